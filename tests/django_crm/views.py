"""Requests that write, each in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db import connection, transaction
from django.http import HttpResponse
from django.urls import path

from django_crm.models import Lead


def save() -> None:
    """As most requests do."""
    Lead.objects.count()
    lead = Lead(full_name="saved")
    lead.save()
    lead.full_name = "saved again"
    lead.save()


def query() -> None:
    """Without loading what is written."""
    Lead.objects.update(type="exchange")
    Lead.objects.filter(full_name="saved again").delete()


def bulk() -> None:
    """Several rows at once."""
    Lead.objects.bulk_create(Lead(full_name=f"bulk {n}") for n in range(2))


def savepoints() -> None:
    """A transaction of which the first statement is a savepoint, and another right after it."""
    with transaction.atomic():
        try:
            with transaction.atomic():
                Lead(full_name="never").save()
                raise LookupError
        except LookupError:
            Lead(full_name="after a savepoint").save()
    with transaction.atomic():
        Lead(full_name="in the next transaction").save()


def cursors() -> None:
    """While a cursor of the server's is open."""
    with transaction.atomic():
        for lead in Lead.objects.order_by("lead_id").iterator(chunk_size=1):
            lead.type = "seen"
            lead.save()


def raw() -> None:
    """In SQL, and with its results."""
    with connection.cursor() as cursor:
        cursor.execute("\n insert into lead (full_name, source, bd_in_charge, type) values (%s, '', '', '')", ["raw"])
        assert cursor.rowcount == 1
        cursor.execute("UPDATE lead SET type = 'raw' WHERE full_name = %s RETURNING full_name", ["raw"])
        assert cursor.fetchall() == [("raw",)]


VIEWS = {view.__name__: view for view in (save, query, bulk, savepoints, cursors, raw)}


def _answering(view: Callable[[], None]) -> Callable[[Any], HttpResponse]:
    def answer(request: Any) -> HttpResponse:
        view()
        return HttpResponse("done")

    return answer


urlpatterns = [path(f"{name}/", _answering(view)) for name, view in VIEWS.items()]
