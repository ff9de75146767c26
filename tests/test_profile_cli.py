"""`cdc-worker profile`, as who writes a profile meets it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st
from support import Crm, crm_on, role

from cdc_worker import config, profile, profile_checks
from cdc_worker.cli import main
from cdc_worker.cluster import Cluster
from cdc_worker.doctor import doctor
from cdc_worker.errors import ProfileError
from cdc_worker.places import Places
from cdc_worker.profile import shipped

TARGET = """\
name = "test"

[target]
table = "activity"
columns = { activity_type = "type", description = "description" }
"""


def cdc(*arguments: str, crm: Crm | None = None, dsn: str = "") -> Result:
    """Run a subcommand of `profile`, with the DSN of a CRM if one is given."""
    environment = {"CDC_WORKER_DSN": crm.dsn if crm else dsn or None}
    return CliRunner().invoke(main, ["profile", *arguments], env=environment, catch_exceptions=False)


def written(directory: Path, text: str) -> str:
    """The path of a profile with this text."""
    path = directory / "crm.toml"
    path.write_text(text, "utf-8")
    return str(path)


def told(directory: Path, text: str, *, crm: Crm | None = None) -> list[str]:
    """What a check says of a profile, without the file's name."""
    path = written(directory, text)
    done = cdc("check", path, crm=crm)
    lines = done.stdout.splitlines()
    faults = sum(re.match(r"\d+: (?!warning: )", line.removeprefix(f"{path}:")) is not None for line in lines[:-1])
    assert lines[-1].startswith(f"{path}: {faults} faults, ")
    assert done.exit_code == (1 if faults else 0)
    return [line.removeprefix(f"{path}:") for line in lines[:-1]]


