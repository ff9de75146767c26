"""What the documents say is so."""

from __future__ import annotations

import re
import signal
from contextlib import ExitStack, closing
from pathlib import Path
from socket import gethostname
from typing import LiteralString

import psycopg
from pydantic import BaseModel
from support import GRANTS, Crm, WorkerProcess, eventually, role

from cdc_worker.backfill import Backfilled, Sample
from cdc_worker.checks import Finding
from cdc_worker.config import PREFIX, Settings
from cdc_worker.doctor import CHECKS, Report
from cdc_worker.feed import Count, Entry
from cdc_worker.ledger import Missing
from cdc_worker.ours import Was
from cdc_worker.profile import read
from cdc_worker.replay import Line, Replayed
from cdc_worker.replay import Sample as ReplaySample
from cdc_worker.rewrite import Difference, Rewritten
from cdc_worker.status import Backfill, Counts, Failure, Process, Status

ROOT = Path(__file__).parent.parent


def settings_table() -> list[str]:
    """The README's table of settings, as the settings are."""
    rows = ["| Variable | Flag | Default | |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) or name == "dsn" else f"`{field.default}`"
        flag = f"`--{name.replace('_', '-')}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {flag} | {default} | {field.description} |")
    return rows


def test_the_readme_lists_every_setting_with_its_default() -> None:
    assert_has("README.md", settings_table())


def test_the_readme_lists_the_grants_with_which_the_suite_runs_the_worker() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [grant for grant in GRANTS if f"    {grant.format(role='cdc')};" not in readme] == []


def test_operating_lists_the_fields_of_the_status() -> None:
    assert_has("docs/operating.md", fields_table(Status, Process, Counts, Backfill, Failure))


def fields_table(*models: type[BaseModel]) -> list[str]:
    """Of the first, and of the others as fields of its fields."""
    rows = ["| Field | |", "| --- | --- |"]
    for model in models:
        of = "" if model is models[0] else f"(of {model.__name__.lower()}) "
        rows += [f"| {of}`{name}` | {field.description} |" for name, field in model.model_fields.items()]
    return rows


def test_operating_lists_the_fields_of_the_doctor() -> None:
    assert_has("docs/operating.md", fields_table(Report, Finding))


def test_backfill_lists_the_fields_of_its_json() -> None:
    assert_has("docs/backfill.md", fields_table(Backfilled, Sample))


def test_replay_lists_the_fields_of_its_json_and_of_its_lines() -> None:
    assert_has("docs/replay.md", fields_table(Replayed, ReplaySample, Missing))
    assert_has("docs/replay.md", fields_table(Line))


def test_replay_lists_what_a_rewrite_tells_beside_them() -> None:
    rows = fields_table(Rewritten, Difference, Was)
    assert_has("docs/replay.md", [row for row in rows if row not in fields_table(Replayed)[2:]])


def test_activities_lists_the_fields_of_its_json() -> None:
    assert_has("docs/activities.md", fields_table(Entry))
    assert_has("docs/activities.md", fields_table(Count))


def test_operating_lists_the_checks_of_the_doctor() -> None:
    rows = ["| Check | |", "| --- | --- |"]
    rows += [f"| `{check.__name__}` | {(check.__doc__ or '').splitlines()[0]} |" for check in CHECKS]
    assert_has("docs/operating.md", rows)


def assert_has(document: str, rows: list[str]) -> None:
    assert "\n".join(rows) in (ROOT / document).read_text(), "\n" + "\n".join(rows)


