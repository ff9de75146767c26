-- LeadFi's own tables, as its application makes them: for the demo, the tests and docker-compose. Setup never runs this.

CREATE TABLE lead (
    lead_id       serial PRIMARY KEY,
    full_name     varchar(50) NOT NULL,
    title         varchar(50),
    email         varchar(120),
    telegram      varchar(50),
    phone_number  varchar(20),
    source        varchar(50) NOT NULL,
    status        varchar(50),
    date_created  timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP,
    linkedin_url  varchar(255),
    company_name  varchar(120),
    country       varchar(50),
    bd_in_charge  varchar(20) NOT NULL,
    background    text,
    is_converted  boolean DEFAULT false,
    type          varchar(50) NOT NULL
);

CREATE TABLE customer (
    customer_uid      integer PRIMARY KEY,
    registered_email  varchar(120),
    type              varchar(50),
    name              varchar(120) NOT NULL,
    is_closed         boolean DEFAULT false,
    date_closed       timestamp,
    country           varchar(50),
    date_created      timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE contact (
    contact_id          serial PRIMARY KEY,
    customer_uid        integer NOT NULL REFERENCES customer ON DELETE CASCADE,
    lead_id             integer NOT NULL REFERENCES lead ON DELETE CASCADE,
    is_primary_contact  boolean DEFAULT true,
    date_added          timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP
);
