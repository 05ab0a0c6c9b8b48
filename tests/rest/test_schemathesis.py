"""Requests made up from the schema: no crash, and no answer that the schema does not declare."""

import faulthandler
import os
from pathlib import Path

import pytest

from tests.made_up_requests import fake_server, send

CASES = int(os.environ.get("SCHEMATHESIS_CASES", "60"))


@pytest.mark.slow
def test_made_up_requests_get_declared_answers_only(tmp_path: Path):
    faulthandler.dump_traceback_later(3600, exit=True)
    with fake_server() as url:
        outcome = send(url, CASES, 1, tmp_path)
    print(f"\n{outcome.cases} cases, {outcome.statuses.total()} requests, by status {dict(outcome.statuses)}")
    assert outcome.has_passed, outcome.report[-8000:]
    assert outcome.cases >= CASES
    assert outcome.statuses.total() >= outcome.cases
    assert not [status for status in outcome.statuses if status.startswith("5")]
