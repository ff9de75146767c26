-- Bytes of any value and number.
CREATE TABLE blob (id int PRIMARY KEY, b bytea);
ALTER TABLE blob REPLICA IDENTITY FULL;
ALTER TABLE blob ALTER b SET STORAGE EXTERNAL;

CREATE TABLE by_bytes (b bytea PRIMARY KEY, note text);

-- slots

INSERT INTO blob VALUES
    (1, ''), (2, NULL), (3, '\x00'), (4, (SELECT string_agg(set_byte('\x00', 0, n), '' ORDER BY n) FROM generate_series(0, 255) n)),
    (5, 'abc\134'), (6, decode(repeat('00ff', 20000), 'hex')), (7, '\x5c78');
UPDATE blob SET b = b || '\x01'::bytea WHERE id IN (1, 2, 4);
UPDATE blob SET id = 60 WHERE id = 6;
DELETE FROM blob;

INSERT INTO by_bytes VALUES ('\x00ff', 'a'), ('', 'b');
UPDATE by_bytes SET b = '\x01' WHERE note = 'a';
DELETE FROM by_bytes;
