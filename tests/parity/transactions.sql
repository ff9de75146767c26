-- Transactions that are empty for us, large, full of subtransactions, written under an origin, or interleaved.
CREATE TABLE item (id int PRIMARY KEY, note text);
ALTER TABLE item REPLICA IDENTITY FULL;

CREATE TABLE unheard (id int PRIMARY KEY, note text);

CREATE TABLE nothing_in_it ();
ALTER TABLE nothing_in_it REPLICA IDENTITY FULL;

CREATE SEQUENCE counter;

SELECT pg_replication_origin_create('parity') WHERE NOT EXISTS (SELECT FROM pg_replication_origin WHERE roname = 'parity');

-- slots

INSERT INTO unheard VALUES (1, 'x');

SELECT nextval('counter');

CREATE TABLE made_meanwhile (id int);

DROP TABLE made_meanwhile;

BEGIN;
INSERT INTO item VALUES (0, 'undone');
DELETE FROM item WHERE id = 0;
COMMIT;

INSERT INTO item SELECT n, 'row ' || n FROM generate_series(1, 2500) n;

UPDATE item SET note = note || '!' WHERE id % 2 = 0;

DO $$
BEGIN
    FOR n IN 3001..3100 LOOP
        BEGIN
            INSERT INTO item VALUES (n, 'subtransaction');
            IF n % 3 = 0 THEN
                RAISE 'no';
            END IF;
        EXCEPTION WHEN raise_exception THEN
            NULL;
        END;
    END LOOP;
END $$;

SELECT pg_replication_origin_session_setup('parity');
INSERT INTO item VALUES (4001, 'from another server');
SELECT pg_replication_origin_xact_setup('1/23456789', '2020-02-20 20:20:20+00');
UPDATE item SET note = 'so is this' WHERE id = 4001;

SELECT pg_replication_origin_session_reset();

INSERT INTO nothing_in_it DEFAULT VALUES;
DELETE FROM nothing_in_it;

DELETE FROM item WHERE id > 100;
DELETE FROM item;
