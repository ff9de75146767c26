"""What deploy/ ships for service managers and for monitoring, each held against the tool of its trade."""

from __future__ import annotations

import json
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import tools
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support import Crm, eventually

from cdc_worker import errors, service_manager
from cdc_worker.cli import main
from cdc_worker.config import PREFIX, Settings, load
from cdc_worker.metrics import Exposition
from cdc_worker.observer import Observer, Seen
from cdc_worker.status import Counts, Status
from cdc_worker.stop import HANG
from cdc_worker.vitals import Vitals

DEPLOY = Path(__file__).parent.parent / "deploy"
DOCS = DEPLOY.parent / "docs"
UNIT = DEPLOY / "systemd" / "cdc-worker.service"
MANIFESTS = [*yaml.safe_load_all((DEPLOY / "kubernetes" / "cdc-worker.yaml").read_text())]
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
GAPS = {
    error.exit_code
    for error in (
        errors.SlotMissingError,
        errors.SlotMismatchError,
        errors.SlotLostError,
        errors.SlotAheadError,
        errors.ClusterMismatchError,
        errors.SlotGivenUpError,
    )
}
"""Exit codes that no service manager may restart into."""

NONE = Counts(minute=0, hour=0, day=0)
SEEN = Status(
    worker="w",
    late=None,
    healthy=True,
    processes=[],
    slot="w",
    plugin="pgoutput",
    active_pid=1,
    holder="w",
    wal_status="reserved",
    streaming=True,
    checkpoint="0/1",
    commit_lsn=None,
    changes=0,
    committed_at=None,
    written_at=datetime(2026, 11, 21, tzinfo=UTC),
    wal_end="0/2",
    lag_bytes=1,
    lag_seconds=0.5,
    retained_bytes=3,
    activities=NONE,
    dead_letters=NONE,
    dead_letters_waiting=0,
    marked=[],
    gaps=[],
    backfills=[],
    last_error=None,
    version="0",
    server_version="15",
)


def exposed() -> str:
    """All metrics that a worker has, each with a value."""
    settings, vitals = load(None, {"dsn": "host=none"}), Vitals()
    vitals.activities["lead_created"] += 1
    vitals.dead_letters["refused"] += 1
    observer = Observer(settings, vitals)
    observer.seen = Seen(time.time(), SEEN, [])
    return Exposition(vitals, observer, worker="w").text("")[1].decode()


def metrics() -> set[str]:
    return {of.name for family in text_string_to_metric_families(exposed()) for of in family.samples}


# Systemd


def verify(unit: Path, text: str) -> None:
    """Have systemd's own tool look at a unit, whose programs are there."""
    program = unit.with_name("cdc-worker")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    there = text.replace("/opt/cdc-worker/bin/cdc-worker", str(program))
    unit.write_text(there.replace("/bin/kill", str(program)))  # of a package that few machines lack
    done = tools.systemd_analyze(unit.parent).run("--user", "verify", "--man=no", str(unit))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_is_one_by_systemds_own_tool(tmp_path: Path) -> None:
    verify(tmp_path / UNIT.name, UNIT.read_text())


def test_it_is_one_with_an_instance_for_each_database_as_its_head_says(tmp_path: Path) -> None:
    template = UNIT.read_text()
    for of_one, of_each in (
        ("EnvironmentFile=/etc/cdc-worker/cdc-worker.env\n", "EnvironmentFile=/etc/cdc-worker/%i.env\n"),
        ("\nStateDirectory=cdc-worker\n", "\nStateDirectory=cdc-worker/%i\n"),
        ("WorkingDirectory=%S/cdc-worker\n", "WorkingDirectory=%S/cdc-worker/%i\n"),
    ):
        assert template.count(of_one) == 1
        template = template.replace(of_one, of_each)
    verify(tmp_path / "cdc-worker@crm.service", template)


def test_the_unit_is_well_guarded_by_systemds_own_measure(tmp_path: Path) -> None:
    """From 0, which is safe, to 10. A service as it is made by default has more than 9."""
    asked = ("--user", "security", "--offline=true", "--threshold=20", "--no-pager")
    done = tools.systemd_analyze(tmp_path).run(*asked, str(UNIT))
    assert done.returncode == 0, done.stdout


def test_the_unit_hides_nothing_that_the_metrics_of_the_process_need() -> None:
    """They are read from /proc, of which ProcSubset=pid leaves the processes alone."""
    assert "process_start_time_seconds" in metrics()
    assert re.findall(r"^ProcSubset=", UNIT.read_text(), re.MULTILINE) == []