@pytest.fixture(scope="module")
def shared(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """LeadFi's tables, set up, for tests that only look."""
    with crm_on(server, tmp_path_factory.mktemp("shared"), prepared=True) as crm:
        yield crm


@pytest.mark.parametrize("name", sorted(main.commands["profile"].commands))  # type: ignore[attr-defined]
def test_help_of_each_command_starts_with_a_verb_and_ends_with_an_example(name: str) -> None:
    text = main.commands["profile"].commands[name].help.replace("\b", "")  # type: ignore[attr-defined]
    assert re.match(r"[A-Z][a-z]*[a-rt-z] ", text.strip())
    assert re.fullmatch(rf"Example: cdc-worker profile {name}.*", text.strip().splitlines()[-1].strip())
    assert cdc(name, "--help").exit_code == 0


# Lines

scalars = st.sampled_from(["{}", "[{}, {}]", "[\n {}, # a ] comment\n\n {},\n]", "{{ a = {}, 'b.c' = {}, d.e = {} }}"])
texts = st.sampled_from(
    [
        '"""\n# no comment ]\n"""',
        "'''\n[x]\n'''",
        '"a # b"',
        "'\"'",
        '"\\""',
        '""',
        "''",
        '""""a"\\"""""',
        "1979-05-27 07:32:00",
    ]
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """TOML in which each integer stands once."""
    number = iter(range(100, 10_000))
    keys = iter(range(10_000))
    lines = []
    for _ in range(draw(st.integers(1, 12))):
        key = draw(st.sampled_from(["k", "k.l", '"q \\u0041 k"', "'l.k'"]))
        match draw(st.sampled_from(["pair", "text", "table", "array", "blank"])):
            case "pair":
                shape = draw(scalars)
                lines.append(f"x{next(keys)}.{key} = {shape.format(*[next(number) for _ in range(3)])}")
            case "text":
                lines.append(f"x{next(keys)} = {draw(texts)}")
            case "table":
                lines.append(f"[ t{next(keys)} . {key} ] # comment")
            case "array":
                name = draw(st.sampled_from(["a", "b.c", "\"b\".'d'"]))
                lines.append(f"[[{name}]]\nn = {next(number)}")
                if draw(st.booleans()):
                    lines.append(f"[{name}.sub{next(keys)}]\nn = {next(number)}")
            case _:
                lines.append("\t# [no] = 'table\n")
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines) + draw(st.sampled_from(["", "\n"]))


def leaves(value: Any, place: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    if isinstance(value, (dict, list)):
        for key, of in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(of, (*place, key))
    else:
        yield place, value


@given(documents())
def test_each_place_is_on_the_line_where_it_stands(text: str) -> None:
    places, lines = Places(text), text.split("\n")
    for place, value in leaves(tomllib.loads(text)):
        if isinstance(value, int):
            assert re.search(rf"\b{value}\b", lines[places.line(place) - 1]), (place, text)


def test_a_place_that_is_not_there_is_on_the_line_of_what_is_around_it() -> None:
    places = Places("\n[a]\n\n[[a.b]]\nc = 1\n")
    assert [places.line(place) for place in [("a",), ("a", "b"), ("a", "b", 0, "d", 3), ("z", "y"), ()]] == [
        2,
        4,
        4,
        1,
        1,
    ]


# check, without a database


@pytest.mark.parametrize("name", shipped())
def test_the_shipped_profiles_are_right(name: str) -> None:
    done = cdc("check", name)
    assert (done.exit_code, done.stdout) == (
        0,
        f"{name}: 0 faults, 0 warnings; by itself only: --dsn holds it against a database\n",
    )


def test_all_faults_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    """Of form, and of templates in other tables and in other rules of the same one."""
    tables = """\
colour = "red"

[tables.lead]
key = 7

[[tables.customer.rules]]
on = "insert"
type = "a"
description = "{nobody}"

[[tables.customer.rules]]
on = "update"
type = "b"
description = "x"

[[tables.customer.rules]]
on = "delete"
type = "c"
description = "x"

[tables.customer.rules.metadata]
one = "{old.one}"
two = "{new.two}"

[tables.contact]
rules = [
  { on = "insert", type = "d", description = "{lookup.lead.name}" },
]
"""
    assert told(tmp_path, TARGET + tables) == [
        "6: target.colour: Extra inputs are not permitted",
        "9: tables.lead.key: Input should be a valid list",
        "14: tables.customer, rule 1 (a): {nobody} names nothing that a template can use",
        '16: tables.customer.rules.1: a rule on updates is on them alone, and says in "changed" which columns it is'
        " about",
        "28: tables.customer, rule 3 (c): {new.two}: there is no new row at delete",
        '32: tables.contact, rule 1 (d): {lookup.lead.name}: there is no lookup "lead" here',
    ]


def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path) -> None:
    (fault,) = told(tmp_path, 'name = "x"\n\nname = !\n')
    assert re.fullmatch(r"3: profile \"\S+\" is not TOML: Invalid value \(at line 3, column 8\)", fault)
    (fault,) = told(tmp_path, 'name = "x"\n[target')
    assert fault.startswith("2: ")


@pytest.mark.parametrize("command", ["check", "show", "try"])
def test_a_file_that_cannot_be_read_is_told(command: str, tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    for path, reason in [("no_such.toml", "No such file"), (".", "Is a directory"), ("latin.toml", "UTF-8")]:
        done = cdc(command, str(tmp_path / path), *(["--change", "{}"] if command == "try" else []))
        assert (done.exit_code, done.stdout) == (1, "")
        assert re.match(rf'error: profile "\S+" can\'t be read: .*{reason}', done.stderr)


def test_hashes_and_functions_are_held_against_the_settings(tmp_path: Path) -> None:
    text = (
        TARGET
        + '[tables.lead]\nmasked = { email = "hash" }\nrules = [{ on = "insert", name = "f", rule = "os:getcwd" }]'
    )
    assert told(tmp_path, text) == [
        "7: tables.lead.masked: hashes need a key, in the setting mask_key",
        '8: tables.lead, rule 1 (f): "os:getcwd": the settings allow functions of no modules (rule_modules)',
    ]


SHIPPED = {name: profile.read(name) for name in shipped()}
TOKENS = [
    "[",
    "]",
    "{",
    "}",
    '"',
    "'",
    "=",
    ".",
    "\n",
    "0",
    "-1",
    "nan",
    "1e999999999",
    "true",
    "on",
    "rules",
    "new.",
    "lookup.x.y",
]


@st.composite
def mangled(draw: st.DrawFn) -> str:
    """A shipped profile with some pieces taken out, doubled, swapped or put in."""
    text = SHIPPED[draw(st.sampled_from(shipped()))]
    pieces = re.findall(r"\w+|\s+|[^\w\s]", text)
    for _ in range(draw(st.integers(1, 4))):
        at, other = draw(st.integers(0, len(pieces) - 1)), draw(st.integers(0, len(pieces) - 1))
        match draw(st.sampled_from(["out", "token", "swap", "double", "value"])):
            case "out":
                pieces[at] = ""
            case "token":
                pieces[at] += draw(st.sampled_from(TOKENS) | st.text(max_size=3))
            case "swap":
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case "double":
                pieces[at:at] = pieces[at : at + 40]
            case _:
                values = ["1", "[]", "{}", "true", "2001-02-03", "[[1]]", "{ new.x = { not = [1, { null = true }] } }"]
                equals = [n for n, piece in enumerate(pieces) if piece == "="]
                n = draw(st.sampled_from(equals)) if equals else 0
                pieces[n : n + 1] = ["=", draw(st.sampled_from(values)), "\n#"]
    return "".join(pieces)


@given(mangled())
@example('name = "x"\n' + "a." * 2000 + "a = 1")
@example("a = " + "[" * 3000 + "]" * 3000)
@example("a = " + "9" * 5000)
@example("a = 1e99999999999999999999999")
@example(
    TARGET
    + '[tables.a]\nrules = [{ on = "insert", type = "x", description = "y", when = '
    + "{ not = " * 300
    + "{}"
    + "}" * 300
    + "}]"
)
@example(
    TARGET + '[tables.a]\nrules = [{ on = "update", changed = "*", type = "x", description = "y", delta.a.over = nan }]'
)
def test_a_mangled_profile_is_never_more_than_a_wrong_one(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "mangled.toml"
    path.write_text(text, "utf-8", newline="")
    lines = text.count("\n") + 1
    found = [*profile_checks.check(config.load(), str(path))]
    assert all(1 <= one.line <= lines and one.outcome == "fault" for one in found)
    try:
        config.load().rules(profile.parse(text, source="x"))
    except ProfileError:
        assert found
    else:
        assert found == []


# check, with a database


def test_a_profile_that_fits_has_no_faults(shared: Crm) -> None:
    done = cdc("check", "leadfi", crm=shared)
    assert (done.exit_code, done.stdout) == (0, "leadfi: 0 faults, 0 warnings\n")


def test_what_setup_will_mend_is_no_fault(bare_crm: Crm) -> None:
    done = cdc("check", "leadfi", crm=bare_crm)
    assert done.exit_code == 0
    messages = re.findall(r"^leadfi:\d+: (.*)\n  fix: (.*)$", done.stdout, re.M)
    assert messages
    assert {(said.split(":")[0], fix) for said, fix in messages} == {("warning", "cdc-worker setup")}


def test_each_table_and_column_is_held_against_the_catalog_with_its_line(shared: Crm, tmp_path: Path) -> None:
    text = """\
name = "test"

[target]
table = "activity"

[target.columns]
activity_type = "type"
description = "description"
no_such = "type"
customer_uid = "owner"
change_key = "change_key"

[tables.lead]
key = "lead_id"
owner = "bd_in_charge"
lookups.deal = { table = "deal", match = { id = "lead_id" } }

[[tables.lead.rules]]
on = "update"
changed = "is_converted"
to = { is_converted = "yes" }
type = "converted"
description = "{new.full_name} {new.nickname} {lookup.deal.name}"

[[tables.lead.rules]]
on = "insert"
type = "a type of activity that has more than fifty characters"
description = "x"

[tables.nowhere]
"""
    found = told(tmp_path, text, crm=shared)
    assert [line for line in found if not line.startswith("  fix: ")] == [
        "3: column activity_type has 50 characters, too few for what these rules write; their rows become dead letters:"
        " a type of activity that has more than fifty characters of public.lead",
        "9: target table public.activity has no column no_such",
        "10: warning: target column public.activity.customer_uid is of the type integer, as which"
        " public.lead.bd_in_charge can't always be read, and such rows become dead letters: all rules",
        "16: captured table public.deal does not exist",
        '18: rule converted of public.lead is about is_converted = "yes", which a boolean is never',
        "23: captured table public.lead has no column nickname",
        "30: captured table public.nowhere does not exist",
    ]


def test_what_is_told_of_rows_that_are_there_is_held_against_the_catalog_as_well(shared: Crm, tmp_path: Path) -> None:
    text = """\
name = "test"

[target]
table = "activity"

[target.columns]
activity_type = "type"
description = "description"
date_created = "occurred_at"
lead_id = "lead"
change_key = "change_key"

[tables.lead]
key = "lead_id"
fields = { lead = "{row.lead_id}" }

[[tables.lead.rules]]
on = "insert"
type = "created"
description = "{new.full_name}"

[tables.lead.rules.backfill]
when = { row = { is_converted = "yes" } }
at = "{row.is_converted}"
description = "{row.nickname}"

[[tables.lead.rules]]
on = "update"
changed = "email"
type = "converted"
description = "{new.full_name}"

[tables.lead.rules.backfill]
at = "{lookup.contact.date_added}"
description = "{old.full_name}"
"""
    assert told(tmp_path, text, crm=shared)[:2] == [
        '34: tables.lead, rule 2 (converted): {lookup.contact.date_added}: there is no lookup "contact" here',
        "35: tables.lead, rule 2 (converted): {old.full_name}: there is no old row at read",
    ]
    mended = text.replace("{lookup.contact.date_added}", "{row.date_created}").replace("{old.", "{row.")
    assert told(tmp_path, mended, crm=shared) == [
        "9: for backfill: target column public.activity.date_created is of the type timestamp without time zone, as"
        " which public.lead.is_converted can't be read: created of public.lead",
        '  fix: name a column of dates as "at" of the backfill',
        "13: warning: for backfill: no rule of public.lead is sure to tell which lead_id a row had before: one that"
        " gets another is told of once more",
        '  fix: add a rule on "update" with changed = "unclaimed" and metadata = { changes = "{changes}" }',
        '17: for backfill: rule created of public.lead is about is_converted = "yes", which a boolean is never',
        "  fix: write true or false there, without quotes",
        "25: for backfill: captured table public.lead has no column nickname",
        "  fix: name columns that it has in [tables.lead] of the profile",
    ]


def test_what_is_wrong_for_a_backfill_alone_stops_no_worker(shared: Crm, tmp_path: Path) -> None:
    text = profile.read("leadfi").replace('at = "{row.date_created}"', 'at = "{row.lead_id}"', 1)
    settings = config.load(None, {"dsn": shared.dsn, "slot": shared.slot, "profile": written(tmp_path, text)})
    found = [finding for finding in doctor(settings).findings if "for backfill: " in finding.message]
    assert [(finding.check, finding.outcome) for finding in found] == [("profile", "warning")]


def test_lookups_and_constants_are_held_against_the_types_of_columns(bare_crm: Crm, tmp_path: Path) -> None:
    bare_crm.execute(
        "CREATE DOMAIN number AS bigint;"
        "CREATE TABLE firm (id bigint PRIMARY KEY, code char(3), name varchar(9), active boolean, rank int);"
        "CREATE TABLE deal (a number, b numeric(9), c varchar(20), d char(3), e text, flag boolean, count int)"
    )
    text = f"""\
{TARGET}
[tables.deal]
lookups.a = {{ table = "firm", match = {{ id = "a" }} }}
lookups.b = {{ table = "firm", match = {{ id = "b" }}, where = {{ active = true, rank = 1.0, code = "x  " }} }}
lookups.c = {{ table = "firm", match = {{ id = "c" }}, where = {{ active = 1 }} }}
lookups.d = {{ table = "firm", match = {{ code = "d" }}, where = {{ rank = true }} }}
lookups.e = {{ table = "firm", match = {{ name = "e" }}, where = {{ rank = "1" }} }}
lookups.f = {{ table = "firm", match = {{ code = "lookup.b.name" }} }}
rules = [
  {{ on = "update", changed = ["flag", "count"], to = {{ flag = 1 }}, type = "x", description = "x" }},
  {{ on = "update", changed = "*", when = {{ new = {{ flag = true, count = true }} }}, type = "y", description = "x" }},
  {{ on = "update", changed = "*", from = {{ count = [true, 1] }}, type = "z", description = "x" }},
  {{ on = "update", changed = "e", type = "v", description = "", when.any = [{{ delta = {{ e = {{ over = 1 }} }} }}] }},
]
"""
    first = TARGET.count("\n") + 2
    found = [line for line in told(tmp_path, text, crm=bare_crm) if " is about " in line or " finds " in line]
    assert found == [
        f"{first + 1}: lookup a of public.deal finds id of public.firm, of the type bigint, by a, of the type number:"
        " what the stream tells of both is never the same",
        f"{first + 3}: lookup c of public.deal finds id of public.firm, of the type bigint, by c,"
        " of the type character varying(20): what the stream tells of both is never the same",
        f'{first + 3}: lookup c of public.deal is about active = "1" of public.firm, which a boolean is never',
        f'{first + 4}: lookup d of public.deal is about rank = "true" of public.firm, which a integer is never',
        f'{first + 5}: lookup e of public.deal is about rank = "1" of public.firm, which a integer is never',
        f"{first + 6}: lookup f of public.deal finds code of public.firm, of the type character(3), by lookup.b.name,"
        " of the type character varying(9): what the stream tells of both is never the same",
        f'{first + 8}: rule x of public.deal is about flag = "1", which a boolean is never',
        f'{first + 9}: rule y of public.deal is about count = "true", which a integer is never',
        f"{first + 11}: rule v of public.deal is about how much e changes, which is no number but a text",
    ]


def test_a_rule_on_several_operations_is_named_once(shared: Crm, tmp_path: Path) -> None:
    text = """\
name = "test"
target = { table = "activity", columns = { activity_type = "type", customer_uid = "owner" } }
[tables.lead]
owner = "bd_in_charge"
rules = [
  { on = ["insert", "delete"], type = "x", description = "x" },
  { on = "truncate", type = "y", description = "x" },
]
"""
    (found,) = [line for line in told(tmp_path, text, crm=shared) if "as which" in line]
    assert found.endswith("such rows become dead letters: x of public.lead")


def test_a_target_column_that_must_have_a_value_is_a_fault_where_there_is_none(shared: Crm, tmp_path: Path) -> None:
    shared.execute(
        "CREATE TABLE note (note_id serial PRIMARY KEY, kind varchar(10) NOT NULL CHECK (kind <> 'bad'),"
        " body text NOT NULL, lead_id int NOT NULL, author text NOT NULL, change_key text UNIQUE)"
    )
    text = """\
name = "test"
[target]
table = "note"
columns = { kind = "type", body = "description", lead_id = "lead", change_key = "change_key" }
[tables.lead]
fields.lead = "{row.lead_id}"
rules = [
  { on = "insert", type = "bad", description = "x" },
  { on = "truncate", type = "gone", description = "x" },
]
"""
    found = [line for line in told(tmp_path, text, crm=shared) if not line.startswith("  fix: ")]
    shared.execute("DROP TABLE note")
    assert found == [
        '2: CHECK "note_kind_check" refuses all that these rules write, which becomes dead letters: bad of public.lead',
        "2: column author must have a value, has no default, and isn't in the profile: no row is taken",
        "2: column lead_id must have a value, and these rules have none, so that their rows become dead letters:"
        " gone of public.lead",
    ]


def test_faults_of_the_text_do_not_hide_those_of_the_catalog(shared: Crm, tmp_path: Path) -> None:
    rules = 'rules = [{ on = "insert", type = "x" }, { on = "insert", type = "y", description = "{new.no_such}" }]'
    found = told(tmp_path, f"{TARGET}[tables.lead]\n{rules}\n[tables.customer]\nkey = 1\n", crm=shared)
    assert [line for line in found if "captured" in line or "it says" in line] == [
        "7: tables.lead.rules.0: it says no description",
        "7: captured table public.lead has no column no_such",
    ]
    assert "9: tables.customer.key: Input should be a valid list" in found


@pytest.mark.parametrize("command", ["check", "try", "init"])
def test_a_server_that_is_not_there_is_told(command: str) -> None:
    more = ["--change", '{"table": "lead", "new": {}}'] if command == "try" else []
    file = [] if command == "init" else ["leadfi"]
    done = cdc(command, *file, *more, dsn="host=127.0.0.1 port=1 dbname=crm")
    assert done.exit_code == 1
    assert re.search(r"^error: .*(refused|failed)", done.stderr)


# show and schema


def test_show_prints_what_each_rule_is_about() -> None:
    done = cdc("show", "leadfi")
    text = re.sub(" +", " ", done.stdout)
    assert done.exit_code == 0
    assert text.startswith("profile leadfi, written to activity\n\nlead\n rule on condition type description\n")
    assert ' status_changed update status changed status_changed Lead status changed from "{old.status}"' in text
    assert "is_converted changed, is_converted is true lead_converted" in text
    assert "\ncontact\n no rules: captured for what it tells of others\n" in text


def test_show_tells_what_a_backfill_makes_of_rows_that_are_there() -> None:
    shown = cdc("show", "leadfi").stdout.splitlines()
    assert '  backfill of lead_created: Lead "{row.full_name}" created (dated {row.date_created})' in shown
    rows = {row["rule"]: row["backfill"] for row in json.loads(cdc("show", "leadfi", "--json").stdout)}
    assert rows["lead_converted"] == "{lookup.contact.date_added}"
    assert rows["lead_deleted"] is None


def test_show_tells_every_kind_of_condition_and_value(tmp_path: Path) -> None:
    text = """\
[tables.deal]
values.what = { by = "new.stage", map = { won = "Won", lost = "Lost" }, default = "{new.stage}" }
[[tables.deal.rules]]
on = "update"
changed = ["stage", "amount"]
from.stage = { not = ["won", "lost"] }
to.stage = ["won", { null = true }, { empty = false, over = 3 }]
delta.amount = { at_least = 1000, over_ratio = 0.1, grows = true }
when = { any = [{ new.a = 1 }, { not = { lookup.user.b = "x" } }], context = { source = "import" } }
skip_unless = ["new.owner", "lookup.user.id"]
type = "x"
description = ["Deal {values.what}", { text = "!", when = { new.a = true }, otherwise = "." }]
[[tables.deal.rules]]
on = ["insert", "delete"]
name = "f"
rule = "crm.rules:deal"
"""
    rows = json.loads(cdc("show", written(tmp_path, TARGET + text), "--json").stdout)
    assert rows == [
        {
            "table": "deal",
            "rule": "x",
            "on": ["update"],
            "condition": 'stage or amount changed, stage was anything but one of "won", "lost",'
            ' stage is one of "won", NULL, > 3 and not empty,'
            " amount changed by 1000 or more and more than 0.1 of the old value and an amount above zero,"
            ' context.source is "import" and (new.a is 1 or not (lookup.user.b is "x")),'
            " new.owner and lookup.user.id not empty",
            "type": "x",
            "description": "Deal {values.what}[! if new.a is true else .]",
            "backfill": None,
        },
        {
            "table": "deal",
            "rule": "f",
            "on": ["insert", "delete"],
            "condition": "",
            "type": "function crm.rules:deal",
            "description": "",
            "backfill": None,
        },
    ]
    assert (
        "  {values.what}: by new.stage (won: Won; lost: Lost; else: {new.stage})\n"
        in cdc("show", written(tmp_path, TARGET + text)).stdout
    )


def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(cdc("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", shipped())
def test_the_json_schema_takes_the_shipped_profiles(name: str) -> None:
    validator().validate(tomllib.loads(SHIPPED[name]))


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        'colour = "red"\n[tables.lead]',
        '[tables.lead]\nrules = [{ on = "upsert", type = "x", description = "y" }]',
        '[tables.lead]\nrules = [{ type = "x", description = "y" }]',
        '[tables.lead]\nmasked = { email = "maybe" }',
        '[tables.lead]\nfields = { "No Name" = "x" }',
        '[tables.lead]\nrules = [{ on = "insert", type = { by = "x", map = {} }, description = "y" }]',
        '[tables.lead]\nrules = [{ on = "insert", type = "x", description = "y", when = { nev = { a = 1 } } }]',
        "[tables.lead]\nlookups.a = { table = 1, match = { a = 'b' } }",
        "[tables.lead]\nkey = [1]",
    ],
)
def test_the_json_schema_refuses_what_is_wrong_in_form(wrong: str) -> None:
    assert not validator().is_valid(tomllib.loads(TARGET + wrong))
    with pytest.raises(ProfileError):
        profile.parse(TARGET + wrong, source="x")


def test_the_json_schema_describes_every_field() -> None:
    schema = profile.json_schema()
    fields = {
        f"{name}.{field}": of.get("description")
        for name, model in {"Profile": schema, **schema["$defs"]}.items()
        for field, of in model["properties"].items()
    }
    undescribed = {"Match.at_least", "Match.under", "Match.at_most", "Delta.at_least", "Delta.at_least_ratio"}
    assert {field for field, description in fields.items() if not description} <= undescribed


# try


def tried(file: str, *changes: dict[str, Any] | str, crm: Crm | None = None) -> list[dict[str, Any]]:
    """What a profile would write of changes."""
    given = [change if isinstance(change, str) else json.dumps(change) for change in changes]
    done = cdc("try", file, "--json", *(word for change in given for word in ("--change", change)), crm=crm)
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_change_that_is_told_becomes_what_the_worker_would_write() -> None:
    old = {"lead_id": 7, "full_name": "Ada", "company_name": "Engines", "bd_in_charge": "jane", "status": "a"}
    (only,) = tried("leadfi", {"table": "lead", "old": old, "new": {"status": "b"}, "context": {"changed_by": "joe"}})
    columns = only.pop("columns")
    metadata = {"lead_id": 7, "lead_name": "Ada", "company_name": "Engines", "old_status": "a", "new_status": "b"}
    metadata |= {"changed_by": "joe", "context_source": "message"}
    assert only == {
        "outcome": "activity",
        "table": "public.lead",
        "operation": "update",
        "type": "status_changed",
        "description": 'Lead status changed from "a" to "b"',
        "metadata": metadata,
        "reason": None,
    }
    assert json.loads(columns.pop("metadata")) == metadata
    assert re.fullmatch(r"\d{4}-\d\d-\d\d .*\+00:00", columns.pop("date_created"))
    assert columns == {
        "activity_type": "status_changed",
        "description": 'Lead status changed from "a" to "b"',
        "bd_in_charge": "jane",
        "created_by": "joe",
        "lead_id": "7",
        "customer_uid": None,
        "change_key": "cdc_worker/0/0000000000000001/public.lead/0/status_changed",
        "activity_category": "system",
        "is_visible_to_bd": "t",
    }


def test_changes_that_are_told_are_one_transaction() -> None:
    found = tried(
        "leadfi",
        {"table": "lead", "old": {"lead_id": 7, "is_converted": False}, "new": {"is_converted": True}},
        {"table": "contact", "new": {"lead_id": 7, "customer_uid": 42}},
        {"table": "customer", "operation": "truncate"},
        {"table": "public.lead", "old": {"lead_id": 7, "full_name": "Ada"}},
    )
    assert [(one["operation"], one["type"], one["columns"]["customer_uid"]) for one in found] == [
        ("update", "lead_converted", "42"),
        ("truncate", "customer_deleted", None),
        ("delete", "lead_deleted", None),
    ]


def test_numbers_keep_every_digit() -> None:
    (only,) = tried(
        "sales_cookbook", '{"table": "core_quote", "new": {"created_by_id": 1, "total_price": 12345678901234567890.10}}'
    )
    assert only["description"] == "Quote created:  for $12,345,678,901,234,567,890.10"


def test_rows_that_are_looked_up_can_be_told_and_their_absence_is() -> None:
    lead = {"table": "core_lead", "new": {"name": "Ada", "company": "", "assigned_to_id": 3, "organization_id": 9}}
    (told_,) = tried("sales_cookbook", {**lead, "lookups": {"user": {"organization_id": 5}}})
    assert told_["columns"]["organization_id"] == "5"
    done = cdc("try", "sales_cookbook", "--change", json.dumps(lead))
    assert re.search("organization_id +9\n", done.stdout)
    assert done.stdout.endswith(
        "not looked up, for want of a DSN: rows of public.core_user\n"
        "1 changes: 1 activities, 0 dead letters; nothing was written\n"
    )


def test_what_would_be_a_dead_letter_is_told_with_its_reason(tmp_path: Path) -> None:
    rules = 'rules = [{ on = "insert", type = "x", description = "{new.amount:,.2f}" }]'
    path = written(tmp_path, f"{TARGET}[tables.deal]\n{rules}\n")
    (only,) = tried(path, {"table": "deal", "new": {"amount": "much"}})
    assert (only["outcome"], only["columns"]) == ("dead_letter", None)
    assert only["reason"].startswith("rule_failed: ")
    done = cdc("try", path, "--change", '{"table": "deal", "new": {"amount": "much"}}')
    assert done.stdout.startswith("public.deal, insert: dead letter, rule_failed: ")


def test_a_masked_value_is_not_shown(tmp_path: Path) -> None:
    rules = 'masked = ["email"]\nrules = [{ on = "insert", type = "x", description = "{new.email}" }]'
    path = written(tmp_path, f"{TARGET}[tables.deal]\n{rules}\n")
    assert tried(path, {"table": "deal", "new": {"email": "a@b"}})[0]["description"] == "***"


def test_a_recording_becomes_what_the_worker_would_write() -> None:
    recordings = Path(__file__).parent / "recordings"
    done = cdc("try", "leadfi", "--json", "--recording", str(recordings / "leadfi.jsonl"))
    expected = json.loads((recordings / "leadfi.activities.json").read_text())
    assert [json.loads(line)["metadata"] for line in done.stdout.splitlines()] == [one["metadata"] for one in expected]
    assert done.stderr == f"24 changes: {len(expected)} activities, 0 dead letters; nothing was written\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}\n', "line 1: wal2json sent 9 bytes that can't be read"),
        ("\n\n\0\n", "line 3: wal2json sent"),
        ('{"action":"C","nextlsn":"0/1"}', "a commit came outside a transaction"),
        (
            '{"action":"B","timestamp":"2026-01-01 00:00:00+00","lsn":"0/1","nextlsn":"0/2"}\n',
            "the recording ends within a transaction",
        ),
    ],
)
def test_a_recording_that_is_none_is_told_with_its_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    done = cdc("try", "leadfi", "--recording", str(tmp_path / "x.jsonl"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "it can't be read as JSON"),
        ("[" * 100_000, "it can't be read as JSON"),
        ('{"table": "lead", "new": {"lead_id": NaN}}', "NaN is no number that a column has"),
        ('{"table": "lead", "new": {"lead_id": 1e999999999999999999999}}', "is no number that a column has"),
        (
            '{"table": "lead", "new": {"lead_id": [1]}}',
            "new.lead_id: a value is null, true, false, a number, or a text",
        ),
        ('{"table": "lead", "new": {"lead_id": "\\u0000n"}}', "new.lead_id: a value is null"),
        ("[]", "Input should be a valid dictionary"),
        ('{"new": {}}', "table: Field required"),
        ('{"table": "lead", "new": {}, "colour": 1}', "colour: Extra inputs are not permitted"),
        ('{"table": "lead"}', 'it has neither "old" nor "new"'),
        ('{"table": "deal", "new": {}}', 'table "deal" isn\'t captured; these are: public.contact'),
        ('{"table": "lead", "new": {}, "lookups": {"contact": {}}}', "tell its row as a change of its own"),
        ('{"table": "lead", "new": {}, "lookups": {"user": {}}}', 'table public.lead has no lookup "user"'),
    ],
)
def test_a_change_that_is_none_is_a_misuse(change: str, reason: str) -> None:
    done = cdc("try", "leadfi", "--change", change)
    assert (done.exit_code, done.stdout) == (2, "")
    assert reason in done.stderr


