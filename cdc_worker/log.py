"""Structured logs on stderr: lines for a terminal, JSON for machines."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal

import structlog

Logger = structlog.stdlib.BoundLogger


def configure(level: str, form: Literal["console", "json"] | None) -> None:
    """Set up structlog for this process."""
    console = sys.stderr.isatty() if form is None else form == "console"
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # It warns of time zones that Python doesn't know, and takes UTC: moments are the same there.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())


def get() -> Logger:
    """The process's logger."""
    logger: Logger = structlog.get_logger()
    return logger
