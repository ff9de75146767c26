-- Very long texts, and those that an update leaves where they are, under each identity that can tell.
CREATE TABLE long_full (id int PRIMARY KEY, n int, body text, js jsonb, list text[], bytes bytea, exact numeric);
ALTER TABLE long_full REPLICA IDENTITY FULL;
ALTER TABLE long_full ALTER body SET STORAGE EXTERNAL, ALTER js SET STORAGE EXTERNAL, ALTER list SET STORAGE EXTERNAL,
    ALTER bytes SET STORAGE EXTERNAL, ALTER exact SET STORAGE EXTERNAL;

CREATE TABLE long_default (id int PRIMARY KEY, n int, body text, other text);
ALTER TABLE long_default ALTER body SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL;

CREATE TABLE long_index (id int NOT NULL, code text NOT NULL, body text, note text);
CREATE UNIQUE INDEX long_index_code ON long_index (code, id);
ALTER TABLE long_index REPLICA IDENTITY USING INDEX long_index_code;
ALTER TABLE long_index ALTER body SET STORAGE EXTERNAL;

CREATE TABLE compressed (id int PRIMARY KEY, body text);
ALTER TABLE compressed REPLICA IDENTITY FULL;

-- slots

INSERT INTO long_full VALUES
    (1, 1, repeat('é🎉"\', 5000), jsonb_build_object('key', repeat('v', 9000)), ARRAY[repeat('x', 5000), repeat('y', 5000)],
     decode(repeat('ab', 9000), 'hex'), repeat('9', 9000)::numeric),
    (2, 2, 'short', '{}', '{}', '', 1);
UPDATE long_full SET n = 10;
UPDATE long_full SET body = body || '!' WHERE id = 1;
UPDATE long_full SET body = NULL, bytes = '' WHERE id = 1;
UPDATE long_full SET id = 3 WHERE id = 1;
DELETE FROM long_full;

INSERT INTO long_default VALUES (1, 1, repeat('a', 9000), repeat('b', 9000)), (2, 2, repeat('c', 9000), NULL);
UPDATE long_default SET n = 10;
UPDATE long_default SET body = repeat('d', 9000) WHERE id = 1;
UPDATE long_default SET other = NULL, n = 11 WHERE id = 1;
UPDATE long_default SET id = 3 WHERE id = 2;
DELETE FROM long_default;

INSERT INTO long_index VALUES (1, 'a', repeat('a', 9000), 'x'), (2, 'b', 'short', 'y');
UPDATE long_index SET note = 'z';
UPDATE long_index SET code = 'c' WHERE id = 1;
DELETE FROM long_index;

INSERT INTO compressed VALUES (1, repeat('compressible ', 20000)), (2, repeat('x', 3000000));
UPDATE compressed SET body = body || '.' WHERE id = 1;
UPDATE compressed SET id = id + 10;
DELETE FROM compressed;
