"""The publication that pgoutput reads by: exactly the captured tables, made beside a wal2json slot too.

So a slot can have the other plugin later. A published table must tell its rows apart, or the application's UPDATE and
DELETE fail. So a partitioned table is published itself, with partitions yet to come, only if its primary key sees to
that; of another one those partitions are published that there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdc_worker import checkpoint, ddl, errors
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.rules import Rules

Relation = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Member:
    """A relation that is to be published for the captured table that it is, or stores rows of.

    It is `published` if it stands there itself, and `whole` with all rows and columns. It is `withheld` if the
    application could not update it. Its rows are in `stores`, of each of which there are the marks by which it is
    published: its own, and those of what it is a partition of. Whatever is published anew has another mark.
    """

    oid: int
    relation: Relation
    table: Relation
    withheld: bool
    owned: bool
    published: bool
    whole: bool
    stores: list[list[str]]

    @property
    def sent(self) -> bool:
        """Whether its changes are published, by whichever name: where keys come and go it may be another's."""
        return self.published or (bool(self.stores) and all(self.stores))

    @property
    def complete(self) -> bool:
        """Whether there is nothing to do about it."""
        return self.withheld or (self.published and self.whole)


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication as it is, and what is to be in it.

    Our role may make or change it if it is `owned`. What it `leaves_out` are operations, or names of partitions. Beside
    `members` it has `others`, and all tables of `schemas`.
    """

    name: str
    exists: bool
    owned: bool
    comment: str | None
    everything: bool
    leaves_out: list[str]
    members: list[Member]
    others: list[Relation]
    schemas: list[str]

    def is_of(self, worker: str) -> bool:
        """Whether it is this worker's to make, change and drop."""
        return not self.exists or self.comment == _comment(worker)

    @property
    def missing(self) -> list[str]:
        """The relations whose changes it doesn't have."""
        return [
            ".".join(member.relation) + _WITHHELD * member.withheld
            for member in self.members
            if member.withheld or not member.sent
        ]

    @property
    def narrowed(self) -> list[str]:
        """The relations of whose changes it has a part."""
        return [".".join(member.relation) for member in self.members if member.sent and not member.whole]

    def changed(self, noted: Collection[str]) -> list[str]:
        """The relations that others have published anew, or no longer publish, since it was noted how they were."""
        known = {mark.partition(" ")[0] for mark in noted}
        return [
            ".".join(member.relation)
            for member in self.members
            if (any({*noted}.isdisjoint(marks) for marks in member.stores) if member.sent else str(member.oid) in known)
        ]

    @property
    def allowed(self) -> bool:
        """Whether our role may make it what it is to be."""
        return self.owned and all(member.owned for member in self.members if not member.complete)

    def adding(self, table: Relation) -> dict[Relation, list[str]]:
        """The statements that publish what stores a table's rows, by relation."""
        found: dict[Relation, list[str]] = {}
        for member in self.members:
            if member.table == table and not member.complete:
                drop = [self._alter("DROP", member.relation)] if member.published else []
                found[member.relation] = [*drop, self._alter("ADD", member.relation)]
        return found

    def _alter(self, verb: str, relation: Relation) -> str:
        # Tables that inherit from it are captured by themselves.
        names = sql.Identifier(self.name).as_string(), sql.Identifier(*relation).as_string()
        return f"ALTER PUBLICATION {names[0]} {verb} TABLE ONLY {names[1]}"

    def making(self, connection: Connection, worker: str) -> Iterator[Step]:
        """What comes before tables are added: it is there, and sends everything."""
        name = sql.Identifier(self.name)
        options = _OPTIONS + (_GENERATED if connection.info.server_version >= 180000 else "")
        if not self.exists:
            create = sql.SQL("CREATE PUBLICATION {} WITH ({})").format(name, sql.SQL(options))
            comment = sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(name, _comment(worker))
            statements = ddl.transaction(create, comment)
            yield Step(f'publication "{self.name}" is made', statements, administrator=True)
        elif self.leaves_out:
            alter = sql.SQL("ALTER PUBLICATION {} SET ({})").format(name, sql.SQL(options)).as_string()
            yield Step(f'publication "{self.name}" publishes every change', alter, administrator=True)

    def clearing(self) -> Iterator[Step]:
        """What comes after that: nothing else is in it."""
        for schema in self.schemas:
            drop = sql.SQL("ALTER PUBLICATION {} DROP TABLES IN SCHEMA {}")
            statement = drop.format(sql.Identifier(self.name), sql.Identifier(schema)).as_string()
            yield Step(f"schema {schema} is no longer published", statement, administrator=True)
        withheld = [member.relation for member in self.members if member.withheld and member.published]
        for relation in [*self.others, *withheld]:
            statement = self._alter("DROP", relation)
            yield Step(f"{'.'.join(relation)} is no longer published", statement, administrator=True)

    def steps(self, connection: Connection, worker: str) -> Iterator[Step]:
        """All that there is to do, where replica identities are seen to."""
        yield from self.making(connection, worker)
        for table in dict.fromkeys(member.table for member in self.members):
            for relation, statements in self.adding(table).items():
                name = sql.Identifier(*relation).as_string()
                statement = statements[0] if len(statements) == 1 else ddl.transaction(*statements)
                yield Step(
                    f"{'.'.join(relation)} is published",
                    statement,
                    f"SHARE UPDATE EXCLUSIVE on {name}",
                    administrator=True,
                )
        yield from self.clearing()


