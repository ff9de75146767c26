-- COPY, upserts, savepoints, two-phase commit, prepared rollback, triggers, cascades and what rolls back.
CREATE TABLE item (id int PRIMARY KEY, name text UNIQUE, n int DEFAULT 0);
ALTER TABLE item REPLICA IDENTITY FULL;

CREATE TABLE line (id int PRIMARY KEY, item_id int REFERENCES item ON DELETE CASCADE ON UPDATE CASCADE, note text);
ALTER TABLE line REPLICA IDENTITY FULL;

CREATE TABLE unheard (id int PRIMARY KEY, note text);

CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);

CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO line VALUES (1000 + NEW.id, NEW.id, TG_OP);
    RETURN NULL;
END $$;

-- slots

COPY item (id, name, n) FROM stdin;
1	one	\N
2	tab\tand\\backslash	2
3	\N	3

UPDATE item SET n = 5 WHERE id = 1;

INSERT INTO item VALUES (1, 'other', 1), (4, 'four', 4) ON CONFLICT (id) DO UPDATE SET n = item.n + 10, name = excluded.name;
INSERT INTO item VALUES (1, 'again', 1) ON CONFLICT DO NOTHING;
INSERT INTO item VALUES (4, 'four', 4) ON CONFLICT (id) DO UPDATE SET n = item.n WHERE false;

BEGIN;
INSERT INTO item VALUES (10, 'kept');
SAVEPOINT a;
INSERT INTO item VALUES (11, 'lost');
ROLLBACK TO a;
INSERT INTO item VALUES (12, 'kept too');
SAVEPOINT b;
UPDATE item SET n = 99 WHERE id = 12;
SAVEPOINT c;
DELETE FROM item WHERE id = 10;
RELEASE b;
SAVEPOINT d;
UPDATE item SET n = -1;
ROLLBACK TO d;
COMMIT;

BEGIN;
INSERT INTO item VALUES (13, 'never');
ROLLBACK;

DO $$
BEGIN
    INSERT INTO item VALUES (20, 'before');
    BEGIN
        INSERT INTO item VALUES (21, 'caught');
        RAISE 'no';
    EXCEPTION WHEN OTHERS THEN
        INSERT INTO item VALUES (22, 'after');
    END;
END $$;

BEGIN;
INSERT INTO item VALUES (30, 'prepared');
UPDATE item SET n = 31 WHERE id = 30;
PREPARE TRANSACTION 'parity';

BEGIN;
INSERT INTO item VALUES (31, 'prepared in vain');
PREPARE TRANSACTION 'parity in vain';

INSERT INTO item VALUES (32, 'between');

COMMIT PREPARED 'parity';

ROLLBACK PREPARED 'parity in vain';

INSERT INTO line VALUES (1, 1, 'a'), (2, 2, 'b'), (3, 2, 'c');
UPDATE item SET id = 100 WHERE id = 1;
DELETE FROM item WHERE id = 2;

CREATE TRIGGER stamp AFTER INSERT OR UPDATE OF name ON item FOR EACH ROW EXECUTE FUNCTION stamp();

INSERT INTO item VALUES (40, 'triggered');
UPDATE item SET name = NULL WHERE id = 30;

SET session_replication_role = replica;
INSERT INTO item VALUES (41, 'not triggered');
RESET session_replication_role;

BEGIN;
INSERT INTO unheard VALUES (1, 'x');
INSERT INTO unlogged VALUES (1);
CREATE TEMPORARY TABLE passing (id int);
INSERT INTO passing VALUES (1);
INSERT INTO item VALUES (42, 'among others');
UPDATE unheard SET note = 'y';
COMMIT;

WITH gone AS (DELETE FROM line WHERE id = 1 RETURNING *), made AS (INSERT INTO item VALUES (43, 'from a query'))
UPDATE item SET n = 44 WHERE id = 42;

DECLARE walk CURSOR FOR SELECT * FROM item WHERE id = 42 FOR UPDATE;
FETCH walk;
UPDATE item SET n = 45 WHERE CURRENT OF walk;
CLOSE walk;

SELECT * FROM item WHERE id = 42 FOR UPDATE;

UPDATE item SET n = n WHERE id = 42;
UPDATE item SET n = n + 1 WHERE false;
DELETE FROM line;
DELETE FROM item;
