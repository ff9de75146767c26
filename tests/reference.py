"""The reference of the command line, from the commands: `python tests/reference.py > docs/cli.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from cdc_worker.cli import main
from cdc_worker.config import Settings

SHARED = {*Settings.model_fields, "config"}
"""Options of nearly all commands."""


def page() -> str:
    """All of it."""
    return "\n".join(lines()) + "\n"


def lines() -> Iterator[str]:
    yield "# Command line"
    yield ""
    yield "Made of the commands by `tests/reference.py`; `cdc-worker COMMAND --help` prints the same, and the settings."
    yield "Options marked with * may be given more than once. Nearly all take a settings file (`--config FILE`), and"
    yield "each setting of the README as an option. They end with 0 (done), 1 (failed) or 2 (misused); `run` has"
    yield "[more](exit-codes.md)."
    for path, command in commands(main, "cdc-worker"):
        yield from section(path, command)


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """All commands with their names, in order; groups before their own."""
    for name, command in sorted(group.commands.items()):
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


def section(path: str, command: click.Command) -> Iterator[str]:
    """A command's heading, usage, words and options."""
    context = click.Context(command, info_name=path)
    words, _, example = inspect.cleandoc(command.help or "").partition("\b\n")
    yield ""
    yield f"## {path.removeprefix('cdc-worker ')}"
    yield ""
    yield f"    {' '.join([path, *command.collect_usage_pieces(context)])}"
    for paragraph in words.strip().split("\n\n"):
        yield ""
        yield escaped(" ".join(paragraph.split()))
    if example:
        yield ""
        yield f"    {example.removeprefix('Example: ').strip()}"
    own = [of for of in command.params if isinstance(of, click.Option) and of.name not in SHARED and not of.hidden]
    if own:
        yield ""
        yield "| Option | |"
        yield "| --- | --- |"
        yield from (row(option, context) for option in own)


def row(option: click.Option, context: click.Context) -> str:
    found = option.get_help_record(context)
    assert found is not None
    names, said = found
    return f"| `{names.strip()}`{' *' if option.multiple else ''} | {escaped(' '.join(said.split()))} |"


def escaped(text: str) -> str:
    """Without what Markdown would take for its own."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    click.echo(page(), nl=False)
