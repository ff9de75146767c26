-- Arrays come as text.
CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"', 'a,b', '{}');
CREATE TYPE pair AS (a int, b text);
CREATE TABLE list (
    id int PRIMARY KEY, numbers int[], exact numeric[], reals float8[], truths bool[], texts text[], bytes bytea[], days date[],
    moments timestamptz[], moods mood[], pairs pair[], objects jsonb[], ranges int4range[], fixed char(4)[], spans interval[]
);
ALTER TABLE list REPLICA IDENTITY FULL;

-- slots

INSERT INTO list VALUES
    (1, '{1,NULL,3}', '{1.50,-0.0,1e30}', '{1.5,-0,1e300}', '{t,f,NULL}', ARRAY['', 'NULL', NULL, 'a"b', 'c\d', 'e,f', '{g}', ' h ', E'i\nj', 'é🎉'],
     ARRAY['\x00ff'::bytea, '', NULL], '{2026-01-31,infinity,"0044-03-15 BC"}', '{"2026-01-31 12:00:00+05:30",-infinity}',
     ARRAY['sad', 'it''s "ok"', 'a,b', '{}']::mood[], ARRAY[ROW(1, 'x,y'), ROW(NULL, '"'), NULL]::pair[],
     ARRAY['{"a": [1, "b"]}', 'null']::jsonb[], ARRAY['[1,5)', 'empty']::int4range[], '{a,bc}', '{"1 day -01:00:00",0}'),
    (2, '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}'),
    (3, '{{1,2},{3,4}}', '[0:1]={1,2}', '[-1:0][2:3]={{1,2},{3,4}}', NULL, '{{{a}}}', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);

UPDATE list SET numbers = array_append(numbers, 5), texts = texts[1:2] WHERE id = 1;
UPDATE list SET numbers[1][1] = 9 WHERE id = 3;
DELETE FROM list;
