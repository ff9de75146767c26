-- The worker's own state: where it is, and what it could not write. All of it is in the database, so that the process
-- can be killed and moved, and so that the checkpoint moves in the same transaction as the activities.

CREATE SCHEMA IF NOT EXISTS cdc_worker;

COMMENT ON SCHEMA cdc_worker IS 'State of cdc-worker, which records changes as system activities';

CREATE TABLE IF NOT EXISTS cdc_worker.checkpoint (
    worker            text PRIMARY KEY,
    slot              text NOT NULL,
    plugin            text NOT NULL,
    system_identifier text NOT NULL,
    slot_created_at   pg_lsn NOT NULL,
    lsn               pg_lsn NOT NULL,
    commit_lsn        pg_lsn NOT NULL DEFAULT '0/0',
    changes           bigint NOT NULL DEFAULT 0 CHECK (changes >= 0),
    committed_at      timestamptz,
    written_at        timestamptz NOT NULL DEFAULT now(),
    owner             uuid,
    backend_pid       integer,
    backend_start     timestamptz
);

COMMENT ON TABLE cdc_worker.checkpoint IS 'How far each worker has written, one row a worker';
COMMENT ON COLUMN cdc_worker.checkpoint.worker IS 'Name of the worker, part of every change_key';
COMMENT ON COLUMN cdc_worker.checkpoint.system_identifier IS 'The cluster whose positions these are';
COMMENT ON COLUMN cdc_worker.checkpoint.slot_created_at IS 'Where the slot began';
COMMENT ON COLUMN cdc_worker.checkpoint.lsn IS 'All commits that end at or before it are written';
COMMENT ON COLUMN cdc_worker.checkpoint.commit_lsn IS 'The commit after them of which a part is written, or 0/0';
COMMENT ON COLUMN cdc_worker.checkpoint.changes IS 'How many changes of that commit are written';
COMMENT ON COLUMN cdc_worker.checkpoint.committed_at IS 'When the last change written was committed';
COMMENT ON COLUMN cdc_worker.checkpoint.owner IS 'Token of the process that may write';
COMMENT ON COLUMN cdc_worker.checkpoint.backend_pid IS 'Its writing connection, which a successor terminates first';

CREATE TABLE IF NOT EXISTS cdc_worker.dead_letter (
    dead_letter_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker          text NOT NULL,
    change_key      text NOT NULL UNIQUE,
    kind            text NOT NULL CHECK (kind IN ('old_values_unknown', 'rule_failed', 'refused')),
    reason          text NOT NULL,
    sqlstate        text,
    constraint_name text,
    committed_at    timestamptz NOT NULL,
    change          jsonb NOT NULL,
    fields          jsonb,
    attempts        integer NOT NULL DEFAULT 1,
    recorded_at     timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_worker.dead_letter IS 'Changes that could not become activities, kept until someone sees to them';
COMMENT ON COLUMN cdc_worker.dead_letter.change_key IS 'What the key of the activity would have been';
COMMENT ON COLUMN cdc_worker.dead_letter.change IS 'The change: operation, schema, table, old and new row';
COMMENT ON COLUMN cdc_worker.dead_letter.fields IS 'The activity that the target refused';
