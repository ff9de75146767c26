"""Change data capture for PostgreSQL CRMs: every committed change becomes a system activity, exactly once."""

__version__ = "0.1.0"
