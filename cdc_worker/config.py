"""Settings: defaults, a TOML file, CDC_WORKER_* variables and flags, each overriding those before it."""

from __future__ import annotations

import importlib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cdc_worker.context import Policy
from cdc_worker.errors import ConnectionStringError, SettingsError
from cdc_worker.profile import Profile
from cdc_worker.rules import Function, Rules, compile_backfill, compile_rules

PREFIX = "CDC_WORKER_"


def known_time_zone(name: str) -> str:
    """The name, if it is one of a time zone. Raises ValueError if it isn't."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'"{name}" is not the name of a time zone such as Europe/Berlin') from None
    return name


def _listed(value: object) -> object:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _name(value: str) -> str:
    """The name of something in the database, if the server calls it that: of a longer one it cuts the end off."""
    if not 1 <= len(value.encode()) <= 63 or "\0" in value:
        raise ValueError("a name has 1 to 63 bytes, none of which is zero")
    return value


_SECRETS = ("dsn", "context_key", "mask_key")

SlotName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,63}$")]
Seconds = Annotated[float, Field(gt=0)]


class _TomlSource(TomlConfigSettingsSource):
    """A settings file, in which names that begin alike may stand in a table of what they begin with."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        table = found.pop(_RECORDING, {})
        if not isinstance(table, dict):
            return {**found, _RECORDING: table}
        return {**found, **{f"{_RECORDING}_{name}": value for name, value in table.items()}}


_RECORDING: Final = "recording"


class Settings(BaseSettings):
    """What an operator can set. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    dsn: SecretStr = Field(
        SecretStr(""), description="Connection string or URL of libpq, which finds what it leaves out."
    )
    slot: SlotName = Field("cdc_worker", description="Replication slot.")
    plugin: Literal["auto", "wal2json", "pgoutput"] = Field(
        "auto",
        description="Output plugin that setup makes the slot with; auto takes wal2json where the server has and allows"
        " it, else pgoutput.",
    )
    publication: Annotated[str, AfterValidator(_name)] | None = Field(
        None, description="Publication of the captured tables, which pgoutput reads; named as the slot if not given."
    )
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,63}$")] | None = Field(
        None, description="Name of this worker, part of every change_key; the slot's if not given."
    )
    profile: str = Field("leadfi", description="Shipped profile, or a file.")
    time_zone: Annotated[str, AfterValidator(known_time_zone)] | None = Field(
        None, description="Zone of timestamps without one in the target; the database's if not given."
    )
    idle_advance_interval: Seconds = Field(
        10, description="Seconds between two writes of the position of a stream without activities, at least."
    )
    idle_advance_bytes: Annotated[int, Field(ge=1 << 16)] = Field(
        1 << 20, description="Bytes of WAL that must have gone by before such a write."
    )
    linger: Annotated[float, Field(ge=0, le=1)] = Field(
        0, description="Seconds between two batches while the worker keeps up: fewer commits, for later activities."
    )
    retained_alarm_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        4 << 30, description="Bytes of WAL kept for the slot beyond which the worker and the doctor raise an alarm."
    )
    retained_limit_bytes: Annotated[int, Field(ge=1 << 20)] | None = Field(
        None,
        description="Bytes of WAL kept for the slot beyond which the worker drops it and ends, so that the server's"
        " disk doesn't fill: what is committed from then on is lost. Never if not given.",
    )
    context_key: Annotated[SecretStr, Field(min_length=16)] | None = Field(
        None,
        description="Key that signs context messages, of 16 characters at least; others are not trusted then.",
    )
    unsigned_control: bool = Field(
        False, description="Whether context messages may ask to skip or collapse changes without being signed."
    )
    rule_modules: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="Python modules, with commas between them, whose functions a profile may name as rules."
    )
    mask_key: Annotated[SecretStr, Field(min_length=16)] | None = Field(
        None, description="Key of the hashes that stand in place of masked values, of 16 characters at least."
    )
    recording_directory: Path | None = Field(
        None, description="Directory in which the worker keeps the changes that it consumes; none if not given."
    )
    recording_segment_bytes: Annotated[int, Field(ge=1 << 16)] = Field(
        64 << 20, description="Bytes of a recording's segment after which another one is begun."
    )
    recording_segment_seconds: Seconds = Field(
        3600, description="Seconds after which another segment is begun, if there is anything to record."
    )
    recording_retention_days: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Days after which segments are deleted; never if not given."
    )
    recording_retention_bytes: Annotated[int, Field(ge=1 << 20)] | None = Field(
        None, description="Bytes of segments beyond which the oldest are deleted; never if not given."
    )
    recording_masked: bool = Field(
        True, description="Whether values that the profile masks are masked in recordings as well."
    )
    http_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None,
        description="Port on which the worker serves its status page at /, /metrics, /healthz and /readyz; none if not"
        " given.",
    )
    http_host: str = Field("127.0.0.1", description="Address on which it serves them.")
    http_values: bool = Field(False, description="Whether the status page shows the texts of the last activities.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error."
    )
    log_format: Literal["console", "json"] | None = Field(
        None, description="console or json; console on a terminal if not given."
    )

    @property
    def worker(self) -> str:
        """The name under which this worker keeps its checkpoint and makes its keys."""
        return self.name or self.slot

    @property
    def publication_name(self) -> str:
        """The publication of the captured tables."""
        return self.publication or self.slot

    def rules(self, profile: Profile) -> Rules:
        """A profile's rules, with what these settings allow them. Raises ProfileError."""
        return compile_rules(profile, function=self._function, mask_key=self._mask_key)

    def backfill_rules(self, profile: Profile) -> Rules:
        """Those of them that are for rows that are there already. Raises ProfileError."""
        return compile_backfill(profile, mask_key=self._mask_key)

    @property
    def _mask_key(self) -> str | None:
        return None if self.mask_key is None else self.mask_key.get_secret_value()

    def zone(self, profile: Profile, database: str) -> str:
        """Zone of timestamps without one in the target, where that of the `database` is known.

        Raises SettingsError if it has to be that, and it is one that Postgres alone knows.
        """
        named = self.time_zone or profile.target.time_zone
        try:
            return named or known_time_zone(database)
        except ValueError as error:
            for name in available_timezones():
                if name.lower() == database.lower():  # as Postgres compares them
                    return name
            raise SettingsError(
                f"the database's time zone: {error}", hint="name one in CDC_WORKER_TIME_ZONE, or for the database"
            ) from error

    def policy(self, profile: Profile) -> Policy:
        """What of context messages these settings believe and allow, and a profile keeps."""
        key = None if self.context_key is None else self.context_key.get_secret_value().encode()
        return Policy(key, unsigned_control=self.unsigned_control, kept=tuple(profile.context))

    def _function(self, name: str) -> Function:
        """A function that a profile names as a rule, if its module is allowed. Raises ValueError."""
        module, _, function = name.partition(":")
        if module not in self.rule_modules:
            allowed = ", ".join(self.rule_modules) or "no modules"
            raise ValueError(f'"{name}": the settings allow functions of {allowed} (rule_modules)')
        try:
            found = getattr(importlib.import_module(module), function)
        except Exception as error:
            raise ValueError(f'"{name}" can\'t be imported: {type(error).__name__}: {error}') from error
        if not callable(found):
            raise ValueError(f'"{name}" is no function')
        return cast("Function", found)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before the environment before the file."""
        return (init_settings, env_settings, _TomlSource(settings_cls))


def load(config: Path | None = None, flags: dict[str, Any] | None = None) -> Settings:
    """The settings in force; `flags` that are None don't count. Raises SettingsError naming every wrong one."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    kind = Settings
    if config:
        _check_file(config)

        class FromFile(Settings):
            model_config = SettingsConfigDict(toml_file=config)

        kind = FromFile  # to make it takes longer than to load them: only where there is a file
    try:
        settings = kind(**given)
    except ValidationError as error:
        faults = [_fault(fault, given, config) for fault in error.errors()]
        raise SettingsError("wrong settings:\n" + "\n".join(faults), hint="see: cdc-worker run --help") from None
    _check_dsn(settings.dsn.get_secret_value())
    return settings


