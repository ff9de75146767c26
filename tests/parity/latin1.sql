-- database LATIN1
-- A database in another encoding.
CREATE TABLE "Straße" ("Größe" int PRIMARY KEY, name text, fixed char(5), js json, list text[], bytes bytea);
ALTER TABLE "Straße" REPLICA IDENTITY FULL;

CREATE TABLE "schlüssel" ("ß" text PRIMARY KEY, note text);

CREATE TYPE farbe AS ENUM ('grün');
CREATE TABLE bunt (id int PRIMARY KEY, farbe farbe);

-- slots

INSERT INTO "Straße" VALUES (1, 'Jürgen é ÿ', 'é', '{"ä": "ö"}', '{ü,"ä b"}', '\xe9ff00'), (2, repeat('ü', 5000), NULL, NULL, NULL, NULL);
UPDATE "Straße" SET name = name || '·';
UPDATE "Straße" SET fixed = 'ß';
DELETE FROM "Straße";

INSERT INTO "schlüssel" VALUES ('ä', 'é');
UPDATE "schlüssel" SET "ß" = 'ö';
DELETE FROM "schlüssel";
TRUNCATE "schlüssel", "Straße";

INSERT INTO bunt VALUES (1, 'grün');

SELECT pg_logical_emit_message(true, 'asked', 'Grüße');
SELECT pg_logical_emit_message(true, 'asked', '\xe9ff'::bytea);
SELECT pg_logical_emit_message(false, 'asked', 'Grüße, außerhalb');
