"""What users install: a wheel and an sdist that have all that the worker needs, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cdc_worker
from cdc_worker.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that is made of it, as whoever packages it does."""
    directory = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--quiet", "--outdir", str(directory), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_they_are_named_by_the_version_which_is_in_one_place(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == {
        f"cdc_worker-{cdc_worker.__version__}-py3-none-any.whl",
        f"cdc_worker-{cdc_worker.__version__}.tar.gz",
    }
    assert "version" not in (ROOT / "pyproject.toml").read_text().partition("[project]")[2].partition("[")[0].replace(
        'dynamic = ["version"]', ""
    )
    assert f"## {cdc_worker.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_has_modules_profiles_schema_page_and_types(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cdc_worker").rglob("*.py")}
    data = {f"cdc_worker/{path.relative_to(ROOT)}" for path in (ROOT / "schema").glob("*.sql")}
    data |= {str(path.relative_to(ROOT)) for path in (ROOT / "cdc_worker" / "profiles").glob("*.toml")}
    assert names == modules | data | {"cdc_worker/py.typed", "cdc_worker/page.html"}


def test_the_sdist_has_what_the_wheel_is_made_of(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        tops = {name.split("/")[1] for name in files.getnames() if "/" in name}
    assert tops == {"cdc_worker", "schema", "pyproject.toml", "README.md", "CHANGELOG.md", ".gitignore", "PKG-INFO"}


def test_what_is_installed_of_the_wheel_works_elsewhere(built: Path, tmp_path: Path) -> None:
    """With the dependencies that are here: that they can be had is another matter."""
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cdc_worker", *command],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").startswith(f"cdc-worker {cdc_worker.__version__}\n")
    assert "profile leadfi, written to activity" in run("profile", "show", "leadfi")
    origin = subprocess.run(
        [sys.executable, "-c", "import cdc_worker.ddl as d; print(d.__file__); d.schema('leadfi.sql')"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert origin.startswith(str(target))
    script = target / "bin" / "cdc-worker"
    assert script.is_file()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    def complete(*words: str) -> str:
        environment = {
            **os.environ,
            "_CDC_WORKER_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": " ".join(("cdc-worker", *words)) if shell != "fish" else words[-1],
            "COMP_CWORD": str(len(words)) if shell != "fish" else words[-1],
        }
        if shell == "fish":
            environment["COMP_WORDS"] = " ".join(("cdc-worker", *words))
        program = Path(sys.executable).with_name("cdc-worker")
        return subprocess.run([program], env=environment, capture_output=True, text=True, check=False).stdout

    every = complete("")
    assert [name for name in main.commands if name not in every] == []
    assert "timeline" in complete("ti")
    assert "--customer" in complete("timeline", "--cus")
    script = subprocess.run(
        [sys.executable, "-m", "cdc_worker", "completion", shell], capture_output=True, text=True, check=True
    )
    assert "_CDC_WORKER_COMPLETE" in script.stdout
