"""Installed PostgreSQL server programs and a wal2json that fits them, or private copies of the distribution's packages.

Private copies are fetched with `apt-get` and unpacked with `dpkg` into a cache directory. Neither needs root, and the
machine stays as it is: apt works with lists and archives of its own, and nothing is installed.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

Report = Callable[[str], None]

CANDIDATE_MAX_AGE = 24 * 3600

APT_CONFIG = """\
Dir::State::lists "{directory}/lists";
Dir::Cache "{directory}/cache";
Dir::Cache::archives "{directory}/archives";
Debug::NoLocking "true";
APT::Sandbox::User "{user}";
Acquire::Languages "none";
Acquire::Retries "3";
// The machine's hooks would clean the machine's own archives.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


class ClusterError(Exception):
    """There is no private cluster to be had. `hint` tells what to install or to change."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Binaries:
    """Server programs and a wal2json that fits them."""

    bindir: Path
    plugin_dir: Path | None
    """Private directory of wal2json.so, for `dynamic_library_path`; None where it is in the server's own `$libdir`."""
    library_path: str | None
    """`LD_LIBRARY_PATH` of privately unpacked programs."""
    version: str
    origin: str
    """One line for the user: which server, which wal2json, and where they are from."""
    plugin_list: bool
    """The server has `output_plugin_libraries`, and refuses wal2json unless that names it."""

    def program(self, name: str) -> str:
        return str(self.bindir / name)

    def environment(self) -> dict[str, str]:
        """Ours without libpq's variables, which speak of another server, and with the path of private libraries."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        if self.library_path is not None:
            environment["LD_LIBRARY_PATH"] = self.library_path
        return environment


def to_stderr(line: str) -> None:
    click.echo(line, err=True)


def find_binaries(*, report: Report = to_stderr, newest: bool = False) -> Binaries:
    """The newest installed server with wal2json. What is missing is fetched and kept in the cache.

    `newest` asks for the distribution's newest minor instead, beside whatever is installed.
    """
    if newest:
        return _newest(report)
    installed = _installed()
    for bindir in installed:
        if (_libdir(bindir) / "wal2json.so").is_file():
            return _binaries(bindir, origin=f"wal2json in {_libdir(bindir)}")
    for bindir in installed:
        prefix = _cached(f"postgresql-{_major(bindir)}-wal2json")
        if prefix is not None:
            return _with_plugin(bindir, prefix)
    if not installed:
        for prefix in _cached_servers():
            return _private(prefix)
    with _apt(report) as apt:
        majors = apt.majors()
        for bindir in installed:
            if _major(bindir) in majors:
                return _with_plugin(bindir, apt.unpack([f"postgresql-{_major(bindir)}-wal2json"], dependencies=False))
        for major in majors:
            return _private(apt.unpack(_server_packages(major), dependencies=True))
    raise ClusterError("the distribution has no package of wal2json", hint=_hint())


def _newest(report: Report) -> Binaries:
    record = cache_directory() / "newest"
    if not record.exists() or time.time() - record.stat().st_mtime > CANDIDATE_MAX_AGE or _recorded(record) is None:
        try:
            with _apt(report) as apt:
                majors = apt.majors()
                major = next((m for m in [*map(_major, _installed()), *majors] if m in majors), None)
                if major is None:
                    raise ClusterError("the distribution has no package of wal2json", hint=_hint())
                version = apt.candidate(f"postgresql-{major}") or ""
                if _installed_version(major) != version and _cached(f"postgresql-{major}", version) is None:
                    apt.unpack(_server_packages(major), dependencies=True)
            _write(record, f"{major} {version}\n")
        except ClusterError:
            # Without the network, what was newest at the last look will do.
            if not record.exists():
                raise
    binaries = _recorded(record)
    return binaries if binaries is not None else find_binaries(report=report)


def _recorded(record: Path) -> Binaries | None:
    """The server that was the distribution's newest when `record` was written, if it is still here."""
    major, version = record.read_text().split()
    if _installed_version(major) == version:
        return find_binaries()
    prefix = _cached(f"postgresql-{major}", version)
    return _private(prefix) if prefix is not None else None


