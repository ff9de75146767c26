"""What the documents say is so."""

from __future__ import annotations

import re
from pathlib import Path

from support import GRANTS

from cdc_worker.config import PREFIX, Settings

ROOT = Path(__file__).parent.parent


def settings_table() -> list[str]:
    """The README's table of settings, as the settings are."""
    rows = ["| Variable | Flag | Default | |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or name == "dsn" else f"`{field.default}`"
        flag = f"`--{name.replace('_', '-')}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {flag} | {default} | {field.description} |")
    return rows


def test_the_readme_lists_every_setting_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(settings_table()) in readme, "\n" + "\n".join(settings_table())


def test_the_readme_lists_the_grants_with_which_the_suite_runs_the_worker() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [grant for grant in GRANTS if f"    {grant.format(role='cdc')};" not in readme] == []


def test_links_within_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_names_every_make_target_that_it_uses() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(re.findall(r"(?:^    (?:\S+=\S+ )?|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test"} <= used <= targets
