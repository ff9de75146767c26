-- What the worker wrote is an audit trail: read-only, but in a way that no application breaks on.
--
-- An ORM nulls or deletes a lead's activities before it deletes the lead. Its UPDATE finds the rows, its DELETE none,
-- each with a WARNING, and the history stays. Who may see a row can always be changed. Rows of other writers have no
-- change_key and stay theirs, whatever their category.
--
-- Who may UPDATE cdc_worker.checkpoint, as the worker and administrators may, changes and deletes such rows after
--     SET cdc_worker.protect = off;
--
-- `cdc-worker setup --no-protect` leaves this file out. To undo it: DROP TRIGGER zz_cdc_worker_protect ON activity;

CREATE OR REPLACE FUNCTION cdc_worker.protect() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    aside text[];
BEGIN
    -- By OID, since the application may not use the schema.
    IF current_setting('cdc_worker.protect', true) = 'off' AND (
        SELECT has_table_privilege(c.oid, 'UPDATE')
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'cdc_worker' AND c.relname = 'checkpoint'
    ) THEN
        RETURN coalesce(NEW, OLD);
    END IF;
    IF TG_OP = 'UPDATE' THEN
        -- Generated columns have no value yet in NEW.
        SELECT array_agg(attname::text) || '{is_visible_to_bd}' INTO aside
        FROM pg_catalog.pg_attribute WHERE attrelid = TG_RELID AND attgenerated <> '';
        OLD.is_visible_to_bd := NEW.is_visible_to_bd;
        IF to_jsonb(NEW) - aside = to_jsonb(OLD) - aside THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE WARNING 'activity % was written by cdc-worker and is read-only, but for is_visible_to_bd', OLD.activity_id
        USING HINT = 'Administrators may: SET cdc_worker.protect = off';
    IF TG_OP = 'UPDATE' THEN
        RETURN OLD;
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION cdc_worker.protect() IS 'Keeps rows of cdc-worker as they are, without an error';

-- System activities written by the worker are read-only. Left out while a link has a foreign key that sets it
-- (SET NULL, SET DEFAULT, ON UPDATE CASCADE) and so can't stand on a generated column: protection would break it.
-- Named to fire last, since what the application's own triggers change counts as well.
-- lock: SHARE ROW EXCLUSIVE on activity
SELECT 'CREATE TRIGGER zz_cdc_worker_protect BEFORE UPDATE OR DELETE ON activity'
       ' FOR EACH ROW WHEN (OLD.change_key IS NOT NULL) EXECUTE FUNCTION cdc_worker.protect()'
WHERE NOT EXISTS (
    SELECT FROM pg_trigger WHERE tgrelid = to_regclass('activity') AND tgname = 'zz_cdc_worker_protect'
) AND NOT EXISTS (
    SELECT FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = ANY (conkey)
    WHERE conrelid = to_regclass('activity') AND contype = 'f' AND attname IN ('lead_id', 'customer_uid')
          AND (confdeltype IN ('n', 'd') OR confupdtype IN ('c', 'n', 'd') OR cardinality(conkey) > 1)
) \gexec
