-- Three replica identities under which everything goes, and the fourth under which rows can only come.
CREATE TABLE by_all (id int, name text, n int);
ALTER TABLE by_all REPLICA IDENTITY FULL;

CREATE TABLE by_key (name text, id int, part int, note text, PRIMARY KEY (part, id));

CREATE TABLE by_index (note text, code text NOT NULL, id int PRIMARY KEY);
CREATE UNIQUE INDEX by_index_code ON by_index (code);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code;

CREATE TABLE by_nothing (id int PRIMARY KEY, note text);
ALTER TABLE by_nothing REPLICA IDENTITY NOTHING;

CREATE TABLE without_key (id int, note text);

CREATE TABLE changing (id int PRIMARY KEY, code text NOT NULL UNIQUE, note text);

-- slots

INSERT INTO by_all VALUES (1, 'a', 1), (2, NULL, NULL), (2, NULL, NULL);
UPDATE by_all SET n = n + 1;
UPDATE by_all SET id = 5, name = 'b' WHERE id = 1;
UPDATE by_all SET n = n;
DELETE FROM by_all;

INSERT INTO by_key VALUES ('a', 1, 1, 'x'), ('b', 2, 1, NULL);
UPDATE by_key SET note = 'y';
UPDATE by_key SET id = 10 WHERE id = 1;
UPDATE by_key SET part = 2, note = NULL;
UPDATE by_key SET id = id, name = name;
DELETE FROM by_key;

INSERT INTO by_index VALUES ('x', 'a', 1), (NULL, 'b', 2);
UPDATE by_index SET note = 'y';
UPDATE by_index SET id = 10 WHERE id = 1;
UPDATE by_index SET code = 'c', note = NULL WHERE code = 'a';
DELETE FROM by_index;

INSERT INTO by_nothing VALUES (1, 'a');
INSERT INTO without_key VALUES (1, 'a'), (NULL, NULL);
TRUNCATE by_nothing, without_key;

INSERT INTO changing VALUES (1, 'a', 'x');
UPDATE changing SET note = 'by key';
ALTER TABLE changing REPLICA IDENTITY FULL;
UPDATE changing SET note = 'by all';
ALTER TABLE changing REPLICA IDENTITY USING INDEX changing_code_key;
UPDATE changing SET note = 'by index';
UPDATE changing SET code = 'b';
ALTER TABLE changing REPLICA IDENTITY DEFAULT;
UPDATE changing SET id = 2;

ALTER TABLE changing REPLICA IDENTITY FULL;

UPDATE changing SET note = NULL;
DELETE FROM changing;
