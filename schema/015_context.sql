-- What an application may call to say who changes what follows in its transaction.

CREATE OR REPLACE FUNCTION cdc_worker.set_context(context jsonb) RETURNS pg_lsn LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF jsonb_typeof(context) IS DISTINCT FROM 'object' THEN
        RAISE 'a context is a JSON object, such as {"changed_by": "jane_doe"}'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF length(context::text) > 8192 THEN
        RAISE 'a context of more than 8192 characters is not heard' USING ERRCODE = 'program_limit_exceeded';
    END IF;
    RETURN pg_logical_emit_message(true, 'cdc_worker.context', context::text);
END
$$;

COMMENT ON FUNCTION cdc_worker.set_context IS
    'Says who makes the changes that follow in this transaction, and more of them; returns where it stands in the WAL';

-- Whoever may use the schema may call it: GRANT USAGE ON SCHEMA cdc_worker TO application. It says no more than
-- pg_logical_emit_message does, which everyone may call.
GRANT EXECUTE ON FUNCTION cdc_worker.set_context TO PUBLIC;