# What is installed


def _installed() -> list[Path]:
    """Directories with a server's programs, newest major first."""
    found = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        *Path("/usr").glob("pgsql-*/bin"),
        Path("/usr/local/pgsql/bin"),
    ]
    if pg_config := shutil.which("pg_config"):
        found.append(Path(_output(pg_config, "--bindir").strip()))
    if postgres := shutil.which("postgres"):
        found.append(Path(postgres).resolve().parent)
    servers = {
        bindir.resolve()
        for bindir in found
        if all(os.access(bindir / program, os.X_OK) for program in ("postgres", "initdb", "pg_ctl", "psql"))
    }
    return sorted(servers, key=lambda bindir: int(_major(bindir)), reverse=True)


def _libdir(bindir: Path) -> Path:
    """Where the server looks for plugins: `$libdir`."""
    if (bindir / "pg_config").exists():
        return Path(_output(str(bindir / "pg_config"), "--pkglibdir").strip())
    return bindir.parent / "lib"


def _version(bindir: Path, library_path: str | None = None) -> str:
    printed = _output(str(bindir / "postgres"), "--version", library_path=library_path)
    if not (match := re.search(r"\(PostgreSQL\) (\d\S*)", printed)):
        raise ClusterError(f"{bindir / 'postgres'} is not a PostgreSQL server: {printed.strip()}")
    return match[1]


def _major(bindir: Path) -> str:
    return re.split(r"\D", _version(bindir))[0]