def test_try_wants_changes_or_a_recording() -> None:
    for arguments in [
        [],
        ["--change", "{}", "--recording", __file__],
        ["--recording", "/no/such"],
        ["--recording", "/"],
    ]:
        assert cdc("try", "leadfi", *arguments).exit_code == 2


def test_with_a_dsn_a_row_has_all_columns_and_texts_are_cut_as_the_target_wants_them(shared: Crm) -> None:
    change: dict[str, Any] = {"table": "lead", "old": {"bd_in_charge": "jane"}, "new": {"country": "Malta"}}
    (only,) = tried("leadfi", change, crm=shared)
    assert only["description"] == 'Lead "" updated: country'
    (only,) = tried("leadfi", {"table": "lead", "new": {}, "context": {"changed_by": "x" * 60}}, crm=shared)
    assert only["columns"]["created_by"] == "x" * 49 + "…"
    assert "+" not in only["columns"]["date_created"]
    done = cdc("try", "leadfi", "--change", '{"table": "lead", "new": {"nickname": "A"}}', crm=shared)
    assert (done.exit_code, "table public.lead has no column nickname" in done.stderr) == (2, True)


def test_with_a_dsn_rows_are_looked_up(shared: Crm, tmp_path: Path) -> None:
    text = """\
[tables.contact]
lookups.lead = { table = "lead", match = { lead_id = "lead_id" } }
lookups.peer = { table = "lead", match = { bd_in_charge = "lookup.lead.bd_in_charge" }, where = { status = "x" } }
rules = [{ on = "insert", type = "a", description = "{lookup.lead.full_name or 'nobody'}, {lookup.peer.full_name}" }]
"""
    shared.execute(
        "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status)"
        " VALUES (1007, 'Ada', 's', 'jane', 't', 'y'), (1008, 'Bea', 's', 'jane', 't', 'x')"
    )
    try:
        path = written(tmp_path, TARGET + text)
        changes = [{"table": "contact", "new": {"lead_id": number}} for number in (1007, 1009)]
        assert [one["description"] for one in tried(path, *changes, crm=shared)] == ["Ada, Bea", "nobody, "]
        told_ = {**changes[0], "lookups": {"lead": {"full_name": "Eve"}}}
        assert [one["description"] for one in tried(path, told_, crm=shared)] == ["Eve, "]
        with role(shared, granted=False):
            done = cdc("try", path, "--change", json.dumps(changes[0]), dsn=shared.settings["dsn"])
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert "42501" in done.stderr
    finally:
        shared.execute("DELETE FROM lead WHERE lead_id > 1000")


