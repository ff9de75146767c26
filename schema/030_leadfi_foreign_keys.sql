-- The foreign keys of activity, moved to generated columns that are NULL for system and automated rows: manual rows
-- keep their guarantee, history outlives its subject, and the worker's writes take no lock on the application's rows.
--
-- Keys are found in the catalog, whatever they are called, and keep name and actions. SET NULL, SET DEFAULT and ON
-- UPDATE CASCADE can't be had on a generated column: a link that has such a key keeps it, and the worker then leaves
-- links empty whose subject is gone.

-- The links of manual activities stand in columns of their own.
-- lock: ACCESS EXCLUSIVE on activity; rewrites activity
SELECT format(E'BEGIN;\nALTER TABLE activity %s;\n%s;\nCOMMIT',
    string_agg(format($$ADD COLUMN manual_%1$s %2$s GENERATED ALWAYS AS
        (CASE WHEN activity_category IN ('system', 'automated') THEN NULL ELSE %1$s END) STORED$$,
                      name, coalesce(format_type(atttypid, atttypmod), 'integer')), E',\n    ' ORDER BY name DESC),
    string_agg(format($$COMMENT ON COLUMN activity.manual_%1$s IS
    '%1$s of manual activities, for the foreign key'$$, name), E';\n' ORDER BY name DESC))
FROM (VALUES ('lead_id'), ('customer_uid')) AS link (name)
LEFT JOIN pg_attribute ON attrelid = to_regclass('activity') AND attname = name
WHERE (attname IS NULL OR (SELECT bool_and(confdeltype IN ('a', 'r', 'c') AND confupdtype IN ('a', 'r'))
                           FROM pg_constraint WHERE conrelid = attrelid AND contype = 'f' AND conkey = ARRAY[attnum]))
  AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('activity') AND attname = 'manual_' || name)
HAVING count(*) > 0
\gexec

-- The links of manual activities have indexes, so that deleting a lead or a customer stays fast. What an interrupted
-- build left is dropped first.
-- lock: SHARE UPDATE EXCLUSIVE on activity
WITH link AS (
    SELECT 'manual_' || name AS name
    FROM (VALUES ('lead_id'), ('customer_uid')) AS link (name)
    LEFT JOIN pg_attribute ON attrelid = to_regclass('activity') AND attname = name
    WHERE attname IS NULL
       OR (SELECT bool_and(confdeltype IN ('a', 'r', 'c') AND confupdtype IN ('a', 'r'))
           FROM pg_constraint WHERE conrelid = attrelid AND contype = 'f' AND conkey = ARRAY[attnum])
       OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('activity') AND attname = 'manual_' || name)
), found AS (
    SELECT name, indexrelid::regclass AS index, indisvalid
    FROM link JOIN pg_attribute ON attrelid = to_regclass('activity') AND attname = name
    JOIN pg_index ON indrelid = attrelid AND indkey[0] = attnum
)
SELECT statement
FROM link, LATERAL (
    SELECT 1, format('DROP INDEX CONCURRENTLY %s', index) FROM found WHERE found.name = link.name AND NOT indisvalid
    UNION ALL
    SELECT 2, format('CREATE INDEX CONCURRENTLY activity_%1$s ON activity (%1$s) WHERE %1$s IS NOT NULL', link.name)
    WHERE NOT EXISTS (SELECT FROM found WHERE found.name = link.name AND indisvalid)
) AS step (place, statement)
ORDER BY name DESC, place
\gexec

-- Foreign keys hold for manual activities, and leave those of the worker free. Each key by itself: first for new rows,
-- then the old ones are read, which keeps nobody waiting.
-- lock: ACCESS EXCLUSIVE on activity, lead, customer
WITH link (name, key) AS (VALUES
    ('lead_id', 'REFERENCES lead(lead_id)'), ('customer_uid', 'REFERENCES customer(customer_uid) ON DELETE CASCADE')
), found AS (
    SELECT name, attname = name AS moves, conname, convalidated, pg_get_constraintdef(c.oid) AS definition,
           bool_and(confdeltype IN ('a', 'r', 'c') AND confupdtype IN ('a', 'r')) OVER (PARTITION BY name) AS movable,
           obj_description(c.oid, 'pg_constraint') AS remark
    FROM link JOIN pg_attribute ON attrelid = to_regclass('activity') AND attname IN (name, 'manual_' || name)
    JOIN pg_constraint c ON conrelid = attrelid AND contype = 'f' AND conkey = ARRAY[attnum]
    UNION ALL
    SELECT name, true, format('activity_%s_fkey', name), true, format('FOREIGN KEY (%s) %s', name, key), true, NULL
    FROM link
    WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('activity') AND attname = name)
)
SELECT statement
FROM found, LATERAL (VALUES
    (1, CASE WHEN moves THEN
        format('ALTER TABLE activity DROP CONSTRAINT %1$I, ADD CONSTRAINT %1$I %2$s NOT VALID', conname,
               regexp_replace(replace(definition, ' NOT VALID', ''), '\(.*?\)', format('(manual_%s)', name))) END),
    (2, CASE WHEN moves OR (NOT convalidated AND remark IS NULL) THEN
        format('SELECT cdc_worker.validate(''activity'', %L)', conname) END)) AS step (place, statement)
WHERE movable AND statement IS NOT NULL
ORDER BY name DESC, conname, place
\gexec

-- The worker's activities need no link. A NOT NULL or a CHECK that demands one goes on doing so for all other rows.
-- lock: ACCESS EXCLUSIVE on activity
WITH link AS (
    SELECT attname, attnum, attnotnull
    FROM pg_attribute
    WHERE attrelid = to_regclass('activity') AND attname IN ('lead_id', 'customer_uid', 'change_key')
), demand AS (
    SELECT format('activity_%s_given', attname) AS name, true AS changes, format('%s IS NOT NULL', attname) AS rule,
           format('ALTER COLUMN %s DROP NOT NULL', attname) AS without
    FROM link WHERE attname <> 'change_key' AND attnotnull
    UNION ALL
    SELECT conname, changes, pg_get_expr(conbin, conrelid), format('DROP CONSTRAINT %I', conname)
    FROM pg_constraint c,
         LATERAL (SELECT conkey <@ ARRAY(SELECT attnum FROM link WHERE attname <> 'change_key')) AS first (changes)
    WHERE conrelid = to_regclass('activity') AND contype = 'c' AND conkey <@ ARRAY(SELECT attnum FROM link)
      AND (changes OR (NOT convalidated AND obj_description(c.oid, 'pg_constraint') IS NULL))
)
SELECT statement
FROM demand, LATERAL (VALUES
    (1, CASE WHEN changes THEN
        format('ALTER TABLE activity %s, ADD CONSTRAINT %I CHECK (change_key IS NOT NULL OR %s) NOT VALID',
               without, name, rule) END),
    (2, format('SELECT cdc_worker.validate(''activity'', %L)', name))) AS step (place, statement)
WHERE statement IS NOT NULL
ORDER BY name, place
\gexec
