-- What wal2json prints of each type; recorded as types.jsonl.
CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"');
CREATE DOMAIN money_amount AS numeric(12,2);
CREATE TABLE kinds (
    id int PRIMARY KEY, flag boolean, small int2, big int8, exact numeric, fixed numeric(40,10), f4 float4, f8 float8,
    note text, short varchar(10), padded char(5), day date, at time, moment timestamp, instant timestamptz,
    span interval, blob bytea, doc json, docb jsonb, list int[], words text[], within int4range, uid uuid, addr inet,
    feeling mood, amount money_amount
);
ALTER TABLE kinds REPLICA IDENTITY FULL;
CREATE TABLE "Odd, *.""\ 'name" ("a ""col""" int PRIMARY KEY, "ü" text);
CREATE TABLE keyed (id int PRIMARY KEY, name text, body text);
ALTER TABLE keyed ALTER body SET STORAGE EXTERNAL;
CREATE TABLE toasted (id int PRIMARY KEY, name text, body text, last int);
ALTER TABLE toasted ALTER body SET STORAGE EXTERNAL;
ALTER TABLE toasted REPLICA IDENTITY FULL;

-- recorded from here on

INSERT INTO kinds VALUES (
    1, true, -32768, 9223372036854775807, 123456789012345678901234567890, -0.0000000001, 1.5, 1e20,
    E'tab\t quote" backslash\\ newline\n brace{} %s bell\x07 del\x7f 😀 é', '', 'ab', '0044-03-15 BC', '24:00:00',
    'infinity', '2026-02-03 04:05:06.789+02', '1 year 2 mons -3 days 04:05:06', '\xdeadbeef00', '{"a": [1, "x"] }',
    '{"b": 1.10}', '{1,NULL,3}', '{"a b",NULL,"NULL","q\"q"}', '[1,5)', '00000000-0000-0000-0000-000000000001',
    '10.0.0.1/8', 'it''s "ok"', 1234.50);
INSERT INTO kinds (id) VALUES (2);
INSERT INTO kinds (id, exact, f4, f8) VALUES (3, 'NaN', 'Infinity', '-Infinity'), (4, 0.1000, 1e-10, 1e15), (5, 1e30, 1e6, 0.1);
INSERT INTO kinds (id, exact) VALUES (6, 0.0000000), (7, 123456789.123456789012345678901234567890);
UPDATE kinds SET big = -9223372036854775808, exact = NULL, flag = false WHERE id = 1;
UPDATE kinds SET flag = flag WHERE id = 2;
DELETE FROM kinds WHERE id = 2;
INSERT INTO "Odd, *.""\ 'name" VALUES (1, 'x');
INSERT INTO toasted VALUES (1, 'a', repeat('x', 3000), 7);
UPDATE toasted SET name = 'b' WHERE id = 1;
UPDATE toasted SET body = 'short' WHERE id = 1;
INSERT INTO keyed VALUES (1, 'a', repeat('x', 3000));
UPDATE keyed SET name = 'b' WHERE id = 1;
UPDATE keyed SET id = 2 WHERE id = 1;
DELETE FROM keyed WHERE id = 2;
TRUNCATE keyed, toasted;
BEGIN;
SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"changed_by": "jane \"q\" 😀"}');
INSERT INTO keyed (id) VALUES (9);
SELECT pg_logical_emit_message(false, 'cdc_worker.context', 'at once');
SELECT pg_logical_emit_message(true, 'cdc_worker.context', '\x61ff'::bytea);
COMMIT;
CREATE TABLE elsewhere (id int);
