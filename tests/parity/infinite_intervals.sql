-- from 17
-- Intervals that never end.
CREATE TABLE span (id int PRIMARY KEY, span interval, list interval[]);
ALTER TABLE span REPLICA IDENTITY FULL;

-- slots

INSERT INTO span VALUES (1, 'infinity', '{infinity,-infinity}'), (2, '-infinity', '{1 day}');
UPDATE span SET span = -span;
DELETE FROM span;
