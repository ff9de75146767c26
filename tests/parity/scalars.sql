-- Every scalar type, with its extremes.
CREATE TABLE number (
    id int PRIMARY KEY, two int2, four int4, eight int8, object oid, exact numeric, scaled numeric(20, 6), single float4,
    double float8, truth bool
);
ALTER TABLE number REPLICA IDENTITY FULL;

CREATE TABLE texts (id int PRIMARY KEY, body text, short varchar(20), fixed char(6), one "char", ident name, bare bpchar);
ALTER TABLE texts REPLICA IDENTITY FULL;

CREATE TABLE moment (
    id int PRIMARY KEY, day date, clock time, zoned timetz, local timestamp, instant timestamptz, rough timestamptz(0),
    span interval
);
ALTER TABLE moment REPLICA IDENTITY FULL;

CREATE TABLE other (
    id int PRIMARY KEY, uuid uuid, money money, bits bit(5), varying bit varying, inet inet, cidr cidr, mac macaddr,
    mac8 macaddr8, point point, line line, lseg lseg, box box, path path, polygon polygon, circle circle,
    vector tsvector, query tsquery, lsn pg_lsn, snapshot pg_snapshot, old_snapshot txid_snapshot, xid xid, xid8 xid8,
    cid cid, tid tid, class regclass, kind regtype, proc regproc, procedure regprocedure, oper regoper,
    operator regoperator, role regrole, namespace regnamespace, config regconfig, dictionary regdictionary,
    cursor refcursor, small_vector int2vector, oids oidvector, acl aclitem, js json, jsb jsonb, path_of jsonpath
);
ALTER TABLE other REPLICA IDENTITY FULL;

-- slots

