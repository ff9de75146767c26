-- The worker's own state: where it is, and what it could not write. All of it is in the database, so that the process
-- can be killed and moved, and so that the checkpoint moves in the same transaction as the activities.

-- schema cdc_worker is made
-- administrator: CREATE on the database
SELECT format('CREATE SCHEMA cdc_worker AUTHORIZATION %I', current_user) WHERE to_regnamespace('cdc_worker') IS NULL
\gexec

COMMENT ON SCHEMA cdc_worker IS 'State of cdc-worker, which records changes as system activities';

CREATE OR REPLACE FUNCTION cdc_worker.cluster() RETURNS text LANGUAGE sql STABLE AS
    'SELECT system_identifier::text FROM pg_catalog.pg_control_system()';

COMMENT ON FUNCTION cdc_worker.cluster IS 'The cluster on which positions mean something';

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

ALTER TABLE cdc_worker.checkpoint
    ADD COLUMN IF NOT EXISTS nonce uuid NOT NULL DEFAULT gen_random_uuid(),
    ADD COLUMN IF NOT EXISTS tables text[],
    ADD COLUMN IF NOT EXISTS activities bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS dead_letters bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS spare_slot text,
    ADD COLUMN IF NOT EXISTS published text[];

COMMENT ON TABLE cdc_worker.checkpoint IS 'How far each worker has written, one row a worker';
COMMENT ON COLUMN cdc_worker.checkpoint.worker IS 'Name of the worker, part of every change_key';
COMMENT ON COLUMN cdc_worker.checkpoint.system_identifier IS 'The cluster whose positions these are';
COMMENT ON COLUMN cdc_worker.checkpoint.slot_created_at IS 'Where the first slot began that it had on this cluster';
COMMENT ON COLUMN cdc_worker.checkpoint.lsn IS 'All commits that end at or before it are written';
COMMENT ON COLUMN cdc_worker.checkpoint.commit_lsn IS 'The commit after them of which a part is written, or 0/0';
COMMENT ON COLUMN cdc_worker.checkpoint.changes IS 'How many changes of that commit are written';
COMMENT ON COLUMN cdc_worker.checkpoint.committed_at IS 'When the last change written was committed';
COMMENT ON COLUMN cdc_worker.checkpoint.owner IS 'Token of the process that may write';
COMMENT ON COLUMN cdc_worker.checkpoint.backend_pid IS 'Its writing connection, which a successor terminates first';
COMMENT ON COLUMN cdc_worker.checkpoint.nonce IS 'Made anew with each cut-over and erasure: who writes must know the last';
COMMENT ON COLUMN cdc_worker.checkpoint.tables IS
    'The tables that its owner captures, by which changes counts; those with (facts) are not recorded themselves';

COMMENT ON COLUMN cdc_worker.checkpoint.spare_slot IS
    'A slot that is switch-plugin''s to drop: a copy that isn''t taken yet, or what was read before it';
COMMENT ON COLUMN cdc_worker.checkpoint.published IS
    'The relations that were published as the worker was set up, each with what changes if it is published anew';
COMMENT ON COLUMN cdc_worker.checkpoint.activities IS 'How many activities were written, with the checkpoint itself';
COMMENT ON COLUMN cdc_worker.checkpoint.dead_letters IS 'How many changes became dead letters, likewise';

CREATE TABLE IF NOT EXISTS cdc_worker.gap (
    gap                      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker                   text NOT NULL REFERENCES cdc_worker.checkpoint ON DELETE CASCADE,
    exit_code                integer NOT NULL,
    reason                   text NOT NULL,
    system_identifier        text NOT NULL,
    from_lsn                 pg_lsn NOT NULL,
    from_time                timestamptz NOT NULL,
    until_system_identifier  text,
    until_lsn                pg_lsn,
    until_time               timestamptz,
    failover                 boolean NOT NULL DEFAULT false,
    noted_at                 timestamptz NOT NULL DEFAULT now(),
    reconciled_at            timestamptz
);

CREATE UNIQUE INDEX IF NOT EXISTS gap_open ON cdc_worker.gap (worker) WHERE until_lsn IS NULL;

