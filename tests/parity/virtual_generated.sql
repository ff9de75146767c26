-- from 18
-- Columns that are computed when they are read. They are in no WAL.
CREATE TABLE computed (id int PRIMARY KEY, a int, double int GENERATED ALWAYS AS (a * 2) VIRTUAL, note text);

-- slots

INSERT INTO computed (id, a, note) VALUES (1, 1, 'x');
UPDATE computed SET a = 5;
DELETE FROM computed;
