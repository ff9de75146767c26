"""The command line, as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import reference
from support import Crm

import cdc_worker
from cdc_worker import errors
from cdc_worker.cli import main
from cdc_worker.config import Settings
from cdc_worker.errors import CdcWorkerError

COMMANDS = sorted(main.commands)


def cdc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cdc_worker", *arguments], capture_output=True, text=True, check=False)


def test_ctrl_c_while_it_still_begins_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = cdc("--version")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "Aborted!\n")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_starts_with_a_verb_and_ends_with_an_example(command: str) -> None:
    """A verb in the imperative: the first word of a description would be an article, a noun or a verb with an s."""
    found = main.commands[command] if command else main
    text = (found.help or "").replace("\b", "").strip()
    first, *_ = text.split()
    assert re.fullmatch(r"[A-Z][a-z]*[a-rt-z]", first)
    assert first not in {"The", "This", "An", "A", "Command", "Option"}
    example = text.splitlines()[-1].strip()
    assert re.fullmatch(rf"Example: cdc-worker {command}.*", example)
    with click.Context(found, info_name="cdc-worker") as context:
        assert example in found.get_help(context)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    for option in main.commands[command].params:
        assert isinstance(option, click.Argument) or option.help, option.name


def test_every_flag_of_run_is_a_setting_or_its_own() -> None:
    names = {option.name for option in main.commands["run"].params}
    assert names - {"config", "once", "takeover", "no_wait"} <= set(Settings.model_fields)


def test_the_version_is_told_with_those_of_what_a_failure_may_depend_on() -> None:
    done = cdc("--version")
    first, second = done.stdout.splitlines()
    assert (done.returncode, done.stderr, first) == (0, "", f"cdc-worker {cdc_worker.__version__}")
    assert re.fullmatch(
        r"Python 3\.\S+ on \w+ \w+, psycopg 3\.\S+ \((?:binary|c|python)\) with libpq \d+\.\d+, msgspec \S+,"
        r" pydantic \S+",
        second,
    )


def test_the_reference_is_what_the_commands_say() -> None:
    assert (Path(__file__).parent.parent / "docs" / "cli.md").read_text() == reference.page()


def test_the_installed_command_is_the_module() -> None:
    script = Path(sys.executable).with_name("cdc-worker")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == cdc("--version").stdout


@pytest.mark.parametrize(
    "arguments", [("run", "--no-such-flag"), ("no-such-command",), ("run", "stray"), ("run", "--slot")]
)
def test_a_misused_command_line_exits_2(arguments: tuple[str, ...]) -> None:
    done = cdc(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "setup", "status"])
def test_a_wrong_setting_exits_2_from_any_command(command: str) -> None:
    done = cdc(command, "--slot", "Not A Slot")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: wrong settings:\n  slot = 'Not A Slot' \(--slot\): .*\nhint: .*\n", done.stderr)


def test_results_go_to_stdout_and_logs_to_stderr(crm: Crm) -> None:
    crm.add_leads(1)
    run = crm.command("run", "--once")
    assert (run.returncode, run.stdout) == (0, "")
    events = [json.loads(line)["event"] for line in run.stderr.splitlines()]
    assert events == ["replication_started", "worker_stopped"]
    for command in (["setup"], ["status"], ["status", "--json"]):
        done = crm.command(*command)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_flags_settle_what_the_environment_says(crm: Crm) -> None:
    right = ["--dsn", crm.dsn, "--slot", crm.slot, "--profile", "leadfi", "--time-zone", "Asia/Tokyo"]
    done = crm.command(
        "run",
        "--once",
        *right,
        "--log-level",
        "error",
        dsn="nonsense",
        slot="no_such",
        profile="no such",
        time_zone="X",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_settings_file_is_enough(crm: Crm, tmp_path: Path) -> None:
    path = tmp_path / "cdc-worker.toml"
    path.write_text(f"dsn = {json.dumps(crm.dsn)}\nslot = {json.dumps(crm.slot)}\n")
    done = cdc("status", "--config", str(path), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slot"] == crm.slot


def test_logs_are_for_people_where_they_are_asked_for(crm: Crm) -> None:
    done = crm.command("run", "--once", log_format="console")
    assert re.search(
        r"\[info +\] replication_started +lsn=\S+ options=\[.+\] plugin=wal2json slot=\S+ time_zone=\S+\n", done.stderr
    )


# Exit codes


OTHERS = ("UnknownValueError", "NotRunningError", "BusyError", "RecordingUnreadableError", "ClusterError", "DemoError")


def codes() -> dict[str, int]:
    """Every error that ends `run`, with its code: not what becomes a dead letter, nor what only others meet."""
    ends = [kind for kind in CdcWorkerError.__subclasses__() if kind.__module__ == errors.__name__]
    return {kind.__name__: kind.exit_code for kind in ends if kind.__name__ not in OTHERS}


def test_every_error_has_a_code_of_its_own() -> None:
    found = codes()
    assert sorted(found.values()) == list(range(1, len(found) + 1))


def test_the_exit_codes_are_documented() -> None:
    table = (Path(__file__).parent.parent / "docs" / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| \S.* \| \S.* \|$", table, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == codes()


def test_the_tree_of_errors_tells_their_codes() -> None:
    rows = re.findall(r"^[├└]── (\w+) +(\d+)   \S", errors.__doc__ or "", re.MULTILINE)
    assert {name: int(code) for name, code in rows if name not in OTHERS} == codes()
