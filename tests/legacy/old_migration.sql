-- The migration that LeadFi published, reconstructed from what it did, statement by statement. psql goes on after one
-- that fails, as the CHECK does on an activity without a link.

ALTER TABLE activity RENAME COLUMN bd TO bd_in_charge;

ALTER TABLE activity ADD COLUMN customer_uid INTEGER;

ALTER TABLE activity ADD COLUMN activity_category varchar(20) DEFAULT 'manual'
    CHECK (activity_category IN ('manual', 'system', 'automated'));

ALTER TABLE activity ADD COLUMN metadata jsonb;

ALTER TABLE activity ADD COLUMN created_by varchar(50);

ALTER TABLE activity ADD COLUMN is_visible_to_bd boolean DEFAULT true;

ALTER TABLE activity ALTER COLUMN date_created SET DEFAULT NOW();

ALTER TABLE activity ADD CONSTRAINT fk_activity_customer
    FOREIGN KEY (customer_uid) REFERENCES customer (customer_uid) ON DELETE CASCADE;

-- The default has filled the category already, so this matches no row.
UPDATE activity SET activity_category = 'manual', created_by = bd_in_charge WHERE activity_category IS NULL;

ALTER TABLE activity ADD CONSTRAINT chk_activity_link CHECK (lead_id IS NOT NULL OR customer_uid IS NOT NULL);

CREATE INDEX idx_activity_category ON activity (activity_category);

CREATE INDEX idx_activity_type ON activity (activity_type);

CREATE INDEX idx_activity_date ON activity (date_created);

CREATE INDEX idx_activity_lead_date ON activity (lead_id, date_created);

CREATE INDEX idx_activity_customer_date ON activity (customer_uid, date_created);

CREATE FUNCTION create_system_activity(
    p_activity_type varchar, p_description text, p_lead_id integer DEFAULT NULL, p_customer_uid integer DEFAULT NULL,
    p_metadata jsonb DEFAULT NULL, p_created_by varchar DEFAULT 'system'
) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    new_id integer;
BEGIN
    INSERT INTO activity (lead_id, customer_uid, activity_type, activity_category, description, metadata, created_by)
    VALUES (p_lead_id, p_customer_uid, p_activity_type, 'system', p_description, p_metadata, p_created_by)
    RETURNING activity_id INTO new_id;
    RETURN new_id;
END;
$$;

CREATE FUNCTION create_manual_activity(
    p_activity_type varchar, p_description text, p_lead_id integer DEFAULT NULL, p_customer_uid integer DEFAULT NULL,
    p_metadata jsonb DEFAULT NULL, p_bd_in_charge varchar DEFAULT NULL
) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    new_id integer;
BEGIN
    INSERT INTO activity (lead_id, customer_uid, activity_type, activity_category, description, metadata, bd_in_charge,
                          created_by)
    VALUES (p_lead_id, p_customer_uid, p_activity_type, 'manual', p_description, p_metadata, p_bd_in_charge,
            p_bd_in_charge)
    RETURNING activity_id INTO new_id;
    RETURN new_id;
END;
$$;

CREATE FUNCTION track_lead_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM create_system_activity(
            'lead_created', format('Lead "%s" created by %s', NEW.full_name, NEW.bd_in_charge), NEW.lead_id, NULL,
            jsonb_build_object('company_name', NEW.company_name, 'source', NEW.source, 'type', NEW.type,
                               'status', NEW.status),
            NEW.bd_in_charge);
        RETURN NEW;
    END IF;
    IF OLD.status != NEW.status THEN
        PERFORM create_system_activity(
            'status_changed', format('Lead status changed from "%s" to "%s"', OLD.status, NEW.status), NEW.lead_id, NULL,
            jsonb_build_object('old_status', OLD.status, 'new_status', NEW.status, 'lead_name', NEW.full_name),
            NEW.bd_in_charge);
    END IF;
    IF OLD.is_converted = false AND NEW.is_converted = true THEN
        PERFORM create_system_activity(
            'lead_converted', format('Lead "%s" converted to customer', NEW.full_name), NEW.lead_id, NULL,
            jsonb_build_object('company_name', NEW.company_name, 'final_status', NEW.status), NEW.bd_in_charge);
    END IF;
    RETURN NEW;
END;
$$;

CREATE FUNCTION track_customer_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM create_system_activity(
            'customer_created', format('Customer "%s" created (ID: %s)', NEW.name, NEW.customer_uid), NULL,
            NEW.customer_uid,
            jsonb_build_object('customer_name', NEW.name, 'customer_uid', NEW.customer_uid, 'type', NEW.type), 'system');
    ELSIF OLD.name != NEW.name OR OLD.type != NEW.type OR OLD.is_closed != NEW.is_closed THEN
        PERFORM create_system_activity(
            'customer_updated', format('Customer "%s" updated', NEW.name), NULL, NEW.customer_uid,
            jsonb_build_object('customer_name', NEW.name, 'old_name', OLD.name, 'new_name', NEW.name,
                               'old_closed', OLD.is_closed, 'new_closed', NEW.is_closed), 'system');
    END IF;
    RETURN NEW;
END;
$$;

CREATE TRIGGER lead_activity_tracker AFTER INSERT OR UPDATE ON lead
    FOR EACH ROW EXECUTE FUNCTION track_lead_changes();

CREATE TRIGGER customer_activity_tracker AFTER INSERT OR UPDATE ON customer
    FOR EACH ROW EXECUTE FUNCTION track_customer_changes();

CREATE VIEW v_manual_activities AS
SELECT a.*, l.full_name AS lead_name, l.company_name, c.name AS customer_name
FROM activity a LEFT JOIN lead l ON l.lead_id = a.lead_id LEFT JOIN customer c ON c.customer_uid = a.customer_uid
WHERE a.activity_category = 'manual';

CREATE VIEW v_system_activities AS
SELECT a.*, l.full_name AS lead_name, l.company_name, c.name AS customer_name
FROM activity a LEFT JOIN lead l ON l.lead_id = a.lead_id LEFT JOIN customer c ON c.customer_uid = a.customer_uid
WHERE a.activity_category = 'system';

CREATE VIEW v_lead_timeline AS
SELECT l.lead_id, l.full_name, l.company_name, a.activity_id, a.activity_type, a.activity_category, a.description,
       a.metadata, a.date_created, a.bd_in_charge, a.created_by
FROM lead l JOIN activity a ON a.lead_id = l.lead_id
WHERE a.is_visible_to_bd
ORDER BY l.lead_id, a.date_created DESC;

CREATE VIEW v_customer_timeline AS
SELECT c.customer_uid, c.name, a.activity_id, a.activity_type, a.activity_category, a.description,
       a.metadata, a.date_created, a.bd_in_charge, a.created_by
FROM customer c JOIN activity a ON a.customer_uid = c.customer_uid
WHERE a.is_visible_to_bd
ORDER BY c.customer_uid, a.date_created DESC;
