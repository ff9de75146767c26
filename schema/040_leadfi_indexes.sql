-- The indexes of activity: one that lets no change be recorded twice and holds no manual rows, which so pay nothing for
-- it, and those that its views read by.

-- Each change is recorded once, and views find their activities. What an interrupted build left is dropped first; an
-- index on the same leading columns, whatever it is called, is enough.
-- lock: SHARE UPDATE EXCLUSIVE on activity
WITH wanted (place, name, columns, condition) AS (VALUES
    (1, 'activity_change_key', '{change_key}'::name[], 'change_key IS NOT NULL'),
    (2, 'activity_lead', '{lead_id,date_created}', 'lead_id IS NOT NULL'),
    (3, 'activity_customer', '{customer_uid,date_created}', 'customer_uid IS NOT NULL'),
    (4, 'activity_date', '{date_created}', NULL)
), found AS (
    SELECT indexrelid::regclass AS index, indisvalid, indisunique, pg_get_expr(indpred, indrelid) AS condition,
           ARRAY(SELECT attname FROM unnest(indkey) WITH ORDINALITY AS key (number, place)
                 LEFT JOIN pg_attribute ON attrelid = indrelid AND attnum = number ORDER BY place) AS columns
    FROM pg_index WHERE indrelid = to_regclass('activity')
), serving AS (
    SELECT wanted.name, index, indisvalid
    FROM wanted JOIN found ON found.columns[1:cardinality(wanted.columns)] = wanted.columns
     AND (found.condition IS NULL OR found.condition = format('(%s)', wanted.condition))
     AND (wanted.name <> 'activity_change_key' OR (indisunique AND found.columns = wanted.columns))
)
SELECT statement
FROM wanted, LATERAL (
    SELECT 1, format('DROP INDEX CONCURRENTLY %s', index)
    FROM serving WHERE serving.name = wanted.name AND NOT indisvalid
    UNION ALL
    SELECT 2, format('CREATE %sINDEX CONCURRENTLY %s ON activity (%s)',
                     CASE WHEN name = 'activity_change_key' THEN 'UNIQUE ' ELSE '' END, name,
                     array_to_string(columns, ', ')) || coalesce(' WHERE ' || condition, '')
    WHERE NOT EXISTS (SELECT FROM serving WHERE serving.name = wanted.name AND indisvalid)
) AS step (step, statement)
ORDER BY place, step
\gexec
