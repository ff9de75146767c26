-- LeadFi as another installation has it: each activity is of a lead, and may be a task.

CREATE TABLE activity (
    activity_id        serial PRIMARY KEY,
    lead_id            integer NOT NULL REFERENCES lead ON DELETE CASCADE,
    activity_type      varchar(50) NOT NULL,
    activity_category  varchar(20) NOT NULL DEFAULT 'manual' CHECK (activity_category IN ('manual', 'system', 'automated')),
    description        text,
    activity_metadata  jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(activity_metadata) = 'object'),
    date_created       timestamp NOT NULL DEFAULT now(),
    assigned_to        varchar(20),
    created_by         varchar(50),
    is_visible_to_bd   boolean NOT NULL DEFAULT true,
    task_status        varchar(20) CHECK (task_status IN ('pending', 'in_progress', 'completed', 'cancelled')),
    task_priority      varchar(10) CHECK (task_priority IN ('low', 'medium', 'high')),
    due_date           date,
    CHECK ((task_status IS NULL) = (task_priority IS NULL))
);
