"""A few rounds of the crash harness; `python -m tests.crash --rounds 200` runs many."""

import os
from pathlib import Path

import pytest

from tests.crash.rounds import leave_no_process, run_rounds

ROUNDS = int(os.environ.get("FOCALE_CRASH_ROUNDS", "4"))


@pytest.mark.crash
@pytest.mark.slow
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    try:
        tally = run_rounds(outputs, ROUNDS, seed=1)
    finally:
        leave_no_process()
    assert tally.acknowledged, (tmp_path / "server.log").read_text()
    assert tally.is_clean, tally