def test_with_a_dsn_recorded_changes_of_partitions_are_their_roots(shared: Crm, tmp_path: Path) -> None:
    shared.execute("CREATE TABLE deal (id int, state text) PARTITION BY LIST (state)")
    shared.execute("CREATE TABLE deal_open PARTITION OF deal FOR VALUES IN ('open')")
    shared.execute("CREATE TABLE deal_won PARTITION OF deal FOR VALUES IN ('won')")
    text = """\
[tables.deal]
key = "id"
rules = [{ on = "update", changed = "state", type = "moved", description = "{old.state} to {new.state}" }]
"""
    row = '[{"name":"id","value":1},{"name":"state","value":"%s"}]'
    recorded = [
        '{"action":"B","timestamp":"2026-01-01 00:00:00+00","lsn":"0/1","nextlsn":"0/2"}',
        f'{{"action":"D","schema":"public","table":"deal_open","identity":{row % "open"}}}',
        f'{{"action":"I","schema":"public","table":"deal_won","columns":{row % "won"}}}',
        '{"action":"C","nextlsn":"0/2"}',
    ]
    (tmp_path / "moved.jsonl").write_text("\n".join(recorded))
    done = cdc("try", written(tmp_path, TARGET + text), "--recording", str(tmp_path / "moved.jsonl"), crm=shared)
    shared.execute("DROP TABLE deal")
    assert "public.deal, update: moved\n" in done.stdout
    assert done.stdout.endswith("1 changes: 1 activities, 0 dead letters; nothing was written\n")


