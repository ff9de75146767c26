-- Recorded as format1*.json*, format2.jsonl and format2_bare.jsonl, with slots that were made before the second part.
CREATE TABLE lead (lead_id int PRIMARY KEY, name text, amount numeric, score float8, note text);
ALTER TABLE lead REPLICA IDENTITY FULL;
CREATE TABLE keyed (id int PRIMARY KEY, a text, b text);

-- recorded from here on

INSERT INTO lead VALUES (1, 'Ada', 1.10, 1e20, NULL), (2, E'a"b\nc', NULL, NULL, NULL);
UPDATE lead SET note = 'x' WHERE lead_id = 1;
UPDATE lead SET name = 'Bob' WHERE lead_id = 2;
INSERT INTO keyed VALUES (1, 'x', NULL);
UPDATE keyed SET a = 'y';
UPDATE keyed SET id = 2;
DELETE FROM keyed;
DELETE FROM lead WHERE lead_id = 2;
BEGIN;
SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"changed_by": "j"}');
UPDATE lead SET amount = 2;
COMMIT;
SELECT pg_logical_emit_message(false, 'x', 'y');
TRUNCATE keyed;
CREATE TABLE other (i int);
