"""Every command that the documents tell somebody to run is run, in a CRM of its own; what can't be is listed, and why.

What they print is held elsewhere, beside each page: here they are understood, and end as commands do.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import PATIENCE, Crm

from cdc_worker import profile

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("cdc-worker", "docker", "kubectl", "make", "mkdocs", "pip", "promtool", "psql", "systemctl")

UNRUN = {
    "make": "the suite can't run itself; the Makefile's targets are held by tests/test_docs.py, and CI runs them",
    "docker": "no engine runs here; tests/test_compose.py holds the file, deploy/stand-ins tries it",
    "kubectl": "no cluster runs here; tests/test_deploy.py holds the manifests",
    "systemctl": "no systemd runs here; tests/test_deploy.py holds the unit, and what the worker tells it",
    "pip": "tests/test_package.py installs the wheel, without an index",
    "promtool": "tests/test_deploy.py runs it",
    "psql": "tests/test_schema.py runs the files of schema/ with it",
    "demo": "tests/test_demo.py plays it",
}
"""By program, or by command of cdc-worker."""

ENDLESS = ("run", "tail", "status --watch")
ASKING = ("teardown", "forget", "dead-letters discard")


def commands(document: Path) -> list[str]:
    """What a document is the first to tell somebody to run, in order."""
    before = DOCUMENTS[: DOCUMENTS.index(document)]
    known = {command for other in before for command in told(other)}
    return [command for command in told(document) if command not in known]


def told(document: Path) -> list[str]:
    """What a document tells somebody to run, in order: in blocks, and where it is set as code."""
    text = document.read_text()
    lines = [line for line in re.findall(r"^    (.*)$", text, re.MULTILINE) if "[OPTIONS]" not in line]
    parts = [part for line in lines for part in re.split(r" && |; | \| ", re.sub(r"(?:^|\s+)#.*", "", line))]
    parts += re.findall(r"`([^`\n]+)`", text)
    programs = "|".join(PROGRAMS)
    found = [part.strip() for part in parts if re.match(rf"(?:\w+=\S+ )*(?:\S*/)?(?:{programs}) \S", part.strip())]
    return list(dict.fromkeys(found))


def program(command: str) -> str:
    """The program of a command, without variables and directories."""
    return re.sub(r"^(?:\w+=\S+ )*", "", command).split(maxsplit=1)[0].rpartition("/")[2]


def why_not(command: str) -> str | None:
    """Why it can't be run here."""
    if (name := program(command)) != "cdc-worker":
        return UNRUN[name]
    return UNRUN.get(command.split()[1])


def as_here(command: str, crm: Crm) -> str:
    """The command with what its placeholders stand for here, and a limit to what has no end."""
    command = re.sub(r'--dsn "host=[^"]*"', f"--dsn {shlex.quote(crm.dsn)}", command)
    command = re.sub(r"\b(?:FILE|practice\.toml)\b", "crm.toml", command)
    command = command.replace("SHELL", "bash").replace("LSN", "0/1").replace("COMMAND --help", "run --help")
    command = command.replace("/backup/crm", "backup").replace("~/.local/share/bash-completion/completions/", "")
    rest = command.removeprefix("cdc-worker ")
    if rest.startswith(ASKING) and "--yes" not in rest:
        command += " --yes"
    if rest.endswith("--skip"):
        command += " 0/1 --dry-run"
    if rest in ("forget --yes", "timeline", "forget"):
        command = f"cdc-worker {rest.split()[0]} --lead 7" + (" --yes" if rest.startswith("forget") else "")
    if rest in ("dead-letters retry", "profile check"):
        command += " --all" if rest.endswith("retry") else " crm.toml"
    if rest == "profile try crm.toml":
        command += """ --change '{"table": "lead", "new": {"lead_id": 1}}'"""
    if rest in ("dead-letters", "replay"):
        command += " list" if rest == "dead-letters" else " --dry-run"
    if rest.startswith(ENDLESS) and not {"--once", "--no-follow", "--help"} & {*rest.split()}:
        command = f"timeout --signal=TERM 3 {command}"
    return command


def check(command: str, crm: Crm, directory: Path, environment: dict[str, str]) -> None:
    """Run a command. Here it may have nothing to do, or nothing to do it with; it may not be misunderstood."""
    if crm.value("SELECT to_regclass('cdc_worker.checkpoint') IS NULL OR count(*) = 0 FROM pg_replication_slots"):
        crm.setup()
    done = subprocess.run(
        ["/bin/bash", "-c", as_here(command, crm)],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = f"{command}\nended with {done.returncode}:\n{done.stderr}"
    assert done.returncode in (0, 1, 2, 11, 124), said
    assert "Traceback" not in done.stderr, said
    assert "Usage:" not in done.stderr, said


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_tells_to_run_can_be_run(
    document: Path, crm: Crm, tmp_path: Path, record_property: pytest.FixtureRequest
) -> None:
    directory = tmp_path / "elsewhere"
    (directory / "backup").mkdir(parents=True)
    (directory / "crm.toml").write_text(profile.read("leadfi"))
    environment = crm.environment()
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    run = 0
    try:
        for command in commands(document):
            if (reason := why_not(command)) is not None:
                record_property("unrun", f"{program(command)}: {reason}")  # type: ignore[operator]
            else:
                check(command, crm, directory, environment)
                run += 1
    finally:
        if crm.execute("SELECT FROM pg_roles WHERE rolname = 'cdc'"):  # which `setup --role cdc` has made
            crm.execute("DROP OWNED BY cdc CASCADE")
            crm.execute("DROP ROLE cdc")
    record_property("documents", run)  # type: ignore[operator]


def test_the_documents_tell_to_run_something() -> None:
    found = {command for document in DOCUMENTS for command in commands(document)}
    assert len([command for command in found if why_not(command) is None]) > 60
    assert {program(command) for command in found} >= {"cdc-worker", "make", "docker"}