def test_nothing_is_written_and_a_role_that_may_only_connect_is_enough(shared: Crm) -> None:
    recording = str(Path(__file__).parent / "recordings" / "leadfi.jsonl")
    commands = [
        ["check", "leadfi"],
        ["try", "leadfi", "--change", '{"table": "lead", "new": {}}'],
        ["try", "leadfi", "--recording", recording],
    ]
    with role(shared, granted=False):
        for dsn in (shared.settings["dsn"], shared.dsn):
            for command in commands:
                done = cdc(*command, dsn=dsn)
                assert (done.exit_code, done.stderr) == (0, "")
    for table in ("activity", "cdc_worker.dead_letter", "cdc_worker.tally", "cdc_worker.process"):
        assert shared.connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() == (0,)


# init


def drafted(crm: Crm, directory: Path, *arguments: str) -> str:
    """A draft, which check finds nothing wrong with, nor with all that it has in comments."""
    done = cdc("init", *arguments, crm=crm)
    assert (done.exit_code, done.stderr) == (0, "")
    path = written(directory, done.stdout)
    checked = cdc("check", path, crm=crm)
    assert checked.exit_code == 0, checked.stdout + done.stdout
    (directory / "all.toml").write_text(re.sub(r"^#(?![ :])", "", done.stdout, flags=re.M))
    all_ = [*profile_checks.check(config.load(), str(directory / "all.toml"))]
    assert {told_.message.split('"')[1] for told_ in all_} <= {"crm_rules:told"}, all_
    return done.stdout


