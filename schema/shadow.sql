-- A second witness, for the demo, the tests and chaos; never part of setup. Triggers write every change of LeadFi's tables
-- into a ledger, and views tell from the ledger alone, by rules of their own, which activities the worker owes.
--
-- After leadfi.sql and `cdc-worker setup`. An application that says who acts, says it here as well:
--     SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"changed_by": "jane"}'),
--            set_config('shadow.changed_by', 'jane', true);

CREATE SCHEMA shadow;

-- No index: the ledger stays cheap in storms. Order within a row is certain, because whoever changes it holds its lock.
CREATE TABLE shadow.change (
    id          bigint GENERATED ALWAYS AS IDENTITY,
    xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),
    table_name  text NOT NULL,
    operation   text NOT NULL,
    changed_by  text DEFAULT nullif(current_setting('shadow.changed_by', true), ''),
    old         json,
    new         json
);

COMMENT ON COLUMN shadow.change.old IS 'The row before, with its columns in their order, as jsonb would not have them';

CREATE FUNCTION shadow.record() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO shadow.change (table_name, operation, old, new)
    VALUES (TG_TABLE_NAME, TG_OP, row_to_json(OLD), row_to_json(NEW));
    RETURN NULL;
END
$$;

CREATE TRIGGER shadow_lead AFTER INSERT OR UPDATE OR DELETE ON lead FOR EACH ROW EXECUTE FUNCTION shadow.record();
CREATE TRIGGER shadow_lead_truncate AFTER TRUNCATE ON lead EXECUTE FUNCTION shadow.record();
CREATE TRIGGER shadow_customer AFTER INSERT OR UPDATE OR DELETE ON customer FOR EACH ROW EXECUTE FUNCTION shadow.record();
CREATE TRIGGER shadow_customer_truncate AFTER TRUNCATE ON customer EXECUTE FUNCTION shadow.record();
CREATE TRIGGER shadow_contact AFTER INSERT OR UPDATE ON contact FOR EACH ROW EXECUTE FUNCTION shadow.record();

-- Also where session_replication_role is replica.
ALTER TABLE lead ENABLE ALWAYS TRIGGER shadow_lead;
ALTER TABLE lead ENABLE ALWAYS TRIGGER shadow_lead_truncate;
ALTER TABLE customer ENABLE ALWAYS TRIGGER shadow_customer;
ALTER TABLE customer ENABLE ALWAYS TRIGGER shadow_customer_truncate;
ALTER TABLE contact ENABLE ALWAYS TRIGGER shadow_contact;

