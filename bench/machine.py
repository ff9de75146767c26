"""What was measured on, and of what."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cdc_worker.binaries import Binaries

PACKAGES = {
    "cdc-worker": "cdc-worker",
    "psycopg": "psycopg",
    "psycopg-binary": "psycopg-binary",
    "msgspec": "msgspec",
    "psycopg2": "psycopg2-binary",
    "pydbzengine": "pydbzengine",
}
"""As they are called, and as the package index has them."""


def machine() -> dict[str, str]:
    """Cores, processor, memory and kernel."""
    with suppress(OSError):
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        total = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return {
            "cores": str(os.cpu_count()),
            "processor": model[1] if model else platform.processor() or "unknown",
            "memory": f"{int(total[1]) * 1024 / 1e9:.0f} GB" if total else "unknown",
            "kernel": f"{platform.system()} {platform.release()}",
        }
    return {"cores": str(os.cpu_count()), "processor": platform.processor(), "kernel": platform.platform()}


def versions(binaries: Binaries) -> dict[str, str]:
    """Of the server, its plugin, Python, and what is compared."""
    found = {"PostgreSQL": binaries.version, "Python": platform.python_version()}
    if binaries.plugin == "wal2json":
        packaged = re.search(r"wal2json (\d\S*)", binaries.origin)
        found["wal2json"] = packaged[1] if packaged else "as it is installed"
    for name, package in PACKAGES.items():
        with suppress(PackageNotFoundError):
            found[name] = version(package)
    if (java := shutil.which("java")) is not None and "pydbzengine" in found:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
        found["Java"] = told.split('"')[1] if '"' in told else "unknown"
    return found