def test_a_draft_for_leadfi(shared: Crm, tmp_path: Path) -> None:
    found = profile.parse(drafted(shared, tmp_path), source="draft")
    assert found.target.table == "activity"
    assert found.target.columns == {
        "activity_type": "type",
        "description": "description",
        "metadata": "metadata",
        "date_created": "occurred_at",
        "created_by": "created_by",
        "lead_id": "lead",
        "customer_uid": "customer",
        "change_key": "change_key",
    }
    assert found.target.constants == {"activity_category": "system"}
    assert [*found.tables] == ["contact", "customer", "lead"]
    assert found.tables["contact"].lookups["lead"].match == {"lead_id": "lead_id"}
    assert found.tables["contact"].fields == {"lead": "{row.lead_id}", "customer": "{row.customer_uid}"}
    assert [rule.label for rule in found.tables["lead"].rules] == [
        "lead_created",
        "lead_status_changed",
        "lead_updated",
        "lead_deleted",
    ]


def test_a_draft_for_the_sales_cookbook_and_for_what_cannot_be_written_there(bare_crm: Crm, tmp_path: Path) -> None:
    bare_crm.connection.execute((Path(__file__).parent / "sales_cookbook.sql").read_bytes())
    text = drafted(bare_crm, tmp_path)
    found = profile.parse(text, source="draft")
    assert found.target.columns == {
        "type": "type",
        "summary": "description",
        "timestamp": "occurred_at",
        "user_id": "user",
        "lead_id": "lead",
        "contact_id": "contact",
        "opportunity_id": "opportunity",
        "organization_id": "organization",
    }
    assert "# Nothing of lead says user_id, which must have a value: it isn't captured." in text
    assert [*found.tables] == ["core_lead", "core_opportunity", "core_quote", "core_task", "core_user"]
    assert found.tables["core_user"].masked == {"password": "hidden"}
    assert found.tables["core_opportunity"].lookups["owner"].table == "core_user"
    (created, *_) = found.tables["core_opportunity"].rules
    # Not of 25 characters, as the type is 20 long, and not without the user that each row must have.
    assert (created.name, created.type, created.skip_unless) == (
        "core_opportunity_created",
        "created",
        ["row.owner_id"],
    )
    text = drafted(bare_crm, tmp_path, "--table", "core_lead", "--table", "core_quote")
    assert [rule.type for rule in profile.parse(text, source="draft").tables["core_quote"].rules] == [
        "quote_created",
        "quote_updated",
        "quote_deleted",
    ]


