-- TRUNCATE of partitioned tables. pgoutput names the partitions that were emptied, and never the table they are parts of.
CREATE TABLE sale (id int PRIMARY KEY, note text) PARTITION BY RANGE (id);
CREATE TABLE sale_1 PARTITION OF sale FOR VALUES FROM (0) TO (10);
CREATE TABLE sale_2 PARTITION OF sale FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (id);
CREATE TABLE sale_2a PARTITION OF sale_2 FOR VALUES FROM (10) TO (15);
CREATE TABLE sale_2b PARTITION OF sale_2 FOR VALUES FROM (15) TO (20);

CREATE TABLE before (id int PRIMARY KEY);
CREATE TABLE referring (id int PRIMARY KEY, before_id int REFERENCES before) PARTITION BY RANGE (id);
CREATE TABLE between (id int PRIMARY KEY, before_id int REFERENCES before);
CREATE TABLE referring_1 PARTITION OF referring DEFAULT;

CREATE TABLE unheard (id int PRIMARY KEY);

-- slots

INSERT INTO sale SELECT n FROM generate_series(5, 15, 5) n;

TRUNCATE sale_1;

TRUNCATE sale_2;

TRUNCATE sale;

TRUNCATE between, referring, sale, unheard;

TRUNCATE before CASCADE;

BEGIN;
INSERT INTO sale VALUES (1, 'gone again');
TRUNCATE sale;
INSERT INTO sale VALUES (2, 'left');
TRUNCATE sale;
TRUNCATE sale;
INSERT INTO sale VALUES (3, 'last');
COMMIT;

TRUNCATE sale_1, sale_2b;

CREATE TABLE sale_3 PARTITION OF sale FOR VALUES FROM (20) TO (30);
INSERT INTO sale VALUES (21, 'third');

TRUNCATE sale;

DROP TABLE sale_2b;

TRUNCATE sale;
