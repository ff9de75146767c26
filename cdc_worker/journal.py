"""What the target has recorded of rows: the activities that link to them, as events of their history."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, LiteralString

from psycopg import sql

from cdc_worker import catalog, errors, gap, postgres
from cdc_worker import rows as captured
from cdc_worker.activities import Place, parsed_key
from cdc_worker.catalog import TargetTable
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.history import EVERYTHING, Event, Recorded, What
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection
from cdc_worker.profile import Target
from cdc_worker.rows import RowKey, Rows
from cdc_worker.rules import qualified
from cdc_worker.templates import text

Events = Mapping[str, Sequence[Event]]
"""Events by the row that they were recorded of."""

MOVES: Final = 100_000
"""So many changes of keys are remembered."""

UNLINKED: Final = 30_000
"""So many activities are remembered of which the target refused a link."""

_NOTHING: Final = sql.SQL("")


class Journal:
    """The activities of one captured table, read through a connection of its own `rows`.

    Positions are those of the cluster that the worker's `checkpoint` is of: all that was recorded on former ones is
    before them.
    """

    def __init__(
        self,
        connection: Connection,
        target: Target,
        *,
        table: TargetTable,
        recorded: Recorded,
        rows: Rows,
        checkpoint: Checkpoint,
    ) -> None:
        """`table` is the target as the catalog has it. TargetUnusableError where its rows can't be told apart."""
        self._connection = connection
        self._recorded = recorded
        self._rows = rows
        self._worker, self.clusters = checkpoint.worker, gap.clusters(connection, checkpoint)
        self._links = [recorded.links[column] for column in rows.key]
        of_target = catalog.columns(connection, qualified(target.table))[qualified(target.table)]
        self._link_types = {column: catalog.cast(of_target[column]) for column in self._links}
        # As the target has read it; of numbers the operators know the other's kind, which may be a wider one.
        self._read_as = {
            column: catalog.cast(own if own.base == link.base or {own.category, link.category} == {"N"} else link)
            for column, own, link in ((of, rows.columns[of], of_target[recorded.links[of]]) for of in rows.key)
        }
        # A link of the application's own may be none that the row's type can have.
        self._some_alien = any(
            of_target[link].declared != rows.columns[of].declared
            for of, link in zip(rows.key, self._links, strict=True)
        )
        self._columns = {field: column for column, field in target.columns.items()}
        self._table = sql.Identifier(*qualified(target.table))
        key = catalog.row_key(target, table)
        if key is None:
            raise errors.TargetUnusableError(
                f"which rows of {target.table} are the worker's can't be told: it has no column for change keys,"
                " and no primary key from a sequence",
                hint="add a column for change keys, and name it in [target.columns] of the profile",
            )
        self._key = key
        self._metadata: sql.Composable = sql.SQL("NULL::jsonb")
        if "metadata" in self._columns:
            self._metadata = sql.Identifier(self._columns["metadata"])
            if of_target[self._columns["metadata"]].base != "jsonb":  # the application may have any text there
                self._metadata = sql.SQL("CASE WHEN {} IS NOT NULL THEN {}::jsonb END").format(key, self._metadata)
        column = catalog.key_column(target)
        self._keys = (sql.Identifier("cdc_worker", "written_key"), sql.Identifier("change_key"))
        if column is not None:
            self._keys = (self._table, sql.Identifier(column))
        (self._indexed,) = postgres.fetch_one(connection, _INDEXED, *qualified(target.table), self._links)
        # The target grows beneath plans that would be kept, and each read is to be a small one.
        connection.execute("SET plan_cache_mode = force_custom_plan")
        connection.execute("SET jit = off")
        connection.execute("SET max_parallel_workers_per_gather = 0")
        self.links_follow = bool(table.foreign_keys)  # such a key may have ON UPDATE CASCADE
        self._unlinked = bool(table.foreign_keys) and "metadata" in self._columns
        self.forget()
        # Of rows that triggers wrote no more is known than their type, and the constants that are texts.
        self._ours = [
            sql.SQL("{} = {}").format(sql.Identifier(column), value)
            for column, value in target.constants.items()
            if isinstance(value, str)
        ]

    def forget(self) -> None:
        """Look again for what was remembered: something was recorded whose time had passed."""
        self._letters: dict[str, list[Event]] = {}
        self._last_letter = 0
        self._moves: dict[RowKey, list[Event]] | None = {}
        self._moved_until = INVALID
        self._emptied: list[Place] = []
        self._emptied_until = INVALID
        self._refused: dict[RowKey, list[str]] | None = {}
        self._refused_until = INVALID

    def of(self, keys: Collection[RowKey], *, until: LSN, since: LSN | None = None) -> dict[str, list[Event]]:
        """What was recorded of rows up to a position.

        With `since` only what says when they came to be or ceased, and what else was recorded after that; and without
        it all, with metadata.
        """
        asked = {self._rows.subject(key): key for key in keys}
        found: dict[str, list[Event]] = {name: [] for name in asked}
        if not asked:
            return found
        self._remember_refused(until)
        for links in self._by_links():
            if not isinstance(links[0], sql.Identifier) and self._refused is not None:
                refused = {"refused": [of for key in asked.values() for of in self._refused.get(key, ())]}
                if refused["refused"]:
                    query = self._query(links, since) + sql.SQL(" WHERE {} = ANY (%(refused)s){}").format(
                        self._key, self._wanted(since)
                    )
                    for event in self._events(query, self._parameters(since) | refused, until):
                        found.setdefault(event.subject, []).append(event)
                continue
            # A key is told as it was asked for: a link may print it in another way.
            asked_for = [sql.Identifier(f"asked_{number}") for number in range(len(links))]
            query = sql.SQL(
                "SELECT told.* FROM unnest({arrays}) AS asked ({names})"
                " CROSS JOIN LATERAL ({query} WHERE {same}{wanted}{one_by_one}) AS told"
            ).format(
                arrays=sql.SQL(", ").join(
                    sql.SQL("%(key_{})s::text[]").format(sql.SQL(str(n))) for n in range(len(links))
                ),
                names=sql.SQL(", ").join(asked_for),
                query=self._query(asked_for, since),
                same=sql.SQL(" AND ").join(
                    sql.SQL("{} = {}::{}").format(link, of, self._type(column, link))
                    for column, link, of in zip(self._rows.key, links, asked_for, strict=True)
                ),
                wanted=self._wanted(since),
                # Before the target is analysed, its whole index may look cheaper than a thousand looks into it.
                one_by_one=sql.SQL(" OFFSET 0" if self._indexed and isinstance(links[0], sql.Identifier) else ""),
            )
            arrays = {f"key_{n}": list(values) for n, values in enumerate(zip(*asked.values(), strict=True))}
            for event in self._events(query, self._parameters(since) | arrays, until):
                found.setdefault(event.subject, []).append(event)
        for event in (*self._skipped([*asked], until), *self._unwritten(asked, until)):
            found.setdefault(event.subject, []).append(event)
        return found

    def _remember_refused(self, until: LSN) -> None:
        """Remember to which rows activities would link if the target had not refused that: no index knows it."""
        if not self._unlinked or self._refused is None or until <= self._refused_until:
            return
        *_, links = self._by_links()
        query = sql.SQL("SELECT {}, {} FROM {} WHERE {} IS NOT NULL AND ({}) ? 'unlinked'").format(
            sql.SQL(", ").join(links), self._key, self._table, links[0], self._metadata
        )
        parameters: dict[str, Any] = {"most": UNLINKED}
        if self._refused_until:
            query += sql.SQL(" AND {key} > %(from)s AND {key} < %(to)s").format(key=self._key)
            parameters |= {"from": self._first_key(self._refused_until), "to": self._first_key(LSN(until + 1))}
        query += sql.SQL(" LIMIT %(most)s")
        for *key, change_key in self._connection.execute(postgres.with_parameters(query), parameters).fetchall():
            if change_key is not None:
                self._refused.setdefault(tuple(key), []).append(change_key)
        self._refused_until = until
        if sum(map(len, self._refused.values())) >= UNLINKED:
            self._refused = None  # too many to be remembered

    def keys(self, size: int) -> Iterator[list[RowKey]]:
        """All keys that activities link to, up to so many at once, in an order of their own.

        Where columns that link are of other types than the key's, those are left out that only activities of others
        link to.
        """
        links = [sql.Identifier(column) for column in self._links]
        row = sql.SQL("({})").format(sql.SQL(", ").join(links))
        given = sql.SQL(", ").join(sql.SQL("%s::{}").format(self._link_types[link]) for link in self._links)
        after: RowKey = ()
        while True:
            further = [row + sql.SQL(" > (") + given + sql.SQL(")")] if after else []
            query = self._linked(sql.SQL(""), *further) + sql.SQL(" ORDER BY {} LIMIT %s").format(
                sql.SQL(", ").join(links)
            )
            found = self._connection.execute(postgres.with_parameters(self._printed(query)), [*after, size]).fetchall()
            if not found:
                return
            yield [row[len(links) :] for row in found]
            after = found[-1][: len(links)]

    def sample(self, count: int) -> list[RowKey]:
        """About so many of them, from all over the target."""
        share = captured.share(self._connection, self._table, count)
        query = sql.SQL("SELECT * FROM ({}) AS linked ORDER BY random() LIMIT %s").format(
            self._linked(sql.SQL("TABLESAMPLE SYSTEM (%s)"))
        )
        found = self._connection.execute(postgres.with_parameters(self._printed(query)), [share, count]).fetchall()
        return [row[len(self._links) :] for row in found]

    def _linked(self, sample: sql.Composable, *further: sql.Composable) -> sql.Composed:
        links = [sql.Identifier(column) for column in self._links]
        conditions = [*(link + sql.SQL(" IS NOT NULL") for link in links), *further]
        if self._some_alien:
            conditions.append(sql.SQL("starts_with({}, {})").format(self._key, f"{self._worker}/"))
        return sql.SQL("SELECT DISTINCT {} FROM {} {} WHERE {}").format(
            sql.SQL(", ").join(links), self._table, sample, sql.SQL(" AND ").join(conditions)
        )

    def _printed(self, query: sql.Composed) -> sql.Composed:
        """Links as they are, and as the row's key prints them."""
        links = [sql.Identifier(column) for column in self._links]
        types = [sql.SQL(self._rows.columns[column].declared) for column in self._rows.key]
        keys = (sql.SQL("format('%%s', {}::{})").format(link, of) for link, of in zip(links, types, strict=True))
        columns = [*(link + sql.SQL("::text") for link in links), *keys]
        return sql.SQL("SELECT {} FROM ({}) AS linked").format(sql.SQL(", ").join(columns), query)

    def left(self, keys: Collection[RowKey], *, until: LSN) -> dict[str, list[Place]]:
        """When rows that had these keys got others, up to a position."""
        return {subject: [of.place for of in moves] for subject, moves in self.moves(keys, until=until).items()}

    def moves(self, keys: Collection[RowKey], *, until: LSN) -> dict[str, list[Event]]:
        """The changes by which rows that had these keys got others, up to a position.

        Nothing links to a key that was left: it takes a look at the whole target, of which is remembered what it finds.
        """
        asked = {key: self._rows.subject(key) for key in keys}
        found: dict[str, list[Event]] = {subject: [] for subject in asked.values()}
        if not found or not self._changes() or "metadata" not in self._columns:
            return found
        self._remember_moves(until)
        moves = self._moves
        if moves is None:
            olds = [
                sql.SQL("coalesce({}) = ANY (%({})s)").format(
                    sql.SQL(", ").join(self._olds(column)), sql.SQL(f"old_{place}")
                )
                for place, column in enumerate(self._rows.key)
            ]
            values = {f"old_{place}": [*of] for place, of in enumerate(zip(*asked, strict=True))}
            moves = self._moved(sql.SQL(" OR ").join(olds), values, until)
        for key, subject in asked.items():
            found[subject] = [move for move in moves.get(key, ()) if move.place < self.clusters.after(until)]
        return found

    def add_move(self, move: Event) -> None:
        """Remember one that is recorded only now, of a time that was looked at."""
        if self._moves is not None:
            self._moves.setdefault(move.before, []).append(move)

    @property
    def remembers(self) -> bool:
        """Whether that is so, as far as is known: it isn't where there are too many."""
        return self._moves is not None

    def _remember_moves(self, until: LSN) -> None:
        if self._moves is None or until <= self._moved_until:
            return
        changed = sql.SQL(" OR ").join(
            sql.SQL("{} IS NOT NULL").format(old) for column in self._rows.key for old in self._olds(column)
        )
        parameters: dict[str, Any] = {"most": MOVES}
        if self._moved_until:
            changed = sql.SQL("({}) AND {key} > %(from)s AND {key} < %(to)s").format(changed, key=self._key)
            parameters |= {"from": self._first_key(self._moved_until), "to": self._first_key(LSN(until + 1))}
        for key, moves in self._moved(changed, parameters, until, limit=sql.SQL(" LIMIT %(most)s")).items():
            self._moves.setdefault(key, []).extend(moves)
        self._moved_until = until
        if sum(map(len, self._moves.values())) >= MOVES:
            self._moves = None  # too many to be remembered

    def _olds(self, column: str) -> list[sql.Composable]:
        """Where metadata may have the old value of a key's column."""
        return [sql.SQL("({}) #>> {}").format(self._metadata, [name, column, "old"]) for name in self._changes()]

    def _moved(
        self, condition: sql.Composable, parameters: Mapping[str, Any], until: LSN, *, limit: sql.Composable = _NOTHING
    ) -> dict[RowKey, list[Event]]:
        """How keys were left, for whatever others, as far as the condition says it."""
        rules = [rule for rule, names in self._recorded.changes.items() if names]
        found: dict[RowKey, list[Event]] = {}
        for links in self._by_links():
            query = self._query(links, until) + sql.SQL(" WHERE {} = ANY (%(rules)s) AND ({})").format(
                _rule(self._key), condition
            )
            for event in self._events(query + limit, {"rules": rules, **parameters}, until):
                if event.what == "moved":
                    found.setdefault(event.before, []).append(event)
        return found

    def emptied(self, until: LSN) -> list[Place]:
        """When all rows of the table went, up to a position."""
        if self._recorded.emptied and until > self._emptied_until:
            table, key = self._keys
            query = sql.SQL("SELECT {key} FROM {table} WHERE {rule} = ANY (%(rules)s)").format(
                key=key, table=table, rule=_rule(key)
            )
            parameters: dict[str, Any] = {"rules": [*self._recorded.emptied]}
            if self._emptied_until:
                query += sql.SQL(" AND {key} > %(from)s AND {key} < %(to)s").format(key=key)
                parameters |= {"from": self._first_key(self._emptied_until), "to": self._first_key(LSN(until + 1))}
            for (key,) in self._connection.execute(postgres.with_parameters(query), parameters).fetchall():
                parsed = parsed_key(self._worker, self.clusters, key)
                if parsed is not None and parsed.kind == "stream" and parsed.table == self._recorded.table:
                    self._emptied.append(parsed.place)
            self._emptied = sorted({*self._emptied})
            self._emptied_until = until
        return [place for place in self._emptied if place < self.clusters.after(until)]

    def moved(self, *, since: LSN, until: LSN) -> list[RowKey]:
        """The keys that rows got in place of others, after one position and up to another."""
        if not self._changes() or "metadata" not in self._columns:
            return []
        query = sql.SQL(
            "SELECT {key}, {links} FROM {table} WHERE {key} > %(from)s AND {key} < %(to)s AND ({moved})"
        ).format(
            key=self._key,
            links=sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(link)) for link in self._links),
            table=self._table,
            moved=sql.SQL(" OR ").join(
                sql.SQL("({}) #> {} IS NOT NULL").format(self._metadata, [name, key])
                for name in self._changes()
                for key in self._rows.key
            ),
        )
        bounds = {"from": self._first_key(since), "to": self._first_key(LSN(until + 1))}
        found: dict[RowKey, None] = {}
        for change_key, *key in self._connection.execute(postgres.with_parameters(query), bounds).fetchall():
            parsed = parsed_key(self._worker, self.clusters, change_key)
            if parsed is not None and parsed.kind == "stream" and parsed.table == self._recorded.table:
                found[tuple(key)] = None
        return [key for key in found if None not in key]

    def _first_key(self, lsn: LSN) -> str:
        """Where the change keys of a commit begin: they sort as commits do, and those of other kinds come after all."""
        return f"{self._worker}/{self.clusters.current}/{lsn:016X}"

    def _by_links(self) -> Iterator[list[sql.Composable]]:
        """How rows are linked to: by the columns for it, or where the target refused that by what metadata tells."""
        yield [sql.Identifier(column) for column in self._links]
        if self._unlinked:
            columns = [sql.Identifier(column) for column in self._links]
            some = sql.SQL(" OR ").join(column + sql.SQL(" IS NULL") for column in columns)
            yield [
                sql.SQL("CASE WHEN {} THEN coalesce({}::text, ({}) #>> {}) END").format(
                    some, column, self._metadata, ["unlinked", name]
                )
                for name, column in zip(self._links, columns, strict=True)
            ]

    def _type(self, column: str, link: sql.Composable) -> sql.Composable:
        return self._read_as[column] if isinstance(link, sql.Identifier) else sql.SQL("text")

    def _query(self, links: Sequence[sql.Composable], since: LSN | None) -> sql.Composed:
        metadata: sql.Composable = sql.SQL("NULL")
        at: sql.Composable = sql.SQL("NULL")
        befores: list[sql.Composable] = [sql.SQL("NULL") for _ in self._changes() for _ in links]
        if "metadata" in self._columns:
            befores = [
                sql.SQL("({}) #>> {}").format(self._metadata, [name, key, "old"])
                for name in self._changes()
                for key in self._rows.key
            ]
            metadata = self._metadata if since is None else metadata
        if "occurred_at" in self._columns:
            at = sql.SQL("{}::text").format(sql.Identifier(self._columns["occurred_at"]))
        kind = sql.Identifier(self._columns["type"]) if "type" in self._columns else sql.SQL("NULL")
        columns = sql.SQL(", ").join(
            [*(link + sql.SQL("::text") for link in links), self._key, kind, self._is_ours(), metadata, at, *befores]
        )
        return sql.SQL("SELECT {} FROM {}").format(columns, self._table)

    def _is_ours(self) -> sql.Composable:
        return sql.SQL(" AND ").join([sql.SQL("true"), *self._ours])

    def _changes(self) -> list[str]:
        """Names in the metadata that may hold an old key."""
        return sorted({name for names in self._recorded.changes.values() for name in names})

    def _wanted(self, since: LSN | None) -> sql.Composable:
        if since is None:
            return sql.SQL("")
        conditions = [
            sql.SQL("{} = ANY (%(rules)s)").format(_rule(self._key)),
            sql.SQL("""split_part({}, '/', 3) COLLATE "C" > %(since)s""").format(self._key),
        ]
        if "type" in self._columns:
            kind = sql.Identifier(self._columns["type"])
            conditions.append(sql.SQL("({} IS NULL AND {} = ANY (%(types)s))").format(self._key, kind))
        if "metadata" in self._columns:
            conditions += [
                sql.SQL("({}) #> {} IS NOT NULL").format(self._metadata, [name, key])
                for name in self._changes()
                for key in self._rows.key
            ]
        return sql.SQL(" AND ({})").format(sql.SQL(" OR ").join(conditions))

    def _parameters(self, since: LSN | None) -> dict[str, Any]:
        if since is None:
            return {}
        recorded = self._recorded
        rules = {rule for rule in recorded.operations if recorded.what(rule) != "told"} | {*recorded.types.values()}
        return {"rules": [*rules], "since": f"{since:016X}", "types": [*recorded.types]}

    def _events(self, query: sql.Composed, parameters: Mapping[str, Any], until: LSN) -> Iterator[Event]:
        recorded, names = self._recorded, self._changes()
        width = len(self._rows.key)
        for row in self._connection.execute(postgres.with_parameters(query), parameters).fetchall():
            key: RowKey = row[:width]
            if None in key:  # it isn't linked to like this
                continue
            change_key, type_, ours, metadata, at, *befores = row[width:]
            subject = self._rows.subject(key)
            if change_key is None:
                if ours and (rule := recorded.types.get(type_)) is not None:
                    yield Event(subject, rule, recorded.what(rule), Place(), metadata=metadata, at=at or "")
                continue
            parsed = parsed_key(self._worker, self.clusters, change_key)
            if parsed is None or parsed.table != recorded.table:
                continue
            if parsed.kind == "stream" and parsed.place > self.clusters.after(until):
                continue
            what: What = recorded.what(parsed.rule)
            before: RowKey = ()
            for number, name in enumerate(names):
                old = befores[number * width : (number + 1) * width]
                if name in recorded.changes.get(parsed.rule, ()) and any(value is not None for value in old):
                    before = tuple(now if was is None else was for was, now in zip(old, key, strict=True))
                    what = "moved" if before != key else what
            yield Event(
                parsed.subject or subject,
                parsed.rule,
                what,
                parsed.place,
                parsed.kind,
                before=before if what == "moved" else (),
                key=key,
                change_key=change_key,
                metadata=metadata,
                at=at or "",
            )

    def _unwritten(self, subjects: Collection[str], until: LSN) -> Iterator[Event]:
        """Changes of key of which the activities are dead letters, and creations that someone discarded."""
        parameters = {"worker": self._worker, "schema": self._rows.table.name[0], "table": self._rows.table.name[1]}
        differ = sql.SQL(" OR ").join(
            sql.SQL("change -> 'old' ->> {key} <> change -> 'new' ->> {key}").format(key=key) for key in self._rows.key
        )
        found = self._connection.execute(
            postgres.with_parameters(_UNWRITTEN.format(differ=differ)), {**parameters, "last": self._last_letter}
        ).fetchall()
        for number, change_key, old, new in found:
            self._last_letter = max(self._last_letter, number)
            parsed = parsed_key(self._worker, self.clusters, change_key)
            if parsed is None:
                continue
            key = tuple(text(new.get(column)) for column in self._rows.key)
            if old is None:
                subject = parsed.subject or self._rows.subject(key)
                event = Event(subject, parsed.rule, "created", parsed.place, skipped=True)
                self._letters.setdefault(subject, []).append(event)
            elif parsed.kind == "stream":
                before = tuple(text(old[column]) for column in self._rows.key)
                subject = self._rows.subject(key)
                self._letters.setdefault(subject, []).append(Event(subject, "", "moved", parsed.place, before=before))
        for subject in subjects:
            for event in self._letters.get(subject, ()):
                if event.place < self.clusters.after(until):
                    yield event

    def _skipped(self, subjects: list[str], until: LSN) -> Iterator[Event]:
        """What context messages kept from being told."""
        parameters = {
            "worker": self._worker,
            "cluster": self.clusters.current,
            "clusters": [*self.clusters.former, self.clusters.current],
            "table": self._recorded.table,
            "subjects": subjects,
            "until": str(until),
        }
        with self._connection.transaction():
            # It costs little to read such a table, the planner thinks, who doesn't count how long its arrays are.
            self._connection.execute("SET LOCAL enable_seqscan = off")
            found = self._connection.execute(_SKIPPED, parameters).fetchall()
        meant: dict[str, What] = {"insert": "created", "delete": "deleted", "truncate": "deleted"}
        for asked, operation, cluster, lsn, number in found:
            place = Place(self.clusters.generation(cluster), LSN.parse(lsn), number)
            for subject in subjects if asked is None else [asked]:
                yield Event(subject, EVERYTHING, meant.get(operation, "told"), place, skipped=True)