_OPTIONS: Final = "publish = 'insert, update, delete, truncate', publish_via_partition_root = false"

_GENERATED: Final = ", publish_generated_columns = stored"

_WITHHELD: Final = " (whose virtual generated columns would make UPDATE and DELETE fail)"


def _comment(worker: str) -> str:
    return f'What the worker "{worker}" of cdc-worker captures'


KEYED: Final = """\
EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisvalid AND indimmediate
            AND (relreplident = 'd' AND indisprimary OR relreplident = 'i' AND indisreplident))"""
"""Whether the old row of the pg_class `c` has a key, in SQL. One that may be violated for a while is none."""

_VIRTUAL: Final = "EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attgenerated = 'v' AND NOT attisdropped)"

# Rows of these catalogs have another xmin after whatever is done to them.
_MARK: Final = "concat_ws(' ', prrelid, p.oid, p.xmin, published.oid, published.xmin)"

# The worker asks, and waits for no lock: pg_partition_tree would.
_MEMBERS: Final = (
    """
WITH RECURSIVE captured AS (
    SELECT c.oid, needs, relkind = 'p' AND relpersistence = 'p' AND relreplident <> 'n' AND EXISTS (
               SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary AND indimmediate) AS itself
    FROM unnest(%(tables)s::text[], %(needs)s::bool[]) AS it (name, needs) JOIN pg_class c ON c.oid = to_regclass(name)
    WHERE relkind IN ('r', 'p')
), part AS (
    SELECT oid AS root, oid, needs, itself FROM captured
    UNION ALL
    SELECT root, inhrelid, needs, itself
    FROM part JOIN pg_partitioned_table ON partrelid = oid JOIN pg_inherits ON inhparent = oid
), member AS (
    SELECT DISTINCT ON (1) CASE WHEN itself THEN root ELSE part.oid END AS oid, root,
           bool_or(relkind = 'r' AND {virtual} AND (needs OR relreplident = 'f' OR NOT {keyed})) AS withheld
    FROM part JOIN pg_class c USING (oid)
    WHERE itself OR (relkind = 'r' AND relpersistence = 'p')
    GROUP BY 1, 2
    ORDER BY 1, root <> CASE WHEN itself THEN root ELSE part.oid END
), published AS (
    SELECT prrelid, to_jsonb(published) ->> 'prqual' IS NULL AND to_jsonb(published) ->> 'prattrs' IS NULL AS whole,
           {mark} AS mark
    FROM pg_publication_rel published JOIN pg_publication p ON p.oid = prpubid AND pubname = %(name)s
), store AS (
    SELECT member.oid AS member, stored.oid
    FROM member JOIN part ON part.root = member.root AND member.oid IN (part.root, part.oid)
    JOIN pg_class stored ON stored.oid = part.oid AND relkind = 'r' AND relpersistence = 'p'
), sent AS (
    SELECT member, bool_and(coalesce(own.whole, true)) AS whole,
           jsonb_agg(ARRAY(SELECT mark FROM published
                           WHERE prrelid IN (SELECT store.oid UNION ALL SELECT pg_partition_ancestors(store.oid))
                           ORDER BY 1)) AS stores
    FROM store LEFT JOIN published own ON prrelid = store.oid
    GROUP BY 1
)
SELECT c.oid, n.nspname::text, c.relname::text, rn.nspname::text, r.relname::text, withheld,
       pg_has_role(c.relowner, 'USAGE'), own.mark IS NOT NULL, coalesce(own.whole, true) AND coalesce(sent.whole, true),
       coalesce(stores, jsonb_build_array(array_remove(ARRAY[own.mark], NULL)))
FROM member JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class r ON r.oid = root JOIN pg_namespace rn ON rn.oid = r.relnamespace
LEFT JOIN published own ON own.prrelid = c.oid LEFT JOIN sent ON sent.member = c.oid
ORDER BY 2, 3
""".replace("{virtual}", _VIRTUAL)
    .replace("{keyed}", KEYED)
    .replace("{mark}", _MARK)
)

