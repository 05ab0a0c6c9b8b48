"""Whole tasks on a tiny random SDXL: files, seeds, batches, stop, skip, yield, resume, refiners, LoRAs, FreeU."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modules.control import Control
from modules.engine.refiner import Interposer
from modules.errors import UnknownName
from modules.events import (
    Event,
    Failed,
    Finished,
    ImageSaved,
    ImageSkipped,
    Noticed,
    Planned,
    Progress,
    Skipped,
    Stopped,
    Yielded,
)
from modules.files import Kind
from modules.generate import JOURNALS, EngineWorkbench
from modules.metadata_reader import read_picture
from modules.record import Record
from modules.request import GenerationRequest, normalised, to_params
from modules.settings import ROOT, Settings
from modules.worker import events_of
from tests.tiny_sdxl import (
    CLIP_G_WIDTH,
    PLANS,
    TensorWriter,
    write_clip,
    write_open_clip,
    write_tiny,
    write_unet,
    write_vae,
)

pytestmark = pytest.mark.engine

STEPS = 4
SMALL: dict[str, object] = {
    "base_model_name": "tiny.safetensors",
    "aspect_ratios_selection": "64*64",
    "overwrite_step": STEPS,
    "style_selections": [],
    "loras": [],
    "sampler_name": "euler",
    "image_seed": 7,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> EngineWorkbench:
    root = tmp_path_factory.mktemp("focale")
    shutil.copytree(ROOT / "models" / "tokenizer", root / "models" / "tokenizer")
    settings = Settings.load(["--port", "0", "--temp-path", str(root / "temp"), "--always-cpu"], env={}, root=root)
    settings.prepare()
    checkpoints = settings.paths.checkpoints[0]
    write_tiny(checkpoints / "tiny.safetensors")
    write_tiny(checkpoints / "other.safetensors", seed=1)
    write_tiny(checkpoints / "xl_refiner.safetensors", "refiner", seed=2)
    write_tiny(checkpoints / "sd15.safetensors", "sd15", seed=3)
    write_base_for_sd15(checkpoints / "wide.safetensors")
    torch.manual_seed(0)
    save_file(Interposer().state_dict(), settings.paths.vae_approx / "xl-to-v1_interposer-v4.0.safetensors")
    rank, width = 2, 128
    save_file(
        {
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.randn(
                rank, width
            ),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.randn(width, rank),
        },
        settings.paths.loras[0] / "tilt.safetensors",
    )
    return EngineWorkbench(settings)


def write_base_for_sd15(path: Path) -> None:
    """A tiny SDXL whose first text tower is as wide as Stable Diffusion 1.5 wants it."""
    writer = TensorWriter(torch.Generator().manual_seed(4), torch.float16)
    write_unet(writer, replace(PLANS["sdxl"], context=768 + CLIP_G_WIDTH))
    write_vae(writer)
    write_clip(writer, "conditioner.embedders.0.transformer.text_model.", 768, layers=2)
    write_open_clip(writer, "conditioner.embedders.1.model.", CLIP_G_WIDTH)
    save_file(writer.tensors, path)


class Run:
    """What one task did."""

    def __init__(self, bench: EngineWorkbench, events: list[Event]) -> None:
        self.events = events
        self.saved = [event for event in events if isinstance(event, ImageSaved)]
        self.files = [bench.settings.paths.outputs / event.path for event in self.saved]
        self.last = events[-1]

    def pixels(self, index: int = 0) -> np.ndarray:
        with Image.open(self.files[index]) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, Progress) and event.step]


_numbers = iter(range(1_000_000))


def record_of(**sent: object) -> Record:
    request = normalised(GenerationRequest.model_validate({**SMALL, **sent}))
    return Record(task_id=f"{next(_numbers):032x}", req_params=to_params(request))


def run(bench: EngineWorkbench, record: Record | None = None, **sent: object) -> Run:
    return Run(bench, list(events_of(lambda: bench, record or record_of(**sent), Control())))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = float(((first - second) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_the_hash_cache_is_rebuilt_when_asked_for(bench: EngineWorkbench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = bench.settings.paths.hash_cache
    cache.write_text('{"path": "gone.safetensors", "identity": [], "sha256": "00"}\n', encoding="utf-8")
    monkeypatch.setattr(bench, "settings", replace(bench.settings, rebuild_hash_cache=2))
    with suppress(UnknownName):  # the default model is not among the files of these tests
        bench.warm_up()
    paths = {json.loads(line)["path"] for line in cache.read_text(encoding="utf-8").splitlines()}
    catalogue = bench.resources.catalogue
    names = [(kind, name) for kind in (Kind.CHECKPOINT, Kind.LORA) for name in catalogue.names(kind)]
    assert paths == {str(catalogue.find(kind, name)) for kind, name in names}
    assert len(names) >= 2


def test_a_task_ends_with_a_picture_of_the_right_size_and_its_parameters(bench: EngineWorkbench) -> None:
    done = run(bench, prompt="a red apple", image_number=2)
    assert isinstance(done.last, Finished)
    assert [event.seed for event in done.saved] == [7, 8]
    assert done.pixels().shape == (64, 64, 3)
    planned = next(event for event in done.events if isinstance(event, Planned))
    assert (planned.model, planned.width, planned.steps) == ("tiny.safetensors", 64, STEPS)
    stored = read_picture(done.files[1])
    assert stored.request["prompt"] == "a red apple"


def test_progress_never_falls_and_counts_the_steps(bench: EngineWorkbench) -> None:
    done = run(bench, image_number=2, sampler_name="dpmpp_2m")
    percents = [event.percent for event in done.events if isinstance(event, Progress)]
    assert percents == sorted(percents)
    assert max(done.steps()) == STEPS
    assert all(event.preview for event in done.events if isinstance(event, Progress) and event.step)


def test_disabled_previews_are_not_sent(bench: EngineWorkbench) -> None:
    done = run(bench, disable_preview=True)
    assert all(event.preview is None for event in done.events if isinstance(event, Progress))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde_gpu", "dpm_adaptive", "uni_pc"])
def test_the_same_request_gives_the_same_pixels(bench: EngineWorkbench, sampler: str) -> None:
    first = run(bench, prompt="a (cat:1.2)", negative_prompt="dog", sampler_name=sampler)
    run(bench, prompt="something else", sampler_name="heun", guidance_scale=9)
    assert np.array_equal(
        first.pixels(), run(bench, prompt="a (cat:1.2)", negative_prompt="dog", sampler_name=sampler).pixels()
    )


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde_gpu", "dpm_adaptive"])
def test_image_i_equals_the_single_image_with_its_seed(bench: EngineWorkbench, sampler: str) -> None:
    together = run(bench, prompt="a cat", image_number=2, sampler_name=sampler)
    for index in range(2):
        alone = run(bench, prompt="a cat", image_seed=7 + index, sampler_name=sampler)
        assert psnr(together.pixels(index), alone.pixels()) >= 50


def test_with_deterministic_image_i_has_the_bits_of_the_single_image(
    bench: EngineWorkbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [run(bench, prompt="a cat", image_seed=7 + index) for index in range(3)]
    monkeypatch.setattr(bench, "settings", replace(bench.settings, deterministic=True))

    together = run(bench, prompt="a cat", image_number=3)

    for index in range(3):
        assert np.array_equal(together.pixels(index), alone[index].pixels())


def test_a_fixed_seed_gives_equal_images(bench: EngineWorkbench) -> None:
    done = run(bench, image_number=2, disable_seed_increment=True)
    assert psnr(done.pixels(0), done.pixels(1)) >= 50


@pytest.mark.parametrize(
    "change",
    [
        {"sharpness": 20.0},
        {"guidance_scale": 9.0},
        {"adaptive_cfg": 2.0},
        {"adm_scaler_positive": 3.0},
        {"adm_scaler_end": 1.0},
        {"clip_skip": 1},
        {"freeu_enabled": True, "freeu_b1": 1.5},
        {"negative_prompt": "dog"},
        {"scheduler_name": "exponential"},
        {"loras": [{"enabled": True, "model_name": "tilt.safetensors", "weight": 1.0}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_parameter_changes_the_picture_and_leaves_no_trace(
    bench: EngineWorkbench, change: dict[str, object]
) -> None:
    before = run(bench, prompt="a cat").pixels()
    changed = run(bench, prompt="a cat", **change).pixels()
    assert not np.array_equal(before, changed)
    assert np.array_equal(before, run(bench, prompt="a cat").pixels())


@pytest.mark.parametrize(
    "neutral",
    [
        {"freeu_enabled": True, "freeu_b1": 1.0, "freeu_b2": 1.0, "freeu_s1": 1.0, "freeu_s2": 1.0},
        {"loras": [{"enabled": True, "model_name": "tilt.safetensors", "weight": 0.0}]},
        {"loras": [{"enabled": False, "model_name": "tilt.safetensors", "weight": 1.0}]},
        {"refiner_model_name": "tiny.safetensors"},
    ],
)
def test_neutral_values_change_nothing(bench: EngineWorkbench, neutral: dict[str, object]) -> None:
    assert np.array_equal(run(bench, prompt="a cat").pixels(), run(bench, prompt="a cat", **neutral).pixels())


def test_forced_parameters_of_a_mode_change_nothing(bench: EngineWorkbench) -> None:
    loras = bench.settings.paths.loras[0]
    shutil.copy(loras / "tilt.safetensors", loras / "sdxl_lightning_4step_lora.safetensors")
    fast = run(bench, prompt="a cat", performance_selection="Lightning")
    forced = run(
        bench, prompt="a cat", performance_selection="Lightning", guidance_scale=9, sharpness=9, negative_prompt="x"
    )
    assert np.array_equal(fast.pixels(), forced.pixels())


@pytest.mark.parametrize("method", ["joint", "separate", "vae"])
@pytest.mark.parametrize("refiner", ["other.safetensors", "xl_refiner.safetensors", "sd15.safetensors"])
def test_refiners_take_over_and_repeat_themselves(bench: EngineWorkbench, refiner: str, method: str) -> None:
    base = "wide.safetensors" if refiner.startswith("sd15") else "tiny.safetensors"
    plain = {"prompt": "a cat", "base_model_name": base}
    sent = {**plain, "refiner_model_name": refiner, "refiner_swap_method": method, "refiner_switch": 0.5}
    done = run(bench, **sent)
    assert isinstance(done.last, Finished), done.last
    assert np.array_equal(done.pixels(), run(bench, **sent).pixels())
    assert not np.array_equal(done.pixels(), run(bench, **plain).pixels())


def test_a_refiner_that_never_takes_over_changes_nothing(bench: EngineWorkbench) -> None:
    done = run(bench, prompt="a cat", refiner_model_name="other.safetensors", overwrite_switch=STEPS)
    assert np.array_equal(done.pixels(), run(bench, prompt="a cat").pixels())


def run_and_ask(bench: EngineWorkbench, action: str, at_step: int, record: Record) -> Run:
    control, events, asked = Control(), [], False
    for event in events_of(lambda: bench, record, control):
        events.append(event)
        if isinstance(event, Progress) and event.step == at_step and not asked:
            asked = True
            control.ask(action)  # type: ignore[arg-type]
    return Run(bench, events)


def test_stop_keeps_what_is_finished(bench: EngineWorkbench) -> None:
    control, events = Control(), []
    for event in events_of(lambda: bench, record_of(image_number=2, sampler_name="dpm_adaptive"), control):
        events.append(event)
        if isinstance(event, ImageSaved):
            control.ask("stop")
    done = Run(bench, events)
    assert isinstance(done.last, Stopped)
    assert len(done.saved) == 1


def test_stop_takes_effect_at_the_next_evaluation(bench: EngineWorkbench) -> None:
    done = run_and_ask(bench, "stop", 2, record_of())
    assert isinstance(done.last, Stopped)
    assert max(done.steps()) == 2


def test_skip_drops_one_image_of_a_batch_and_the_others_stay_as_they_are(bench: EngineWorkbench) -> None:
    whole = run(bench, prompt="a cat", image_number=3)
    done = run_and_ask(bench, "skip", 2, record_of(prompt="a cat", image_number=3))
    assert [event.index for event in done.events if isinstance(event, ImageSkipped)] == [0]
    assert [event.index for event in done.saved] == [1, 2]
    assert isinstance(done.last, Finished)
    assert psnr(done.pixels(0), whole.pixels(1)) >= 50


def test_a_task_whose_only_image_is_skipped_is_skipped(bench: EngineWorkbench) -> None:
    done = run_and_ask(bench, "skip", 2, record_of())
    assert isinstance(done.last, Skipped)
    assert done.saved == []


def test_a_batch_task_yields_between_batches_and_goes_on(bench: EngineWorkbench) -> None:
    record = record_of(prompt="a cat", image_number=2, sampler_name="dpm_adaptive", priority="batch")
    first = run_and_ask(bench, "yield", 1, record)
    assert isinstance(first.last, Yielded)
    assert [event.index for event in first.saved] == [0]
    second = run(bench, record.model_copy(update={"settled": (0,), "result": (first.saved[0].path,)}))
    assert [event.index for event in second.saved] == [1]
    assert np.array_equal(
        second.pixels(), run(bench, prompt="a cat", image_seed=8, sampler_name="dpm_adaptive").pixels()
    )


@pytest.mark.parametrize(
    ("sampler", "sent"),
    [("euler", {}), ("dpmpp_2m_sde_gpu", {}), ("euler_ancestral", {"image_number": 2}), ("uni_pc", {}),
     ("euler", {"refiner_model_name": "other.safetensors", "refiner_swap_method": "vae"})],
)  # fmt: skip
def test_a_run_cut_short_goes_on_with_the_same_pixels(
    bench: EngineWorkbench, sampler: str, sent: dict[str, object]
) -> None:
    whole = run(bench, prompt="a cat", sampler_name=sampler, overwrite_step=8, **sent)
    record = record_of(prompt="a cat", sampler_name=sampler, overwrite_step=8, **sent)
    events: Iterator[Event] = bench.run(record, Control())
    for event in events:
        if isinstance(event, Progress) and event.step == 6:
            break
    events.close()  # type: ignore[attr-defined]
    assert list((bench.settings.paths.outputs / JOURNALS).glob(f"{record.task_id}-*")) != []
    again = run(bench, record)
    assert isinstance(again.last, Finished)
    assert again.last.evaluations < 8
    assert np.array_equal(whole.pixels(), again.pixels())
    assert list((bench.settings.paths.outputs / JOURNALS).glob(f"{record.task_id}-*")) == []


def test_prompts_of_different_length_do_not_share_a_batch(bench: EngineWorkbench) -> None:
    long = ", ".join(f"word{number}" for number in range(60))
    done = run(bench, prompt=f"[[a cat, {long.replace(', ', ' ')}]]", image_number=2)
    assert len(done.saved) == 2


def test_a_lora_for_another_model_is_left_out_and_told(bench: EngineWorkbench) -> None:
    save_file(
        {f"lora_unet_nowhere_{n}.lora_down.weight": torch.zeros(1, 1) for n in range(20)},
        bench.settings.paths.loras[0] / "alien.safetensors",
    )
    done = run(bench, prompt="a cat", loras=[{"enabled": True, "model_name": "alien.safetensors", "weight": 1.0}])
    assert any("alien" in event.message for event in done.events if isinstance(event, Noticed))
    assert np.array_equal(done.pixels(), run(bench, prompt="a cat").pixels())


def test_a_contact_sheet_is_added_when_asked_for(bench: EngineWorkbench) -> None:
    done = run(bench, image_number=2, generate_image_grid=True)
    assert [event.index for event in done.saved] == [0, 1, -1]
    assert done.pixels(2).shape == (64, 128, 3)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("cut.safetensors", None, "cut"),
        ("pickle.ckpt", b"\x80\x04not a checkpoint", "pickle"),
        ("empty.safetensors", b"", "empty"),
    ],
)
def test_an_unusable_checkpoint_ends_the_task_with_one_sentence(
    bench: EngineWorkbench, name: str, content: bytes | None, sentence: str
) -> None:
    folder = bench.settings.paths.checkpoints[0]
    whole = (folder / "tiny.safetensors").read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    done = run(bench, base_model_name=name)
    assert isinstance(done.last, Failed)
    assert done.last.kind == "ModelFileUnusable"
    assert sentence in done.last.error
    assert "\n" not in done.last.error


def test_a_refiner_file_as_base_is_refused(bench: EngineWorkbench) -> None:
    done = run(bench, base_model_name="sd15.safetensors")
    assert isinstance(done.last, Failed)
    assert "Stable Diffusion 1.5" in done.last.error


def test_a_sheet_of_paths_stays_inside_the_output_folder(bench: EngineWorkbench) -> None:
    done = run(bench, save_name="../../evil")
    root = bench.settings.paths.outputs.resolve()
    assert all(Path(file).resolve().is_relative_to(root) for file in done.files)
