-- What the role of the worker needs, and no more: it makes no tables and is no superuser.
--
-- For psql: -v role=cdc -v target=public.activity -v key=change_key -v schemas=public -v lookups=''.
-- The key is '' where the target has no column for it; lookups are tables that rules look into, with commas between them,
-- and these as well as the schemas are quoted as elements of an array are.
-- That it may read a slot is an administrator's to give: ALTER ROLE cdc REPLICATION.

-- the worker's role has its grants on the worker's own tables
SELECT format('GRANT %s ON %s TO %I', privilege, object, :'role')
FROM (SELECT (SELECT oid FROM pg_roles WHERE rolname = :'role')) AS role (oid),
    LATERAL (
        VALUES
            ('USAGE', 'SCHEMA cdc_worker', has_schema_privilege(oid, to_regnamespace('cdc_worker')::oid, 'USAGE')),
            ('SELECT, UPDATE', 'cdc_worker.checkpoint',
                has_table_privilege(oid, to_regclass('cdc_worker.checkpoint')::oid, 'SELECT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.checkpoint')::oid, 'UPDATE')),
            ('SELECT, INSERT', 'cdc_worker.dead_letter',
                has_table_privilege(oid, to_regclass('cdc_worker.dead_letter')::oid, 'SELECT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.dead_letter')::oid, 'INSERT')),
            ('SELECT, INSERT, DELETE', 'cdc_worker.tally',
                has_table_privilege(oid, to_regclass('cdc_worker.tally')::oid, 'SELECT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.tally')::oid, 'INSERT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.tally')::oid, 'DELETE')),
            ('SELECT, INSERT, UPDATE, DELETE', 'cdc_worker.process',
                has_table_privilege(oid, to_regclass('cdc_worker.process')::oid, 'SELECT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.process')::oid, 'INSERT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.process')::oid, 'UPDATE')
                AND has_table_privilege(oid, to_regclass('cdc_worker.process')::oid, 'DELETE')),
            ('SELECT, INSERT, UPDATE', 'cdc_worker.partition', to_regclass('cdc_worker.partition') IS NULL OR (
                has_table_privilege(oid, to_regclass('cdc_worker.partition')::oid, 'SELECT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.partition')::oid, 'INSERT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.partition')::oid, 'UPDATE'))),
            ('SELECT', 'cdc_worker.excluded',
                has_table_privilege(oid, to_regclass('cdc_worker.excluded')::oid, 'SELECT')),
            ('SELECT, UPDATE (until_lsn)', 'cdc_worker.erased',
                has_table_privilege(oid, to_regclass('cdc_worker.erased')::oid, 'SELECT')
                AND has_column_privilege(oid, to_regclass('cdc_worker.erased')::oid, 'until_lsn', 'UPDATE')),
            ('INSERT', 'cdc_worker.skipped', to_regclass('cdc_worker.skipped') IS NULL
                OR has_table_privilege(oid, to_regclass('cdc_worker.skipped')::oid, 'INSERT')),
            ('SELECT', 'cdc_worker.skip', to_regclass('cdc_worker.skip') IS NULL
                OR has_table_privilege(oid, to_regclass('cdc_worker.skip')::oid, 'SELECT')),
            ('SELECT', 'cdc_worker.gap', to_regclass('cdc_worker.gap') IS NULL
                OR has_table_privilege(oid, to_regclass('cdc_worker.gap')::oid, 'SELECT')),
            ('SELECT', 'cdc_worker.backfill', to_regclass('cdc_worker.backfill') IS NULL
                OR has_table_privilege(oid, to_regclass('cdc_worker.backfill')::oid, 'SELECT')),
            ('SELECT, INSERT', 'cdc_worker.written_key', :'key' <> '' OR (
                has_table_privilege(oid, to_regclass('cdc_worker.written_key')::oid, 'SELECT')
                AND has_table_privilege(oid, to_regclass('cdc_worker.written_key')::oid, 'INSERT')))
    ) AS needed (privilege, object, granted)
WHERE granted IS NOT TRUE
\gexec

-- the worker's role has its grants on the target, which teardown takes back
SELECT format(
    'GRANT %1$s ON %2$s TO %3$I; INSERT INTO cdc_worker.replaced (kind, table_name, name, restore)'
    ' VALUES (''grant'', %4$L, %5$L, %6$L) ON CONFLICT DO NOTHING',
    privilege, object, :'role', :'target', privilege || ' ON ' || object || ' TO ' || :'role',
    format('REVOKE %s ON %s FROM %I', privilege, object, :'role'))
FROM (SELECT (SELECT oid FROM pg_roles WHERE rolname = :'role'), to_regclass(:'target')::oid) AS role (oid, target),
    LATERAL (
        SELECT 'INSERT', :'target', has_table_privilege(oid, target, 'INSERT')
        UNION ALL
        SELECT format('SELECT (%I)', :'key'), :'target', :'key' = '' OR
            has_column_privilege(oid, target, (SELECT attnum FROM pg_attribute WHERE attrelid = target AND attname = :'key'), 'SELECT')
        UNION ALL
        SELECT DISTINCT 'USAGE', 'SEQUENCE ' || seqrelid::regclass, has_sequence_privilege(role.oid, seqrelid, 'USAGE')
        FROM pg_attrdef a JOIN pg_depend d ON classid = 'pg_attrdef'::regclass AND objid = a.oid
        JOIN pg_sequence ON seqrelid = refobjid
        WHERE adrelid = target
        UNION ALL
        SELECT 'USAGE', 'SEQUENCE ' || seqrelid::regclass, has_sequence_privilege(role.oid, seqrelid, 'USAGE')
        FROM pg_depend d JOIN pg_sequence ON seqrelid = objid
        WHERE :'key' = '' AND d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
            AND d.refobjid = target AND d.deptype = 'i' -- an identity's, whose numbers are drawn beforehand
        UNION ALL
        SELECT 'SELECT', name, has_table_privilege(role.oid, to_regclass(name)::oid, 'SELECT')
        FROM unnest(('{' || :'lookups' || '}')::text[]) AS name
        UNION ALL
        SELECT 'USAGE', format('SCHEMA %I', name), has_schema_privilege(role.oid, to_regnamespace(quote_ident(name))::oid, 'USAGE')
        FROM unnest(('{' || :'schemas' || '}')::text[]) AS name
    ) AS needed (privilege, object, granted)
WHERE granted IS NOT TRUE
\gexec