_PUBLICATION: Final = """
SELECT pg_has_role(pubowner, 'USAGE'), obj_description(p.oid, 'pg_publication'), puballtables,
       array_remove(ARRAY[CASE WHEN NOT pubinsert THEN 'INSERT' END, CASE WHEN NOT pubupdate THEN 'UPDATE' END,
                          CASE WHEN NOT pubdelete THEN 'DELETE' END, CASE WHEN NOT pubtruncate THEN 'TRUNCATE' END,
                          CASE WHEN pubviaroot THEN 'the names of partitions' END,
                          CASE WHEN to_jsonb(p) ->> 'pubgencols' <> 's' THEN 'stored generated columns' END], NULL)
FROM pg_publication p WHERE pubname = %s
"""

_PUBLISHED: Final = """
SELECT nspname::text, relname::text
FROM pg_publication p JOIN pg_publication_rel ON prpubid = p.oid
JOIN pg_class c ON c.oid = prrelid JOIN pg_namespace n ON n.oid = relnamespace
WHERE pubname = %s ORDER BY 1, 2
"""

_SCHEMAS: Final = """
SELECT nspname::text
FROM pg_publication p JOIN pg_publication_namespace ON pnpubid = p.oid JOIN pg_namespace n ON n.oid = pnnspid
WHERE pubname = %s ORDER BY 1
"""

_MAY_CREATE: Final = "SELECT has_database_privilege(current_database(), 'CREATE')"


def look(connection: Connection, name: str, rules: Rules) -> Publication:
    """The publication of this name, and what is to be in it."""
    tables = [sql.Identifier(*table).as_string() for table in rules]
    needs = [table.needs_old_rows for table in rules.values()]
    members = [
        Member(oid, (schema, relation), (table_schema, table), *rest)
        for oid, schema, relation, table_schema, table, *rest in connection.execute(
            _MEMBERS, {"tables": tables, "needs": needs, "name": name}
        )
    ]
    found = connection.execute(_PUBLICATION, (name,)).fetchone()
    if found is None:
        (owned,) = fetch_one(connection, _MAY_CREATE)
        return Publication(name, False, owned, None, False, [], members, [], [])
    wanted = {member.relation for member in members}
    published: list[Relation] = [(schema, relation) for schema, relation in connection.execute(_PUBLISHED, (name,))]
    schemas: list[str] = []
    if connection.info.server_version >= 150000:
        schemas = [schema for (schema,) in connection.execute(_SCHEMAS, (name,))]
    owned, comment, everything, leaves_out = found
    others = [relation for relation in published if relation not in wanted]
    return Publication(name, True, owned, comment, everything, leaves_out, members, others, schemas)


def missing(connection: Connection, name: str, rules: Rules) -> list[str]:
    """The tables and partitions whose changes pgoutput would not send."""
    return look(connection, name, rules).missing


# Also before setup has made the column.
_NOTED: Final = "SELECT to_jsonb(c) -> 'published' FROM cdc_worker.checkpoint c WHERE worker = %s"

_NOTE: Final = """\
UPDATE cdc_worker.checkpoint
SET published = ARRAY(SELECT {mark} FROM pg_publication p JOIN pg_publication_rel published ON prpubid = p.oid
                      WHERE pubname = {name})
WHERE worker = {worker}""".replace("{mark}", _MARK)


def noted(connection: Connection, worker: str) -> list[str] | None:
    """How relations were published when that was noted; None if it wasn't. Raises NotSetUpError."""
    rows = checkpoint.fetched(connection, _NOTED, (worker,))
    return rows[0][0] if rows else None


