"""Visitors: one who has logged in, and one who hasn't."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.test import Client

from django_crm.views import VIEWS


def visit(database: dict[str, object]) -> None:
    """Let jane_doe call every view, and after her nobody in particular one of them."""
    connection.settings_dict |= database
    try:
        call_command("migrate", verbosity=0)
        jane, nobody = Client(), Client()
        jane.force_login(User.objects.create_user("jane_doe"))
        for client, names in ((jane, list(VIEWS)), (nobody, ["bulk"])):
            for name in names:
                assert client.get(f"/{name}/").content == b"done"
    finally:
        connection.close()
