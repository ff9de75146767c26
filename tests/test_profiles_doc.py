"""What the page about profiles says is so: the tutorial on a real server, and the reference as the models are."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import BaseModel
from support import Crm, crm_on

from cdc_worker import profile
from cdc_worker.cluster import Cluster
from cdc_worker.rules import compile_rules

PAGE = (Path(__file__).parent.parent / "docs" / "profiles.md").read_text("utf-8")

# The tutorial.


def blocks() -> Iterator[tuple[str, str]]:
    """What the tutorial shows, in order: its kind, and the text."""
    (tutorial,) = re.findall(r"^## Tutorial\n(.*?)(?=^## )", PAGE, re.M | re.S)
    yield from re.findall(r"^```([a-z ]+)\n(.*?)^```$", tutorial, re.M | re.S)


def sections(toml: str) -> list[tuple[str, str]]:
    """Headings, of which the first is empty, and the lines below them."""
    parts = re.split(r"^(\[.*)$", toml, flags=re.M)
    return [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def added(toml: str, more: str) -> str:
    """A profile and what is added to it: below the headings that are there already, else at its end."""
    found = sections(toml)
    for heading, lines in sections(more):
        known = [place for place, (of, _) in enumerate(found) if of.split(" #")[0] == heading]
        if known and not heading.startswith("[["):
            of, before = found[known[0]]
            found[known[0]] = (of, f"{before.rstrip()}\n{lines.strip()}\n\n")
        else:
            found.append((heading, lines))
    return "".join(heading + lines for heading, lines in found)


class Practice:
    """The tutorial's database, and how far the tutorial has come."""

    def __init__(self, crm: Crm) -> None:
        self.crm = crm
        self.profile = ""
        self._set_up = ""
        self._seen = 0

    def do(self, kind: str, text: str) -> None:
        """Do what a block shows."""
        match kind:
            case "toml":
                self._write(added(self.profile, text))
            case "toml profile":
                self._write(text)
                self._seen = 0
            case "python":
                (self.crm.directory / "practice_rules.py").write_text(text, "utf-8")
                self.crm.settings["rule_modules"] = "practice_rules"
            case "sql":
                if self._set_up != self.profile:
                    self.crm.setup()
                    self._set_up = self.profile
                for statement in text.split(";\n"):
                    self.crm.connection.execute(statement.encode())
            case _:
                raise ValueError(f"a block of the page says what it is: {kind}")

    def _write(self, text: str) -> None:
        path = self.crm.directory / "practice.toml"
        path.write_text(text, "utf-8")
        self.profile, self.crm.settings["profile"] = text, str(path)

    def printed(self, console: str) -> str:
        """Commands, each with what it prints."""
        commands = re.findall(r"^\$ cdc-worker (.*)$", console, re.M)
        with ExitStack() as stack:
            if "backfill" in commands:
                stack.enter_context(self.crm.worker()).wait_for("replication_started")
            return "".join(f"$ cdc-worker {command}\n{self.crm.succeed(*shlex.split(command))}" for command in commands)

    def told(self, head: str) -> str:
        """What has been written since, as a table of these columns of the target."""
        self.crm.record()
        table, key = ("old_log", "id") if "old_log" in self.profile else ("diary", "entry_id")
        columns = head.split()
        chosen = ", ".join(f"{column}::text" for column in columns)
        query = f"SELECT {key}, {chosen} FROM {table} WHERE {key} > {self._seen} ORDER BY 1"
        rows = self.crm.connection.execute(query.encode()).fetchall()
        self._seen = rows[-1][0] if rows else self._seen
        cells = [columns, *([value or "" for value in row[1:]] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
        return "".join(f"{line}\n" for line in lines)


@pytest.fixture
def practice(server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Practice]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where a worker that the tests start finds modules
    with crm_on(server, tmp_path) as crm:
        crm.slot = "cdc_worker"
        yield Practice(crm)


def without_times(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d [\d:.+]+", "…", text)


def test_each_step_of_the_tutorial_writes_what_the_page_shows(practice: Practice) -> None:
    for kind, text in blocks():
        if kind == "text":
            assert practice.told(text.splitlines()[0]) == text
        elif kind == "console":
            assert without_times(practice.printed(text)) == without_times(text)
        else:
            practice.do(kind, text)
    assert practice.crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_each_example_of_a_matcher_can_be_read() -> None:
    (examples,) = re.findall(r"^```toml matchers\n(.*?)^```$", PAGE, re.M | re.S)
    for line in examples.splitlines():
        text = f"""
            name = "x"
            target = {{ table = "t", columns = {{ k = "type" }} }}
            [[tables.lead.rules]]
            on = "update"
            changed = "*"
            type = "t"
            description = ""
            {line}"""
        compile_rules(profile.parse(text, source="the page"))


# The reference.

WORDS = {
    "str": "text",
    "bool": "true or false",
    "int": "whole number",
    "Decimal": "number",
    "Name": "name",
    "Constant": "constant",
    "Value": "[value](#values-templates-and-conditions)",
    "Matcher": "[matcher](#matchers)",
    "Path_": "path",
    "Names": "column, or list of them",
    "Paths": "path, or list of them",
    "Happenings": "operation, or list of them",
    "Masked": "list of columns, or by column `hidden` or `hash`",
}

MODELS: list[tuple[type[BaseModel], str]] = [
    (profile.Profile, "The file"),
    (profile.Target, "`[target]`"),
    (profile.Table, "`[tables.<table>]`"),
    (profile.Lookup, "`[tables.<table>.lookups.<name>]`"),
    (profile.Mapped, "`[tables.<table>.mapped.<column>]`"),
    (profile.Rule, "`[[tables.<table>.rules]]`"),
    (profile.Backfill, "`[tables.<table>.rules.backfill]`"),
    (profile.Condition, "Conditions: `when`"),
    (profile.Match, "Matchers"),
    (profile.Delta, "`delta`"),
    (profile.Map, "Values: maps"),
    (profile.Part, "Values: parts of a text"),
]

ANCHORS = {
    "Target": "target",
    "Table": "tablestable",
    "Lookup": "tablestablelookupsname",
    "Mapped": "tablestablemappedcolumn",
    "Rule": "tablestablerules",
    "Backfill": "tablestablerulesbackfill",
    "Condition": "conditions-when",
    "Delta": "delta",
}


def in_words(annotation: str | ast.expr) -> str:
    """A type as it stands in the source of a model."""
    match annotation if isinstance(annotation, ast.expr) else ast.parse(annotation, mode="eval").body:
        case ast.Name(id=name) if name in WORDS:
            return WORDS[name]
        case ast.Name(id=name):
            return f"[{name.lower()}](#{ANCHORS[name]})"
        case ast.BinOp(left=of, right=ast.Constant(value=None)):
            return in_words(of)
        case ast.BinOp(left=one, right=other):
            return f"{in_words(one)}, or {in_words(other)}"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[of, *_])):
            return in_words(of)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=constant):
            return f"`{ast.unparse(constant)}`"
        case ast.Subscript(value=ast.Name(id="list"), slice=of):
            return f"list of {in_words(of)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, of])):
            return f"table of {in_words(of)}"
        case other:
            raise ValueError(ast.dump(other))


