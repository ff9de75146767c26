-- database SQL_ASCII
-- A database that takes any bytes.
CREATE TABLE "Straße" (id int PRIMARY KEY, name text, fixed char(9));
ALTER TABLE "Straße" REPLICA IDENTITY FULL;

-- slots

INSERT INTO "Straße" VALUES (1, 'Jürgen 🎉', 'é');

INSERT INTO "Straße" VALUES (2, convert_from('\xe9ff', 'SQL_ASCII'));

UPDATE "Straße" SET name = 'read' WHERE id = 2;

UPDATE "Straße" SET name = 'and again' WHERE id = 2;
SELECT pg_logical_emit_message(true, 'asked', 'Grüße');
SELECT pg_logical_emit_message(true, 'asked', '\xe9ff'::bytea);