COMMENT ON TABLE cdc_worker.gap IS 'What was committed and could not be recorded, for nothing kept it';
COMMENT ON COLUMN cdc_worker.gap.exit_code IS 'What run ended with';
COMMENT ON COLUMN cdc_worker.gap.system_identifier IS 'The cluster of the checkpoint before it';
COMMENT ON COLUMN cdc_worker.gap.from_lsn IS 'All commits that end at or before it were written';
COMMENT ON COLUMN cdc_worker.gap.from_time IS 'When the last change written before it was committed, if there was any';
COMMENT ON COLUMN cdc_worker.gap.until_lsn IS 'Commits that end after it are recorded; NULL until that is so';
COMMENT ON COLUMN cdc_worker.gap.until_time IS 'A time by then';
COMMENT ON COLUMN cdc_worker.gap.failover IS 'Whether the slot was known to be a failover slot';
COMMENT ON COLUMN cdc_worker.gap.reconciled_at IS 'When all rows had been held against their log; NULL if that is to be done';

CREATE TABLE IF NOT EXISTS cdc_worker.tally (
    worker        text NOT NULL REFERENCES cdc_worker.checkpoint ON DELETE CASCADE,
    at            timestamptz NOT NULL,
    activities    bigint NOT NULL,
    dead_letters  bigint NOT NULL,
    PRIMARY KEY (worker, at)
);

COMMENT ON TABLE cdc_worker.tally IS
    'What the checkpoint''s counts were by then: every ten seconds of work, for a day and the last before';

CREATE TABLE IF NOT EXISTS cdc_worker.process (
    process        uuid PRIMARY KEY,
    worker         text NOT NULL,
    host           text NOT NULL,
    pid            integer NOT NULL,
    version        text NOT NULL,
    started_at     timestamptz NOT NULL,
    backend_pid    integer NOT NULL,
    backend_start  timestamptz NOT NULL,
    failed_at      timestamptz,
    failure        text,
    exit_code      integer,
    ended_at       timestamptz
);

COMMENT ON TABLE cdc_worker.process IS 'The last processes of each worker, and what went wrong last in each';
COMMENT ON COLUMN cdc_worker.process.version IS 'Of cdc-worker';
COMMENT ON COLUMN cdc_worker.process.backend_pid IS
    'Its connection: it is alive while that is there, and active if it is the checkpoint''s';
COMMENT ON COLUMN cdc_worker.process.failure IS 'What went wrong last, also if it has healed';
COMMENT ON COLUMN cdc_worker.process.exit_code IS 'What it ended with; NULL if it runs, or was killed';

CREATE TABLE IF NOT EXISTS cdc_worker.excluded (
    worker             text NOT NULL,
    table_name         text NOT NULL,
    system_identifier  text NOT NULL DEFAULT cdc_worker.cluster(),
    from_lsn           pg_lsn NOT NULL,
    until_lsn          pg_lsn CHECK (until_lsn > from_lsn),
    triggers           boolean NOT NULL DEFAULT false,
    PRIMARY KEY (worker, table_name, system_identifier, from_lsn)
);

ALTER TABLE cdc_worker.excluded ADD COLUMN IF NOT EXISTS marked boolean NOT NULL DEFAULT false;

COMMENT ON TABLE cdc_worker.excluded IS
    'Stretches of WAL in which the changes of a table are not the worker''s; each table that is set up has one from 0/0 on';
COMMENT ON COLUMN cdc_worker.excluded.marked IS
    'But what follows a context message in its transaction is the worker''s: old code of the application sends none';
COMMENT ON COLUMN cdc_worker.excluded.system_identifier IS 'The cluster whose positions these are';
COMMENT ON COLUMN cdc_worker.excluded.triggers IS 'Triggers recorded them; else the table was not set up yet';
COMMENT ON COLUMN cdc_worker.excluded.table_name IS 'Schema and table, as in lead of public: public.lead';
COMMENT ON COLUMN cdc_worker.excluded.from_lsn IS 'Commits at or after it are left out';
COMMENT ON COLUMN cdc_worker.excluded.until_lsn IS 'Commits at or after it are recorded; NULL until cut-over';