def reference() -> str:
    """All that a profile may say, as the models have it."""
    lines = []
    for model, title in MODELS:
        model.model_rebuild(force=True)  # where it names what comes after it, it doesn't know its aliases yet
        lines += [f"### {title}", "", inspect.getdoc(model) or "", "", "| Key | | | |", "| --- | --- | --- | --- |"]
        for name, field in model.model_fields.items():
            given = "required" if field.is_required() else ""
            if field.default and not field.is_required():
                given = f"`{field.default}`"
            kind = in_words(model.__annotations__[name])
            told = " ".join((field.description or "").split())
            lines.append(f"| `{field.alias or name}` | {kind} | {given} | {told} |")
        lines.append("")
    return "\n".join(lines)


def test_the_reference_is_what_the_models_are() -> None:
    (shown,) = re.findall(r"^<!-- reference -->\n\n(.*)\n<!-- end of reference -->$", PAGE, re.M | re.S)
    assert shown == reference()


def test_every_key_of_the_reference_is_explained() -> None:
    unexplained = [
        f"{model.__name__}.{name}"
        for model, _ in MODELS
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert unexplained == []


def test_links_within_the_page_lead_to_its_headings() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert [target for target in re.findall(r"\]\(#([^)]*)\)", PAGE) if target not in anchors] == []
