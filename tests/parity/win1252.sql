-- database WIN1252
-- An encoding in which some bytes are no characters: nobody can read them, and what comes after them is read.
CREATE TABLE preis (id int PRIMARY KEY, "€" text);
ALTER TABLE preis REPLICA IDENTITY FULL;

-- slots

INSERT INTO preis VALUES (1, '5 €, œuvre, “so”');

INSERT INTO preis VALUES (2, convert_from('\x81', 'WIN1252'));

UPDATE preis SET "€" = '–' WHERE id = 1;
