"""Requests made up from the schema: no crash, and no answer that the schema does not declare."""

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)
CASES_PER_OPERATION = os.environ.get("SCHEMATHESIS_EXAMPLES", "2")


@pytest.fixture
def fake_server_url() -> Iterator[str]:
    """A server with the fake engine, in a process of its own."""
    faulthandler.dump_traceback_later(1800, exit=True)
    command = [sys.executable, "-m", "tests.fake_server", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[1]
        server.terminate()


@pytest.mark.slow
def test_made_up_requests_get_declared_answers_only(fake_server_url: str, tmp_path: Path):
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{fake_server_url}/openapi.json",
        "--max-examples", CASES_PER_OPERATION, "--seed", "1", "--phases", "fuzzing", "--checks", CHECKS,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
