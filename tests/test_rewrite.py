"""After a profile has changed, what was recorded becomes what the profile says now, and nothing else is touched."""

from __future__ import annotations

import msgspec
from factories import assembled, inserted, rules

from cdc_worker.activities import Activity
from cdc_worker.transform import Transformer, settled

# What was looked up is told again, also by rules that leave tables out


def test_what_was_found_for_a_change_is_found_by_rules_of_fewer_tables() -> None:
    """Answers are numbered as the changes of the recording, which has more tables than the rules have by now."""
    fewer = rules("""
[tables.deal]
lookups.owner = { table = "person", match = { id = "owner_id" } }
rules = [{ on = "insert", type = "deal_created", description = "by {lookup.owner.name}" }]
[tables.person]
key = "id"
""")
    (transaction,) = assembled(
        [inserted("other", {"id": 1}), inserted("deal", {"id": 1, "owner_id": 7}), inserted("other", {"id": 2})]
    )
    transaction = msgspec.structs.replace(transaction, answers={(1, "owner"): {"name": "Ada"}})
    transformer = Transformer(fewer, worker="w", system_identifier="1")
    (told,) = settled(transformer, transaction, dict.fromkeys)
    assert isinstance(told, Activity)
    assert told.fields["description"] == "by Ada"
