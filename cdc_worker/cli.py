"""The command line: each command parses, wires and calls one function."""

from __future__ import annotations

import functools
import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, ParamSpec

import click
import msgspec
import psycopg
import pydantic
from click.shell_completion import get_completion_class

from cdc_worker import __version__, config, log, postgres, profile, tracing
from cdc_worker import cutover as cutting_over
from cdc_worker import erasure as erasing
from cdc_worker import setup as setting_up
from cdc_worker import skips as skipping
from cdc_worker import status as state
from cdc_worker import teardown as tearing_down
from cdc_worker.config import Settings
from cdc_worker.decoders import PLUGINS
from cdc_worker.errors import CdcWorkerError, SettingsError
from cdc_worker.lsn import LSN
from cdc_worker.stop import Stop
from cdc_worker.worker import Worker, beside

if TYPE_CHECKING:
    from cdc_worker.binaries import Plugin
    from cdc_worker.dead_letters import Selection
    from cdc_worker.feed import Selection as Activities

P = ParamSpec("P")


class _Failure(click.ClickException):
    """An error, told as click tells its own: on stderr, without a traceback."""

    def __init__(self, error: CdcWorkerError | psycopg.Error, exit_code: int | None = None) -> None:
        """Without an `exit_code` it is the error's own."""
        known = postgres.failure(error) if isinstance(error, psycopg.Error) else error
        super().__init__(f"{known}\nhint: {known.hint}" if known.hint else str(known))
        self._exit_code = known.exit_code if exit_code is None else exit_code

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)
        sys.exit(self._exit_code)


@contextmanager
def _failing() -> Iterator[None]:
    """Tell errors of a command without settings."""
    try:
        yield
    except (CdcWorkerError, psycopg.Error) as error:
        raise _Failure(error, 1) from error


def _settings(command: Callable[P, None]) -> Callable[..., None]:
    """Give a command the flags that all share, and the settings that come of them."""

    @click.option("--config", type=click.Path(path_type=Path), help="Settings file (TOML).")
    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        flags = {name: given.pop(name) for name in Settings.model_fields}
        run = click.get_current_context().info_name == "run"
        try:
            settings = config.load(given.pop("config"), flags)
            log.configure(settings.log_level, settings.log_format)
            for variable in config.unknown_variables():
                log.get().warning("setting_unknown", variable=variable)
            command(settings, **given)  # type: ignore[arg-type]  # click knows which options it has
        except SettingsError as error:
            raise _Failure(error) from error
        except (CdcWorkerError, psycopg.Error) as error:
            raise _Failure(error, None if run else 1) from error

    for name, field in reversed(Settings.model_fields.items()):
        default = f" [default: {field.default}]" if field.default not in (None, ()) and name != "dsn" else ""
        wrapped = click.option(f"--{name.replace('_', '-')}", help=f"{field.description}{default}")(wrapped)
    return wrapped