def test_links_within_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_names_every_make_target_that_it_uses() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(re.findall(r"(?:^    (?:\S+=\S+ )?|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test"} <= used <= targets


def shown(document: str, first: str) -> list[str]:
    """The block of a document that begins with this line, in the parts between which something is left out."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / document).read_text(), re.M)
    texts = [re.sub(r"^    ", "", block, flags=re.M) for block in blocks]
    (found,) = [text for text in texts if text.startswith(first)]
    return found.split("…\n")


def positions(text: str) -> str:
    """A text with all positions alike."""
    return re.sub(r"\b[0-9A-F]+/[0-9A-F]+\b", "0/0", text)


def test_installing_prints_what_its_page_shows(bare_crm: Crm) -> None:
    bare_crm.settings["slot"] = "cdc_worker"
    for name in ("legacy.sql", "rows.sql", "old_migration.sql"):
        for statement in (ROOT / "tests" / "legacy" / name).read_text().split("\n\n"):
            try:
                bare_crm.connection.execute(statement.encode())
            except psycopg.errors.CheckViolation:  # as it did on old rows without a link
                assert "chk_activity_link" in statement
    bare_crm.add_leads(3)
    try:
        printed = [bare_crm.succeed("setup", "--role", "cdc", *more) for more in (["--dry-run"], [])]
        bare_crm.execute("UPDATE lead SET status = 'x' WHERE lead_id = 7")
        printed += [
            bare_crm.succeed("run", "--once"),
            bare_crm.succeed("forget", "--lead", "7", "--yes"),
            bare_crm.succeed("cutover", "--back"),
            bare_crm.succeed("run", "--once"),
            bare_crm.succeed("teardown", "--all", "--yes"),
        ]
    finally:
        bare_crm.execute("DROP ROLE IF EXISTS cdc")
    for first in ("-- The links of manual activities stand", "forgotten: lead 7", 'slot "cdc_worker" is dropped'):
        for part in shown("docs/installing.md", first):
            assert any(positions(part) in positions(text) for text in printed), (
                f"not printed:\n{part}\nbut:\n" + "\n".join(printed)
            )


def varying(text: str) -> list[str]:
    """The lines of a text with all numbers, positions and names of this machine alike."""
    text = re.sub(r"[0-9A-F]+/[0-9A-F]+|\d[\d,.:-]*(?: UTC)?", "#", text.replace(f" on {gethostname()}", " on vm"))
    return [re.sub(r"PostgreSQL .*", "PostgreSQL", re.sub(" +", " ", line)) for line in text.splitlines()]


def test_operating_prints_what_its_page_shows(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.slot = crm.settings["slot"] = "cdc_worker"
    crm.setup()
    with closing(psycopg.connect(crm.dsn, application_name="psql")) as other, ExitStack() as stack:
        for event in ("replication_started", "waiting_for_slot"):
            stack.enter_context(worker := crm.worker()).wait_for(event)
        crm.add_leads(12)
        eventually(lambda: len(crm.types()) == 12)
        other.execute("LOCK TABLE activity")
        crm.execute("UPDATE lead SET status = 'x'")
        eventually(lambda: "target locked" in crm.succeed("status"))
        (status,) = shown("docs/operating.md", "worker: ")
        assert varying(status) == varying(crm.succeed("status"))
        printed = varying(crm.command("doctor").stdout)
        for part in shown("docs/operating.md", "warning  max_slot_wal_keep_size"):
            assert [line for line in varying(part) if line not in printed] == []
        assert worker.process.poll() is None


def test_activities_prints_what_its_page_shows(crm: Crm) -> None:
    told = "SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"changed_by\": \"jane\"}')"
    changes: list[LiteralString] = [
        "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status)"
        " VALUES (7, 'Ada Lind', 'web', 'jane', 't', '1. lead generated')",
        "SELECT create_manual_activity('call', 'Wants to see fees in writing', 7, p_bd_in_charge => 'jane')",
        "UPDATE lead SET status = '2. proposal'",
        "UPDATE lead SET is_converted = true",
    ]
    for change in changes:
        with crm.connection.transaction():
            crm.execute(told)
            crm.execute(change)
        crm.record()
    # One day after another, which the worker's rows are not to be given: they are read-only.
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("UPDATE activity SET date_created = now()::date - 1 + time '9:14' + activity_id * interval '1 minute'")
    crm.execute("UPDATE activity SET date_created = date_created + interval '1 day' WHERE metadata ? 'final_status'")
    (timeline,) = shown("docs/activities.md", "2026-11-21\n")
    assert varying(timeline) == varying(crm.succeed("timeline", "--lead", "7"))
    printed = varying(crm.succeed("stats"))
    for part in shown("docs/activities.md", "Activities by category"):
        assert [line for line in varying(part) if line not in printed] == []


HISTORY: LiteralString = """
INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status, is_converted, date_created)
SELECT n, (ARRAY['Ada Lind', 'Grace Tan', 'Ken Abe'])[1 + n % 3], 'web', 'jane', 'exchange', '2. proposal', n % 10 = 3,
       timestamp '2024-03-01 09:00' + n * interval '7 hours' FROM generate_series(1, 1204) n;
INSERT INTO customer (customer_uid, name, type, date_created) VALUES (70, 'Lind Ltd', 'fund', '2024-05-06 07:08:09');
INSERT INTO contact (customer_uid, lead_id, date_added) VALUES (70, 3, '2024-05-06 07:08:09');
ANALYZE lead
"""


def test_backfill_prints_what_its_page_shows_with_the_grants_that_it_lists(new_crm: Crm) -> None:
    crm = new_crm
    crm.slot = crm.settings["slot"] = "cdc_worker"
    crm.connection.execute(HISTORY.encode())
    crm.setup()
    page = (ROOT / "docs" / "backfill.md").read_text()
    with role(crm):
        for grant in re.findall(r"^    (GRANT .*);$", page, re.M):
            crm.connection.execute(grant.encode())
        assert shown("docs/backfill.md", "error: ") == [crm.command("backfill").stderr]
        assert shown("docs/backfill.md", "public.lead: 1,204") == [crm.succeed("backfill", "--dry-run")]
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            arguments = ["backfill", "lead", "--chunk-size", "500", "--rate", "500"]
            with WorkerProcess(arguments, crm.environment(), crm.directory / "backfill.log") as filling:
                eventually(lambda: crm.value("SELECT max(rows) >= 500 FROM cdc_worker.backfill"))
                filling.process.send_signal(signal.SIGINT)
                assert filling.wait() == 130
                assert shown("docs/backfill.md", "interrupted") == [filling.said]
            (line,) = shown("docs/backfill.md", "backfill: ")
            assert varying(line)[0] in varying(crm.succeed("status"))
            (lines,) = shown("docs/backfill.md", "public.lead: 704")
            assert varying(lines) == varying(crm.succeed("backfill"))
    metadata = "SELECT jsonb_pretty(metadata) FROM activity WHERE activity_type = 'lead_converted'"
    (example,) = shown("docs/backfill.md", "{\n")
    assert varying(example) == varying(crm.value(metadata))
    (rule,) = shown("docs/backfill.md", "[tables.lead.rules.backfill]")
    assert rule in read("leadfi")
