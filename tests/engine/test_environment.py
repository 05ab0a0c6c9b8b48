"""A worker asks for large pages, and imports the networks' classes without what pictures never need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modules.engine import environment
from tests.tiny_sdxl import write_tiny

SCRIPT = """
import sys
from pathlib import Path
from modules.engine.environment import prepare_environment
assert "torch" not in sys.modules, "preparing comes before torch"
prepare_environment()
from modules.engine.device import choose_policy
from modules.engine.store import ModelStore
model = ModelStore(choose_policy("cpu")).base(Path(sys.argv[1]))
unneeded = (
    "torch._dynamo", "torch.distributed.tensor", "sympy", "accelerate", "peft", "pandas",
    "scipy.ndimage", "scipy.stats", "scipy.optimize",
)
print([name for name in unneeded if name in sys.modules])
import os
print(os.environ["THP_MEM_ALLOC_ENABLE"])
import accelerate, scipy.stats, torch
from transformers.models import auto
from transformers import AutoModelForCausalLM, CLIPTextModel, GPT2LMHeadModel
assert AutoModelForCausalLM is auto.AutoModelForCausalLM and isinstance(model.text_encoder, CLIPTextModel)
assert torch.distributed.is_available()
print(torch.compile(torch.nn.Identity(), backend="eager")(torch.ones(1)).item())
"""


def _prepared(checkpoint: Path) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_model_is_loaded_without_compiler_and_statistics_and_they_work_afterwards(tmp_path: Path) -> None:
    imported, pages, computed = _prepared(write_tiny(tmp_path / "tiny.safetensors"))

    assert imported == "[]"
    assert pages == "1"
    assert computed == "1.0"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "NETWORKS", ())
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    environment.prepare_environment()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