def _tell_versions(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Print the version, and those of what a failure may depend on."""
    if not asked or context.resilient_parsing:
        return
    libpq = ".".join(map(str, divmod(psycopg.pq.version(), 10_000)))
    click.echo(f"cdc-worker {__version__}")
    click.echo(
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()},"
        f" psycopg {psycopg.__version__} ({psycopg.pq.__impl__}) with libpq {libpq}, msgspec {msgspec.__version__},"
        f" pydantic {pydantic.VERSION}"
    )
    context.exit()


class _Command(click.Command):
    """A command of which each word is text, for what isn't would fail later, in the database or on the terminal."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.params if not ctx.resilient_parsing else ():
            for word in _words(ctx.params.get(parameter.name or "")):
                if any("\ud800" <= character <= "\udfff" for character in word):
                    raise click.BadParameter(_not_text(parameter, word), ctx, parameter)
        return rest


def _words(value: Any) -> Iterator[str]:
    """Those of an option or argument. Files that click opens or finds may be called as they like."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for of in value:
            yield from _words(of)


def _not_text(parameter: click.Parameter, word: str) -> str:
    encoding = sys.getfilesystemencoding().upper()
    given = f"'{os.fsencode(word).decode(encoding, 'backslashreplace')}'"
    what = "it" if parameter.name in Settings.model_fields else given  # settings may be secrets
    return f"{what} is not text in {encoding}: let the terminal write {encoding}, or say in LC_ALL what it writes."


class _Group(click.Group):
    command_class = _Command
    group_class = type


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_tell_versions, help="Print versions."
)
def main() -> None:
    """Record every committed change of a PostgreSQL CRM as a system activity, exactly once.

    Settings come from flags, CDC_WORKER_* variables and a file, in falling order.

    \b
    Example: cdc-worker setup && cdc-worker run
    """
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


@main.command()
@click.option("--once", is_flag=True, help="Record what is committed by now, and exit.")
@click.option("--takeover", is_flag=True, help="Take over from the worker that is active, at once.")
@click.option("--no-wait", is_flag=True, help="Exit, instead of standing by, if another process reads the slot.")
@_settings
def run(settings: Settings, once: bool, takeover: bool, no_wait: bool) -> None:
    """Stream changes and record them until told to stop.

    While another process reads the slot it stands by, and takes over when the slot is free.

    \b
    Example: cdc-worker run --dsn "host=db user=cdc dbname=crm" --profile leadfi
    """
    if takeover and no_wait:
        raise click.UsageError("--takeover waits until the other has ended: leave out --no-wait")
    stop = Stop()
    stop.install()
    logger = log.get().bind(slot=settings.slot)
    worker = Worker(
        settings,
        profile.load(settings.profile),
        stop=stop,
        log=logger,
        once=once,
        takeover=takeover,
        wait=not no_wait,
        trace=tracing.tracer(settings.worker),
    )
    if "NOTIFY_SOCKET" in os.environ:
        from cdc_worker import service_manager  # noqa: PLC0415  # it is rarely there

        service_manager.tell(worker.vitals)
    if settings.http_port is not None:
        from cdc_worker import web  # noqa: PLC0415  # it is rarely asked for, and takes time to begin

        web.serve(settings, worker.vitals)
    worker.run()


_dry_run = click.option("--dry-run", is_flag=True, help="Print the SQL with its locks and rewrites, and do nothing.")


@main.command()
@_dry_run
@click.option("--role", metavar="NAME", help="Role that the worker runs as: gets the grants it needs, and no more.")
@click.option("--protect/--no-protect", default=True, help="Whether the worker's rows are read-only for others.")
@click.option("--cutover/--no-cutover", default=True, help="Whether to take over from triggers that record already.")
@click.option(
    "--marked", is_flag=True, help="Of new tables, record only what follows a context message, until cutover."
)
@click.option("--failover", is_flag=True, help="Make a failover slot (PostgreSQL 17 or later).")
@click.option("--with-backfill", is_flag=True, help="Then write activities for the rows that are there already.")
@_settings
def setup(settings: Settings, dry_run: bool, with_backfill: bool, **wishes: Any) -> None:
    """Set up tables, replica identities, grants, slot and cut-over, beside a running application. May be repeated.

    \b
    Example: cdc-worker setup --dsn "host=db user=owner dbname=crm" --role cdc --dry-run
    """
    do = setting_up.plan if dry_run else setting_up.setup
    loaded = profile.load(settings.profile)
    _echo(do(settings, loaded, setting_up.Wishes(**wishes)))
    if with_backfill and not dry_run:
        from cdc_worker import backfill as filling  # noqa: PLC0415  # `run` begins sooner without it

        with _interruptible(_GOES_ON), beside(settings, loaded, log.get().bind(slot=settings.slot)):
            for done in filling.backfill(settings, loaded, log=log.get()):
                _echo(filling.lines(done))


def _echo(lines: Iterator[str]) -> None:
    for line in filter(None, lines):
        click.echo(line)


@main.command()
@_dry_run
@click.option("--back", is_flag=True, help="Bring the triggers back: from there on they record again.")
@click.option("--marked", is_flag=True, help="Record only what follows a context message, until: cdc-worker cutover.")
@_settings
def cutover(settings: Settings, dry_run: bool, back: bool, marked: bool) -> None:
    """Take over from what recorded changes so far, triggers or old code, exactly, while the application writes.

    \b
    Example: cdc-worker cutover --marked
    """
    if back and marked:
        raise click.UsageError("--back is about triggers, --marked about an application that records by itself")
    loaded = profile.load(settings.profile)
    _echo(cutting_over.cut_over(settings, loaded, to_triggers=back, marked=marked, dry_run=dry_run))


@main.command()
@_dry_run
@click.option("--all", "everything", is_flag=True, help="Also all else that setup made; activities stay.")
@click.option("--restore-triggers", is_flag=True, help="With --all: bring back the triggers that cut-over took away.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@_settings
def teardown(settings: Settings, dry_run: bool, everything: bool, restore_triggers: bool, yes: bool) -> None:
    """Drop the slot, and if wished all that setup made.

    \b
    Example: cdc-worker teardown --all --restore-triggers
    """
    if restore_triggers and not everything:
        raise click.UsageError("--restore-triggers is for --all; alone: cdc-worker cutover --back")
    if not dry_run and not yes:
        what = "and all that setup made" if everything else "and the checkpoint"
        _confirm(f'Drop slot "{settings.slot}" {what}? What is committed from then on is not recorded.')
    do = tearing_down.plan if dry_run else tearing_down.teardown
    loaded = profile.load(settings.profile)
    _echo(do(settings, loaded, everything=everything, restore_triggers=restore_triggers))


@main.command("switch-plugin")
@click.option("--to", type=click.Choice(PLUGINS), help="Plugin; the setting's, or else the other one.")
@click.option("--dry-run", is_flag=True, help="Try whether it can be done, and do nothing.")
@_settings
def switch_plugin(settings: Settings, to: str | None, dry_run: bool) -> None:
    """Let the worker read with the other output plugin from now on, also if the server refuses the one it has.

    Nothing is lost or recorded twice. A worker that runs goes on by itself. It may be repeated.

    \b
    Example: cdc-worker switch-plugin --to pgoutput
    """
    from cdc_worker import switch_plugin as switching  # noqa: PLC0415  # `run` begins sooner without it

    loaded = profile.load(settings.profile)
    with _interruptible("nothing is lost: what is left to do does the same command"):
        _echo(switching.switch_plugin(settings, loaded, to, dry_run=dry_run))


def _confirm(question: str, *, otherwise: str = "--yes does it, --dry-run shows it") -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"there is no terminal to ask on: {otherwise}")
    click.confirm(question, abort=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--watch", is_flag=True, help="Look every two seconds, until Ctrl-C; with --json a line each time.")
@_settings
def status(settings: Settings, as_json: bool, watch: bool) -> None:
    """Show whether the worker is alive and keeping up, what it holds up, and what went wrong last.

    \b
    Example: cdc-worker status --watch
    """
    if not watch:
        found = state.status(settings)
        click.echo(found.model_dump_json(indent=2) if as_json else "\n".join(state.lines(found)))
        return
    with suppress(KeyboardInterrupt):
        for seen in state.watch(settings):
            if as_json:
                click.echo(seen.model_dump_json())
            else:
                click.clear()  # does nothing where the output is no terminal
                click.echo("\n".join([*state.lines(seen), ""]))
            time.sleep(2)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@_settings
def doctor(settings: Settings, as_json: bool) -> None:
    """Look at all that the worker depends on, and say what is wrong and how to mend it. Changes nothing.

    It ends with 1 if something has failed.

    \b
    Example: cdc-worker doctor --json
    """
    from cdc_worker import doctor as examining  # noqa: PLC0415  # `run` begins sooner without it

    report = examining.doctor(settings)
    click.echo(report.model_dump_json(indent=2) if as_json else "\n".join(examining.lines(report)))
    if not report.healthy:
        sys.exit(1)


def _selecting_activities(command: Callable[P, None]) -> Callable[..., None]:
    """Give a command the filters that the CRM's people have, and the selection."""

    @click.option("--lead", metavar="ID", help="Those of this lead.")
    @click.option("--customer", metavar="ID", help="Those of this customer.")
    @click.option(
        "--link",
        "others",
        type=(str, str),
        multiple=True,
        metavar="FIELD ID",
        help="Those that link to this key, in the profile's field for it.",
    )
    @click.option("--category", "categories", multiple=True, metavar="NAME", help="Those of it: manual, system, …")
    @click.option("--type", "types", multiple=True, metavar="NAME", help="Those of this type.")
    @click.option("--bd", "owners", multiple=True, metavar="NAME", help="Those that this BD is in charge of.")
    @click.option("--visible-only", is_flag=True, help="Those that are shown to everybody.")
    @functools.wraps(command)
    def wrapped(lead: str | None, customer: str | None, others: tuple[tuple[str, str], ...], **given: Any) -> None:
        from cdc_worker.feed import Selection  # noqa: PLC0415  # other commands begin sooner without it

        named = {"lead": lead, "customer": customer}
        links = [*((of, key) for of, key in named.items() if key is not None), *others]
        if len(dict(links)) < len(links):
            raise click.UsageError("it takes one key of a field at a time")
        selection = Selection(
            links=dict(links), **{name: given.pop(name) for name in ("types", "categories", "owners", "visible_only")}
        )
        command(selection=selection, **given)  # type: ignore[arg-type, call-arg]  # it is click that fits them

    return wrapped


@main.command()
@_selecting_activities
@click.option("-n", "--lines", type=click.IntRange(0), default=10, show_default=True, help="So many of before.")
@click.option("--follow/--no-follow", default=True, help="Whether to go on with those that come, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line.")
@_settings
def tail(settings: Settings, selection: Activities, lines: int, follow: bool, as_json: bool) -> None:
    """Show the activity feed as it happens, manual and system together.

    It takes the right to read the target.

    \b
    Example: cdc-worker tail --type status_changed --bd jane
    """
    from cdc_worker import feed, feed_listing  # noqa: PLC0415  # likewise
    from cdc_worker.console import console  # noqa: PLC0415  # likewise

    def note(text: str) -> None:
        click.echo(text, err=True)

    screen = console()
    with suppress(KeyboardInterrupt):
        loaded = profile.load(settings.profile)
        for line in feed.tail(settings, loaded, selection, lines=lines, follow=follow, metadata=as_json, note=note):
            if as_json:
                click.echo(line)
            else:
                screen.print(feed_listing.line(feed.entry(line), screen), soft_wrap=True)


@main.command()
@_selecting_activities
@click.option("-n", "--limit", type=click.IntRange(1), help="The newest so many; all if not given.")
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line.")
@_settings
def timeline(settings: Settings, selection: Activities, limit: int | None, as_json: bool) -> None:
    """Show the history of a lead or a customer, manual and system together, also of one that is gone.

    It takes the right to read the target.

    \b
    Example: cdc-worker timeline --lead 123
    """
    from cdc_worker import feed, feed_listing  # noqa: PLC0415  # likewise
    from cdc_worker.console import console, printed  # noqa: PLC0415  # likewise

    if not selection.links:
        raise click.UsageError("it takes --lead, --customer or --link to say whose")
    found = feed.timeline(settings, profile.load(settings.profile), selection, limit=limit, metadata=as_json)
    if as_json:
        _echo(iter(found))
        return
    screen = console()
    history = feed_listing.history([feed.entry(line) for line in found], screen)
    click.echo(printed(screen, history) if found else "no activities")


@main.command()
@_selecting_activities
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line.")
@_settings
def stats(settings: Settings, selection: Activities, as_json: bool) -> None:
    """Count activities: by category, by day, by BD and by type.

    It takes the right to read the target.

    \b
    Example: cdc-worker stats --bd jane
    """
    from cdc_worker import feed, feed_listing  # noqa: PLC0415  # likewise
    from cdc_worker.console import console, printed  # noqa: PLC0415  # likewise

    counts = feed.stats(settings, profile.load(settings.profile), selection)
    if as_json:
        _echo(feed.printable(count.model_dump_json()) for count in counts)
        return
    screen = console()
    click.echo(printed(screen, feed_listing.tables(counts, screen)))


@main.command()
@click.option("--lead", metavar="ID", help="Key of a lead.")
@click.option("--customer", metavar="ID", help="Key of a customer.")
@click.option(
    "--person",
    "others",
    type=(str, str),
    multiple=True,
    metavar="FIELD ID",
    help="Key of anybody, in the profile's field for them.",
)
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@_settings
def forget(
    settings: Settings, others: tuple[tuple[str, str], ...], yes: bool, as_json: bool, **named: str | None
) -> None:
    """Forget a person: blank what was recorded, and what will be, until the key is given to somebody else.

    It takes the rights of the tables' owner, and says what it can't reach.

    \b
    Example: cdc-worker forget --lead 7
    """
    given = [(field, key) for field, key in named.items() if key is not None] + [*others]
    persons = dict(given)
    if not persons:
        raise click.UsageError("it takes --lead, --customer or --person to say who")
    if len(persons) < len(given):
        raise click.UsageError("it takes one key of a field at a time")
    if not yes:
        who = " and ".join(f"{field} {key}" for field, key in persons.items())
        _confirm(f"Blank all that was recorded of {who}? It can't be undone.", otherwise="--yes does it")
    done = erasing.forget(settings, profile.load(settings.profile), persons)
    click.echo(done.model_dump_json(indent=2) if as_json else "\n".join(erasing.lines(done)))


_chunk_size = click.option(
    "--chunk-size", type=click.IntRange(1, 100_000), default=1_000, show_default=True, help="Rows read at once."
)


def _moment(value: str) -> datetime:
    """A date, with or without a time and its zone."""
    try:
        return datetime.fromisoformat(value)
    except ValueError as error:
        examples = "2026-01-31, 2026-01-31T12:00 or 2026-01-31T12:00+02:00"
        raise click.BadParameter(f"'{value}' is no date such as {examples}.") from error


_INTERRUPTED: Final = 128 + signal.SIGINT
"""The exit code of who was interrupted, as shells have it."""


@contextmanager
def _interruptible(left: str) -> Iterator[None]:
    """Tell who interrupts a long command, by Ctrl-C or SIGTERM, how things are `left`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"interrupted: {left}", err=True)
        sys.exit(_INTERRUPTED)


_GOES_ON: Final = "what is written stays, and the same command goes on from there"


@main.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option("--since", type=_moment, metavar="DATE", help="Only what is dated then or later.")
@click.option("--until", type=_moment, metavar="DATE", help="Only what is dated before then.")
@click.option(
    "--from-key", multiple=True, metavar="KEY", help="Only rows after this key; once for each of its columns."
)
@click.option("--to-key", multiple=True, metavar="KEY", help="Only rows up to this key.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Rows a second, at most.")
@_chunk_size
@click.option("--dry-run", is_flag=True, help="Count what would be written and show some of it; nothing is.")
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a table, each on a line.")
@_settings
def backfill(settings: Settings, tables: tuple[str, ...], dry_run: bool, as_json: bool, **wishes: Any) -> None:
    """Write activities for rows that were there before the worker, beside it and the application.

    All tables of the profile that have rules with a backfill, if none is named. It may be interrupted, and goes on from
    there. It takes the right to read the tables. DATE may have a time and a zone; without one it is the target's.

    \b
    Example: cdc-worker backfill lead --rate 2000
    """
    from cdc_worker import backfill as filling  # noqa: PLC0415  # likewise

    done = filling.backfill(
        settings,
        profile.load(settings.profile),
        tables,
        filling.Wishes(**wishes),
        log=log.get(),
        dry_run=dry_run,
    )
    with _interruptible("nothing was written" if dry_run else _GOES_ON):
        for table in done:
            click.echo(table.model_dump_json() if as_json else "\n".join(filling.lines(table)))


def _bound(value: str) -> LSN | datetime:
    """A position in the WAL, or a date."""
    try:
        return LSN.parse(value)
    except ValueError:
        return _moment(value)


def _system_identifier(value: str) -> str:
    """What `SELECT system_identifier FROM pg_control_system()` says. It is a part of keys."""
    if not (value.isascii() and value.isdecimal()):
        raise click.BadParameter(f"{value!r} is no number such as 7500000000000000001.")
    return value


@main.command()
@click.argument("paths", nargs=-1, metavar="[FILE|DIRECTORY]...")
@click.option("--since", type=_bound, metavar="X", help="Only what was committed then or later: a date, or an LSN.")
@click.option("--until", type=_bound, metavar="X", help="Only what was committed before then.")
@click.option("--table", "tables", multiple=True, metavar="TABLE", help="Only changes of this table.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only activities of this type.")
@click.option("--dry-run", is_flag=True, help="Count what would be written and show some of it; nothing is.")
@click.option("--rewrite", "again", is_flag=True, help="Also change and remove what the profile says otherwise now.")
@click.option("--output", metavar="FILE", help="Write JSON lines there, and nothing to the target; - is stdout.")
@click.option("--strict", is_flag=True, help="Stop at the first thing that is not whole.")
@click.option(
    "--system-identifier",
    type=_system_identifier,
    metavar="ID",
    help="The cluster of recordings that don't name theirs.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@_settings
def replay(settings: Settings, paths: tuple[str, ...], again: bool, as_json: bool, **wishes: Any) -> None:
    """Write the activities of recorded changes that the target hasn't, beside the worker.

    The worker's own recording is read if none is named; - is stdin. It ends with 1 if something is missing in what was
    read, or the target refused to have something changed. It takes the rights of the tables' owner. A date may have a
    time and a zone; without one it is the target's.

    \b
    Example: cdc-worker replay --since 2026-01-31 --dry-run
    """
    from cdc_worker import replay as replaying  # noqa: PLC0415  # likewise
    from cdc_worker import rewrite as rewriting  # noqa: PLC0415  # likewise

    _keep_private()
    asked = replaying.Wishes(**wishes)
    if again and asked.output is not None:
        raise click.UsageError("--rewrite is about what the target has, --output leaves it alone")
    unwritten = asked.dry_run or asked.output is not None
    with _interruptible("nothing was written" if unwritten else "what is written stays: run it again for the rest"):
        loaded = profile.load(settings.profile)
        do = rewriting.rewrite if again else replaying.replay
        done = do(settings, loaded, paths, asked, log=log.get())
    lines = rewriting.lines(done) if isinstance(done, rewriting.Rewritten) else replaying.lines(done)
    for line in [done.model_dump_json()] if as_json else lines:
        click.echo(line, err=asked.output == "-")
    for line in replaying.damages(done.missing):
        click.echo(line, err=True)
    if not done.whole:
        sys.exit(1)


@main.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option("--repair", is_flag=True, help="Write activities that make up for what is missing, marked as such.")
@click.option("--sample", type=click.IntRange(1), help="Look at so many rows only, and so many keys in the log.")
@_chunk_size
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    help="Seconds to wait for transactions of others, where it depends on them.",
)
@click.option("--values", is_flag=True, help="Print values as well, of columns that differ.")
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line, as they are found.")
@_settings
def verify(settings: Settings, tables: tuple[str, ...], as_json: bool, **wishes: Any) -> None:
    """Hold the rows of captured tables against the log, beside the worker and the application.

    All tables of the profile whose log can be found, if none is named. It ends with 1 if the log isn't true, or where
    that couldn't be told. It takes the right to read the tables and the target.

    \b
    Example: cdc-worker verify lead --repair
    """
    from cdc_worker import verify as verifying  # noqa: PLC0415  # likewise

    true = True

    def found() -> Iterator[verifying.Finding]:
        nonlocal true
        loaded = profile.load(settings.profile)
        for of in verifying.verify(settings, loaded, tables, verifying.Wishes(**wishes), log=log.get()):
            true = true and (not isinstance(of, verifying.Verified) or of.true)
            yield of

    for line in (of.model_dump_json() for of in found()) if as_json else verifying.lines(found()):
        click.echo(line)
    if not true:
        sys.exit(1)


def _position(value: str) -> LSN:
    """A position as Postgres writes it."""
    try:
        return LSN.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is no position such as 0/17FE4B8.") from error


@main.command()
@click.option("--skip", "position", type=_position, metavar="LSN", help="Allow to pass over the message there.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@_settings
def recover(settings: Settings, position: LSN | None, dry_run: bool) -> None:
    """Lead on where `run` has ended with 11, 12, 14, 15, 16 or 23: the slot is gone, lost or was moved.

    The gap is noted, the worker goes on from a slot that is there, and what is missing is made up for as by
    `verify --repair`. It may be interrupted, and goes on from there.

    With --skip: allow the worker to pass over a message that it can't read, and at which it ends with 20. It is kept as
    a dead letter; where it can be read after all, by a newer version perhaps, nothing is passed over.

    Either takes the rights of the tables' owner.

    \b
    Example: cdc-worker recover
    """
    if position is not None:
        _echo(skipping.skip(settings, position, dry_run=dry_run))
        return
    from cdc_worker import recover as recovering  # noqa: PLC0415  # it is rarely run, and imports all of verify

    loaded = profile.load(settings.profile)
    with _interruptible("nothing was done" if dry_run else _GOES_ON):
        _echo(recovering.recover(settings, loaded, log=log.get(), dry_run=dry_run))


@main.group("dead-letters")
def dead_letters() -> None:
    """See to changes that could not become activities.

    Of those that wait, some are meant: by their numbers (ID), by --table and --error, or --all. --error is a kind, a
    SQLSTATE, or the first two digits of some.

    \b
    Example: cdc-worker dead-letters list --error 23 && cdc-worker dead-letters retry --error 23
    """
    _keep_private()


def _keep_private() -> None:
    """Let nobody else read the files that are made from now on: they hold values of rows."""
    os.umask(0o077)


_asks: Final = click.option("--yes", is_flag=True, help="Don't ask.")
_discarded: Final = click.option("--discarded", is_flag=True, help="Those that were discarded, not those that wait.")


def _selecting(command: Callable[P, None], *, required: bool = True) -> Callable[..., None]:
    """Give a command the arguments and options that say which dead letters are meant, and the selection."""

    @click.argument("ids", nargs=-1, type=click.IntRange(1), metavar="[ID]...")
    @click.option("--table", metavar="TABLE", help="Those of changes of this table.")
    @click.option("--error", metavar="ERROR", help="Those with this SQLSTATE, class of SQLSTATEs or kind.")
    @click.option("--all", "everything", is_flag=True, help="All that wait.")
    @functools.wraps(command)
    def wrapped(
        ids: tuple[int, ...],
        table: str | None,
        error: str | None,
        everything: bool,
        discarded: bool = False,
        **rest: Any,
    ) -> None:
        from cdc_worker.dead_letters import Selection  # noqa: PLC0415  # other commands begin sooner without it

        some = table is not None or error is not None
        if (bool(ids), some, everything).count(True) > 1:
            raise click.UsageError("it takes IDs, or --table and --error, or else --all")
        if required and not (ids or some or everything):
            raise click.UsageError("it takes IDs, --table, --error or --all to say which are meant")
        command(selection=Selection(ids, table, error, discarded), **rest)  # type: ignore[arg-type, call-arg]  # it is click that fits them

    return wrapped


_selected: Final = functools.partial(_selecting, required=False)


@dead_letters.command("list")
@_selected
@_discarded
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line.")
@_settings
def list_(settings: Settings, selection: Selection, as_json: bool) -> None:
    """List dead letters, without the values of their rows: all that wait, if none are named.

    \b
    Example: cdc-worker dead-letters list --table lead --error 23514
    """
    from cdc_worker import dead_letters as letters  # noqa: PLC0415  # likewise

    found = letters.listed(settings, selection)
    for line in (of.model_dump_json() for of in found) if as_json else letters.listing(found):
        click.echo(line)


@dead_letters.command("show")
@click.argument("number", metavar="ID", type=click.IntRange(1))
@_settings
def show_letter(settings: Settings, number: int) -> None:
    """Print all that is kept of a dead letter, with the values of its row.

    \b
    Example: cdc-worker dead-letters show 7
    """
    from cdc_worker import dead_letters as letters  # noqa: PLC0415  # likewise

    _echo(letters.shown(settings, number))


@dead_letters.command()
@_selecting
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line.")
@_settings
def retry(settings: Settings, selection: Selection, as_json: bool) -> None:
    """Try dead letters again by the profile as it is now: what succeeds has its own key and date.

    One that was discarded is taken up again if it is named. It ends with 1 if any is not written. It takes the rights
    of the tables' owner.

    \b
    Example: cdc-worker dead-letters retry --all
    """
    from cdc_worker import dead_letters as letters  # noqa: PLC0415  # likewise

    remaining = 0

    def found() -> Iterator[letters.Tried]:
        nonlocal remaining
        for of in letters.retry(settings, profile.load(settings.profile), selection, log=log.get()):
            remaining += of.outcome in ("failed again", "left")
            yield of

    with _interruptible("what is written stays, and the rest waits"):
        for line in (of.model_dump_json() for of in found()) if as_json else letters.told(found()):
            click.echo(line)
    if remaining:
        sys.exit(1)


@dead_letters.command()
@_selecting
@_asks
@_settings
def discard(settings: Settings, selection: Selection, yes: bool) -> None:
    """Leave it at that with dead letters: they no longer wait, and are kept.

    It takes the rights of the tables' owner.

    \b
    Example: cdc-worker dead-letters discard 7 8
    """
    from cdc_worker import dead_letters as letters  # noqa: PLC0415  # likewise

    if not yes:
        count = letters.count(settings, selection)
        _confirm(f"Leave {count:,} changes untold for good?", otherwise="--yes does it")
    click.echo(f"{len(letters.discard(settings, selection)):,} discarded")


@dead_letters.command()
@_selecting
@_discarded
@click.option("--output", type=click.File("w", encoding="utf-8", lazy=False), default="-", help="File to write to.")
@_settings
def export(settings: Settings, selection: Selection, output: IO[str]) -> None:
    """Print dead letters with all that is kept of them, and every digit, as JSON lines.

    \b
    Example: cdc-worker dead-letters export --all --output letters.jsonl
    """
    from cdc_worker import dead_letters as letters  # noqa: PLC0415  # likewise

    for line in letters.exported(settings, selection):
        output.write(f"{line}\n")


@main.group("profile")
def profiles() -> None:
    """Help to write profiles, which say what a CRM's tables mean.

    FILE is a profile's file, or the name of one that is shipped.

    \b
    Example: cdc-worker profile init > crm.toml && cdc-worker profile check crm.toml
    """


_file = click.argument("file")


@profiles.command()
@_file
@_settings
def check(settings: Settings, file: str) -> None:
    """Look for all that is wrong with a profile, by itself and, with a DSN, for that database. Changes nothing.

    It ends with 1 if something is wrong; a warning is about some rows only, or about what setup mends.

    \b
    Example: cdc-worker profile check crm.toml --dsn "host=db user=cdc dbname=crm"
    """
    from cdc_worker import profile_checks  # noqa: PLC0415  # likewise

    counts = Counter[str]()
    for told in profile_checks.check(settings, file):
        counts[told.outcome] += 1
        click.echo(f"{file}:{told.line}: {'' if told.outcome == 'fault' else 'warning: '}{told.message}")
        if told.fix:
            click.echo(f"  fix: {told.fix}")
    against = "" if settings.dsn.get_secret_value() else "; by itself only: --dsn holds it against a database"
    click.echo(f"{file}: {counts['fault']} faults, {counts['warning']} warnings{against}")
    if counts["fault"]:
        sys.exit(1)


@profiles.command()
@_file
@click.option("--json", "as_json", is_flag=True, help="For machines: an array of rules.")
def show(file: str, as_json: bool) -> None:
    """Print the rules of a profile as a table.

    \b
    Example: cdc-worker profile show leadfi
    """
    from cdc_worker import profile_listing  # noqa: PLC0415  # likewise

    with _failing():
        found = profile.load(file)
    rows = [row.model_dump() for row in profile_listing.rows(found)]
    click.echo(json.dumps(rows, indent=2) if as_json else "\n".join(profile_listing.lines(found)))


@profiles.command("try")
@_file
@click.option(
    "--change",
    "changes",
    multiple=True,
    metavar="JSON",
    help="A change as a JSON object; several are one transaction, in this order.",
)
@click.option("--recording", type=click.File("rb"), help="Output of wal2json, format version 2; - is stdin.")
@click.option("--json", "as_json", is_flag=True, help="For machines: an object a line.")
@_settings
def try_(settings: Settings, file: str, changes: tuple[str, ...], recording: IO[bytes] | None, as_json: bool) -> None:
    """Print what would be written of changes. Nothing is written, be it with a DSN.

    A change has the keys table, old and new (columns; those left out are NULL, or as in the old row), and if wished
    operation (insert, update, delete, truncate), context (what the application says before it) and lookups (rows by
    the lookup's name). Other rows are looked up in the database if there is a DSN, as they are now.

    \b
    Example: cdc-worker profile try crm.toml --change '{"table": "lead", "new": {"full_name": "Ada"}}'
    """
    from cdc_worker import profile_trial  # noqa: PLC0415  # likewise

    if bool(changes) == (recording is not None):
        raise click.UsageError("it takes --change, once or several times, or else --recording")
    loaded = profile.load(file)
    counts = profile_trial.Counts()
    try:
        if recording is not None:
            outcomes = profile_trial.try_recording(settings, loaded, recording, counts)
        else:
            told = [profile_trial.told_change(change) for change in changes]
            outcomes = profile_trial.try_changes(settings, loaded, told, counts)
        for tried in outcomes:
            click.echo(tried.json_line() if as_json else "\n".join(profile_trial.lines(tried)))
    except profile_trial.ChangeError as error:
        raise click.BadParameter(str(error), param_hint="--change") from error
    for line in profile_trial.summary(counts):
        click.echo(line, err=as_json)


@profiles.command("init")
@click.option(
    "--table", "tables", multiple=True, metavar="NAME", help="Table to capture; all of the schema if none is."
)
@click.option("--target", metavar="NAME", help="Table to write activities to; the likeliest if not given.")
@click.option("--schema", metavar="NAME", default="public", show_default=True, help="Schema of the tables.")
@_settings
def init(settings: Settings, tables: tuple[str, ...], target: str | None, schema: str) -> None:
    """Print a commented profile to begin with, drawn from the database's tables, keys and foreign keys.

    \b
    Example: cdc-worker profile init --table lead --target activity > crm.toml
    """
    from cdc_worker import profile_draft  # noqa: PLC0415  # likewise

    lines = profile_draft.draft(settings, tables=tables, target=target, schema=schema)
    click.echo(profile_draft.joined(lines), nl=False)


@profiles.command("schema")
def json_schema() -> None:
    """Print the JSON Schema of profiles, by which editors complete and check them.

    An editor with Taplo takes it from a first line: #:schema ./profile.schema.json

    \b
    Example: cdc-worker profile schema > profile.schema.json
    """
    click.echo(json.dumps(profile.json_schema(), indent=2))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script by which a shell completes commands and options.

    \b
    Example: cdc-worker completion bash > ~/.local/share/bash-completion/completions/cdc-worker
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "cdc-worker", "_CDC_WORKER_COMPLETE").source())


@main.command()
@click.option("--keep", is_flag=True, help="Leave server and worker up, until Ctrl-C.")
@click.option("--plugin", type=click.Choice(PLUGINS), help="Take a server with it; wal2json where it can be had.")
def demo(keep: bool, plugin: Plugin | None) -> None:
    """Play a sales day against a private PostgreSQL, and check every activity.

    \b
    Example: cdc-worker demo --keep
    """
    from cdc_worker import demo as playing  # noqa: PLC0415  # likewise

    with _failing():
        right = playing.demo(keep=keep, plugin=plugin)
    if not right:
        sys.exit(1)
