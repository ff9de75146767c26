-- The functions that LeadFi's application may call, with the signatures of the published migration. Any function of the
-- name stays as it is: a second signature would make calls ambiguous.

-- The application has create_system_activity, for what the worker doesn't see
-- lock: ROW EXCLUSIVE on activity
SELECT $create$CREATE FUNCTION create_system_activity(
    p_activity_type varchar,
    p_description   text,
    p_lead_id       integer DEFAULT NULL,
    p_customer_uid  integer DEFAULT NULL,
    p_metadata      jsonb DEFAULT NULL,
    p_created_by    varchar DEFAULT 'system'
) RETURNS integer LANGUAGE sql AS $$
    INSERT INTO public.activity
        (activity_type, activity_category, description, lead_id, customer_uid, metadata, created_by)
    VALUES (p_activity_type, 'system', p_description, p_lead_id, p_customer_uid, p_metadata, p_created_by)
    RETURNING activity_id
$$;
COMMENT ON FUNCTION create_system_activity IS 'Writes a system activity of the application; returns its activity_id'
$create$
WHERE NOT EXISTS (
    SELECT FROM pg_proc WHERE proname = 'create_system_activity' AND pg_function_is_visible(oid)
) \gexec

-- The application has create_manual_activity, for what a BD did
-- lock: ROW EXCLUSIVE on activity
SELECT $create$CREATE FUNCTION create_manual_activity(
    p_activity_type varchar,
    p_description   text,
    p_lead_id       integer DEFAULT NULL,
    p_customer_uid  integer DEFAULT NULL,
    p_metadata      jsonb DEFAULT NULL,
    p_bd_in_charge  varchar DEFAULT NULL
) RETURNS integer LANGUAGE sql AS $$
    INSERT INTO public.activity
        (activity_type, activity_category, description, lead_id, customer_uid, metadata, bd_in_charge, created_by)
    VALUES (p_activity_type, 'manual', p_description, p_lead_id, p_customer_uid, p_metadata, p_bd_in_charge,
            p_bd_in_charge)
    RETURNING activity_id
$$;
COMMENT ON FUNCTION create_manual_activity IS 'Writes what a BD did, and that the BD wrote it; returns its activity_id'
$create$
WHERE NOT EXISTS (
    SELECT FROM pg_proc WHERE proname = 'create_manual_activity' AND pg_function_is_visible(oid)
) \gexec
