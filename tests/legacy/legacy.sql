-- LeadFi's activity table before any enhancement, with the trigger function that it shares with other tables.

CREATE TABLE activity (
    activity_id    serial PRIMARY KEY,
    lead_id        int REFERENCES lead (lead_id),
    activity_type  varchar(50) NOT NULL,
    description    text,
    date_created   timestamp NOT NULL,
    bd             varchar(20)
);

CREATE FUNCTION trigger_set_timestamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.date_created = NOW();
    RETURN NEW;
END;
$$;

CREATE TRIGGER set_timestamp BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION trigger_set_timestamp();

CREATE TRIGGER set_timestamp BEFORE INSERT ON lead FOR EACH ROW EXECUTE FUNCTION trigger_set_timestamp();

CREATE TRIGGER set_timestamp BEFORE INSERT ON customer FOR EACH ROW EXECUTE FUNCTION trigger_set_timestamp();