def unknown_variables() -> list[str]:
    """Variables that look like settings and are none: a misspelling, or what Kubernetes tells of a service."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)


def _fault(fault: Any, given: dict[str, Any], config: Path | None) -> str:
    name = str(fault["loc"][0])
    variable = next((v for v in os.environ if v.upper() == f"{PREFIX}{name}".upper()), None)
    source = f"--{name.replace('_', '-')}" if name in given else variable or str(config)
    # What is no setting of ours may be anything, a password too.
    value = f" = {fault['input']!r}" if name in Settings.model_fields and name not in _SECRETS else ""
    return f"  {name}{value} ({source}): {fault['msg']}"


def _check_file(path: Path) -> None:
    try:
        tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise SettingsError(f'settings file "{path}" can\'t be read: {reason}') from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f'settings file "{path}" is not TOML: {error}') from error


def _check_dsn(dsn: str) -> None:
    # libpq's message would repeat what it stumbled over, which may be the password.
    try:
        parts = conninfo_to_dict(dsn)
    except Exception:
        raise ConnectionStringError(
            f"{PREFIX}DSN is not a connection string",
            hint='write "postgresql://user@host/database" or "host=… user=… dbname=…"',
        ) from None
    if "@" in str(parts.get("host", ""))[1:] or not re.fullmatch(r"[\d,]*", str(parts.get("port", ""))):
        raise ConnectionStringError(
            f"{PREFIX}DSN has no proper host and port",
            hint='in a URL write "@" and "/" of a password as "%40" and "%2F", or use "host=… password=…"',
        )