-- A value in `changes`: a timestamp as Postgres prints it, a long text shortened.
CREATE FUNCTION shadow.printed(key text, value json) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN json_typeof(value) <> 'string' THEN value::jsonb
                WHEN key LIKE 'date\_%' THEN to_jsonb(replace(value #>> '{}', 'T', ' '))
                WHEN length(value #>> '{}') > 200 THEN to_jsonb(left(value #>> '{}', 200) || '…')
                ELSE value::jsonb END
$$;

-- What differs between two rows, in the order of the columns, leaving out those that another activity tells of.
CREATE FUNCTION shadow.differing(old json, new json, told text[], OUT columns text, OUT changes jsonb)
LANGUAGE sql IMMUTABLE AS $$
    SELECT string_agg(key, ', ' ORDER BY place),
           jsonb_object_agg(key, jsonb_build_object('old', shadow.printed(key, o), 'new', shadow.printed(key, n)))
    FROM json_each(new) WITH ORDINALITY AS after (key, n, place) JOIN json_each(old) AS before (key, o) USING (key)
    WHERE o::text <> n::text AND key <> ALL (told)
$$;

-- The activities that are owed: of change `id`, in the order of `place`.
CREATE VIEW shadow.expected AS
WITH lead AS (
    SELECT id, xid, operation, changed_by, old AS before, new AS after, o, n,
           coalesce(n.lead_id, o.lead_id) AS lead_id, coalesce(n.bd_in_charge, o.bd_in_charge) AS bd_in_charge,
           n.is_converted AND o.is_converted IS NOT TRUE AS converts,
           jsonb_build_object('lead_id', coalesce(n.lead_id, o.lead_id),
                              'lead_name', coalesce(n.full_name, o.full_name),
                              'company_name', CASE WHEN new IS NULL THEN o.company_name ELSE n.company_name END) AS who
    FROM shadow.change, json_populate_record(NULL::lead, old) o, json_populate_record(NULL::lead, new) n
    WHERE table_name = 'lead'
), customer AS (
    SELECT id, operation, changed_by, old AS before, new AS after, o, n,
           coalesce(n.customer_uid, o.customer_uid) AS customer_uid,
           CASE WHEN o.is_closed THEN 'closed' ELSE 'open' END AS old_status,
           CASE WHEN n.is_closed THEN 'closed' ELSE 'open' END AS new_status,
           jsonb_build_object('customer_uid', coalesce(n.customer_uid, o.customer_uid),
                              'customer_name', coalesce(n.name, o.name)) AS who
    FROM shadow.change, json_populate_record(NULL::customer, old) o, json_populate_record(NULL::customer, new) n
    WHERE table_name = 'customer'
), contact AS (
    SELECT id, xid, (new ->> 'lead_id')::integer AS lead_id, (new ->> 'customer_uid')::integer AS customer_uid
    FROM shadow.change WHERE table_name = 'contact'
), conversion AS (
    -- Of the contacts of the same transaction the last one before the conversion, else the first one after it.
    -- (The worker looks no further than 10,000 changes.)
    SELECT DISTINCT ON (lead.id) lead.id, contact.customer_uid
    FROM lead LEFT JOIN contact ON contact.xid = lead.xid AND contact.lead_id = (n).lead_id
    WHERE operation = 'UPDATE' AND converts
    ORDER BY lead.id, contact.id > lead.id, abs(contact.id - lead.id)
), owed AS (
    SELECT id, 1 AS place, 'lead_created' AS activity_type,
           format('Lead "%s" created by %s', (n).full_name, (n).bd_in_charge) AS description,
           lead_id, NULL::integer AS customer_uid, bd_in_charge, changed_by,
           who || jsonb_build_object('source', (n).source, 'type', (n).type, 'status', (n).status,
                                     'bd_in_charge', (n).bd_in_charge) AS metadata
    FROM lead WHERE operation = 'INSERT'
    UNION ALL
    SELECT id, 1, 'status_changed', format('Lead status changed from "%s" to "%s"', (o).status, (n).status),
           lead_id, NULL, bd_in_charge, changed_by,
           who || jsonb_build_object('old_status', (o).status, 'new_status', (n).status)
    FROM lead WHERE operation = 'UPDATE' AND (o).status IS DISTINCT FROM (n).status
    UNION ALL
    SELECT id, 2, 'assignment_changed',
           format('Lead assignment changed from "%s" to "%s"', (o).bd_in_charge, (n).bd_in_charge),
           lead_id, NULL, bd_in_charge, changed_by,
           who || jsonb_build_object('old_bd', (o).bd_in_charge, 'new_bd', (n).bd_in_charge)
    FROM lead WHERE operation = 'UPDATE' AND (o).bd_in_charge <> (n).bd_in_charge
    UNION ALL
    SELECT id, 3, 'lead_converted', format('Lead "%s" converted to customer', (n).full_name),
           lead_id, conversion.customer_uid, bd_in_charge, changed_by,
           who || jsonb_build_object('final_status', (n).status)
               || CASE WHEN conversion.customer_uid IS NULL THEN '{}'
                       ELSE jsonb_build_object('customer_uid', conversion.customer_uid) END
    FROM conversion JOIN lead USING (id)
    UNION ALL
    SELECT id, 4, 'lead_updated', format('Lead "%s" updated: %s', (n).full_name, columns),
           lead_id, NULL, bd_in_charge, changed_by, who || jsonb_build_object('changes', changes)
    FROM lead, shadow.differing(before, after, CASE WHEN converts THEN '{status, bd_in_charge, is_converted}'::text[]
                                                    ELSE '{status, bd_in_charge}' END)
    WHERE operation = 'UPDATE' AND columns IS NOT NULL
    UNION ALL
    SELECT id, 1, 'lead_deleted', format('Lead "%s" deleted', (o).full_name),
           lead_id, NULL, bd_in_charge, changed_by,
           who || jsonb_build_object('status', (o).status, 'bd_in_charge', (o).bd_in_charge,
                                     'source', (o).source, 'type', (o).type)
    FROM lead WHERE operation = 'DELETE'
    UNION ALL
    SELECT id, 1, 'lead_deleted', 'All leads removed (TRUNCATE)', NULL, NULL, NULL, changed_by, '{"truncated": true}'
    FROM lead WHERE operation = 'TRUNCATE'
    UNION ALL
    SELECT id, 1, 'customer_created', format('Customer "%s" created (ID: %s)', (n).name, customer_uid),
           NULL, customer_uid, NULL, changed_by, who || jsonb_build_object('type', (n).type)
    FROM customer WHERE operation = 'INSERT'
    UNION ALL
    SELECT id, 1, 'status_changed', format('Customer status changed from "%s" to "%s"', old_status, new_status),
           NULL, customer_uid, NULL, changed_by,
           who || jsonb_build_object('old_status', old_status, 'new_status', new_status)
    FROM customer WHERE operation = 'UPDATE' AND old_status <> new_status
    UNION ALL
    SELECT id, 2, 'customer_updated', format('Customer "%s" updated', (n).name),
           NULL, customer_uid, NULL, changed_by,
           who || jsonb_build_object('old_name', (o).name, 'new_name', (n).name, 'old_closed', (o).is_closed,
                                     'new_closed', (n).is_closed, 'changes', changes)
    FROM customer, shadow.differing(before, after, '{}')
    WHERE operation = 'UPDATE' AND columns IS NOT NULL
    UNION ALL
    SELECT id, 1, 'customer_deleted', format('Customer "%s" deleted (ID: %s)', (o).name, customer_uid),
           NULL, customer_uid, NULL, changed_by,
           who || jsonb_build_object('type', (o).type, 'is_closed', (o).is_closed)
    FROM customer WHERE operation = 'DELETE'
    UNION ALL
    SELECT id, 1, 'customer_deleted', 'All customers removed (TRUNCATE)', NULL, NULL, NULL, changed_by,
           '{"truncated": true}'
    FROM customer WHERE operation = 'TRUNCATE'
)
SELECT id, place, coalesce('lead ' || lead_id, 'customer ' || customer_uid) AS subject,
       activity_type, description, lead_id, customer_uid, bd_in_charge,
       coalesce(changed_by, 'system') AS created_by,
       metadata || CASE WHEN changed_by IS NULL THEN '{"context_source": "default"}'
                   ELSE jsonb_build_object('changed_by', changed_by, 'context_source', 'message') END AS metadata
FROM owed;

COMMENT ON VIEW shadow.expected IS 'The activities that the worker owes, by the ledger';

CREATE VIEW shadow.recorded AS
SELECT activity_id, coalesce('lead ' || lead_id, 'customer ' || customer_uid) AS subject,
       activity_type, description, lead_id, customer_uid, bd_in_charge, created_by, metadata
FROM activity WHERE change_key IS NOT NULL;

COMMENT ON VIEW shadow.recorded IS 'The activities that the worker wrote';

CREATE VIEW shadow.difference AS
SELECT sum(owed) AS missing, activity_type, description, lead_id, customer_uid, bd_in_charge, created_by, metadata
FROM (SELECT 1 AS owed, activity_type, description, lead_id, customer_uid, bd_in_charge, created_by, metadata
      FROM shadow.expected
      UNION ALL
      SELECT -1, activity_type, description, lead_id, customer_uid, bd_in_charge, created_by, metadata
      FROM shadow.recorded) AS both_sides
GROUP BY activity_type, description, lead_id, customer_uid, bd_in_charge, created_by, metadata
HAVING sum(owed) <> 0;

COMMENT ON VIEW shadow.difference IS 'Empty when all is right: so many are missing, or too many if negative';

CREATE VIEW shadow.disorder AS
SELECT subject, position, owed.description AS expected, found.description AS recorded
FROM (SELECT subject, description, row_number() OVER (PARTITION BY subject ORDER BY id, place) AS position
      FROM shadow.expected) AS owed
JOIN (SELECT subject, description, row_number() OVER (PARTITION BY subject ORDER BY activity_id) AS position
      FROM shadow.recorded) AS found USING (subject, position)
WHERE owed.description <> found.description;

COMMENT ON VIEW shadow.disorder IS 'Empty when the activities of each lead and customer are in the order of its changes';
