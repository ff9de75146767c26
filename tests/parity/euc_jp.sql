-- database EUC_JP
-- An encoding with characters of several bytes, of which not everybody has the same idea.
CREATE TABLE "表" (id int PRIMARY KEY, "名前" text, fixed char(5));
ALTER TABLE "表" REPLICA IDENTITY FULL;

-- slots

INSERT INTO "表" VALUES (1, '日本語 カタカナ', '犬'), (2, '～', 'abc');
UPDATE "表" SET "名前" = "名前" || '!';
DELETE FROM "表";
SELECT pg_logical_emit_message(true, 'asked', '挨拶');
