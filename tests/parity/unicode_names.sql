-- Names beyond ASCII.
CREATE TABLE "Kundé 🎉" ("größe" int PRIMARY KEY, "中文" text, "​" text, "𝓊𝓃" text);
ALTER TABLE "Kundé 🎉" REPLICA IDENTITY FULL;

-- slots

INSERT INTO "Kundé 🎉" VALUES (1, '值', 'zero width', '𝓊');
UPDATE "Kundé 🎉" SET "größe" = 2, "​" = NULL;
DELETE FROM "Kundé 🎉";
