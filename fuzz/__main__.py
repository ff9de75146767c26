"""`make fuzz`: whatever bytes the decoders are given, they read them or say that they can't; guided by coverage.

What they are given begins with what both plugins send of the scripts of the parity tests, by a server of this machine.
What proved to be worth keeping stays in `.fuzz`, for the next run to begin with.

An exception that no caller expects, more than 5 seconds or a gigabyte for 8 kB of input end a target, and the run with
exit code 1: the input is kept in `.fuzz`, and `python -m fuzz.harness TARGET FILE` repeats it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import psycopg

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import decoding
import fuzzing

from cdc_worker import decoders, wal2json
from cdc_worker.binaries import find_binaries
from cdc_worker.cluster import Cluster

LONGEST = 8192
"""Bytes of an input."""

LIMITS = [f"-max_len={LONGEST}", "-rss_limit_mb=1024", "-timeout=5", "-print_final_stats=1", "-verbosity=1"]

SENT = "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, VARIADIC %s)"


def sent(server: decoding.Server, plugin: str, options: dict[str, str]) -> Iterator[bytes]:
    """What a plugin sends of all scripts."""
    for encoding, database in server.databases.items():
        name = f"parity_{encoding.lower()}"
        arguments = [part for option in options.items() for part in option]
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            for (data,) in connection.execute(SENT, (f"{name}_{plugin}", arguments)):
                yield bytes(data)


def with_relations(messages: Iterable[bytes]) -> Iterator[bytes]:
    """Each message of pgoutput behind those that say what it is of."""
    known: dict[bytes, bytes] = {}
    for message in messages:
        kind, number = message[:1], message[1:5]
        if kind == b"R":
            known[number] = message
        elif kind == b"T":
            yield fuzzing.framed([*known.values(), message])
        else:
            yield fuzzing.framed([*([known[number]] if kind in b"IUD" else []), message])


def seeds(directory: Path) -> None:
    """Have both plugins send everything, and keep it by target."""
    with Cluster(find_binaries(), settings={"max_prepared_transactions": "5"}) as cluster:
        server = decoding.Server(cluster, decoders.PLUGINS)
        options = {
            plugin: decoders.options(plugin, (), (), publication=decoding.PUBLICATION)[0] for plugin in decoders.PLUGINS
        }
        lines = options[wal2json.PLUGIN]
        for option in ("add-tables", "add-msg-prefixes", "numeric-data-types-as-string"):
            lines.pop(option, None)
        found = {
            "pgoutput": with_relations(sent(server, "pgoutput", options["pgoutput"])),
            "wal2json": sent(server, "wal2json", lines),
            "documents": (fuzzing.framed([data]) for data in sent(server, "wal2json", lines | {"format-version": "1"})),
        }
        for target, inputs in found.items():
            (directory / target).mkdir(parents=True, exist_ok=True)
            for data in inputs:
                if len(data) <= LONGEST:
                    (directory / target / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


def fuzz(target: str, directory: Path, seconds: int) -> bool:
    """Fuzz one target for so long, and print what came of it; returns whether nothing was found."""
    arguments = [f"-max_total_time={seconds}", *LIMITS, f"-artifact_prefix={directory}/{target}-"]
    command = [sys.executable, "-m", "fuzz.harness", target, *arguments, str(directory / target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said: Callable[[str], str] = lambda pattern: (re.findall(pattern, done.stdout) or ["0"])[-1]  # noqa: E731
    executions, covered = said(r"stat::number_of_executed_units: (\d+)"), said(r"cov: (\d+)")
    click.echo(f"{target:10} {int(executions):>12,} executions, {int(covered):,} places in the code reached")
    if done.returncode != 0 or executions == "0":
        click.echo("\n".join(done.stdout.splitlines()[-60:]), err=True)
        return False
    return True


@click.command()
@click.option("--seconds", default=120, show_default=True, help="How long each target is fuzzed.")
@click.option("--target", "targets", type=click.Choice([*fuzzing.TARGETS]), multiple=True, help="Only this.")
@click.option("--directory", default=".fuzz", show_default=True, type=click.Path(path_type=Path), help="Of inputs.")
def main(seconds: int, targets: tuple[str, ...], directory: Path) -> None:
    """Fuzz the decoders."""
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException("the package index has no atheris for this machine: pip install 'cdc-worker[fuzz]'")
    seeds(directory)
    found = [fuzz(target, directory, seconds) for target in targets or fuzzing.TARGETS]
    sys.exit(not all(found))


main()
