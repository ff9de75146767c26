-- What numbers can't say. A wal2json before 2.6 says null for it.
CREATE TABLE odd (id int PRIMARY KEY, exact numeric, single float4, double float8, list numeric[], spread numrange);
ALTER TABLE odd REPLICA IDENTITY FULL;

-- slots

INSERT INTO odd VALUES
    (1, 'NaN', 'NaN', 'NaN', '{NaN,1}', '[1,2]'),
    (2, 'Infinity', 'Infinity', 'Infinity', '{Infinity}', '[1,Infinity]'),
    (3, '-Infinity', '-Infinity', '-Infinity', '{-Infinity}', '(,)');

UPDATE odd SET exact = 1, double = double WHERE id = 1;
UPDATE odd SET single = 2 WHERE id = 2;

DELETE FROM odd;
