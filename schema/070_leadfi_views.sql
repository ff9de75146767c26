-- The views for LeadFi's people and reports. A subject's name and company are those of its row or, when that is gone,
-- those that the activity tells in its metadata, which may have any shape where others wrote it.
-- 040_leadfi_indexes.sql has what they read by: the timelines by subject, the others by date.

-- Views keep their owner, grants and security options, which are lost in the DROP and CREATE that other columns need.
-- One on which others depend stays as it is, since to drop those is not for us to decide.
CREATE OR REPLACE FUNCTION cdc_worker.replace_view(name text, query text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    old       pg_class;
    grants    text[];
    statement text;
    dependent text;
BEGIN
    SELECT * INTO old FROM pg_class WHERE oid = to_regclass(quote_ident(name));
    query := format('VIEW %I %s AS %s', name, (
        SELECT format('WITH (%s)', string_agg(option, ', '))
        FROM unnest(old.reloptions) option WHERE option LIKE 'security%' HAVING count(*) > 0
    ), query);
    BEGIN
        EXECUTE 'CREATE OR REPLACE ' || query;
        RETURN;
    EXCEPTION WHEN invalid_table_definition THEN  -- other columns
    END;

    SELECT array_agg(format('GRANT %s %s ON %I TO %s %s', privilege_type, '(' || quote_ident(attname) || ')', name,
                            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                            CASE WHEN is_grantable THEN 'WITH GRANT OPTION' END)) INTO grants
    FROM (SELECT NULL, coalesce(old.relacl, acldefault('r', old.relowner))
          UNION ALL
          SELECT attname, attacl FROM pg_attribute WHERE attrelid = old.oid) AS had (attname, acl), aclexplode(acl);
    BEGIN
        EXECUTE format('DROP VIEW %I', name);
    EXCEPTION WHEN dependent_objects_still_exist THEN
        GET STACKED DIAGNOSTICS dependent = PG_EXCEPTION_DETAIL;
        RAISE WARNING '% keeps its old columns (%): drop what depends on it, then: psql -f 070_leadfi_views.sql',
            name, replace(dependent, E'\n', ', ');
        RETURN;
    END;
    EXECUTE 'CREATE ' || query;
    EXECUTE format('ALTER VIEW %I OWNER TO %s', name, old.relowner::regrole);
    -- What default privileges gave may not have been granted before.
    SELECT format('REVOKE ALL ON %I FROM %s', name, string_agg(DISTINCT
                  CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END, ', ')) INTO statement
    FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner))) WHERE oid = to_regclass(quote_ident(name));
    EXECUTE statement;
    FOREACH statement IN ARRAY grants LOOP
        BEGIN
            EXECUTE statement;
        EXCEPTION WHEN undefined_column THEN  -- it is gone, and its grant with it
        END;
    END LOOP;
END
$$;

COMMENT ON FUNCTION cdc_worker.replace_view IS 'Makes a view, or gives it other columns and keeps its grants';

-- Activities that lost their link are found by the identity in their metadata. There are none unless a foreign key
-- sets links to NULL (see 050_leadfi_protection.sql).
-- lock: SHARE UPDATE EXCLUSIVE on activity
SELECT format(statement, name, field)
FROM (VALUES ('activity_unlinked_lead', 'lead_id'), ('activity_unlinked_customer', 'customer_uid')) wanted (name, field)
CROSS JOIN LATERAL (
    SELECT 'DROP INDEX CONCURRENTLY %I' FROM pg_index WHERE indexrelid = to_regclass(name) AND NOT indisvalid
    UNION ALL
    SELECT 'CREATE INDEX CONCURRENTLY %I ON activity ((CASE WHEN metadata ->> %2$L ~ ''^\d{1,10}$'''
           ' THEN nullif(least((metadata ->> %2$L)::bigint, 2147483648), 2147483648)::integer END))'
           ' WHERE change_key IS NOT NULL AND %2$I IS NULL AND metadata ->> %2$L IS NOT NULL'
    WHERE NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(name) AND indisvalid)
) missing (statement)
ORDER BY name, statement DESC \gexec

-- lock: ACCESS EXCLUSIVE on v_manual_activities
SELECT cdc_worker.replace_view('v_manual_activities', $$
    SELECT a.activity_id, a.lead_id, a.customer_uid, a.activity_type, a.activity_category, a.description, a.metadata,
           a.date_created, a.bd_in_charge, a.created_by, a.is_visible_to_bd,
           coalesce(l.full_name, a.metadata ->> 'lead_name') AS lead_name,
           CASE WHEN l.lead_id IS NULL THEN a.metadata ->> 'company_name' ELSE l.company_name END AS company_name,
           coalesce(c.name, a.metadata ->> 'customer_name') AS customer_name
    FROM activity a LEFT JOIN lead l ON l.lead_id = a.lead_id
                    LEFT JOIN customer c ON c.customer_uid = a.customer_uid
    WHERE a.activity_category = 'manual' OR a.activity_category IS NULL
$$);

-- lock: SHARE UPDATE EXCLUSIVE on v_manual_activities
COMMENT ON VIEW v_manual_activities IS 'What BDs did: calls, emails, meetings';

-- lock: ACCESS EXCLUSIVE on v_system_activities
SELECT cdc_worker.replace_view('v_system_activities', $$
    SELECT a.activity_id, a.lead_id, a.customer_uid, a.activity_type, a.activity_category, a.description, a.metadata,
           a.date_created, a.bd_in_charge, a.created_by, a.is_visible_to_bd,
           coalesce(l.full_name, a.metadata ->> 'lead_name') AS lead_name,
           CASE WHEN l.lead_id IS NULL THEN a.metadata ->> 'company_name' ELSE l.company_name END AS company_name,
           coalesce(c.name, a.metadata ->> 'customer_name') AS customer_name
    FROM activity a LEFT JOIN lead l ON l.lead_id = a.lead_id
                    LEFT JOIN customer c ON c.customer_uid = a.customer_uid
    WHERE a.activity_category = 'system'
$$);