INSERT INTO number VALUES
    (1, -32768, -2147483648, -9223372036854775808, 0, 0, 0, 0, 0, false),
    (2, 32767, 2147483647, 9223372036854775807, 4294967295, -0.00, 1.5, '-0', '-0', true),
    (3, 0, 0, 9007199254740993, 2147483648, 12345678901234567890.123456789012345678901234567890, 99999999999999.999999,
     16777217, 9007199254740993, NULL),
    (4, -1, -1, -1, 1, 1e-40, -0.000001, 1.17549435e-38, 2.2250738585072014e-308, true),
    (5, 1, 1, 1, 1, 1e40, 0.1, 3.4028235e38, 1.7976931348623157e308, true),
    (6, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (7, 7, 7, 7, 7, 1.10, 1.1, 1e-45, 5e-324, true),
    (8, 8, 8, 8, 8, 100, 100, 1e15, 1e16, true),
    (9, 9, 9, 9, 9, 0.30000000000000000000000000000001, 1, 0.3, 0.1 + 0.2, true),
    (10, 1, 1, 1, 1, -1e5000 - 1, 1, 1e6, 1e23, true),
    (11, 1, 1, 1, 1, 1e-5000, 1, 123456.79, 123456789012345.6, true);

UPDATE number SET exact = exact + 0.0, double = double + 1 WHERE id < 9;
UPDATE number SET exact = 1.1 WHERE id = 7;

DELETE FROM number WHERE id IN (1, 2, 3, 4, 10);

INSERT INTO texts VALUES
    (1, '', '', '', '', '', ''),
    (2, E'tab\t newline\n return\r backslash\\ quote" apostrophe'' slash/ bell\x07 \x01\x1f delete\x7f', E'\b\f\x0b', 'ab', 'c',
     'a name', 'bare  '),
    (3, 'é ü ß 中文 🎉 ‮right to left‬ ​zero width﻿', '🎉', '🎉', 'x', 'é', '中 '),
    (4, NULL, NULL, NULL, NULL, NULL, NULL),
    (5, 'null', 'NULL', '\N', 'n', 'null', 'NaN'),
    (6, '1e5', '1', ' 2 ', '3', 'true', 'Infinity'),
    (7, '{"a": 1}', '[1]', '"x"', '"', '''', 'é' || repeat('x', 10));

UPDATE texts SET fixed = fixed || 'z', body = body || ' ' WHERE id < 4;
UPDATE texts SET fixed = 'ab    ' WHERE id = 2;
DELETE FROM texts;

INSERT INTO moment VALUES
    (1, '2026-01-31', '12:34:56.789012', '12:34:56.789012+05:30', '2026-01-31 12:34:56.789012',
     '2026-01-31 12:34:56.789012+05:30', '2026-01-31 12:34:56.5+00', '1 year 2 mons 3 days 04:05:06.789'),
    (2, 'infinity', '24:00:00', '24:00:00-15:59', 'infinity', 'infinity', 'infinity', '0'),
    (3, '-infinity', '00:00:00', '00:00:00+15:59', '-infinity', '-infinity', '-infinity', '-1 year -2 mons +3 days -04:05:06'),
    (4, '0044-03-15 BC', '23:59:59.999999', '00:00+00', '0044-03-15 12:00:00 BC', '0044-03-15 12:00:00+00 BC', '0001-01-01 00:00+00',
     '178000000 years'),
    (5, '4713-01-01 BC', '00:00:00.000001', '00:00:00.1+01:02:03', '4713-01-01 00:00 BC', '4713-01-01 00:00+00 BC',
     '4713-01-01 00:00+00 BC', '-00:00:00.000001'),
    (6, '5874897-12-31', '01:00', '01:00+14', '294276-12-31 23:59:59.999999', '294276-12-31 23:59:59.999999+00',
     '294276-12-31 23:59:59+00', 'P1Y2M3DT4H5M6S'),
    (7, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (8, '1883-11-18', '12:03:58', '12:03:58-04:56:02', '1883-11-18 12:03:58', '1883-11-18 12:03:58 America/New_York',
     '1883-11-18 12:03:58 America/New_York', '1 day -00:00:01');

UPDATE moment SET span = span * 2, day = day, local = local WHERE id IN (1, 3);
DELETE FROM moment;

INSERT INTO other (
    id, uuid, money, bits, varying, inet, cidr, mac, mac8, point, line, lseg, box, path, polygon, circle, vector, query, lsn,
    snapshot, old_snapshot, xid, xid8, cid, tid, class, kind, proc, procedure, oper, operator, role, namespace, config,
    dictionary, cursor, small_vector, oids, acl, js, jsb, path_of
) VALUES
    (1, 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', 1234567.891, B'10101', B'1', '192.168.0.1/24', '10.0.0.0/8', '08:00:2b:01:02:03',
     '08:00:2b:01:02:03:04:05', '(1.5,-2)', '{1,2,3}', '[(0,0),(1,1)]', '(1,1),(0,0)', '[(0,0),(1,1),(2,0)]', '((0,0),(1,1),(2,0))',
     '<(0,0),1e-10>', 'a fat cat:3A ''it''''s''', 'fat & (rat | !cat:*)', '16/B374D848', '10:20:10,14,15', '10:20:10,14,15',
     '4294967295', '18446744073709551615', '0', '(4294967294,65535)', 'pg_class', 'timestamp with time zone', 'now', 'abs(numeric)',
     '||/', '+(integer,integer)', 'postgres', 'pg_catalog', 'english', 'simple', 'a cursor', '1 2 3', '1 2 4294967295', 'postgres=arwdDxt/postgres',
     E'{"b" : 1,\n  "a":[1, 2.50, "\\u00e9"], "b": 2}', '{"b": 1, "a": [1, 2.50, "\u00e9"], "b": 2}', '$."a"[*] ? (@ > 1)'),
    (2, '00000000-0000-0000-0000-000000000000', -0.01, B'00000', B'', '::1', '2001:db8::/32', 'ff:ff:ff:ff:ff:ff',
     '00:00:00:00:00:00:00:00', '(1e300,-0)', '{0,1,0}', '[(1e-5,0),(0,0)]', '(0,0),(0,0)', '((0,0))', '((0,0))', '<(1,1),0>', '', '',
     '0/0', '1:1:', '1:1:', '0', '0', '0', '(0,0)', '-', '-', '-', '-', '0', '0', '-', 'pg_toast', 'simple', 'simple', '', '', '', '=r/postgres',
     'null', 'null', '$'),
    (3, NULL, '92233720368547758.07', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
     NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '"x"', '1e5', NULL);

UPDATE other SET jsb = jsb || '[1e400, 1.0]', js = '{ }', money = money * 2, varying = varying || B'0110' WHERE id < 3;
DELETE FROM other;
