"""A PostgreSQL with wal2json for the whole run, and a CRM's database for each test that wants one.

Where wal2json can't be had, CDC_TEST_SERVER=18 gives the tests the embedded server: those that are about wal2json fail.

Hypothesis prints what reproduces a failure; `--hypothesis-seed` gives a run its seed. Storms print theirs, and take it
from CDC_TEST_SEED.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import canaries
import hypothesis
import pytest
import servers
import structlog
from containers import ContainerServer
from storms import DOUBLED, HELD, LOST, Faults, kill_at
from support import Crm, crm_on, make_crm

from cdc_worker.cluster import Binaries, Cluster, find_binaries

hypothesis.settings.register_profile("suite", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")

MEMORY = Path("/dev/shm")  # noqa: S108  # what is made there has a name of its own
# A database is 300 files, and making them can take a disk longer than all else in a test. Crashes are those of
# processes, which files in memory outlive as well. TMPDIR overrides it. A container's may run no programs.
if (
    "TMPDIR" not in os.environ
    and MEMORY.is_dir()
    and shutil.disk_usage(MEMORY).free > 4 << 30
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
):
    tempfile.tempdir = str(MEMORY)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell lets what it runs in the background ignore it, and all that is started from there would as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """As a process begins, for commands that tests before have run in this one set it up for themselves."""
    os.umask(0o022)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    """Server programs with a wal2json that fits them. Raises, and so fails, where there are none to be had."""
    return find_binaries(plugin="wal2json")


NAMED = os.environ.get("CDC_TEST_SERVER") or None


@pytest.fixture(scope="session")
def server_name(request: pytest.FixtureRequest) -> str:
    """Of the server for tests that need no certain one: see servers.py."""
    return getattr(request, "param", NAMED or "distribution")


def _a_server(name: str, request: pytest.FixtureRequest) -> Cluster:
    """A private cluster, or a container: that needs no server programs on this machine."""
    match name:
        case "docker":
            return ContainerServer()
        case "distribution":
            return Cluster(request.getfixturevalue("binaries"))
        case _ if name in servers.NAMES:
            return servers.a_server(name)
        case _:
            raise ValueError(f'CDC_TEST_SERVER is "{name}": there are docker, {", ".join(servers.NAMES)}')


@pytest.fixture(scope="session")
def last_server() -> Iterator[tuple[dict[str, Cluster], ExitStack]]:
    """The server that was there last, by its name, and what ends it."""
    with ExitStack() as stack:
        yield {}, stack


@pytest.fixture(scope="session")
def server(
    server_name: str, last_server: tuple[dict[str, Cluster], ExitStack], request: pytest.FixtureRequest
) -> Cluster:
    """The server that most tests share: none may restart it or change its settings."""
    last, stack = last_server
    if server_name not in last:  # tests that say so and those that take any come one after another
        last.clear()
        stack.close()
        last[server_name] = stack.enter_context(_a_server(server_name, request))
    return last[server_name]


@pytest.fixture(scope="session", params=servers.EACH)
def each_server(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server of each kind that this machine has: of the usual ones in `make test`, of all in `make matrix`."""
    with servers.a_server(request.param) as server:
        yield server


@pytest.fixture
def plugin() -> str:
    """The output plugin that is set: see `support.either_plugin`. CDC_TEST_PLUGIN gives all tests another one."""
    return os.environ.get("CDC_TEST_PLUGIN") or "auto"