-- lock: SHARE UPDATE EXCLUSIVE on v_system_activities
COMMENT ON VIEW v_system_activities IS 'What happened to leads and customers';

-- lock: ACCESS EXCLUSIVE on v_lead_timeline
SELECT cdc_worker.replace_view('v_lead_timeline', $$
    SELECT a.activity_id, a.lead_id, a.customer_uid, a.activity_type, a.activity_category, a.description, a.metadata,
           a.date_created, a.bd_in_charge, a.created_by, a.is_visible_to_bd,
           coalesce(l.full_name, a.metadata ->> 'lead_name') AS lead_name,
           CASE WHEN l.lead_id IS NULL THEN a.metadata ->> 'company_name' ELSE l.company_name END AS company_name,
           l.status AS current_lead_status
    FROM activity a LEFT JOIN lead l ON l.lead_id = a.lead_id
    WHERE a.lead_id IS NOT NULL
    UNION ALL
    SELECT activity_id,
           CASE WHEN metadata ->> 'lead_id' ~ '^\d{1,10}$'
                THEN nullif(least((metadata ->> 'lead_id')::bigint, 2147483648), 2147483648)::integer END,
           customer_uid, activity_type, activity_category, description, metadata,
           date_created, bd_in_charge, created_by, is_visible_to_bd,
           metadata ->> 'lead_name', metadata ->> 'company_name', NULL
    FROM activity WHERE change_key IS NOT NULL AND lead_id IS NULL AND metadata ->> 'lead_id' IS NOT NULL
    ORDER BY date_created DESC, activity_id DESC
$$);

-- lock: SHARE UPDATE EXCLUSIVE on v_lead_timeline
COMMENT ON VIEW v_lead_timeline IS 'All activities of leads, newest first, also of those that are gone';

-- lock: ACCESS EXCLUSIVE on v_customer_timeline
SELECT cdc_worker.replace_view('v_customer_timeline', $$
    SELECT a.activity_id, a.lead_id, a.customer_uid, a.activity_type, a.activity_category, a.description, a.metadata,
           a.date_created, a.bd_in_charge, a.created_by, a.is_visible_to_bd,
           coalesce(c.name, a.metadata ->> 'customer_name') AS customer_name
    FROM activity a LEFT JOIN customer c ON c.customer_uid = a.customer_uid
    WHERE a.customer_uid IS NOT NULL
    UNION ALL
    SELECT activity_id, lead_id,
           CASE WHEN metadata ->> 'customer_uid' ~ '^\d{1,10}$'
                THEN nullif(least((metadata ->> 'customer_uid')::bigint, 2147483648), 2147483648)::integer END,
           activity_type, activity_category, description, metadata,
           date_created, bd_in_charge, created_by, is_visible_to_bd, metadata ->> 'customer_name'
    FROM activity WHERE change_key IS NOT NULL AND customer_uid IS NULL AND metadata ->> 'customer_uid' IS NOT NULL
    ORDER BY date_created DESC, activity_id DESC
$$);

-- lock: SHARE UPDATE EXCLUSIVE on v_customer_timeline
COMMENT ON VIEW v_customer_timeline IS 'All activities of customers, newest first, also of those that are gone';

-- A query for one statistic reads no more than it needs: the others are pruned by their name.
-- lock: ACCESS EXCLUSIVE on v_activity_statistics
SELECT cdc_worker.replace_view('v_activity_statistics', $$
    SELECT 'total' AS statistic, coalesce(activity_category, 'manual')::text AS activity_category,
           NULL::text AS activity_type, NULL::text AS bd_in_charge, NULL::date AS day, count(*) AS activities,
           count(*) FILTER (WHERE date_created >= current_date - 6) AS last_7_days, max(date_created) AS latest
    FROM activity GROUP BY 2
    UNION ALL
    SELECT 'trend', category, NULL, NULL, day, coalesce(activities, 0), coalesce(activities, 0), latest
    FROM (SELECT current_date - ago AS day FROM generate_series(0, 6) ago) days
    CROSS JOIN unnest('{manual, system, automated}'::text[]) category
    LEFT JOIN (SELECT date_created::date AS day, coalesce(activity_category, 'manual') AS category,
                      count(*) AS activities, max(date_created) AS latest
               FROM activity WHERE date_created >= current_date - 6 AND date_created < current_date + 1
               GROUP BY 1, 2) recent USING (day, category)
    UNION ALL
    SELECT 'bd', 'manual', activity_type, bd_in_charge, NULL, count(*),
           count(*) FILTER (WHERE date_created >= current_date - 6), max(date_created)
    FROM activity WHERE activity_category = 'manual' OR activity_category IS NULL GROUP BY bd_in_charge, activity_type
    UNION ALL
    SELECT 'system_event', 'system', activity_type, NULL, NULL, count(*),
           count(*) FILTER (WHERE date_created >= current_date - 6), max(date_created)
    FROM activity WHERE activity_category = 'system' GROUP BY activity_type
$$);

-- lock: SHARE UPDATE EXCLUSIVE on v_activity_statistics
COMMENT ON VIEW v_activity_statistics IS
    'statistic is total (by category), trend (by day, 7 days), bd (by BD and type) or system_event (by type)';
