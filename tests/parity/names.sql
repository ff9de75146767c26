-- Names in quotes, and such as are made to harm.
CREATE SCHEMA "Names; drop";
CREATE TABLE "Names; drop"."Tab.le, ""x"" *" ("Id" int PRIMARY KEY, "a b" text, "c""d" text, "e'f" text, "g\h" text, "i.j" text, "k,l" text);
ALTER TABLE "Names; drop"."Tab.le, ""x"" *" REPLICA IDENTITY FULL;

CREATE TABLE "select" ("from" int PRIMARY KEY, "order" text, "NULL" text, "{}" text, "*" text, "%s %(x)s" text, "$1" text, " " text);
ALTER TABLE "select" REPLICA IDENTITY FULL;

CREATE TABLE "'; DROP TABLE lead; --" ("}]}" int PRIMARY KEY, "new
line" text, "tab	" text);

CREATE TABLE "UPPER" (id int PRIMARY KEY, "ID" int, "Id" int);
ALTER TABLE "UPPER" REPLICA IDENTITY FULL;

CREATE TABLE upper (id int PRIMARY KEY);

CREATE TABLE "a_name_of_sixty_three_bytes_which_is_as_long_as_a_name_can_be_xx" ("a_column_of_sixty_three_bytes_which_is_as_long_as_it_can_be_xxx" int PRIMARY KEY);

-- slots

INSERT INTO "Names; drop"."Tab.le, ""x"" *" VALUES (1, 'a', 'b', 'c', 'd', 'e', 'f');
UPDATE "Names; drop"."Tab.le, ""x"" *" SET "a b" = '"', "g\h" = NULL;
DELETE FROM "Names; drop"."Tab.le, ""x"" *";
TRUNCATE "Names; drop"."Tab.le, ""x"" *", "select";

INSERT INTO "select" VALUES (1, 'a', NULL, '{}', '*', '%s', '$1', ' ');
UPDATE "select" SET "from" = 2, " " = '  ';
DELETE FROM "select";

INSERT INTO "'; DROP TABLE lead; --" VALUES (1, 'a', 'b');
UPDATE "'; DROP TABLE lead; --" SET "new
line" = 'c';
DELETE FROM "'; DROP TABLE lead; --";

INSERT INTO "UPPER" VALUES (1, 2, 3);
UPDATE "UPPER" SET "ID" = 5;
INSERT INTO upper VALUES (1);
DELETE FROM upper;

INSERT INTO "a_name_of_sixty_three_bytes_which_is_as_long_as_a_name_can_be_xx" VALUES (1);
