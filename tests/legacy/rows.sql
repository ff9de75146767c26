-- What a legacy activity table holds after some years, in a session without triggers: activities of every BD, without a
-- BD, without a lead, and of leads that are gone.

SET session_replication_role = replica;

INSERT INTO lead (lead_id, full_name, source, status, company_name, bd_in_charge, type, date_created)
SELECT n, 'Lead ' || n, 'website', '1. lead generated', 'Company ' || n, 'jane', 'exchange', '2020-01-01'
FROM generate_series(1, 5) n;

INSERT INTO customer (customer_uid, name, date_created) VALUES (7001, 'Acme', '2020-01-01');

INSERT INTO activity (lead_id, activity_type, description, date_created, bd) VALUES
    (1, 'call', 'Wants to see fees in writing', '2021-03-01 09:00', 'jane'),
    (1, 'email', NULL, '2021-03-02 10:30:00.123456', 'john'),
    (2, 'meeting', 'Ünïcode “quotes” and a \ ', '2021-03-03', NULL),
    (NULL, 'note', 'of nobody', '2021-03-04', 'jane'),
    (99, 'call', 'of a lead that is gone', '2021-03-05', 'john'),
    (3, 'demo', '', '2021-03-06', '');

SELECT setval('lead_lead_id_seq', 5);

RESET session_replication_role;