def test_a_draft_without_a_target_has_one_to_be_made(bare_crm: Crm, tmp_path: Path) -> None:
    done = cdc("init", crm=bare_crm)
    path = written(tmp_path, done.stdout)
    assert cdc("check", path).exit_code == 0
    assert "target table public.activity does not exist" in cdc("check", path, crm=bare_crm).stdout
    statement = re.findall(r"^#   (.*)", done.stdout, re.M)
    bare_crm.connection.execute("\n".join(statement).encode())
    checked = cdc("check", path, crm=bare_crm)
    assert (checked.exit_code, checked.stdout) == (0, f"{path}: 0 faults, 0 warnings\n")


def test_a_draft_for_odd_names(bare_crm: Crm, tmp_path: Path) -> None:
    bare_crm.connection.execute(
        """
        CREATE SCHEMA "Odd One";
        SET search_path = "Odd One";
        CREATE TABLE "Re\"\"gion" ("or" int PRIMARY KEY, "Na{me" text);
        CREATE TABLE "select" (
            "or" int, "a or b" text, " " text, "x:y" text, "don't" text, "Quoted \"\"Name\"\"" text, "Größe" numeric,
            "lookup.x.y" text, "*" text, "newline
            " text, "PASSWORD" text, "Region Id" int REFERENCES "Re\"\"gion", "self" int, status varchar(3),
            updated_at timestamptz, PRIMARY KEY ("or", " "));
        CREATE TABLE "dot.ted" (id int PRIMARY KEY);
        CREATE TABLE parted (id int PRIMARY KEY, name text, boss int REFERENCES parted) PARTITION BY RANGE (id);
        CREATE TABLE parted_1 PARTITION OF parted DEFAULT;
        CREATE TABLE "123" (id uuid PRIMARY KEY);
        CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
        CREATE TABLE nothing ();
        CREATE VIEW looks AS SELECT 1 AS id;
        CREATE TABLE "Activity {Log}" (
            id serial PRIMARY KEY, "TYPE" varchar(7) NOT NULL CHECK ("TYPE" IN ('call', 'no''te')),
            "the text" text, body text NOT NULL, at date NOT NULL, flag boolean NOT NULL, n int NOT NULL, parted_id int)
        """.encode()
    )
    text = drafted(bare_crm, tmp_path, "--schema", "Odd One", "--target", "Odd One.Activity {Log}")
    found = profile.parse(text, source="draft")
    assert found.target.table == "Odd One.Activity {Log}"
    assert found.target.constants == {"flag": False, "n": 0}
    assert [*found.tables] == ["Odd One.123", 'Odd One.Re"gion', "Odd One.parted", "Odd One.select"]
    select = found.tables["Odd One.select"]
    assert (select.key, select.ignored, [*select.masked]) == (["or", " "], ["updated_at"], ["PASSWORD"])
    assert select.lookups["region_id"].match == {"or": "Region Id"}
    assert {rule.type for rule in select.rules} == {"call"}


