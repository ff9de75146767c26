"""Programs that the suite holds files and pages against: the machine's own, or fetched as Debian packages.

What is fetched is unpacked in the cache, beside PostgreSQL's: nothing is installed, and it takes no root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cdc_worker import binaries


@dataclass(frozen=True)
class Tool:
    """A program, and the variables that it needs."""

    path: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, patience: float = 120) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            [self.path, *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )


def found(program: str, *packages: str, within: str) -> Tool:
    """A program by its name, or `within` the tree of these packages, which are fetched with what the machine lacks.

    Raises ClusterError, which fails the test, where there is neither.
    """
    if (there := shutil.which(program)) is not None:
        return Tool(there)
    trees = _trees(packages[0])
    if not trees:
        cache = binaries.made_cache_directory()
        with (cache / f".{packages[0]}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the suite has several processes, of which one is to fetch it
            if not _trees(packages[0]):
                binaries._apt().get(*packages, report=binaries.to_stderr)
        trees = _trees(packages[0])
    tree = trees[0]
    libraries = [tree / of for of in (Path(within).parent, *_libraries(tree))]
    return Tool(str(tree / within), {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "FONTCONFIG_FILE": _fonts(tree)})


def _trees(package: str) -> Sequence[Path]:
    return binaries._unpacked(package)


def _libraries(tree: Path) -> list[Path]:
    """Where the packages have put theirs, some below the usual places."""
    return sorted({path.parent for pattern in ("usr/lib", "lib") for path in (tree / pattern).rglob("*.so*")})


def _fonts(tree: Path) -> str:
    """Of what is unpacked, and of the machine."""
    config = tree / "fonts.conf"
    if not config.exists():
        text = (
            '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
            f"<dir>{tree}/usr/share/fonts</dir><dir>/usr/share/fonts</dir><cachedir>{tree}/fontconfig</cachedir></fontconfig>"
        )
        binaries._write(config, text)
        config.chmod(0o644)
    return str(config)


def browser() -> Tool:
    """Chromium, without a window."""
    return found("chromium", "chromium", "fonts-dejavu-core", within="usr/lib/chromium/chromium")


def promtool() -> Tool:
    """Prometheus's own tool for rules and metrics."""
    return found("promtool", "prometheus", within="usr/bin/promtool")


def systemd_analyze(home: Path) -> Tool:
    """Systemd's own tool for units, for which nobody needs to be root: it reads them as a user's, of this home."""
    tool = found("systemd-analyze", "systemd", "libsystemd-shared", within="usr/bin/systemd-analyze")
    units = Path(tool.path).parents[1] / "lib" / "systemd" / "user"
    own = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "SYSTEMD_UNIT_PATH": f"{units}:"}
    return replace(tool, environment={**tool.environment, **own})