CREATE TABLE IF NOT EXISTS cdc_worker.partition (
    worker       text NOT NULL REFERENCES cdc_worker.checkpoint ON DELETE CASCADE,
    schema_name  text NOT NULL,
    table_name   text NOT NULL,
    root         text NOT NULL,
    until_lsn    pg_lsn,
    PRIMARY KEY (worker, schema_name, table_name)
);

COMMENT ON TABLE cdc_worker.partition IS
    'Partitions of captured tables, also those that are gone: their changes may still be read';
COMMENT ON COLUMN cdc_worker.partition.root IS 'The captured table that its changes count as, schema and table';
COMMENT ON COLUMN cdc_worker.partition.until_lsn IS 'Where it was found to be detached or dropped; NULL if it is there';

CREATE TABLE IF NOT EXISTS cdc_worker.erased (
    worker             text NOT NULL,
    field              text NOT NULL,
    key                text NOT NULL,
    system_identifier  text NOT NULL DEFAULT cdc_worker.cluster(),
    erased_lsn         pg_lsn NOT NULL,
    until_lsn          pg_lsn,
    erased_at          timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (worker, field, key, system_identifier, erased_lsn)
);

COMMENT ON TABLE cdc_worker.erased IS 'Persons of whom nothing may be told any more';
COMMENT ON COLUMN cdc_worker.erased.field IS 'Field of the profile''s activities that links to the person: lead, customer';
COMMENT ON COLUMN cdc_worker.erased.key IS 'Its value, as text';
COMMENT ON COLUMN cdc_worker.erased.system_identifier IS 'The cluster whose positions these are';
COMMENT ON COLUMN cdc_worker.erased.erased_lsn IS 'Where the WAL was at the time';
COMMENT ON COLUMN cdc_worker.erased.until_lsn IS 'The commit that gave the key to somebody else; NULL if none did';

CREATE TABLE IF NOT EXISTS cdc_worker.backfill (
    worker             text NOT NULL,
    table_name         text NOT NULL,
    part               text NOT NULL DEFAULT '',
    system_identifier  text NOT NULL DEFAULT cdc_worker.cluster(),
    nonce              uuid NOT NULL DEFAULT gen_random_uuid(),
    key_columns        text[],
    last_key           text[],
    rows               bigint NOT NULL DEFAULT 0,
    expected           bigint,
    activities         bigint NOT NULL DEFAULT 0,
    dead_letters       bigint NOT NULL DEFAULT 0,
    started_at         timestamptz NOT NULL DEFAULT now(),
    started_lsn        pg_lsn NOT NULL DEFAULT pg_current_wal_insert_lsn(),
    written_at         timestamptz NOT NULL DEFAULT now(),
    finished_at        timestamptz,
    PRIMARY KEY (worker, table_name, part)
);

COMMENT ON TABLE cdc_worker.backfill IS 'How far each backfill has come, which goes on from there';
COMMENT ON COLUMN cdc_worker.backfill.table_name IS 'Schema and table';
COMMENT ON COLUMN cdc_worker.backfill.part IS 'Which of its rows, as the command was asked; empty for all';
COMMENT ON COLUMN cdc_worker.backfill.nonce IS 'Made anew with each erasure: who writes must know the last';
COMMENT ON COLUMN cdc_worker.backfill.key_columns IS 'The columns of that index: by others it begins anew';
COMMENT ON COLUMN cdc_worker.backfill.last_key IS 'Rows up to this key are dealt with, in the order of its index';
COMMENT ON COLUMN cdc_worker.backfill.started_lsn IS 'Rows that got other keys since then may have been passed by';
COMMENT ON COLUMN cdc_worker.backfill.expected IS 'About how many rows there are; NULL if nobody knows';

