"""What a worker tells over HTTP: whether it is alive and ready, metrics, and a page for a person on call."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import Crm, WorkerProcess, eventually, free_port, stranger

from cdc_worker import profile, web
from cdc_worker.cluster import Cluster
from cdc_worker.config import Settings, load
from cdc_worker.errors import SettingsError
from cdc_worker.observer import STALE, Observer, links, types
from cdc_worker.status import Unreachable
from cdc_worker.stop import HANG
from cdc_worker.vitals import BUCKETS, SIZE, Vitals


class Site:
    """What is served on a port."""

    def __init__(self, port: int, within: web.Site | None = None) -> None:
        self.port, self._within = port, within

    @property
    def within(self) -> web.Site:
        """What serves it, where that is this process."""
        assert self._within is not None
        return self._within

    def ask(self, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """The answer to a request; its body is there to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=headers)
        return connection.getresponse()

    def json(self, path: str) -> tuple[int, Any]:
        """The status of an answer, and what it says."""
        answer = self.ask(path)
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(answer.read())

    @property
    def state(self) -> Any:
        """What the page shows."""
        return self.json("/status.json")[1]

    @property
    def metrics(self) -> dict[tuple[str, str], float]:
        """All samples, by name and by their label's value."""
        answer = self.ask("/metrics")
        assert answer.status == 200
        return {
            (sample.name, "".join(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.read().decode())
            for sample in family.samples
        }


@contextmanager
def serving(crm: Crm, **settings: str) -> Iterator[tuple[WorkerProcess, Site]]:
    """A worker that serves."""
    port = free_port()
    with crm.worker(http_port=str(port), **settings) as worker:
        site = Site(port)
        eventually(lambda: worker.process.poll() is not None or listens(port), what=worker.said)
        yield worker, site


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


READY = (200, {"ok": True, "role": "active", "reasons": []})


def test_a_worker_that_records_is_alive_and_ready(crm: Crm) -> None:
    with serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        assert site.json("/readyz") == site.json("/healthz") == READY
        assert worker.terminate() == 0


def test_who_stands_by_is_ready_to(crm: Crm) -> None:
    with crm.worker() as active, serving(crm) as (worker, site):
        for event in ("waiting_for_slot", "replication_started"):
            worker.wait_for(event) if event == "waiting_for_slot" else active.wait_for(event)
        assert site.json("/readyz") == (200, {"ok": True, "role": "standby", "reasons": []})
        eventually(lambda: site.state["status"].get("processes", [{}])[0].get("pid") == active.process.pid)
        assert site.metrics["cdc_worker_role", "standby"] == 1
        assert active.terminate() == 0
        worker.wait_for("replication_started")
        assert site.json("/readyz") == READY


def test_without_a_server_it_is_alive_and_says_why_it_is_not_ready(own_server: Cluster, own_crm: Crm) -> None:
    with serving(own_crm) as (worker, site):
        worker.wait_for("replication_started")
        eventually(lambda: site.state["status"].get("healthy"))
        own_server.stop()
        worker.wait_for("connection_lost")
        eventually(lambda: site.json("/readyz")[0] == 503)
        _, told = site.json("/readyz")
        assert (told["ok"], told["role"], len(told["reasons"])) == (False, "connecting", 1)
        assert "OperationalError" in told["reasons"][0] or "AdminShutdown" in told["reasons"][0]
        assert site.json("/healthz") == (200, {"ok": True, "role": "connecting", "reasons": []})
        eventually(lambda: "server down: " in (site.state["status"]["late"] or ""))
        assert site.state["samples"]
        metrics = site.metrics
        assert metrics["cdc_worker_database_up", ""] == 0
        assert ("cdc_worker_lag_bytes", "") not in metrics
        own_server.start()
        eventually(lambda: site.json("/readyz") == READY)
        assert site.metrics["cdc_worker_reconnects_total", ""] == 1
        eventually(lambda: site.state["status"]["late"] is None)


def test_a_stranger_at_the_slot_is_named(server: Cluster, crm: Crm) -> None:
    with stranger(server, crm), serving(crm) as (worker, site):
        worker.wait_for("waiting_for_slot")
        status, told = site.json("/readyz")
        assert status == 503
        assert told["reasons"][0].startswith("slot taken: it is read by process ")
        eventually(lambda: (site.state["status"]["late"] or "").startswith("slot taken: it is read by process "))


def test_who_locks_the_target_is_named(crm: Crm) -> None:
    with psycopg.connect(crm.dsn) as other, serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        eventually(lambda: (site.state["status"].get("late") or "").startswith("target locked: by process "))
        eventually(lambda: site.json("/readyz")[1]["reasons"][:1] and site.json("/readyz")[0] == 503)
        assert "target locked: by process " in site.json("/readyz")[1]["reasons"][0]
        other.rollback()
        eventually(lambda: site.json("/readyz") == READY)


def test_a_loop_that_hangs_is_not_alive() -> None:
    settings = load(None, {"dsn": "host=none", "http_port": "1"})
    vitals = Vitals()
    site = web.Site(settings, vitals, Observer(settings, vitals))
    vitals.became("active")
    assert site.paths["/healthz"]("")[0] == 200
    vitals.turned_at = time.monotonic() - HANG - 1
    status, _, body = site.paths["/healthz"]("")
    assert (status, json.loads(body)["reasons"]) == (503, ["the loop hangs for 301 s"])
    vitals.became("connecting")  # a call that waits for the server, not for the loop
    assert site.paths["/healthz"]("")[0] == 200


def test_metrics_tell_what_was_done_and_what_is_so(crm: Crm) -> None:
    with serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        crm.add_leads(40)
        crm.execute("UPDATE lead SET status = 'x'")
        crm.execute("ALTER TABLE activity ADD CHECK (activity_type <> 'lead_deleted') NOT VALID")
        crm.execute("DELETE FROM lead WHERE lead_id = 1")
        worker.wait_for("change_dead_lettered")
        eventually(lambda: site.metrics["cdc_worker_dead_letters_waiting", ""] == 1)
        eventually(lambda: site.metrics["cdc_worker_lag_bytes", ""] == 0)
        metrics = site.metrics
        batches = metrics["cdc_worker_batches_total", ""]
        written = crm.value("SELECT extract(epoch FROM written_at)::float8 FROM cdc_worker.checkpoint")
    assert metrics["cdc_worker_activities_total", "lead_created"] == 40
    assert metrics["cdc_worker_activities_total", "status_changed"] == 40
    assert metrics["cdc_worker_dead_letters_total", "refused"] == 1
    assert metrics["cdc_worker_transactions_total", ""] == 3
    assert metrics["cdc_worker_role", "active"] == metrics["cdc_worker_ready", ""] == 1
    assert metrics["cdc_worker_write_seconds_count", ""] == batches > 0
    assert metrics["cdc_worker_write_seconds_bucket", "+Inf"] == batches
    assert 0 < metrics["cdc_worker_write_seconds_sum", ""] < 60
    assert 0 < metrics["cdc_worker_decode_seconds_total", ""] < 60
    assert metrics["cdc_worker_lag_seconds", ""] == 0
    assert metrics["cdc_worker_retained_wal_bytes", ""] > 0
    assert metrics["cdc_worker_checkpoint_timestamp_seconds", ""] == pytest.approx(written, abs=60)
    assert metrics["process_resident_memory_bytes", ""] > 0


UNITS = ("_seconds", "_bytes", "_total", "_info", "_bucket", "_count", "_sum")
UNITLESS = ("_role", "_ready", "_database_up", "_dead_letters_waiting", "_gaps", "_streaming")


def test_names_and_units_are_by_the_conventions(crm: Crm) -> None:
    with serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        eventually(lambda: site.metrics.get(("cdc_worker_database_up", "")))
        families = [*text_string_to_metric_families(site.ask("/metrics").read().decode())]
        own = [family for family in families if family.name.startswith("cdc_worker")]
        assert len(own) > 15
        for family in own:
            assert family.documentation
            for sample in family.samples:
                assert sample.name.endswith(UNITS + UNITLESS)
                assert (family.type == "counter") == sample.name.endswith("_total")
        open_metrics = site.ask("/metrics", Accept="application/openmetrics-text")
        assert open_metrics.headers["Content-Type"].startswith("application/openmetrics-text")
        assert open_metrics.read().endswith(b"# EOF\n")


def test_a_histogram_has_each_batch_in_its_bucket() -> None:
    vitals = Vitals()
    for seconds in (0.0, *BUCKETS, 61.0, 3600.0):
        vitals.wrote(seconds)
    assert vitals.writes == [2, *[1] * (len(BUCKETS) - 1), 2]
    assert vitals.batches == len(BUCKETS) + 3


# The page


def test_the_page_is_one_file_that_asks_nobody_else(crm: Crm) -> None:
    with serving(crm) as (_, site):
        answer = site.ask("/")
        page = answer.read().decode()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["'(]?(?!data:)(?:https?:)?//""", page.replace("w3.org", ""))
    assert "innerHTML" not in page
    assert re.findall(r'fetch\("([^"]*)"', page) == ["status.json"]
    policy = answer.headers["Content-Security-Policy"]
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


def test_the_state_has_all_that_a_person_on_call_asks_and_no_values(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT undeletable CHECK (activity_type <> 'lead_deleted') NOT VALID")
    with serving(crm) as (worker, site):
        worker.wait_for("replication_started")
        crm.add_leads(20)
        eventually(lambda: site.state["process"]["activities"])  # in a batch with the delete one less is remembered
        crm.execute("DELETE FROM lead WHERE lead_id = 7")
        worker.wait_for("change_dead_lettered")
        eventually(lambda: site.state["dead_letters"] and site.state["doctor"])
        state = site.state
    assert state["process"]["role"] == "active"
    assert state["process"]["activities"] == {"lead_created": 20}
    assert state["status"]["slot"] == crm.slot
    assert state["status"]["late"].startswith("dead letters: 1 changes wait to be seen to")
    (letters,) = state["dead_letters"]
    assert (letters["table"], letters["sqlstate"], letters["constraint"]) == ("public.lead", "23514", "undeletable")
    assert letters["count"] == 1
    assert {of["check"] for of in state["doctor"]["findings"]} >= {"checkpoint", "wal_level"}
    assert [of["links"] for of in state["activities"]] == [{"lead": str(n)} for n in range(20, 8, -1)]
    assert {tuple(of) for of in state["activities"]} == {("at", "type", "links")}
    assert state["samples"][0].keys() == {"at", "lag_bytes", "lag_seconds", "activities"}
    assert "c4n4ry" not in json.dumps(state)


DRAWN = """
name = "drawn"
[target]
table = "activity"
columns = { activity_type = "type", description = "description", lead_id = "lead", created_by = "company" }
[tables.lead]
key = "lead_id"
fields = { lead = "{row.lead_id}", company = "{row.full_name}" }
values = { kind = { by = "row.type", map = { a = "call" }, default = "{row.type}" } }
[[tables.lead.rules]]
on = "insert"
name = "drawn"
type = "{new.full_name}"
description = ""
[[tables.lead.rules]]
on = "delete"
name = "kind"
type = "{values.kind}"
description = ""
[[tables.lead.rules]]
on = "update"
changed = "*"
type = "lead_updated"
description = ""
"""


def test_types_and_links_are_what_the_profile_names_and_no_values() -> None:
    drawn = profile.parse(DRAWN, source="drawn")
    assert sorted(types(drawn)) == ["call", "lead_updated"]
    assert links(drawn) == ("lead",)


def test_a_type_that_is_a_value_is_told_nowhere(crm: Crm, tmp_path: Path) -> None:
    path = tmp_path / "drawn.toml"
    path.write_text(DRAWN)
    with serving(crm, profile=str(path)) as (worker, site):
        worker.wait_for("replication_started")
        crm.add_leads(3)
        eventually(lambda: site.state["process"]["activities"] == {"other": 3})
        eventually(lambda: any(sample["activities"] == {"other": 3} for sample in site.state["samples"]))
        state, metrics = site.state, site.ask("/metrics").read().decode()
    assert [(of["type"], [*of["links"]]) for of in state["activities"]] == [("other", ["lead"])] * 3
    assert 'cdc_worker_activities_total{type="other"} 3.0' in metrics
    assert "Lead " not in metrics + json.dumps(state)


def test_what_has_not_happened_yet_is_counted_as_none(crm: Crm) -> None:
    with listening(crm) as site:
        metrics = site.metrics
    counted = {of: value for of, value in metrics.items() if of[0].endswith(("dead_letters_total", "activities_total"))}
    kinds = ("old_values_unknown", "rule_failed", "refused", "unreadable")
    assert counted == {
        **{("cdc_worker_dead_letters_total", kind): 0 for kind in kinds},
        **{("cdc_worker_activities_total", kind): 0 for kind in types(profile.load("leadfi"))},
    }


def observing(crm: Crm, **given: str) -> Observer:
    settings: Settings = load(None, {"dsn": crm.dsn, "slot": crm.slot, **given})
    return Observer(settings, Vitals())


def test_a_database_that_does_not_tell_its_state_is_not_down(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = observing(crm)
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE cdc_worker.checkpoint")
        observer.look()
    assert isinstance(observer.seen.found, Unreachable)
    assert "tables of cdc-worker are locked" in observer.seen.found.late
    assert (observer.seen.status, observer.seen.database_up) == (None, True)
    later = time.monotonic() + STALE + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not observer.seen.database_up
    down = observing(crm, dsn="host=127.0.0.1 port=1")
    down.look()
    assert not down.seen.database_up


def test_who_looks_goes_on_after_what_nobody_has_foreseen(
    crm: Crm, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    observer = observing(crm)
    with monkeypatch.context() as patch:
        patch.setattr("cdc_worker.status.status", lambda settings: 1 // 0)
        before = observer.seen
        observer.look()
        observer.look()
        assert observer.seen is before
    said = capfd.readouterr()
    assert (said.out + said.err).count("observing_failed") == 1
    observer.look()
    assert observer.seen.status is not None


def test_how_old_it_is_does_not_depend_on_the_time_of_day(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = observing(crm)
    observer.look()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    observer.look()
    assert observer.seen.status is not None
    assert 0 <= observer.seen.age < STALE
    assert len(observer.samples) == 1


def test_texts_are_behind_a_switch(crm: Crm) -> None:
    with serving(crm, http_values="true") as (worker, site):
        worker.wait_for("replication_started")
        crm.add_leads(2)
        crm.execute("UPDATE lead SET full_name = repeat('x', 50), background = repeat('y', %s)", SIZE)
        eventually(lambda: len(site.state["activities"]) == 4)
        state = site.state
    assert [of["description"] for of in state["activities"]][2:] == [
        'Lead "Lead 2" created by jane',
        'Lead "Lead 1" created by jane',
    ]


# What is refused


def test_nothing_else_is_answered(crm: Crm) -> None:
    with serving(crm) as (worker, site):
        unknown = site.ask("/../etc/passwd")
        assert unknown.status == 404
        assert unknown.read() == b"there is nothing here: / /status.json /metrics /healthz /readyz\n"
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            assert site.ask("/status.json", method).status == 501
        head = site.ask("/", "HEAD")
        assert (head.status, head.read()) == (200, b"")
        assert int(head.headers["Content-Length"]) > 1000
        assert site.ask("/healthz?x=1").status == 200
        # A page from elsewhere, whose name leads here, is none of ours.
        assert site.ask("/status.json", Host=f"evil.example:{site.port}").status == 421
        assert site.ask("/status.json", Host=f"localhost:{site.port}").status == 200
        worker.terminate()
        assert worker.said.count("\n") == len(worker.events())


@contextmanager
def listening(crm: Crm, host: str = "127.0.0.1") -> Iterator[Site]:
    """A site in this process, of a worker that has done nothing."""
    settings, vitals = load(None, {"dsn": crm.dsn, "slot": crm.slot, "http_host": host}), Vitals()
    within = web.Site(settings, vitals, Observer(settings, vitals))
    server = web._Server(host, 0, within)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        port = server.server_address[1]
        assert isinstance(port, int)
        yield Site(port, within)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_many_who_never_ask_do_not_keep_others_from_being_answered(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PATIENCE", 0.5)
    with listening(crm) as site:
        silent = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(web.CONNECTIONS + 8)]
        eventually(lambda: answers(site), what="those who said nothing were let go of")
        for one in silent:
            one.close()


def test_who_asks_a_byte_at_a_time_is_cut_off(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte would begin a timeout of the socket anew: together they held all that is there for a probe."""
    monkeypatch.setattr(web, "PATIENCE", 1.0)
    with listening(crm) as site:
        slow = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(web.CONNECTIONS)]
        over = threading.Event()

        def drip() -> None:
            while not over.wait(0.1):
                for one in slow:
                    with suppress(OSError):
                        one.send(b"G")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            eventually(lambda: answers(site), what="those who dripped were cut off")
        finally:
            over.set()
            thread.join()
            for one in slow:
                one.close()


def test_a_thread_that_can_not_be_started_takes_no_place(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with listening(crm) as site:
        with monkeypatch.context() as patch:
            patch.setattr(ThreadingMixIn, "process_request", refused)
            assert not any(answers(site) for _ in range(web.CONNECTIONS + 1))
        assert answers(site)


ANY = "0.0.0.0"  # noqa: S104  # for as long as a test takes


@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        *(("127.0.0.1", host, 200) for host in ("localhost", "LOCALHOST.", "127.0.0.1", "127.3.2.1", "[::1]")),
        *(("127.0.0.1", host, 421) for host in ("evil.example", "worker", "10.0.0.1", "", "[", "crm.internal")),
        *(("127.0.0.2", host, 421) for host in ("evil.example", "worker")),
        ("127.0.0.2", "127.0.0.2", 200),
        *((ANY, host, 200) for host in ("localhost", "10.0.0.1", "[fd00::1]", "worker", socket.gethostname())),
        *((ANY, host, 200) for host in ("crm.default.svc", "crm.default.svc.cluster.local", "vm.internal")),
        *((ANY, host, 421) for host in ("evil.example", "evil.example.", "svc.example", "", "[")),
    ],
)
def test_a_page_from_elsewhere_can_not_read_it_under_a_name_that_leads_here(
    crm: Crm, bound: str, host: str, status: int
) -> None:
    with listening(crm, bound) as site, socket.create_connection((bound, site.port)) as one:
        one.sendall(f"GET /healthz HTTP/1.0\r\nHost: {f'{host}:{site.port}' if host else ''}\r\n\r\n".encode())
        assert int(one.makefile().readline().split()[1]) == status


def test_who_names_nobody_is_answered(crm: Crm) -> None:
    """As probes of load balancers ask. Browsers always say whom they mean."""
    with listening(crm) as site, socket.create_connection(("127.0.0.1", site.port)) as one:
        one.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert one.makefile().readline() == "HTTP/1.0 200 OK\n"


def test_what_is_no_request_is_no_error_of_ours(crm: Crm, capfd: pytest.CaptureFixture[str]) -> None:
    with listening(crm) as site:
        for accept in ("text/plain; version=x", "application/openmetrics-text; version=1.x"):
            answer = site.ask("/metrics", Accept=accept)
            assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        with socket.create_connection(("127.0.0.1", site.port)) as one:
            one.sendall(b"GET http://[ HTTP/1.0\r\n\r\n")
            assert one.makefile().readline() == "HTTP/1.0 400 Bad Request\n"
    assert capfd.readouterr() == ("", "")


def answers(site: Site) -> bool:
    try:
        return site.ask("/healthz").status == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_port_that_is_taken_is_an_error_at_start(crm: Crm) -> None:
    with serving(crm) as (worker, site):
        done = crm.command("run", http_port=str(site.port))
        assert done.returncode == 2
        assert done.stderr == (
            f"error: nothing can be served on 127.0.0.1, port {site.port}: Address already in use\n"
            "hint: name a port of its own for each process in CDC_WORKER_HTTP_PORT, and an address of this machine in"
            " CDC_WORKER_HTTP_HOST\n"
        )
        assert worker.process.poll() is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no..host"])
def test_an_address_that_is_none_of_this_machine_is_refused(host: str) -> None:
    settings = load(None, {"dsn": "host=none", "http_port": str(free_port()), "http_host": host})
    with pytest.raises(SettingsError, match=f"nothing can be served on {host}"):
        web.serve(settings, Vitals())


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert load(None, {"dsn": "host=none"}).http_host == "127.0.0.1"
    assert load(None, {"dsn": "host=none"}).http_port is None
    assert load(None, {"dsn": "host=none"}).http_values is False
