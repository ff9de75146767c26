-- LeadFi's activity table, brought from whatever state it is in to the one that a worker can write to, while the
-- application goes on: its columns, what is checked of them, and what old rows lack.
--
-- All files of LeadFi may be run any number of times, by setup or by psql as the owner of the tables, in the order of
-- their numbers and each until it ends without an error:
--
--     export PGOPTIONS='-c search_path=public -c lock_timeout=100ms'
--     psql -X -v ON_ERROR_STOP=1 -f schema/010_cdc_worker.sql -f schema/020_leadfi_activity.sql …
--
-- Nothing is renamed under a running application. A legacy column `bd` stays, and a trigger keeps it in step with
-- `bd_in_charge`. When nothing uses it any more:
--
--     DROP FUNCTION activity_bd_in_step() CASCADE;
--     ALTER TABLE activity DROP COLUMN bd;

-- There is an activity table.
SELECT 'CREATE TABLE activity (activity_id serial PRIMARY KEY)' WHERE to_regclass('activity') IS NULL
\gexec

-- Activities have links to leads and customers. A link that was there without a foreign key gets none: the application
-- may rely on that.
-- lock: ACCESS EXCLUSIVE on activity and SHARE ROW EXCLUSIVE on lead, customer
SELECT format('ALTER TABLE activity ADD COLUMN %s integer REFERENCES %s', name, key)
FROM (VALUES ('lead_id', 'lead (lead_id)'), ('customer_uid', 'customer (customer_uid) ON DELETE CASCADE'))
    AS link (name, key)
WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('activity') AND attname = name)
ORDER BY name DESC
\gexec

-- Activities have the enhanced columns, with their defaults. Constant defaults rewrite nothing: old rows are manual and
-- visible from here on.
-- lock: ACCESS EXCLUSIVE on activity
SELECT 'ALTER TABLE activity ' || string_agg(
    CASE WHEN attname IS NULL THEN format('ADD COLUMN %s %s', name, type) || coalesce(' DEFAULT ' || preset, '')
         ELSE format('ALTER COLUMN %s SET DEFAULT %s', name, preset) END, ', ' ORDER BY place)
FROM (VALUES
    (1, 'activity_type', 'varchar(50) NOT NULL', NULL),
    (2, 'activity_category', 'varchar(20)', '''manual'''),
    (3, 'description', 'text', NULL),
    (4, 'metadata', 'jsonb', NULL),
    (5, 'date_created', 'timestamp', 'now()'),
    (6, 'bd_in_charge', coalesce((SELECT format_type(atttypid, atttypmod) FROM pg_attribute
                                  WHERE attrelid = to_regclass('activity') AND attname = 'bd'), 'varchar(20)'), NULL),
    (7, 'created_by', 'varchar(50)', NULL),
    (8, 'is_visible_to_bd', 'boolean', 'true'),
    (9, 'change_key', 'text', NULL)) AS wanted (place, name, type, preset)
LEFT JOIN pg_attribute ON attrelid = to_regclass('activity') AND attname = name
WHERE attname IS NULL OR (preset IS NOT NULL AND NOT atthasdef)
\gexec

-- lock: SHARE UPDATE EXCLUSIVE on activity
COMMENT ON COLUMN activity.change_key IS
    'Identity of the change that a row of cdc-worker tells of; NULL for all other rows';

-- The dates that a worker supplies are kept. A trigger that sets `date_created` goes on doing so for all other rows,
-- but not when the step below fills old rows. What it was is in cdc_worker.replaced.
-- lock: SHARE ROW EXCLUSIVE on activity
WITH found AS (
    SELECT t.tgname, t.tgrelid, t.tgqual IS NOT NULL AS conditional,
           replace(pg_get_triggerdef(t.oid), 'CREATE TRIGGER', 'CREATE OR REPLACE TRIGGER') AS definition,
           'NEW.change_key IS NULL' || CASE WHEN t.tgtype & 16 <> 0 THEN
               $$ AND current_setting('cdc_worker.filling', true) IS DISTINCT FROM 'on'$$ ELSE '' END AS condition
    FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgrelid = to_regclass('activity') AND t.tgenabled = 'O' AND NOT t.tgisinternal
      AND t.tgtype & 3 = 3 AND t.tgtype & 20 <> 0 -- BEFORE, FOR EACH ROW; INSERT, UPDATE
      AND p.prosrc ~* '\mnew\.date_created\s*:?=' AND pg_get_triggerdef(t.oid) !~* '\mnew\.change_key\M'
)
SELECT format($statements$BEGIN;
INSERT INTO cdc_worker.replaced (kind, table_name, name, restore) VALUES ('trigger', %L, %L, %L)
    ON CONFLICT (kind, table_name, name) DO UPDATE SET restore = excluded.restore, replaced_at = now();
%s;
COMMIT$statements$,
              nspname || '.' || relname, tgname, definition,
              CASE WHEN conditional
                   THEN replace(definition, ' FOR EACH ROW WHEN (', format(' FOR EACH ROW WHEN (%s AND ', condition))
                   ELSE replace(definition, ' FOR EACH ROW ', format(' FOR EACH ROW WHEN (%s) ', condition)) END)
FROM found JOIN pg_class c ON c.oid = tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY tgname
\gexec

-- A legacy column `bd` is kept in step with `bd_in_charge`.
-- lock: SHARE ROW EXCLUSIVE on activity
SELECT $statements$BEGIN;
CREATE OR REPLACE FUNCTION activity_bd_in_step() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.bd_in_charge := coalesce(NEW.bd_in_charge, NEW.bd);
    ELSIF NEW.bd_in_charge IS NOT DISTINCT FROM OLD.bd_in_charge THEN
        -- The new column of an old row may not be filled yet.
        NEW.bd_in_charge := CASE WHEN NEW.bd IS DISTINCT FROM OLD.bd THEN NEW.bd
                                 ELSE coalesce(NEW.bd_in_charge, NEW.bd) END;
    END IF;
    NEW.bd := NEW.bd_in_charge;
    RETURN NEW;