def _installed_version(major: str) -> str | None:
    """The version of the installed package of a server."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", f"postgresql-{major}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.removeprefix("installed ") if done.stdout.startswith("installed ") else None


def _binaries(
    bindir: Path, *, origin: str, plugin_dir: Path | None = None, library_path: str | None = None
) -> Binaries:
    version = _version(bindir, library_path)
    settings = _output(str(bindir / "postgres"), "--describe-config", library_path=library_path)
    return Binaries(
        bindir=bindir,
        plugin_dir=plugin_dir,
        library_path=library_path,
        version=version,
        origin=f"PostgreSQL {version} in {bindir}, {origin}",
        plugin_list=re.search(r"^output_plugin_libraries\t", settings, re.MULTILINE) is not None,
    )


# What is unpacked privately


def cache_directory() -> Path:
    if os.geteuid() == 0:
        # The server runs as another user, who can't look into root's home.
        return Path("/var/cache/cdc-worker")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdc-worker"


def _cached(package: str, version: str = "*") -> Path | None:
    """Where `package` was unpacked last."""
    found = cache_directory().glob(f"{package}_{version}")
    return max(found, key=lambda prefix: prefix.stat().st_mtime, default=None)


def _cached_servers() -> Iterator[Path]:
    """Unpacked servers that run on this machine as it is now, newest major first."""
    found = [
        (int(bindir.parent.name), bindir) for bindir in cache_directory().glob("postgresql-*/usr/lib/postgresql/*/bin")
    ]
    for major, bindir in sorted(found, reverse=True):
        prefix = bindir.parents[4]
        if prefix.name.startswith(f"postgresql-{major}_"):
            yield prefix


def _with_plugin(bindir: Path, prefix: Path) -> Binaries:
    """An installed server with the wal2json unpacked under `prefix`."""
    return _binaries(
        bindir,
        plugin_dir=prefix / "usr/lib/postgresql" / _major(bindir) / "lib",
        origin=f"{prefix.name.replace('_', ' ')} unpacked in {prefix.parent}",
    )


def _private(prefix: Path) -> Binaries:
    """A server and its wal2json, unpacked together under `prefix`: it finds its own files relative to its programs."""
    (bindir,) = prefix.glob("usr/lib/postgresql/*/bin")
    libraries = [*prefix.glob("usr/lib/*-linux-*"), *prefix.glob("lib/*-linux-*")]
    return _binaries(
        bindir,
        library_path=":".join(map(str, libraries)),
        origin=f"{prefix.name.replace('_', ' ')} and its wal2json unpacked in {prefix.parent}",
    )


def _server_packages(major: str) -> list[str]:
    return [f"postgresql-{major}", f"postgresql-client-{major}", f"postgresql-{major}-wal2json"]


class _Apt:
    def __init__(self, directory: Path, report: Report) -> None:
        self.directory = directory
        self.report = report

    def majors(self) -> list[str]:
        """Major versions for which the distribution has wal2json, newest first."""
        names = self._run("apt-cache", "pkgnames", "postgresql-").split()
        majors = {match[1] for name in names if (match := re.fullmatch(r"postgresql-(\d+)-wal2json", name))}
        return sorted((m for m in majors if self.candidate(f"postgresql-{m}")), key=int, reverse=True)

    def candidate(self, package: str) -> str | None:
        match = re.search(r"Candidate: (\d\S*)", self._run("apt-cache", "policy", package))
        return match[1] if match else None

    def unpack(self, packages: Sequence[str], *, dependencies: bool) -> Path:
        """Fetch packages, with what the machine lacks of their dependencies, and unpack them as one tree."""
        archives = self.directory / "archives"
        if dependencies:
            self._run("apt-get", "install", "-qq", "--yes", "--download-only", "--no-install-recommends", *packages)
        else:
            self._run("apt-get", "download", "-qq", *packages)
        debs = sorted(archives.glob("*.deb"))
        (main,) = archives.glob(f"{packages[0]}_*.deb")
        target = cache_directory() / main.name.rpartition("_")[0].replace("%3a", ":")
        size = sum(deb.stat().st_size for deb in debs) / 1e6
        self.report(f"fetched {' '.join(packages)} ({len(debs)} packages, {size:.1f} MB), unpacked in {target}")
        return _unpack(debs, target)

    def update(self) -> None:
        # One unreachable source among many is no obstacle: what can't be found then is missed by name.
        self._run("apt-get", "update", "-qq", check=False)

    def _run(self, *words: str, check: bool = True) -> str:
        program, *arguments = words
        return _output(
            program, "-c", str(self.directory / "apt.conf"), *arguments, cwd=self.directory / "archives", check=check
        )


@contextmanager
def _apt(report: Report) -> Iterator[_Apt]:
    """The distribution's package tool, with fresh lists and archives of its own."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ClusterError(
            "no PostgreSQL server with wal2json found, and no apt-get and dpkg to fetch one", hint=_hint()
        )
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            cache.chmod(0o755)
    except OSError as error:
        raise ClusterError(f"cannot create {cache}: {error.strerror}", hint="set XDG_CACHE_HOME") from error
    with tempfile.TemporaryDirectory(prefix="cdc-apt-") as name:
        directory = Path(name)
        for partial in ("lists/partial", "archives/partial", "cache"):
            (directory / partial).mkdir(parents=True)
        user = "root" if os.geteuid() == 0 else ""
        (directory / "apt.conf").write_text(APT_CONFIG.format(directory=directory, user=user))
        apt = _Apt(directory, report)
        apt.update()
        yield apt


def _unpack(debs: Sequence[Path], target: Path) -> Path:
    work = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    try:
        for deb in debs:
            _output("dpkg", "-x", str(deb), str(work))
        work.chmod(0o755)
        os.utime(work)
        try:
            work.rename(target)
        except OSError:
            # Somebody else was faster: theirs is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def _hint() -> str:
    majors = [_major(bindir) for bindir in _installed()]
    packages = " ".join(f"postgresql-{major}-wal2json" for major in majors) or "postgresql postgresql-<major>-wal2json"
    return f"install wal2json for the server; on Debian and Ubuntu: sudo apt-get install {packages}"


def _output(
    program: str, *arguments: str, library_path: str | None = None, cwd: Path | None = None, check: bool = True
) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    if library_path:
        environment["LD_LIBRARY_PATH"] = library_path
    done = subprocess.run(
        [program, *arguments],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        command = " ".join([Path(program).name, *arguments])
        raise ClusterError(f"{command} failed: {done.stderr.strip() or done.stdout.strip()}", hint=_hint_for(program))
    return done.stdout


def _hint_for(program: str) -> str:
    return "check the network and the sources of apt, or " + _hint() if program.startswith("apt") else ""
