"""What docker-compose.yml and deploy/ name is there. That they work takes an engine: see deploy/stand-ins/build."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from cdc_worker import profile
from cdc_worker.cli import main
from cdc_worker.cluster import Cluster, ClusterError
from cdc_worker.config import PREFIX, Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = (ROOT / "docker-compose.yml").read_text()
OVERRIDE = (DEPLOY / "stand-ins" / "compose.yml").read_text()
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))


def found(pattern: str, text: str = COMPOSE) -> list[str]:
    """All matches of a pattern that must match."""
    matches = re.findall(pattern, text, re.MULTILINE)
    assert matches, pattern
    return matches


def test_every_file_that_compose_names_is_there() -> None:
    assert set(found(r"dockerfile: (\S+)")) == {str(path.relative_to(ROOT)) for path in DOCKERFILES}
    for mount in found(r"^ +- \./([^:]+):"):
        assert (ROOT / mount).exists()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_file_that_is_copied_into_an_image_is_there_and_not_ignored(dockerfile: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in found(r"^COPY (?!--)(.+) \S+$", dockerfile.read_text()):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source in allowed


def test_every_argument_of_a_build_is_one_of_a_dockerfile() -> None:
    declared = {argument for path in DOCKERFILES for argument in found(r"^ARG (\w+)", path.read_text())}
    assert set(found(r"^ +(\w+_IMAGE):")) == set(found(r"^ +(\w+_IMAGE):", OVERRIDE)) == declared


SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]

KEYS = frozenset(
    (
        *("build", "cap_drop", "command", "depends_on", "entrypoint", "environment", "healthcheck", "image", "init"),
        *("ports", "profiles", "read_only", "restart", "security_opt", "shm_size", "stop_grace_period", "tmpfs"),
        "volumes",
    )
)
"""Of services, by the Compose Specification, as far as they are used."""


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_one_by_the_specification(name: str) -> None:
    service = SERVICES[name]
    assert service.keys() <= KEYS
    assert "image" in service or "build" in service
    for other, condition in dict(service.get("depends_on") or {}).items() if name != "grafana" else ():
        assert condition.keys() == {"condition"}
        wanted = condition["condition"]
        assert wanted in {"service_healthy", "service_completed_successfully"}
        assert wanted != "service_healthy" or "healthcheck" in SERVICES[other]
    for volume in service.get("volumes", ()):
        source, target, *mode = volume.split(":")
        assert target.startswith("/")
        assert mode in ([], ["ro"])
        assert source.startswith("./") or source in yaml.safe_load(COMPOSE)["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_nothing_that_it_need_not(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert "no-new-privileges:true" in service["security_opt"]
    assert name == "server" or service["cap_drop"] == ["ALL"]
    for port in service.get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port)


def test_compose_starts_without_any_variable_set() -> None:
    for variable in found(r"\$\{([^}]*)\}") + found(r"\$\{([^}]*)\}", OVERRIDE):
        assert ":-" in variable


def test_every_setting_is_one_of_the_workers() -> None:
    assert {name.lower() for name in found(rf"\b{PREFIX}([A-Z_]+)")} <= Settings.model_fields.keys()
    (name,) = found(rf"{PREFIX}PROFILE: (\S+)")
    assert profile.load(name).name == name


def test_every_command_is_one_of_the_workers() -> None:
    lists = found(r"command: (\[.*\])") + found(r"^CMD (\[.*\])", (DEPLOY / "worker.Dockerfile").read_text())
    for name, *options in map(json.loads, lists):
        with main.commands[name].make_context(name, options):
            pass


@pytest.mark.parametrize("known", [True, False], ids=["since August 2026", "before"])
@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        ("postgres", True),
        ("postgres -c wal_level=logical", True),
        ("-c wal_level=logical", True),
        ("postgres -c output_plugin_libraries=pgoutput", False),
        ("psql --list", False),
    ],
)
def test_wal2json_is_allowed_where_the_server_would_refuse_it(
    tmp_path: Path, command: str, allowed: bool, known: bool
) -> None:
    settings = "allow_in_place_tablespaces\toutput\n" + "output_plugin_libraries\tpostmaster\n" * known
    for name, script in {
        "postgres": f'test "$*" = --describe-config && printf %s "{settings}"',
        "docker-entrypoint.sh": "printf '%s\\n' \"$@\"",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [DEPLOY / "postgres-entrypoint", *command.split()],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    added = ["-c", "output_plugin_libraries=pgoutput, test_decoding, wal2json"] if allowed and known else []
    assert done.stdout.splitlines() == [*command.split(), *added]


def test_a_server_of_a_tests_own_can_be_crashed_set_and_asked(own_server: Cluster) -> None:
    """The same of a private cluster and of a container (CDC_TEST_SERVER=docker)."""
    dsn = own_server.dsn()
    with psycopg.connect(dsn) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('x', 'wal2json')")
        connection.execute("CREATE TABLE lead AS SELECT 1 AS id")
    own_server.crash()
    assert not own_server.is_running
    own_server.start()
    assert "was not properly shut down" in own_server.log_tail(100)
    assert own_server.run("psql", "-Atc", "SELECT count(*) FROM lead, pg_replication_slots").stdout == "1\n"
    own_server.set(work_mem="7MB")
    own_server.restart()
    assert own_server.run("psql", "-Atc", "SHOW work_mem").stdout == "7MB\n"
    own_server.set(wal_level="replica")
    own_server.stop()
    with pytest.raises(ClusterError, match="wal_level < logical"):
        own_server.start()
    own_server.set(wal_level="logical")
    own_server.start()
    own_server.write_hba("local all all trust", "host all all 127.0.0.1/32 reject")
    own_server.restart()
    with pytest.raises(psycopg.OperationalError, match="rejects connection"):
        psycopg.connect(dsn)
