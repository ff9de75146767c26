"""The status page in a browser: a person new to it finds out why activities are late.

CDC_TEST_SCREENSHOTS names a directory to which pictures are written, as they are in docs/.
"""

from __future__ import annotations

import html
import os
import re
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import psycopg
import pytest
import tools
from support import Crm, eventually, stranger
from test_web import Site, listening, serving

from cdc_worker.cluster import Cluster

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
)
SETTLED = 4
"""So many seconds of the page's own time."""


def seen(site: Site, tmp_path: Path, name: str = "", *, dark: bool = False, settled: int = SETTLED) -> str:
    """The text of the page as a browser has it; takes a picture, if one is wanted, of what has a name."""
    url = f"http://127.0.0.1:{site.port}/"
    profile = f"--user-data-dir={tmp_path / 'browser'}"
    time = f"--virtual-time-budget={settled * 1000}"
    directory = os.environ.get("CDC_TEST_SCREENSHOTS")
    if directory and name:
        scheme = ("--force-dark-mode", "--enable-features=WebUIDarkMode") if dark else ()
        picture = f"--screenshot={Path(directory).absolute() / name}.png"
        done = tools.browser().run(*FLAGS, time, *scheme, profile, "--window-size=1080,900", picture, url)
        assert done.returncode == 0, done.stderr
    done = tools.browser().run(*FLAGS, time, profile, "--dump-dom", url)
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    body = re.sub(r"<(head|script)>.*?</\1>", "", done.stdout, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def verdict(site: Site, tmp_path: Path, name: str, *, dark: bool = False) -> str:
    """What the page says first."""
    text = seen(site, tmp_path, name, dark=dark)
    return re.sub(r".*?as of [\d.]+ s ago ", "", text.partition("This process")[0]).strip()


def late(site: Site, why: str) -> bool:
    """Wait until the worker's state says so."""
    return eventually(lambda: (site.state["status"].get("late") or "").startswith(why), what=why)


def test_all_is_well(crm: Crm, tmp_path: Path) -> None:
    with serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        crm.add_leads(60)
        crm.execute("UPDATE lead SET status = '2. proposal' WHERE lead_id %% 3 = 0")
        eventually(lambda: site.state["doctor"] and site.state["status"]["activities"]["hour"] == 80)
        text = seen(site, tmp_path, "well")
        assert "Keeping up" in text
        assert "This process active up" in text
        # Of the last minute as well, unless the machine has taken longer.
        assert re.search(r"lead_created \S+ 60 60\b", text)
        assert re.search(r"status_changed \S+ 20 20\b", text)
        assert "lead 60" in text
        assert "created by jane" not in text
        assert "none waits" in text
        assert "wal_level" in text
        assert re.search(r"What the doctor says [\d.]+ s ago", text)
        seen(site, tmp_path, "well-dark", dark=True)


def test_the_server_is_down(own_server: Cluster, own_crm: Crm, tmp_path: Path) -> None:
    with serving(own_crm) as (worker, site):
        worker.wait_for("replication_started")
        own_crm.add_leads(3)
        eventually(lambda: site.state["process"]["activities"])
        own_server.stop()
        late(site, "server down: ")
        text = seen(site, tmp_path, "server-down")
        assert re.search(r"as of [\d.]+ s ago Server down connection failed: .*Connection refused", text), text
        assert "Dead letters unknown: the database can't be asked" in text
        assert "none waits" not in text


def test_what_is_old_is_not_told_as_what_is_so(crm: Crm, tmp_path: Path) -> None:
    with listening(crm) as site:
        observer = site.within._observer
        observer.look()
        assert re.search(r"as of [\d.]+ s ago Not running", seen(site, tmp_path))
        observer.seen = replace(observer.seen, clock=observer.seen.clock - 60)
        text = seen(site, tmp_path)
    assert re.search(r"as of 6\d s ago Nobody knows the database was last looked at 6\d s ago", text), text


def test_a_page_that_was_never_answered_says_since_when(crm: Crm, tmp_path: Path) -> None:
    with listening(crm) as site:
        site.within.paths["/status.json"] = lambda accept: (HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"")
        assert "Asking" in seen(site, tmp_path)
        text = seen(site, tmp_path, settled=20)
    assert re.search(r"No answer this process has not answered for [12]\d s", text), text


def test_the_slot_is_taken(server: Cluster, crm: Crm, tmp_path: Path) -> None:
    with stranger(server, crm), serving(crm) as (worker, site):
        worker.wait_for("waiting_for_slot")
        late(site, "slot taken: ")
        said = verdict(site, tmp_path, "slot-taken")
        assert re.fullmatch(r"Slot taken it is read by process \d+ \(pg_recvlogical, 127\.0\.0\.1\)", said), said


def test_the_target_is_locked(crm: Crm, tmp_path: Path) -> None:
    with psycopg.connect(crm.dsn, application_name="psql") as other, serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        late(site, "target locked: ")
        said = verdict(site, tmp_path, "target-locked")
        assert re.fullmatch(
            r"Target locked by process \d+ \(psql, 127\.0\.0\.1, idle in transaction, for [\d:]+\)", said
        ), said


def test_dead_letters_wait(crm: Crm, tmp_path: Path) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT undeletable CHECK (activity_type <> 'lead_deleted') NOT VALID")
    with serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        crm.add_leads(20)
        crm.execute("DELETE FROM lead WHERE lead_id < 4")
        late(site, "dead letters: ")
        text = seen(site, tmp_path, "dead-letters")
    assert (
        "Dead letters 3 changes wait to be seen to, the last because the target refused the row (SQLSTATE 23514,"
        " constraint undeletable); see: cdc-worker dead-letters list"
    ) in text
    assert "public.lead refused the target refused the row" in text


def test_there_is_a_gap(server: Cluster, crm: Crm, tmp_path: Path) -> None:
    """The process ends at once with the exit code of one; another process sees it, as does `status`."""
    crm.record()
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    done = crm.command("run")
    assert done.returncode == 11
    printed = crm.succeed("status")
    assert re.search(r"^late: +gap: slot \"\S+\" does not exist", printed, re.MULTILINE), printed


@pytest.mark.parametrize("name", ["well", "well-dark", "server-down", "slot-taken", "target-locked", "dead-letters"])
def test_there_is_a_picture_of_each(name: str) -> None:
    picture = Path(__file__).parent.parent / "docs" / "status-page" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
