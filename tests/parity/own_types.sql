-- Composites, ranges, enums in quoted schemas and domains, some of them changed on the way.
CREATE SCHEMA "My Sch";
CREATE SCHEMA "a.b""c, d";
CREATE TYPE "My Sch"."My Enum" AS ENUM ('a', 'b c', 'd"e', 'é');
CREATE TYPE "a.b""c, d"."type ""x""" AS ENUM ('1', '2.5', 'true');
CREATE TYPE inner_row AS (a int, "B c" text);
CREATE TYPE outer_row AS (i inner_row, n numeric, d date[], t text);
CREATE TYPE float_range AS RANGE (subtype = float8);
CREATE DOMAIN whole AS int CHECK (VALUE > 0);
CREATE DOMAIN exact AS numeric(12, 2);
CREATE DOMAIN yes AS bool;
CREATE DOMAIN bytes AS bytea;
CREATE DOMAIN real_number AS float8;
CREATE DOMAIN words AS text[];
CREATE DOMAIN nested AS whole CHECK (VALUE < 100);
CREATE DOMAIN whole_row AS outer_row;
CREATE TABLE composed (id int PRIMARY KEY, i inner_row, o outer_row, os outer_row[], w whole_row);
ALTER TABLE composed REPLICA IDENTITY FULL;

CREATE TABLE spread (
    id int PRIMARY KEY, i int4range, b int8range, n numrange, d daterange, t tsrange, z tstzrange, f float_range, m int4multirange,
    fm float_multirange
);
ALTER TABLE spread REPLICA IDENTITY FULL;

CREATE TABLE chosen (id int PRIMARY KEY, "the Enum" "My Sch"."My Enum" DEFAULT 'a', x "a.b""c, d"."type ""x""");
ALTER TABLE chosen REPLICA IDENTITY FULL;

CREATE TABLE bound (
    id whole PRIMARY KEY, e exact, y yes, b bytes, r real_number, w words, n nested, whole_array whole[], days date
);
ALTER TABLE bound REPLICA IDENTITY FULL;

-- slots

INSERT INTO composed VALUES
    (1, ROW(1, 'x'), ROW(ROW(2, 'a "b" (c), \d'), 1.50, '{2026-01-31}', ''), ARRAY[ROW(NULL, NULL, NULL, NULL)::outer_row],
     ROW(NULL, 1, NULL, NULL)),
    (2, ROW(NULL, NULL), ROW(NULL, NULL, NULL, NULL), '{}', NULL),
    (3, NULL, NULL, NULL, NULL);
UPDATE composed SET i.a = 5, o.t = E'new\nline' WHERE id = 1;
DELETE FROM composed;

INSERT INTO spread VALUES
    (1, '[1,5]', '(,5)', '[1.50,2)', '[2026-01-01,2026-02-01)', '[2026-01-01,)', '[2026-01-01 00:00+05:30,infinity)', '[1.5,2.5]',
     '{[1,2),[5,6)}', '{[1,2]}'),
    (2, 'empty', 'empty', 'empty', 'empty', 'empty', 'empty', 'empty', '{}', '{}'),
    (3, '(,)', NULL, '(,)', '(,)', '(,)', '(,)', '(,)', '{(,)}', NULL);
UPDATE spread SET i = i + int4range(5, 9), m = m + int4multirange(int4range(2, 3)) WHERE id = 1;
DELETE FROM spread;

INSERT INTO chosen VALUES (1, DEFAULT, '1'), (2, 'b c', '2.5'), (3, 'd"e', 'true'), (4, 'é', NULL);
UPDATE chosen SET "the Enum" = 'b c' WHERE id = 1;
UPDATE chosen SET x = '2.5' WHERE x = '1';
DELETE FROM chosen WHERE id > 2;

ALTER TYPE "My Sch"."My Enum" RENAME TO "Your Enum";
ALTER TYPE "My Sch"."Your Enum" RENAME VALUE 'a' TO 'renamed';
ALTER TYPE "My Sch"."Your Enum" ADD VALUE 'later';

INSERT INTO chosen VALUES (5, 'later', '1'), (6, 'renamed', '1');

INSERT INTO bound VALUES
    (1, 1.5, true, '\x00ff', 1.5, '{a,b}', 5, '{1,2}', 'epoch'),
    (2, 1000000, false, '', '1e300', '{}', 99, '{}', '2026-01-31'),
    (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
UPDATE bound SET e = 2, y = NOT y, n = 6;
UPDATE bound SET id = 9 WHERE id = 1;
DELETE FROM bound;
