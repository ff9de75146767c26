import re
from pathlib import Path

import pytest
from factories import TARGET, profile

from cdc_worker.errors import ProfileError
from cdc_worker.profile import load, parse, shipped
from cdc_worker.rules import compile_rules

RULE = '{ on = "insert", type = "created", description = "x" }'


def faults(text: str) -> list[str]:
    """The faults that reading a profile names, one a line."""
    with pytest.raises(ProfileError) as caught:
        compile_rules(parse(text, source="p.toml"))
    assert caught.value.hint == "mend each place named; on which lines they are says: cdc-worker profile check"
    head, *lines = str(caught.value).splitlines()
    assert head in ('profile "p.toml" is wrong:', 'profile "test" is wrong:')
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def table_faults(tables: str) -> list[str]:
    return faults(TARGET + tables)


def test_the_shipped_profiles_can_be_read_and_compiled() -> None:
    assert "leadfi" in shipped()
    for name in shipped():
        assert load(name).name == name
        assert compile_rules(load(name))


def test_a_profile_is_a_shipped_name_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(TARGET + "[tables.lead]", "utf-8")
    assert load(str(path)).name == "test"
    assert load("leadfi").target.table == "activity"


@pytest.mark.parametrize("name", ["leadfy", "", "no/such.toml"])
def test_an_unknown_name_is_told_with_the_names_that_are_known(name: str) -> None:
    with pytest.raises(ProfileError, match=f'^profile "{name}" can\'t be read: ') as caught:
        load(name)
    assert caught.value.hint == f"name a file, or one of the shipped profiles: {', '.join(shipped())}"


def test_a_file_that_cannot_be_read_is_told_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="Is a directory"):
        load(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ProfileError, match="it isn't UTF-8 text"):
        load(str(tmp_path / "latin.toml"))


def test_what_is_not_toml_is_told_with_its_place() -> None:
    with pytest.raises(ProfileError, match=r'^profile "p.toml" is not TOML: .*line 2') as caught:
        parse('name = "x"\nname = !\n', source="p.toml")
    assert caught.value.hint == "mend the file at that place"


def test_every_fault_of_form_is_named_at_once() -> None:
    assert faults(
        """
        name = "No Name"
        colour = "red"
        text_length = 0
        [target]
        table = "activity"
        columns = { key = "change_key" }
        [[tables.lead.rules]]
        on = "upsert"
        type = "x"
        description = "x"
        [tables.customer]
        rules = [{ on = "update", type = "changed", description = "x" }]
        """
    ) == [
        "name: String should match pattern '^[a-z][a-z0-9_]*$'",
        "tables.lead.rules.0.on.0: Input should be 'insert', 'update', 'delete' or 'truncate'",
        'tables.customer.rules.0: a rule on updates is on them alone, and says in "changed" which columns it is about',
        "text_length: Input should be greater than or equal to 1",
        "colour: Extra inputs are not permitted",
    ]


@pytest.mark.parametrize(
    "tables",
    [
        "[tables.lead]\ncolour = 1",
        "[tables.lead.mapped.x]\ncolumn = 'a'\nmap = {}\nelse = 'b'",
        "[tables.lead.lookups.x]\ntable = 'a'\nmatch = { a = 'b' }\nelse = 'b'",
        '[tables.lead]\nrules = [{ on = "insert", type = "x", description = "x", whence = "y" }]',
    ],
)
def test_an_unknown_key_is_a_fault_everywhere(tables: str) -> None:
    (fault,) = table_faults(tables)
    assert fault.endswith(": Extra inputs are not permitted")


@pytest.mark.parametrize(
    ("tables", "fault"),
    [
        (f"[tables.lead]\nrules = [{RULE}, {RULE}]", "rules that need a name of their own: created"),
        (
            '[tables.lead]\nrules = [{ on = "delete", type = "x", name = "created", description = "" }, ' + RULE + "]",
            "rules that need a name of their own: created",
        ),
        (
            '[tables.lead]\nrules = [{ on = "insert", changed = "a", type = "x", description = "x" }]',
            '"changed", "from", "to" and "delta" are for rules on updates alone',
        ),
        (
            '[tables.lead]\nrules = [{ on = "delete", to = { a = 1 }, type = "x", description = "x" }]',
            '"changed", "from", "to" and "delta" are for rules on updates alone',
        ),
        (
            '[tables.lead]\nrules = [{ on = ["insert", "update"], type = "x", description = "x" }]',
            'a rule on updates is on them alone, and says in "changed" which columns it is about',
        ),
        (
            '[tables.lead]\nrules = [{ on = ["insert", "insert"], type = "x", description = "x" }]',
            'an operation stands twice in "on"',
        ),
        (
            '[tables.lead]\nrules = [{ on = [], type = "x", description = "x" }]',
            "should have at least 1 item after validation, not 0",
        ),
        ("[tables.lead.lookups.contact]\ntable = 'contact'\nmatch = {}", "Dictionary should have at least 1 item"),
        ("[tables]", "Dictionary should have at least 1 item"),
    ],
)
def test_a_rule_that_could_not_do_what_it_says_is_a_fault(tables: str, fault: str) -> None:
    (told,) = table_faults(tables)
    assert fault in told