def _rule(key: sql.Composable) -> sql.Composable:
    """The name of the rule in a change key of the stream."""
    return sql.SQL("split_part({}, '/', -1)").format(key)


_INDEXED: Final = """
SELECT EXISTS (SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
               WHERE indrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND indisvalid
                 AND attname = ANY (%s)
                 AND (indpred IS NULL OR pg_get_expr(indpred, indrelid) = format('(%%I IS NOT NULL)', attname)))
"""

_UNWRITTEN: Final = sql.SQL("""
SELECT dead_letter_id, change_key, change -> 'old', change -> 'new' FROM cdc_worker.dead_letter
WHERE dead_letter_id > %(last)s AND worker = %(worker)s
  AND change ->> 'schema' = %(schema)s AND change ->> 'table' = %(table)s
  AND CASE change ->> 'operation' WHEN 'update' THEN {differ}
      WHEN 'insert' THEN discarded_at IS NOT NULL WHEN 'read' THEN discarded_at IS NOT NULL END
""")

# The index on subjects knows which rows each is in, and no other serves what is within OFFSET 0. NULL are all subjects.
_SKIPPED: Final[LiteralString] = """
SELECT asked, operation, system_identifier, commit_lsn::text, number
FROM (SELECT asked, noted.* FROM unnest(%(subjects)s::text[]) AS asked
      CROSS JOIN LATERAL (SELECT worker, system_identifier, table_name, operation, commit_lsn, number
                          FROM cdc_worker.skipped WHERE subjects @> ARRAY[asked] OFFSET 0) AS noted
      UNION ALL
      (SELECT NULL, worker, system_identifier, table_name, operation, commit_lsn, number
       FROM cdc_worker.skipped WHERE subjects = '{}' OFFSET 0)) AS found
WHERE worker = %(worker)s AND system_identifier = ANY (%(clusters)s) AND table_name = %(table)s
  AND (commit_lsn <= %(until)s::pg_lsn OR system_identifier <> %(cluster)s)
"""
