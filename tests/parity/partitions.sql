-- Partitions come under their own names, and rows move between them.
CREATE TABLE deal (id int, region text, amount int DEFAULT 0, note text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE deal_north PARTITION OF deal FOR VALUES IN ('north');
CREATE TABLE "deal, south" PARTITION OF deal FOR VALUES IN ('south');
CREATE TABLE deal_east PARTITION OF deal FOR VALUES IN ('east') PARTITION BY RANGE (id);
CREATE TABLE deal_east_1 PARTITION OF deal_east FOR VALUES FROM (0) TO (100);
CREATE TABLE deal_rest PARTITION OF deal DEFAULT;
ALTER TABLE deal_north REPLICA IDENTITY FULL;
ALTER TABLE "deal, south" REPLICA IDENTITY FULL;
ALTER TABLE deal_east_1 REPLICA IDENTITY FULL;

CREATE TABLE other_order (note text, amount int, dropped int, region text NOT NULL, id int NOT NULL, PRIMARY KEY (id, region));
ALTER TABLE other_order DROP COLUMN dropped;
ALTER TABLE other_order REPLICA IDENTITY FULL;

CREATE TABLE parent (id int PRIMARY KEY, note text);
CREATE TABLE child (PRIMARY KEY (id), more int) INHERITS (parent);
ALTER TABLE parent REPLICA IDENTITY FULL;
ALTER TABLE child REPLICA IDENTITY FULL;

-- slots

INSERT INTO deal (id, region) SELECT n, (ARRAY['north', 'south', 'east', 'moon'])[n] FROM generate_series(1, 4) n;
UPDATE deal SET amount = id;
UPDATE deal SET region = 'south' WHERE id = 1;
UPDATE deal SET region = 'north', note = 'moved' WHERE id = 3;
UPDATE deal SET region = 'east' WHERE id = 4;
DELETE FROM deal WHERE region = 'north';

CREATE TABLE deal_west PARTITION OF deal FOR VALUES IN ('west');

INSERT INTO deal VALUES (5, 'west', 5, 'new'), (6, 'west', 6, NULL);
UPDATE deal SET amount = 7 WHERE id = 5;
UPDATE deal SET region = 'south' WHERE id = 5;

BEGIN;
CREATE TABLE deal_up PARTITION OF deal FOR VALUES IN ('up');
INSERT INTO deal VALUES (7, 'up', 5, 'same transaction');
ALTER TABLE deal_up REPLICA IDENTITY FULL;
UPDATE deal SET amount = 8 WHERE id = 7;
COMMIT;

ALTER TABLE deal ATTACH PARTITION other_order FOR VALUES IN ('down');

INSERT INTO deal VALUES (8, 'down', 8, 'other order');
UPDATE deal SET region = 'north' WHERE id = 8;
UPDATE deal SET region = 'down' WHERE id = 8;

ALTER TABLE deal ADD COLUMN extra text DEFAULT 'x';

UPDATE deal SET extra = 'y' WHERE id = 8;

INSERT INTO deal VALUES (9, 'up', 9, 'last'), (10, 'east', 10, NULL);
ALTER TABLE deal DETACH PARTITION deal_up;
DROP TABLE deal_north;

UPDATE deal SET region = 'south' WHERE id = 10;

INSERT INTO parent VALUES (1, 'p');
INSERT INTO child VALUES (2, 'c', 3);
UPDATE parent SET note = note || '!';
DELETE FROM parent;
TRUNCATE parent;