CREATE TABLE IF NOT EXISTS cdc_worker.replay (
    replay         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    worker         text NOT NULL,
    command        text NOT NULL,
    nonce          uuid NOT NULL DEFAULT gen_random_uuid(),
    lsn            pg_lsn,
    activities     bigint NOT NULL DEFAULT 0,
    dead_letters   bigint NOT NULL DEFAULT 0,
    backend_pid    integer NOT NULL DEFAULT pg_backend_pid(),
    backend_start  timestamptz NOT NULL,
    started_at     timestamptz NOT NULL DEFAULT now(),
    written_at     timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_worker.replay IS 'Commands that write what comes late, beside the worker, while they run';
COMMENT ON COLUMN cdc_worker.replay.command IS 'What was asked: replay, rewrite, retry';
COMMENT ON COLUMN cdc_worker.replay.nonce IS 'Made anew with each cut-over and erasure: who writes must know the last';
COMMENT ON COLUMN cdc_worker.replay.lsn IS 'The last commit that it has dealt with';
COMMENT ON COLUMN cdc_worker.replay.backend_pid IS 'Its writing connection: it is alive while that is there';

CREATE TABLE IF NOT EXISTS cdc_worker.skip (
    worker             text NOT NULL,
    system_identifier  text NOT NULL DEFAULT cdc_worker.cluster(),
    lsn                pg_lsn NOT NULL,
    allowed_at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (worker, system_identifier, lsn)
);

COMMENT ON TABLE cdc_worker.skip IS
    'Positions of messages that someone allowed the worker to pass over if they can''t be read';

CREATE TABLE IF NOT EXISTS cdc_worker.skipped (
    worker             text NOT NULL,
    table_name         text NOT NULL,
    system_identifier  text NOT NULL DEFAULT cdc_worker.cluster(),
    commit_lsn         pg_lsn NOT NULL,
    number             bigint NOT NULL,
    operation          text NOT NULL CHECK (operation IN ('insert', 'update', 'delete', 'truncate')),
    collapsed          boolean NOT NULL,
    subjects           text[] NOT NULL,
    PRIMARY KEY (worker, system_identifier, commit_lsn, table_name, operation, number)
);

-- without a list of what is pending, in which each key that is looked up would be looked for as well
CREATE INDEX IF NOT EXISTS skipped_subjects ON cdc_worker.skipped USING gin (subjects) WITH (fastupdate = off);

COMMENT ON TABLE cdc_worker.skipped IS
    'Which rows a context message let changes pass over: what is missing of them in the activities is meant to be';
COMMENT ON COLUMN cdc_worker.skipped.table_name IS 'Schema and table, as in lead of public: public.lead';
COMMENT ON COLUMN cdc_worker.skipped.system_identifier IS 'The cluster whose positions these are';
COMMENT ON COLUMN cdc_worker.skipped.commit_lsn IS 'The commit in which they were changed';
COMMENT ON COLUMN cdc_worker.skipped.number IS 'How many changes that commit has before the first of these';
COMMENT ON COLUMN cdc_worker.skipped.collapsed IS 'One activity was written in place of theirs; else none';
COMMENT ON COLUMN cdc_worker.skipped.subjects IS
    'Keys of the rows, as in change keys of a backfill; none for a truncate, which is about all that there were';

CREATE TABLE IF NOT EXISTS cdc_worker.replaced (
    kind         text NOT NULL CHECK (kind IN ('replica_identity', 'tracker', 'trigger', 'grant')),
    table_name   text NOT NULL,
    name         text NOT NULL,
    restore      text NOT NULL,
    replaced_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, table_name, name)
);

COMMENT ON TABLE cdc_worker.replaced IS 'What setup found and changed, to be undone by cutover --back and teardown';
COMMENT ON COLUMN cdc_worker.replaced.restore IS 'The statements that bring it back as it was';