@pytest.fixture
def bare_crm(server: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database with LeadFi's tables, not set up."""
    with crm_on(server, tmp_path, plugin=plugin) as crm:
        yield crm


@pytest.fixture
def crm(server: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database with LeadFi's tables, set up for the worker."""
    with crm_on(server, tmp_path, prepared=True, plugin=plugin) as crm:
        yield crm


@pytest.fixture
def new_crm(server: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database that is set up but for slot and checkpoint: what is written before `setup` was there already."""
    with crm_on(server, tmp_path, prepared=True, begun=False, plugin=plugin) as crm:
        yield crm


@pytest.fixture
def own_server(server_name: str, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server that a test may crash, stop and set as it likes."""
    with _a_server(server_name, request) as server:
        yield server


@pytest.fixture
def own_crm(own_server: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database with LeadFi's tables on a server of the test's own, set up for the worker."""
    crm = make_crm(own_server, tmp_path, plugin=plugin)
    crm.setup()
    try:
        yield crm
    finally:
        crm.close()


SEED = "CDC_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    """Draw a seed for the whole run, which the processes of pytest-xdist inherit."""
    config.addinivalue_line("markers", "kills_at(points): where processes are killed, see storms.py")
    os.environ[SEED] = os.environ.get(SEED) or str(random.SystemRandom().randrange(1 << 32))


@pytest.fixture
def seed() -> int:
    """The seed of a storm, printed where it fails. CDC_TEST_SEED repeats one."""
    number = int(os.environ[SEED])
    print(f"CDC_TEST_SEED={number}")  # noqa: T201  # pytest shows it where a test fails
    return number


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    """Counts what a test does to a worker, its server or its network, by kind. Sums are printed in the end."""
    counted = Faults()
    yield counted
    request.node.user_properties.extend(("fault", [kind, times]) for kind, times in counted.items())
    for mark in request.node.iter_markers("kills_at"):
        missed = [point for point in mark.args if not counted[kill_at(point)]]
        assert not missed, f"nothing was killed at {', '.join(missed)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What holds with either plugin does so on every server, which `make matrix` tries."""
    either = any(mark.args[0] == "plugin" for mark in metafunc.definition.iter_markers("parametrize"))
    if either and "server_name" in metafunc.fixturenames and NAMED is None:
        first, *others = servers.NAMES
        params = [first, *(pytest.param(name, marks=pytest.mark.matrix) for name in others)]
        # Through the fixture: else a test without it would get whichever server was there last, or none.
        metafunc.parametrize("server_name", params, scope="session", indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what holds on every server, for `make matrix`, and leave out the plugin that a server doesn't have."""
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "each_server" in getattr(item, "fixturenames", ()) or "server_name" in params:
            item.add_marker("each_server")
        name = params.get("each_server") or params.get("server_name") or NAMED
        lacking = name in servers.WITH_PGOUTPUT_ALONE and params.get("plugin") == "wal2json"
        (dropped if lacking else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Note on which servers a test ran, and fail one whose processes gave something away.

    What a report holds comes from the processes of pytest-xdist as well.
    """
    report = yield
    if call.when == "call":
        values = [getattr(value, "cluster", value) for value in getattr(item, "funcargs", {}).values()]
        used = {value.origin for value in values if isinstance(value, Cluster)}
        report.user_properties.extend(("server", origin) for origin in sorted(used))
        given_away = canaries.caught(report.capstderr)
        if report.passed and given_away:
            report.outcome = "failed"
            report.longrepr = "\n".join(("a password or a row's value was printed:", *given_away))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which servers the tests ran on, and which there weren't."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    ran = Counter(value for report in calls for name, value in report.user_properties if name == "server")
    if not ran:
        return
    tell_faults(terminalreporter, reports)
    tell_unrun(terminalreporter, calls)
    skipped = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    missing: dict[str, set[str]] = {}
    for reason in skipped:
        if servers.NO_SERVER in reason:
            name, _, why = reason.partition(servers.NO_SERVER)[2].partition(": ")
            missing.setdefault(why, set()).add(name)
    terminalreporter.section("servers")
    for origin, tests in sorted(ran.items()):
        terminalreporter.line(f"{tests:6} tests on {origin}")
    for why, names in sorted(missing.items()):
        terminalreporter.line(f"     none on {', '.join(sorted(names))}: {why}")


def tell_unrun(terminalreporter: Any, calls: list[Any]) -> None:
    """Say how many commands of the documents were run, and how many can't be, and why."""
    told = [value for report in calls for value in report.user_properties]
    if run := sum(value for name, value in told if name == "documents"):
        unrun = Counter(value for name, value in told if name == "unrun")
        terminalreporter.section("commands of the documents")
        terminalreporter.line(f"{run:6} were run, {unrun.total()} were not")
        for reason, count in sorted(unrun.items()):
            terminalreporter.line(f"{count:6} {reason}")


def tell_faults(terminalreporter: Any, reports: list[Any]) -> None:
    """What tests counted, also those that failed, as a table for the README."""
    sums = Faults()
    for report in reports:
        if getattr(report, "when", None) == "teardown":
            for name, value in report.user_properties:
                if name == "fault":
                    sums[value[0]] += value[1]
    if not sums:
        return
    terminalreporter.section("faults")
    terminalreporter.line(f"{SEED}={os.environ[SEED]}")
    terminalreporter.line("")
    terminalreporter.line("| What was done | times |")
    terminalreporter.line("| --- | ---: |")
    results = {name: sums.pop(name, 0) for name in (HELD, LOST, DOUBLED)}
    for kind, times in sorted(sums.items()):
        terminalreporter.line(f"| {kind} | {times:,} |")
    kills = sum(times for kind, times in sums.items() if kind.startswith("SIGKILL"))
    terminalreporter.line(f"| **SIGKILL in all** | **{kills:,}** |")
    for name, count in results.items():
        terminalreporter.line(f"| **{name}** | **{count:,}** |")
