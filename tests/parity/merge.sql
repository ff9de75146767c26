-- from 15
-- MERGE is what it comes to.
CREATE TABLE stock (id int PRIMARY KEY, n int, note text);
ALTER TABLE stock REPLICA IDENTITY FULL;

-- slots

INSERT INTO stock VALUES (1, 1, 'a'), (2, 2, 'b'), (3, 3, 'c');

MERGE INTO stock USING (VALUES (1, 10), (2, 0), (4, 40), (5, NULL)) AS come (id, n) ON stock.id = come.id
WHEN MATCHED AND come.n = 0 THEN DELETE
WHEN MATCHED THEN UPDATE SET n = stock.n + come.n
WHEN NOT MATCHED AND come.n IS NULL THEN DO NOTHING
WHEN NOT MATCHED THEN INSERT (id, n) VALUES (come.id, come.n);