def test_a_draft_reads_only(shared: Crm) -> None:
    with role(shared, granted=False):
        assert cdc("init", dsn=shared.settings["dsn"]).stdout == cdc("init", crm=shared).stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--table", "no such"], 'there is no table "no such"'),
        (["--target", "a.b.c"], 'there is no table "a.b.c"'),
        (["--table", "lead\0"], "there is no table"),
        (["--schema", "no such"], 'there is no table with a primary key in the schema "no such"'),
    ],
)
def test_what_no_draft_can_be_made_of_is_told(arguments: list[str], reason: str, shared: Crm) -> None:
    done = cdc("init", *arguments, crm=shared)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {reason}")


def test_a_target_without_columns_for_activities_is_told(shared: Crm) -> None:
    shared.execute("CREATE TABLE bare (id int PRIMARY KEY)")
    done = cdc("init", "--table", "lead", "--target", "bare", crm=shared)
    shared.execute("DROP TABLE bare")
    assert done.exit_code == 1
    assert "no column of public.bare is named for what activities have" in done.stderr


def test_a_target_that_asks_for_what_no_table_has_is_told(bare_crm: Crm) -> None:
    bare_crm.execute("CREATE TABLE person (id int PRIMARY KEY)")
    bare_crm.execute(
        "CREATE TABLE log (body text, lead_id int NOT NULL REFERENCES lead, who int NOT NULL REFERENCES person)"
    )
    done = cdc("init", "--table", "lead", "--table", "person", crm=bare_crm)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nothing of these tables can be written to public.log: lead_id, who must have")
