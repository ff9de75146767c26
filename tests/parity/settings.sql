-- A session that prints and reads everything otherwise.
CREATE TABLE said (
    id int PRIMARY KEY, day date, local timestamp, instant timestamptz, span interval, real_number float8, single float4, bytes bytea,
    money money, list timestamptz[], ranges tstzrange
);
ALTER TABLE said REPLICA IDENTITY FULL;

-- slots

SET datestyle = 'German, DMY';
SET intervalstyle = 'sql_standard';
SET bytea_output = 'escape';
SET extra_float_digits = -15;
SET timezone = 'Asia/Kolkata';
SET client_encoding = 'LATIN1';
SET standard_conforming_strings = off;
SET quote_all_identifiers = on;
SET lc_monetary = 'C';
SET array_nulls = off;
INSERT INTO said VALUES
    (1, '31.01.2026', '31.01.2026 12:00:00.5', '31.01.2026 12:00:00.5', '1-2 3 4:05:06', 1.0 / 3, 1.0 / 3, '\\xdeadbeef', 12.34,
     ARRAY['31.01.2026 12:00'::timestamptz], '[31.01.2026 12:00,)');

UPDATE said SET span = -span, day = day + 1;

DELETE FROM said;
