-- A day at LeadFi that meets every line of its profile; recorded as leadfi.jsonl.
CREATE TABLE lead (
    lead_id serial PRIMARY KEY, full_name varchar(50) NOT NULL, title varchar(50), email varchar(120),
    telegram varchar(50), phone_number varchar(20), source varchar(50) NOT NULL, status varchar(50),
    date_created timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP, linkedin_url varchar(255), company_name varchar(120),
    country varchar(50), bd_in_charge varchar(20) NOT NULL, background text, is_converted boolean DEFAULT false,
    type varchar(50) NOT NULL
);
CREATE TABLE customer (
    customer_uid integer PRIMARY KEY, registered_email varchar(120), type varchar(50), name varchar(120) NOT NULL,
    is_closed boolean DEFAULT false, date_closed timestamp, country varchar(50),
    date_created timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE contact (
    contact_id serial PRIMARY KEY, customer_uid int NOT NULL REFERENCES customer ON DELETE CASCADE,
    lead_id int NOT NULL REFERENCES lead ON DELETE CASCADE, is_primary_contact boolean DEFAULT true,
    date_added timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP
);
ALTER TABLE lead REPLICA IDENTITY FULL;
ALTER TABLE customer REPLICA IDENTITY FULL;
ALTER TABLE lead ALTER background SET STORAGE EXTERNAL;

-- recorded from here on

INSERT INTO lead (full_name, source, bd_in_charge, type, company_name, background)
VALUES ('Ada "the {first}" Lovelace 😀', 'web', 'jane', 'exchange', '100% Engines', repeat('b', 3000));
UPDATE lead SET status = '1. lead generated' WHERE lead_id = 1;
UPDATE lead SET status = '2. proposal', bd_in_charge = 'joe', country = 'UK' WHERE lead_id = 1;
UPDATE lead SET country = country WHERE lead_id = 1;
UPDATE lead SET background = repeat('c', 2000) WHERE lead_id = 1;
BEGIN;
SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"changed_by": "jane_doe"}');
INSERT INTO customer (customer_uid, name, type) VALUES (42, 'Engines Ltd', 'exchange');
UPDATE lead SET is_converted = true, status = '6. closed won' WHERE lead_id = 1;
INSERT INTO contact (customer_uid, lead_id) VALUES (42, 1);
COMMIT;
UPDATE lead SET is_converted = NULL WHERE lead_id = 1;
UPDATE lead SET is_converted = true WHERE lead_id = 1;
UPDATE lead SET status = NULL WHERE lead_id = 1;
DELETE FROM contact;
UPDATE lead SET lead_id = 100 WHERE lead_id = 1;
UPDATE customer SET is_closed = true WHERE customer_uid = 42;
UPDATE customer SET is_closed = NULL, name = 'Engines & Sons' WHERE customer_uid = 42;
UPDATE customer SET is_closed = false WHERE customer_uid = 42;
BEGIN;
UPDATE lead SET status = 'never' WHERE lead_id = 100;
ROLLBACK;
DELETE FROM lead WHERE lead_id = 100;
DELETE FROM customer WHERE customer_uid = 42;
INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type) SELECT n, 'Bulk ' || n, 'import', 'joe', 'otc' FROM generate_series(200, 202) n;
TRUNCATE lead, customer, contact;
