-- Stored generated columns. Before PostgreSQL 18 they aren't published.
CREATE TABLE computed (id int PRIMARY KEY, a int, double int GENERATED ALWAYS AS (a * 2) STORED, note text);
ALTER TABLE computed REPLICA IDENTITY FULL;

CREATE TABLE computed_by_key (id int PRIMARY KEY, a int, double int GENERATED ALWAYS AS (a * 2) STORED, note text);

-- slots

INSERT INTO computed (id, a, note) VALUES (1, 1, 'x'), (2, NULL, 'y');
UPDATE computed SET a = 5 WHERE id = 1;
UPDATE computed SET note = 'z';
DELETE FROM computed;

INSERT INTO computed_by_key (id, a, note) VALUES (1, 1, 'x');
UPDATE computed_by_key SET a = 5;
DELETE FROM computed_by_key;