def note(name: str, worker: str) -> str:
    """The statement that notes how a publication is, so that it is found out if others change it, and back."""
    return sql.SQL(_NOTE).format(name=name, worker=worker).as_string()


def check(connection: Connection, name: str, rules: Rules, *, noted: Collection[str] | None = None) -> None:
    """Raise PublicationError unless all changes of the captured tables are published, as they are to be.

    Also if they weren't for a while, of all that came since it was `noted` how they are.
    """
    if noted is not None:
        check_name(connection, name, noted)
    found = look(connection, name, rules)
    said = f'the publication "{name}"'
    if not found.exists:
        raise errors.PublicationError(f"{said} does not exist: changes are lost", hint="run: cdc-worker setup")
    if found.missing:
        raise errors.PublicationError(
            f"{said} lacks {', '.join(found.missing)}: changes of it are lost",
            hint="declare these columns STORED, or switch to wal2json: cdc-worker switch-plugin"
            if any(member.withheld for member in found.members)
            else "run: cdc-worker setup",
        )
    if found.leaves_out or found.narrowed:
        raise errors.PublicationError(
            f"{said} leaves out "
            + ", ".join([*found.leaves_out, *(f"rows or columns of {relation}" for relation in found.narrowed)])
            + ": changes are lost",
            hint="run: cdc-worker setup",
        )
    if noted is not None and (changed := found.changed(noted)):
        raise errors.PublicationError(
            f"{said} was changed by others: what was meanwhile written to {', '.join(changed)} is lost",
            hint="where there is wal2json, it still has what was not read yet: cdc-worker switch-plugin --to wal2json;"
            " to go on without: cdc-worker setup",
        )


_BY_OID: Final = "SELECT pubname::text FROM pg_publication WHERE oid::text = ANY (%s)"


def check_name(connection: Connection, name: str, noted: Collection[str]) -> None:
    """Raise PublicationError if what was noted is another publication: one that is made now lacks what came before."""
    found = connection.execute(_BY_OID, ([mark.split(" ")[1] for mark in noted],)).fetchone()
    if found is not None and found[0] != name:
        raise errors.PublicationError(
            f'the worker reads by the publication "{found[0]}", not "{name}"',
            hint=f"name {found[0]} in CDC_WORKER_PUBLICATION",
        )


def check_owner(found: Publication, worker: str) -> None:
    """Raise PublicationError for one that isn't this worker's, and is left as it is."""
    if not found.is_of(worker):
        name = sql.Identifier(found.name)
        raise errors.PublicationError(
            f'the publication "{found.name}" was not made for the worker "{worker}"',
            hint="name another in CDC_WORKER_PUBLICATION; or, if nothing else needs it: "
            + sql.SQL("DROP PUBLICATION {}").format(name).as_string(),
        )


# All that are published, however: by their own names, as partitions, or with their schema.
_UNWRITABLE: Final = """
SELECT DISTINCT nspname::text, relname::text, relreplident <> 'f'
FROM pg_publication p, pg_get_publication_tables(pubname::text) listed
LEFT JOIN LATERAL pg_partition_tree(listed.relid) tree ON isleaf
JOIN pg_class c ON c.oid = coalesce(tree.relid, listed.relid) JOIN pg_namespace n ON n.oid = relnamespace
WHERE pubname = %s AND (pubupdate OR pubdelete) AND relkind = 'r' AND NOT {keyed} AND (relreplident <> 'f' OR EXISTS (
    SELECT FROM pg_attribute WHERE attrelid = c.oid AND NOT attisdropped
        AND (attgenerated = 'v' OR attgenerated = 's' AND to_jsonb(p) ->> 'pubgencols' <> 's')))
ORDER BY 1, 2
""".replace("{keyed}", KEYED)


def unwritable(connection: Connection, name: str) -> dict[Relation, bool]:
    """The published tables and partitions that the application can't update, and whether they lack an identity."""
    return {(schema, relation): lacking for schema, relation, lacking in connection.execute(_UNWRITABLE, (name,))}


_DROPPABLE: Final = "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = %s"


def dropping(connection: Connection, name: str, worker: str) -> Iterator[Step]:
    """Take it down, if it is the worker's."""
    if connection.execute(_DROPPABLE, (name,)).fetchone() == (_comment(worker),):
        text = sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(name)).as_string()
        yield Step(f'publication "{name}" is dropped', text, administrator=True)