CREATE TABLE IF NOT EXISTS cdc_worker.schema_file (
    name        text PRIMARY KEY,
    checksum    text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_worker.schema_file IS 'The files of schema/ as setup last applied them';
COMMENT ON COLUMN cdc_worker.schema_file.checksum IS 'SHA-256 of the file';

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

ALTER TABLE cdc_worker.dead_letter
    ADD COLUMN IF NOT EXISTS xid bigint,
    ADD COLUMN IF NOT EXISTS commit_lsn pg_lsn,
    ADD COLUMN IF NOT EXISTS end_lsn pg_lsn,
    ADD COLUMN IF NOT EXISTS context jsonb,
    ADD COLUMN IF NOT EXISTS found jsonb,
    ADD COLUMN IF NOT EXISTS masked text[],
    ADD COLUMN IF NOT EXISTS raw bytea,
    ADD COLUMN IF NOT EXISTS tried_at timestamptz,
    ADD COLUMN IF NOT EXISTS discarded_at timestamptz;

SELECT 'ALTER TABLE cdc_worker.dead_letter DROP CONSTRAINT IF EXISTS dead_letter_kind_check,'
       ' ADD CONSTRAINT dead_letter_kind_check'
       ' CHECK (kind IN (''old_values_unknown'', ''rule_failed'', ''refused'', ''unreadable''))'
WHERE NOT EXISTS (SELECT FROM pg_constraint
                  WHERE conrelid = to_regclass('cdc_worker.dead_letter') AND conname = 'dead_letter_kind_check'
                    AND pg_get_constraintdef(oid) LIKE '%unreadable%')
\gexec

COMMENT ON COLUMN cdc_worker.dead_letter.xid IS 'The transaction, by its last 32 bits';
COMMENT ON COLUMN cdc_worker.dead_letter.commit_lsn IS 'Where it was committed';
COMMENT ON COLUMN cdc_worker.dead_letter.end_lsn IS 'Where its commit ends';
COMMENT ON COLUMN cdc_worker.dead_letter.context IS 'What had been said in it before the change';
COMMENT ON COLUMN cdc_worker.dead_letter.found IS 'Rows that were found for the change, by the names of lookups';
COMMENT ON COLUMN cdc_worker.dead_letter.masked IS 'Columns of the change whose values are not the true ones';
COMMENT ON COLUMN cdc_worker.dead_letter.raw IS 'The message, if it could not be read';
COMMENT ON COLUMN cdc_worker.dead_letter.attempts IS 'How often it was tried';
COMMENT ON COLUMN cdc_worker.dead_letter.tried_at IS 'When it was tried last, if that was later than it arrived';
COMMENT ON COLUMN cdc_worker.dead_letter.discarded_at IS 'When someone decided that it is to be left at that';

COMMENT ON TABLE cdc_worker.dead_letter IS 'Changes that could not become activities, kept until someone sees to them';
COMMENT ON COLUMN cdc_worker.dead_letter.change_key IS 'What the key of the activity would have been';
COMMENT ON COLUMN cdc_worker.dead_letter.change IS 'The change: operation, schema, table, old and new row';
COMMENT ON COLUMN cdc_worker.dead_letter.fields IS 'The activity that the target refused';

CREATE TABLE IF NOT EXISTS cdc_worker.written_key (
    change_key  text PRIMARY KEY,
    table_name  text NOT NULL,
    row_id      bigint
);

CREATE INDEX IF NOT EXISTS written_key_row_id ON cdc_worker.written_key (row_id);

COMMENT ON TABLE cdc_worker.written_key IS
    'What has been written to a target that has no column for change keys, in the same transactions';
COMMENT ON COLUMN cdc_worker.written_key.table_name IS 'The target, schema and table';
COMMENT ON COLUMN cdc_worker.written_key.row_id IS 'Primary key of its row, if that comes from a sequence';

CREATE OR REPLACE FUNCTION cdc_worker.mark(own text, relation text) RETURNS pg_lsn LANGUAGE plpgsql AS $$
DECLARE
    its_nonce uuid := (SELECT nonce FROM cdc_worker.checkpoint WHERE worker = own);
BEGIN
    IF its_nonce IS NULL THEN
        RAISE 'the worker "%" has no checkpoint: nobody would record %', own, relation USING ERRCODE = 'no_data_found';
    END IF;
    RETURN pg_logical_emit_message(
        true, 'cdc_worker.marker', jsonb_build_object('table', relation, 'nonce', its_nonce)::text);
END
$$;

COMMENT ON FUNCTION cdc_worker.mark IS 'Puts the marker of a cut-over into the WAL; returns where it is';
