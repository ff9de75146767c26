-- A schema that gets another name. Before PostgreSQL 16 pgoutput goes on with the old one.
CREATE SCHEMA "first name";
CREATE TABLE "first name".called (id int PRIMARY KEY, note text);
ALTER TABLE "first name".called REPLICA IDENTITY FULL;

-- slots

INSERT INTO "first name".called VALUES (1, 'first name');

ALTER SCHEMA "first name" RENAME TO "second name";

UPDATE "second name".called SET note = 'second name';

ALTER TABLE "second name".called ADD COLUMN more int;

UPDATE "second name".called SET note = 'and looked at anew';
