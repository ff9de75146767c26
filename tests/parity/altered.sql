-- Tables that change while they are streamed: in the same transaction, between transactions, and with what came before.
CREATE TABLE shape (id int PRIMARY KEY, a int, b text, c varchar(10));
ALTER TABLE shape REPLICA IDENTITY FULL;

CREATE TABLE keyed (id int PRIMARY KEY, a int, b text);

CREATE TABLE called (id int PRIMARY KEY, note text);
ALTER TABLE called REPLICA IDENTITY FULL;

CREATE SCHEMA "altered elsewhere";

-- slots

INSERT INTO shape VALUES (1, 1, 'x', 'c'), (2, 2, NULL, NULL);
ALTER TABLE shape ADD COLUMN d int DEFAULT 7;
UPDATE shape SET a = 10 WHERE id = 1;

ALTER TABLE shape ADD COLUMN e timestamptz DEFAULT '2026-01-31 00:00+00', ADD COLUMN f text;

UPDATE shape SET a = 11;

BEGIN;
UPDATE shape SET b = 'before';
ALTER TABLE shape RENAME b TO renamed;
UPDATE shape SET renamed = 'after';
COMMIT;

ALTER TABLE shape DROP COLUMN c;

UPDATE shape SET a = 12 WHERE id = 2;

ALTER TABLE shape ADD COLUMN c int;

UPDATE shape SET c = 5 WHERE id = 2;

BEGIN;
UPDATE shape SET a = 13;
ALTER TABLE shape ALTER a TYPE numeric(10, 2);
UPDATE shape SET a = 13.5;
ALTER TABLE shape ALTER a TYPE text USING 'text ' || a;
UPDATE shape SET a = a || '!';
COMMIT;

ALTER TABLE shape ALTER renamed TYPE bytea USING convert_to(renamed, 'UTF8'), ALTER f SET STORAGE EXTERNAL;

UPDATE shape SET f = repeat('long', 5000);

UPDATE shape SET id = id + 10;

ALTER TABLE shape DROP COLUMN f, DROP COLUMN e, DROP COLUMN d, DROP COLUMN c, DROP COLUMN renamed, DROP COLUMN a;

DELETE FROM shape WHERE id = 11;
INSERT INTO shape VALUES (3);

INSERT INTO keyed VALUES (1, 1, 'x');
BEGIN;
UPDATE keyed SET a = 2;
ALTER TABLE keyed DROP CONSTRAINT keyed_pkey, ADD PRIMARY KEY (a);
UPDATE keyed SET b = 'y';
UPDATE keyed SET a = 3;
COMMIT;
ALTER TABLE keyed RENAME a TO key;
UPDATE keyed SET key = 4;

DELETE FROM keyed;

INSERT INTO called VALUES (1, 'first name');

ALTER TABLE called RENAME TO "called anew";

UPDATE "called anew" SET note = 'second name';

ALTER TABLE "called anew" SET SCHEMA "altered elsewhere";

UPDATE "altered elsewhere"."called anew" SET note = 'elsewhere';

DELETE FROM "altered elsewhere"."called anew";

CREATE TABLE late (id int PRIMARY KEY, note text);
ALTER TABLE late REPLICA IDENTITY FULL;
ALTER PUBLICATION parity ADD TABLE late;
INSERT INTO late VALUES (1, 'a');

UPDATE late SET note = 'b';

DROP TABLE late;

CREATE TABLE late (note text, id int PRIMARY KEY);
ALTER TABLE late REPLICA IDENTITY FULL;
ALTER PUBLICATION parity ADD TABLE late;

INSERT INTO late VALUES ('anew', 1);
