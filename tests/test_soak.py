"""The soak itself, for a while: all faults together lose and double nothing."""

from __future__ import annotations

import pytest
from soak import soaking
from storms import DOUBLED, HELD, LOST, Faults


@pytest.mark.chaos
def test_all_faults_together_lose_and_double_nothing(seed: int, faults: Faults) -> None:
    with soaking(seed) as soak:
        try:
            soak.run(60)
        finally:
            faults.update(soak.faults)
    table = "\n".join(soak.table(60))
    assert f"| **{LOST}** | **0** |" in table
    assert f"| **{DOUBLED}** | **0** |" in table
    assert soak.faults[HELD] > 1000
    assert soak.peaks.memory < 200e6