END $function$;
CREATE OR REPLACE TRIGGER activity_bd_in_step BEFORE INSERT OR UPDATE ON activity
    FOR EACH ROW WHEN (NEW.change_key IS NULL) EXECUTE FUNCTION activity_bd_in_step();
COMMIT$statements$
WHERE EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('activity') AND attname = 'bd')
  AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass('activity') AND tgname = 'activity_bd_in_step')
\gexec

-- Old activities have a category, their BD, and are created by that BD if they are manual. Once: not any more when the
-- keys of changes have their index. A thousand rows at a time, and never waiting for a row that the application holds.
-- lock: ROW EXCLUSIVE on activity
SELECT format($statement$DO $fill$
DECLARE
    newest activity.activity_id%%TYPE := (SELECT max(activity_id) FROM activity);
    done   activity.activity_id%%TYPE;
    upto   activity.activity_id%%TYPE;
BEGIN
    FOR attempt IN 1..10 LOOP
        done := (SELECT min(activity_id) - 1 FROM activity);
        LOOP
            upto := (SELECT max(activity_id)
                     FROM (SELECT activity_id FROM activity WHERE activity_id > done AND activity_id <= newest
                           ORDER BY activity_id LIMIT 1000) AS chunk);
            EXIT WHEN upto IS NULL;
            PERFORM set_config('cdc_worker.filling', 'on', true);
            UPDATE activity SET (activity_category, bd_in_charge, created_by) = ROW(%1$s)
            WHERE activity_id = ANY (ARRAY(
                SELECT activity_id FROM activity
                WHERE activity_id > done AND activity_id <= upto
                  AND (activity_category, bd_in_charge, created_by) IS DISTINCT FROM (%1$s)
                FOR NO KEY UPDATE SKIP LOCKED));
            COMMIT;
            done := upto;
        END LOOP;
        IF NOT EXISTS (SELECT FROM activity WHERE activity_id <= newest
                       AND (activity_category, bd_in_charge, created_by) IS DISTINCT FROM (%1$s)) THEN
            RETURN;
        END IF;
        PERFORM pg_sleep(0.1);
        COMMIT;
    END LOOP;
    RAISE 'old activities are locked by other transactions'
        USING ERRCODE = 'lock_not_available', HINT = 'run this again when they have ended';
END $fill$$statement$, format($$coalesce(activity_category, 'manual'), %1$s,
                CASE WHEN activity_category <> 'manual' THEN created_by ELSE coalesce(created_by, %1$s) END$$, bd))
FROM (SELECT CASE WHEN count(*) > 0 THEN 'coalesce(bd_in_charge, bd)' ELSE 'bd_in_charge' END
      FROM pg_attribute WHERE attrelid = to_regclass('activity') AND attname = 'bd') AS filled (bd)
WHERE pg_relation_size(to_regclass('activity')) > 0
  AND NOT EXISTS (SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND indkey::text = attnum::text
                  WHERE indrelid = to_regclass('activity') AND attname = 'change_key' AND indisunique AND indisvalid)
\gexec

CREATE OR REPLACE FUNCTION cdc_worker.validate(relation regclass, name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('ALTER TABLE %s VALIDATE CONSTRAINT %I', relation, name);
EXCEPTION WHEN check_violation OR foreign_key_violation THEN
    EXECUTE format('COMMENT ON CONSTRAINT %I ON %s IS %L', name, relation,
                   'Checked for new rows only: old ones break it');
    RAISE WARNING 'constraint "%" of % is checked for new rows only: old ones break it', name, relation
        USING HINT = format('mend them, then: ALTER TABLE %s VALIDATE CONSTRAINT %I', relation, name);
END $$;

COMMENT ON FUNCTION cdc_worker.validate IS 'Validates a constraint, or says in its comment why it can''t be';

-- Categories are known ones, and metadata is an object. Where old rows are otherwise, only new ones are checked; a
-- CHECK of the application on the same column stays the only one.
-- lock: ACCESS EXCLUSIVE on activity
WITH wanted (column_name, name, rule) AS (VALUES
    ('activity_category', 'activity_category_known', $$activity_category IN ('manual', 'system', 'automated')$$),
    ('metadata', 'activity_metadata_is_object', $$jsonb_typeof(metadata) = 'object'$$)
), found AS (
    SELECT wanted.*, conname, convalidated, obj_description(c.oid, 'pg_constraint') AS remark
    FROM wanted
    LEFT JOIN pg_attribute a ON attrelid = to_regclass('activity') AND attname = column_name
    LEFT JOIN pg_constraint c ON conrelid = attrelid AND contype = 'c' AND conkey = ARRAY[attnum]
    WHERE column_name <> 'metadata' OR coalesce(atttypid, 'jsonb'::regtype) = 'jsonb'::regtype
)
SELECT statement
FROM found, LATERAL (VALUES
    (1, CASE WHEN conname IS NULL THEN
        format('ALTER TABLE activity ADD CONSTRAINT %s CHECK (%s) NOT VALID', name, rule) END),
    (2, CASE WHEN conname IS NULL OR (conname = name AND NOT convalidated AND remark IS NULL) THEN
        format('SELECT cdc_worker.validate(''activity'', %L)', name) END)) AS step (place, statement)
WHERE statement IS NOT NULL
ORDER BY name, place
\gexec
