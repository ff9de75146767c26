-- Logical messages of both kinds, also among changes, and also of those that nobody asked for.
CREATE TABLE item (id int PRIMARY KEY, note text);
ALTER TABLE item REPLICA IDENTITY FULL;

CREATE TABLE unheard (id int PRIMARY KEY);

-- slots

SELECT pg_logical_emit_message(true, 'asked', 'alone in its transaction');

BEGIN;
SELECT pg_logical_emit_message(true, 'asked', 'before');
INSERT INTO item VALUES (1, 'a');
SELECT pg_logical_emit_message(true, 'asked', 'between: é 🎉 "quotes" \backslash ' || E'new\nline \x01');
SELECT pg_logical_emit_message(false, 'asked', 'at once, from within');
UPDATE item SET note = 'b';
SELECT pg_logical_emit_message(true, 'asked', '');
SELECT pg_logical_emit_message(true, 'asked too', 'prefix with a blank is not asked');
SELECT pg_logical_emit_message(true, 'unasked', 'nobody hears it');
SELECT pg_logical_emit_message(true, 'asked2', 'another prefix');
COMMIT;

SELECT pg_logical_emit_message(false, 'asked', 'at once');

BEGIN;
SELECT pg_logical_emit_message(true, 'asked', 'never');
SELECT pg_logical_emit_message(false, 'asked', 'at once, though it rolls back');
INSERT INTO item VALUES (2, 'never');
ROLLBACK;

BEGIN;
SAVEPOINT s;
SELECT pg_logical_emit_message(true, 'asked', 'rolled back');
ROLLBACK TO s;
SELECT pg_logical_emit_message(true, 'asked', 'after the savepoint');
INSERT INTO unheard VALUES (1);
COMMIT;

SELECT pg_logical_emit_message(true, 'unasked', 'alone, and nobody hears it');

SELECT pg_logical_emit_message(true, 'asked', 'before the zero\000 behind it'::bytea);
SELECT pg_logical_emit_message(true, 'asked', '\x00'::bytea);
SELECT pg_logical_emit_message(true, 'asked', 'no text: \377\376 \303( \355\240\200 end'::bytea);
SELECT pg_logical_emit_message(true, 'asked', '\xc3'::bytea);
SELECT pg_logical_emit_message(false, 'asked', 'no text: \377'::bytea);

SELECT pg_logical_emit_message(true, 'asked', repeat('long "', 50000));

SELECT pg_logical_emit_message(true, '', 'no prefix');
