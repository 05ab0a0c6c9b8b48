"""Freed memory stays with the worker between layers, and goes back to the system when it is told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modules.engine import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the settings are the GNU C library's")

SCRIPT = """
import sys
from pathlib import Path
from modules.engine.memory import prepare_memory, return_freed_memory
prepare_memory()
import torch

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

def faults():
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[7])

before = resident_mib()
layers = [torch.ones(60 * 2**18) for _ in range(5)]
tail = torch.ones(10)
del layers
kept, first = resident_mib() - before, faults()
torch.ones(50 * 2**18)  # 60 need not fit where 60 were: a small object may have taken the few bytes between two layers
again = faults() - first
return_freed_memory()
print(kept, again, resident_mib() - before)
"""


def measured(**environment: str) -> tuple[int, int, int]:
    """MiB kept of 300 freed ones, page faults of the next 50, and MiB kept after giving back."""
    names = (*memory.USERS_OWN, *memory.HUGE_PAGES)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name not in names} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    kept, again, returned = map(int, run.stdout.split())
    return kept, again, returned


def test_freed_memory_serves_the_next_layer_and_goes_back_when_told():
    kept, again, returned = measured()
    assert kept > 250
    assert again < 50
    assert returned < 50


def test_what_the_user_has_set_stays():
    kept, _, _ = measured(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept < 50


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_function", lambda name: None)
    assert not memory.keep_freed_memory()
    assert not memory.return_freed_memory()