def test_the_unit_begins_when_there_are_addresses_to_serve_on() -> None:
    """For it is not begun anew after one that there isn't (2)."""
    words = dict(re.findall(r"^(After|Wants)=(.*)$", UNIT.read_text(), re.MULTILINE))
    assert all("network-online.target" in words[name].split() for name in ("After", "Wants"))


def test_the_unit_never_restarts_into_a_gap() -> None:
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", UNIT.read_text(), re.MULTILINE)
    prevented = {int(code) for code in codes.split()}
    assert prevented >= GAPS
    assert f"    RestartPreventExitStatus={codes}" in (DOCS / "exit-codes.md").read_text()
    # What heals, by a person perhaps, is to be tried again.
    assert prevented.isdisjoint({1, 5, 6, 7, 8, 9, 10, 18, 20, 21, 22, 24, 25, 26})


def test_its_settings_are_settings() -> None:
    names = re.findall(rf"^{PREFIX}(\w+)=", (DEPLOY / "systemd" / "cdc-worker.env").read_text(), re.MULTILINE)
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


class Manager:
    """A service manager, which listens."""

    def __init__(self, path: Path, *, watchdog: float) -> None:
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.variables = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(watchdog * 1_000_000))}

    def hears(self, words: str) -> bool:
        """Whether it has heard these words."""
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return words in self.heard

    def hears_of(self, beginning: str) -> bool:
        """Whether it has heard something that begins so."""
        self.hears("")
        return any(words.startswith(beginning) for words in self.heard)


