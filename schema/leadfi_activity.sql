-- LeadFi's activity table: manual activities of the application beside the system activities of the worker.
--
-- The foreign keys stand on generated columns that are NULL for system rows: manual rows keep their guarantee, history
-- outlives its subject, and the worker's writes take no lock on the application's rows.

CREATE TABLE IF NOT EXISTS activity (
    activity_id          serial PRIMARY KEY,
    lead_id              integer,
    customer_uid         integer,
    activity_type        varchar(50) NOT NULL,
    activity_category    varchar(20) DEFAULT 'manual'
        CONSTRAINT activity_category_known CHECK (activity_category IN ('manual', 'system', 'automated')),
    description          text,
    metadata             jsonb CONSTRAINT activity_metadata_is_object CHECK (jsonb_typeof(metadata) = 'object'),
    date_created         timestamp DEFAULT now(),
    bd_in_charge         varchar(20),
    created_by           varchar(50),
    is_visible_to_bd     boolean DEFAULT true,
    manual_lead_id       integer GENERATED ALWAYS AS
        (CASE WHEN activity_category IN ('system', 'automated') THEN NULL ELSE lead_id END) STORED
        CONSTRAINT activity_manual_lead_fkey REFERENCES lead,
    manual_customer_uid  integer GENERATED ALWAYS AS
        (CASE WHEN activity_category IN ('system', 'automated') THEN NULL ELSE customer_uid END) STORED
        CONSTRAINT activity_manual_customer_fkey REFERENCES customer ON DELETE CASCADE
);

ALTER TABLE activity ADD COLUMN IF NOT EXISTS change_key text;

COMMENT ON COLUMN activity.change_key IS 'Identity of the change that a row of cdc-worker tells of; NULL for all other rows';

-- Partial, so that manual rows pay nothing for it.
CREATE UNIQUE INDEX IF NOT EXISTS activity_change_key ON activity (change_key) WHERE change_key IS NOT NULL;

CREATE INDEX IF NOT EXISTS activity_lead ON activity (lead_id, date_created) WHERE lead_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS activity_customer ON activity (customer_uid, date_created) WHERE customer_uid IS NOT NULL;
