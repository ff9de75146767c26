-- What Django's signals would log, once for each change that is committed, as triggers: a second witness, which knows
-- nothing of the profile.

CREATE TABLE signal (
    type             text NOT NULL,
    summary          text NOT NULL,
    user_id          bigint NOT NULL,
    lead_id          bigint,
    contact_id       bigint,
    opportunity_id   bigint,
    organization_id  bigint
);

CREATE FUNCTION money(amount numeric) RETURNS text RETURN '$' || to_char(amount, 'FM9,999,999,990.00');

CREATE FUNCTION organization_of(id bigint) RETURNS bigint
RETURN (SELECT organization_id FROM core_user u WHERE u.id = organization_of.id);

CREATE FUNCTION lead_signal() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    what text;
BEGIN
    IF NEW.assigned_to_id IS NULL THEN
        RETURN NULL;
    ELSIF TG_OP = 'INSERT' THEN
        what := format('New lead created: %s from %s', NEW.name,
                       CASE NEW.company WHEN '' THEN 'Unknown Company' ELSE NEW.company END);
    ELSIF NEW.status <> OLD.status THEN
        what := format('Lead %s %s', NEW.name, CASE NEW.status
            WHEN 'new' THEN 'marked as new'
            WHEN 'contacted' THEN 'contacted for the first time'
            WHEN 'qualified' THEN 'qualified as a potential customer'
            WHEN 'converted' THEN 'successfully converted to opportunity'
            WHEN 'disqualified' THEN 'disqualified from sales process'
            ELSE 'status changed to ' || NEW.status END);
    ELSE
        RETURN NULL;
    END IF;
    INSERT INTO signal VALUES ('note', what, NEW.assigned_to_id, NEW.id, NULL, NULL,
                               coalesce(organization_of(NEW.assigned_to_id), NEW.organization_id));
    RETURN NULL;
END
$$;

CREATE FUNCTION opportunity_signal() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    what text;
    whats text[];
BEGIN
    IF NEW.owner_id IS NULL THEN
        RETURN NULL;
    ELSIF TG_OP = 'INSERT' THEN
        whats := ARRAY[format('New opportunity created: %s worth %s', NEW.name, money(NEW.amount))];
    ELSE
        IF NEW.stage <> OLD.stage THEN
            whats := whats || format('Opportunity %s %s', NEW.name, CASE NEW.stage
                WHEN 'qualification' THEN 'moved to qualification stage'
                WHEN 'proposal' THEN 'moved to proposal stage - preparing quote'
                WHEN 'negotiation' THEN 'entered negotiation phase'
                WHEN 'won' THEN 'WON! 🎉 Deal closed successfully'
                WHEN 'lost' THEN 'marked as lost - opportunity closed'
                ELSE 'stage changed to ' || NEW.stage END);
        END IF;
        IF OLD.amount <> 0 AND NEW.amount <> 0 AND abs(NEW.amount - OLD.amount) >= 1000
            AND abs(NEW.amount - OLD.amount) * 10 > abs(OLD.amount) THEN
            whats := whats || format('Opportunity value %s from %s to %s',
                                     CASE WHEN NEW.amount > OLD.amount THEN 'increased' ELSE 'decreased' END,
                                     money(OLD.amount), money(NEW.amount));
        END IF;
    END IF;
    FOREACH what IN ARRAY coalesce(whats, '{}') LOOP
        INSERT INTO signal VALUES ('note', what, NEW.owner_id, NULL, NEW.contact_id, NEW.id,
                                   coalesce(organization_of(NEW.owner_id), NEW.organization_id));
    END LOOP;
    RETURN NULL;
END
$$;

CREATE FUNCTION quote_signal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO signal
    SELECT 'note', format('Quote created: %s for %s', NEW.title, money(NEW.total_price)), NEW.created_by_id,
           NULL, o.contact_id, o.id,
           coalesce(organization_of(NEW.created_by_id), o.organization_id, NEW.organization_id)
    FROM core_opportunity o WHERE o.id = NEW.opportunity_id AND NEW.created_by_id IS NOT NULL;
    RETURN NULL;
END
$$;

CREATE FUNCTION task_signal() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    lead core_lead;
    deal core_opportunity;
BEGIN
    IF OLD.status = 'completed' OR NEW.status <> 'completed' THEN
        RETURN NULL;
    END IF;
    SELECT * INTO lead FROM core_lead WHERE id = NEW.related_lead_id;
    SELECT * INTO deal FROM core_opportunity WHERE id = NEW.related_opportunity_id;
    INSERT INTO signal VALUES (
        CASE NEW.type WHEN 'demo' THEN 'note' ELSE NEW.type END,
        format('Task completed: %s %s', CASE NEW.type
            WHEN 'call' THEN 'completed call with'
            WHEN 'email' THEN 'sent email to'
            WHEN 'meeting' THEN 'held meeting with'
            WHEN 'demo' THEN 'conducted demo for'
            ELSE format('completed %s task for', NEW.type) END, coalesce(lead.name, deal.name, 'unknown contact'))
        || CASE WHEN NEW.notes = '' THEN '' ELSE ' - Notes: ' || left(NEW.notes, 100) END
        || CASE WHEN length(NEW.notes) > 100 THEN '...' ELSE '' END,
        NEW.owner_id,
        NEW.related_lead_id,
        CASE WHEN NEW.related_lead_id IS NULL THEN deal.contact_id END,
        CASE WHEN NEW.related_lead_id IS NULL THEN NEW.related_opportunity_id END,
        coalesce(organization_of(NEW.owner_id), lead.organization_id, deal.organization_id));
    RETURN NULL;
END
$$;

CREATE TRIGGER signal AFTER INSERT OR UPDATE ON core_lead FOR EACH ROW EXECUTE FUNCTION lead_signal();
CREATE TRIGGER signal AFTER INSERT OR UPDATE ON core_opportunity FOR EACH ROW EXECUTE FUNCTION opportunity_signal();
CREATE TRIGGER signal AFTER INSERT ON core_quote FOR EACH ROW EXECUTE FUNCTION quote_signal();
CREATE TRIGGER signal AFTER UPDATE ON core_task FOR EACH ROW EXECUTE FUNCTION task_signal();
