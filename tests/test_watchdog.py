"""Who is late, and when he is asked after: laws that hold whatever happens when."""

from __future__ import annotations

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.watchdog import Debtor, Watchdog

PATIENCE = 10.0

moments = st.lists(
    st.tuples(
        st.floats(0, 3 * PATIENCE),  # seconds that pass
        st.dictionaries(st.sampled_from(get_args(Debtor)), st.booleans()),  # who owes, and whether he gives a sign
    )
)


@given(moments)
def test_who_owes_is_late_after_the_patience_and_not_before(
    story: list[tuple[float, dict[Debtor, bool]]],
) -> None:
    watchdog = Watchdog(PATIENCE)
    now, owed, asked = 0.0, dict[Debtor, float](), dict[Debtor, float]()
    for passed, signs in story:
        now += passed
        owed = {debtor: now if sign else owed.get(debtor, now) for debtor, sign in signs.items()}
        late = watchdog.late(owed, now)
        assert late == {debtor: now - since for debtor, since in owed.items() if since < now - PATIENCE}
        due = watchdog.to_ask_after(owed, now)
        assert due.keys() <= late.keys()
        asked = {debtor: at for debtor, at in asked.items() if debtor in late}
        for debtor in late:
            again = debtor not in asked or asked[debtor] <= now - PATIENCE
            assert (debtor in due) == again, "nobody is asked after twice within the patience, and everybody once"
            if again:
                asked[debtor] = now


def test_who_gives_a_sign_and_is_silent_again_is_asked_after_again() -> None:
    watchdog = Watchdog(PATIENCE)
    assert watchdog.to_ask_after({"writing": 0}, 10.1) == {"writing": 10.1}
    assert watchdog.to_ask_after({"writing": 0}, 15) == {}
    assert watchdog.to_ask_after({"writing": 15}, 16) == {}
    assert watchdog.to_ask_after({"writing": 15}, 25.1) == {"writing": 25.1 - 15}
    assert watchdog.to_ask_after({"writing": 15}, 36) == {"writing": 21}