def test_every_fault_between_target_and_tables_is_named_at_once() -> None:
    text = """
    name = "test"
    [target]
    table = "activity"
    columns = { a = "nowhere", b = "lead", c = "nothing", k = "change_key" }
    [tables.lead]
    fields = { lead = "{row.id}", change_key = "x" }
    """
    assert faults(text) == [
        '(top): target column "a" wants the field "nowhere", which no table or rule has',
        '(top): target column "c" wants the field "nothing", which no table or rule has',
        '(top): tables.lead has a field "change_key", which is not for profiles to fill',
    ]


def test_every_fault_of_the_target_is_named_at_once() -> None:
    told = faults(
        """
        name = "test"
        [target]
        table = "activity"
        columns = { a = "type" }
        constants = { a = "x" }
        lengths = { b = 10 }
        [tables.lead]
        """
    )
    assert told == ["target: in columns as well as in constants: a", "target: in lengths and not in columns: b"]


def test_every_template_that_names_something_unknown_is_named_at_once() -> None:
    assert table_faults(
        """
        [tables.lead]
        fields = { lead = "{row.id}" }
        rules = [
            { on = "insert", type = "a", description = "{nothing}" },
            { on = "insert", type = "b", description = "x", metadata = { k = "{lookup.contact.id}" } },
            { on = "delete", type = "c", description = "x", fields = { who = "{new.id}" } },
            { on = "update", changed = ["*", "x"], type = "d", description = "x" },
            { on = "insert", type = "e", description = "{" },
        ]
        [tables.customer]
        lookups.contact = { table = "nowhere", match = { a = "lookup.nothing.b" } }
        rules = [{ on = "insert", type = "f", description = "{}" }]
        """
    ) == [
        "tables.lead, rule 1 (a): {nothing} names nothing that a template can use",
        'tables.lead, rule 2 (b): {lookup.contact.id}: there is no lookup "contact" here',
        "tables.lead, rule 3 (c): {new.id}: there is no new row at delete",
        'tables.lead, rule 4 (d): "*" and "unclaimed" stand alone in "changed"',
        "tables.lead, rule 5 (e): Single '{' encountered in format string",
        "tables.customer, rule 1 (f): {} names nothing that a template can use",
        'tables.customer.lookups.contact: there is no lookup "nothing" here',
    ]


def test_every_fault_of_one_rule_is_named_at_once_with_its_place() -> None:
    text = """
    [tables.lead]
    identity = { who = "{nobody}" }
    [[tables.lead.rules]]
    on = "update"
    changed = ["*", "x"]
    type = "{new}"
    name = "a"
    description = "{"
    metadata = { k = "{values.k}", l = "{new.l}", m = "{lookup.m.n}" }
    """
    with pytest.raises(ProfileError) as caught:
        compile_rules(parse(TARGET + text, source="p.toml"))
    rule = ("tables", "lead", "rules", 0)
    assert [fault.place for fault in caught.value.faults] == [
        (*rule, "changed"),
        (*rule, "type"),
        (*rule, "description"),
        ("tables", "lead", "identity", "who"),
        (*rule, "metadata", "k"),
        (*rule, "metadata", "m"),
    ]


@pytest.mark.parametrize(
    ("on", "template"),
    [("insert", "{old.a}"), ("delete", "{new.a}"), ("truncate", "{old.a}"), ("truncate", "{new.a}")],
)
def test_a_row_that_an_operation_does_not_have_is_a_fault(on: str, template: str) -> None:
    """Each such change would have become a dead letter."""
    rule = f'{{ on = "{on}", type = "t", description = "x" }}'
    (fault,) = table_faults(f'[tables.lead]\nactor = "{template}"\nrules = [{rule}]')
    assert fault == f"tables.lead, rule 1 (t): {template}: there is no {template[1:4]} row at {on}"


@pytest.mark.parametrize(
    "template",
    [
        *("{", "}", "{}", "{0}", "{new}", "{new.}", "{.a}", "{nothing.a}", "{new.status!r}", "{new.status!s}", "{a!}"),
        *(
            "{new.status:{old.x}}",
            "{changes:x}",
            "two {changes}",
            "{__class__}",
            "{context}",
            "{lookup.a}",
            "{lookup.a.b}",
            "{new[a]}",
        ),
    ],
)
def test_a_hostile_template_is_a_fault(template: str) -> None:
    rule = f"{{ on = 'update', changed = '*', type = 't', description = '{template}' }}"
    (fault,) = table_faults(f"[tables.lead]\nrules = [{rule}]")
    assert re.match(r"tables\.lead, rule 1 \(t\): ", fault)


def test_one_table_under_two_names_is_a_fault() -> None:
    """`lead` is `public.lead`: the rules of one of them would have been lost."""
    assert table_faults("[tables.lead]\n[tables.'public.lead']") == ["tables.lead stands here twice"]
    profile("[tables.lead]\n[tables.'crm.lead']")


def test_the_columns_that_a_profile_needs_are_known_for_the_catalog() -> None:
    compiled = compile_rules(load("leadfi"))
    assert {name: sorted(table.columns) for (_, name), table in compiled.items()} == {
        "lead": [
            *("bd_in_charge", "company_name", "full_name", "is_converted", "lead_id", "source", "status", "type"),
        ],
        "customer": ["customer_uid", "is_closed", "name", "type"],
        "contact": ["contact_id", "customer_uid", "lead_id"],
    }
    assert {name: table.needs_old_rows for (_, name), table in compiled.items()} == {
        "lead": True,
        "customer": True,
        "contact": False,
    }