def test_systemd_hears_that_it_records_and_is_alive(crm: Crm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(tmp_path / "notify", watchdog=0.4)
    for name, value in manager.variables.items():
        monkeypatch.setenv(name, value)
    with crm.worker() as worker:
        eventually(lambda: manager.hears("READY=1"))
        eventually(lambda: manager.hears("STATUS=active"))
        eventually(lambda: manager.hears("WATCHDOG=1"))
        manager.heard.clear()
        eventually(lambda: manager.hears("WATCHDOG=1") and manager.heard.count("WATCHDOG=1") >= 3)
        assert "READY=1" not in manager.heard
        assert worker.terminate() == 0


def test_it_has_begun_while_it_waits_for_a_server(crm: Crm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(tmp_path / "notify", watchdog=60)
    for name, value in manager.variables.items():
        monkeypatch.setenv(name, value)
    with crm.worker(dsn=f"{crm.dsn} port=1") as worker:
        eventually(lambda: manager.hears("READY=1"))
        eventually(lambda: manager.hears_of("STATUS=connecting: OperationalError"))
        assert manager.hears("WATCHDOG=1")
        assert worker.terminate() == 0


def test_systemd_hears_nothing_more_of_a_loop_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(tmp_path / "notify", watchdog=0.02)
    for name, value in manager.variables.items():
        monkeypatch.setenv(name, value)
    vitals = Vitals()
    vitals.became("active")
    service_manager.tell(vitals)
    eventually(lambda: manager.hears("WATCHDOG=1"))
    vitals.turned_at = time.monotonic() - HANG - 1
    eventually(lambda: manager.hears("STATUS=active"))
    eventually(lambda: not silent_since(manager))
    manager.heard.clear()
    eventually(lambda: manager.hears("STATUS=active"))
    assert "WATCHDOG=1" not in manager.heard


def silent_since(manager: Manager) -> bool:
    """Whether anything of before was still to be heard."""
    manager.heard.clear()
    manager.hears("")
    return "WATCHDOG=1" in manager.heard


# Kubernetes


def manifest(kind: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [one for one in MANIFESTS if one["kind"] == kind]
    assert len(found) == 1
    return found[0]


def selectors() -> list[dict[str, str]]:
    """Of all that chooses pods."""
    spec = manifest("Deployment")["spec"]
    apart = spec["template"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = apart["preferredDuringSchedulingIgnoredDuringExecution"]
    return [
        spec["selector"]["matchLabels"],
        term["podAffinityTerm"]["labelSelector"]["matchLabels"],
        manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        manifest("Service")["spec"]["selector"],
    ]


CONTAINER: dict[str, Any] = manifest("Deployment")["spec"]["template"]["spec"]["containers"][0]


def test_the_manifests_are_of_their_kinds_by_kubernetes_own_schemas() -> None:
    for one in MANIFESTS:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_one_records_and_one_stands_by() -> None:
    spec = manifest("Deployment")["spec"]
    assert spec["replicas"] == 2
    assert manifest("PodDisruptionBudget")["spec"]["minAvailable"] == 1
    labels = spec["template"]["metadata"]["labels"].items()
    assert all(selector.items() <= labels for selector in selectors())


def test_two_databases_in_one_namespace_have_nothing_in_common() -> None:
    """Each has its name, by which nothing of the other's is chosen, or replaced."""
    names = {one["metadata"]["name"] for one in MANIFESTS}
    names |= {of["valueFrom"]["secretKeyRef"]["name"] for of in CONTAINER["env"] if "valueFrom" in of}
    names.add(manifest("Deployment")["spec"]["template"]["spec"]["serviceAccountName"])
    assert names == {"cdc-worker-crm"}
    assert {selector["app.kubernetes.io/instance"] for selector in selectors()} == {"crm"}


def test_a_worker_that_is_not_ready_can_be_asked_and_evicted() -> None:
    assert manifest("Service")["spec"]["publishNotReadyAddresses"] is True
    assert manifest("PodDisruptionBudget")["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_container_runs_a_command_with_settings_that_there_are() -> None:
    name, *options = CONTAINER["args"]
    with main.commands[name].make_context(name, list(options)):
        pass
    given = {of["name"].removeprefix(PREFIX).lower(): of.get("value") for of in CONTAINER["env"]}
    load(None, {**{name: value for name, value in given.items() if value is not None}, "dsn": "host=none"})
    assert given.keys() <= Settings.model_fields.keys()
    assert "http_values" not in given


def test_the_probes_ask_what_is_answered() -> None:
    (port,) = CONTAINER["ports"]
    (served,) = [of["value"] for of in CONTAINER["env"] if of["name"] == f"{PREFIX}HTTP_PORT"]
    assert str(port["containerPort"]) == served
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness", "startup")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "liveness": "/healthz",
        "readiness": "/readyz",
        "startup": "/healthz",
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}


def test_the_container_may_do_nothing_that_it_need_not() -> None:
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert manifest("Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


# Monitoring


def test_promtool_finds_nothing_to_say_about_the_metrics(tmp_path: Path) -> None:
    tool = tools.promtool()
    text = tmp_path / "metrics"
    text.write_text("".join(line for line in exposed().splitlines(keepends=True) if "process_" not in line))
    done = tools.Tool("/bin/sh", tool.environment).run("-c", f'"{tool.path}" check metrics <"{text}"')
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_alerts_fire_for_what_they_are_about() -> None:
    tool = tools.promtool()
    checked = tool.run("check", "rules", str(ALERTS))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = tool.run("test", "rules", str(ALERTS.with_name("alerts_test.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_when_it_fires_and_when_it_does_not_and_has_its_way_out_in_the_runbook() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    tried = yaml.safe_load(ALERTS.with_name("alerts_test.yml").read_text())["tests"]
    outcomes = {(of["alertname"], bool(of["exp_alerts"])) for test in tried for of in test["alert_rule_test"]}
    names = {rule["alert"] for rule in rules}
    assert outcomes == {(name, fires) for name in names for fires in (True, False)}
    runbook = (DOCS / "operating.md").read_text()
    assert [name for name in sorted(names) if f"| `{name}` |" not in runbook] == []


def test_jobs_are_called_as_the_alerts_have_them() -> None:
    (called, *others) = {*re.findall(r'job=~"([^"]*)"', ALERTS.read_text())}
    assert others == []
    shipped = ALERTS.with_name("prometheus.yml").read_text()
    jobs = re.findall(r"job_name: (\S+)", shipped)  # those in comments as well
    assert manifest("Service")["metadata"]["name"] in jobs
    assert [job for job in jobs if not re.fullmatch(called, job)] == []


def test_alerts_and_dashboard_are_about_metrics_that_there_are() -> None:
    named = re.findall(r"\b(?:cdc_worker|process)_\w+", ALERTS.read_text())
    dashboard = json.loads((DEPLOY / "grafana" / "cdc-worker.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named += re.findall(r"\b(?:cdc_worker|process)_\w+", " ".join(expressions))
    assert {*named} - metrics() - {"cdc_worker"} == set()
    assert len(expressions) > 15


def test_operating_lists_the_metrics() -> None:
    told = {*re.findall(r"^\| `(cdc_worker_\w+)", (DOCS / "operating.md").read_text(), re.MULTILINE)}
    known = {re.sub(r"_(?:bucket|count|sum)$", "", name) for name in metrics() if name.startswith("cdc_worker")}
    assert told == known
