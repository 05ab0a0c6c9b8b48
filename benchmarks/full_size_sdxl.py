"""Loads a synthetic full-size SDXL checkpoint and draws with it, beside diffusers' pipeline on the same file.

    python -m benchmarks.full_size_sdxl                              bf16, 2 steps of 512×512
    python -m benchmarks.full_size_sdxl --size 128 --guidance 1      for a CPU that computes bf16 slowly

Writes 6.9 GB of random weights into a temporary folder (or --folder, where they are kept), then runs each engine in a
process of its own and prints seconds to load, seconds to draw, and peak memory: resident with and without the mapped
pages of the file, which the system may drop at any time. Exits with 1 when ours draws slower.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from benchmarks.engine_vs_diffusers import TOKENIZER, diffusers_pipeline, draw_with_diffusers, draw_with_ours
from modules.engine.device import choose_policy
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tokens import ClipTokenizer
from tests.tiny_sdxl import TensorWriter, UNetPlan, write_clip, write_open_clip, write_unet, write_vae

FULL_UNET = UNetPlan(
    (320, 640, 1280),
    ((0, 0), (2, 2), (10, 10)),
    ((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    10,
    2048,
    2816,
)
NEEDED_BYTES = 8_000_000_000
SAMPLE_VALUES = 1 << 24


@dataclass
class ShapeWriter(TensorWriter):
    """Notes shapes and scales instead of making tensors."""

    entries: dict[str, tuple[tuple[int, ...], float, float]] = field(default_factory=dict)

    def put(self, name: str, *shape: int, scale: float | None = None, centre: float = 0.0) -> None:
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        self.entries[name] = (shape, fan_in**-0.5 if scale is None else scale, centre)


def write_checkpoint(path: Path) -> int:
    """Writes a full-size SDXL checkpoint of random float16 weights, tensor by tensor; gives its parameter count."""
    writer = ShapeWriter(torch.Generator().manual_seed(0), torch.float16)
    write_unet(writer, FULL_UNET)
    write_vae(writer, widths=(128, 256, 512, 512), layers=2)
    write_clip(writer, "conditioner.embedders.0.transformer.text_model.", 768, layers=12)
    write_open_clip(writer, "conditioner.embedders.1.model.", 1280, layers=32)
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, (shape, _, _) in writer.entries.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = torch.randn(SAMPLE_VALUES, generator=writer.generator)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, scale, centre in writer.entries.values():
            for part in _parts(values, torch.Size(shape).numel()):
                file.write((part * scale + centre).half().numpy().tobytes())
    return offset // 2


def _parts(values: Tensor, count: int) -> list[Tensor]:
    whole, rest = divmod(count, len(values))
    return [values] * whole + ([values[:rest]] if rest else [])


class MemoryWatch:
    """Samples this process's memory until it is left.

    anonymous_mib: peak of what cannot be dropped. resident_mib: peak with mapped pages of files.
    """

    def __enter__(self) -> "MemoryWatch":
        self.anonymous_mib = self.resident_mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
            fields = {line[0]: int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "VmHWM:")}
            self.anonymous_mib = max(self.anonymous_mib, fields["RssAnon:"])
            self.resident_mib = max(self.resident_mib, fields["VmHWM:"])


def load_ours(options: argparse.Namespace) -> SdxlModel:
    """The checkpoint, loaded by our store."""
    policy = choose_policy(
        "cpu",
        precision=options.precision,
        vae_precision=options.precision,
        text_precision=options.precision,
    )
    return ModelStore(policy).base(options.file)


def write_configs(model: SdxlModel, folder: Path) -> None:
    """Writes the configurations that diffusers needs to load the checkpoint offline."""
    pipeline = diffusers_pipeline(model)
    pipeline.save_config(folder)
    for name, part in (("unet", model.unet), ("vae", model.vae), ("scheduler", pipeline.scheduler)):
        part.save_config(folder / name)
    for name, tower in (("text_encoder", model.clip_l), ("text_encoder_2", model.clip_g)):
        tower.config.save_pretrained(folder / name)
    for name, tokenizer in (("tokenizer", pipeline.tokenizer), ("tokenizer_2", pipeline.tokenizer_2)):
        tokenizer.save_pretrained(folder / name)


def load_diffusers(options: argparse.Namespace) -> StableDiffusionXLPipeline:
    """diffusers' pipeline with the checkpoint loaded by its own loader."""
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(options.file),
        config=str(options.configs),
        local_files_only=True,
        torch_dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(options: argparse.Namespace) -> dict[str, float | bool]:
    """Loads and draws once with one engine, in this process."""
    ours, request = options.engine == "ours", (1, options.steps, options.size)
    with MemoryWatch() as memory:
        started, began = time.perf_counter(), time.process_time()
        model = load_ours(options) if ours else load_diffusers(options)
        loaded, ready = time.perf_counter(), time.process_time()
        if ours:
            (image,) = draw_with_ours(model, ClipTokenizer(TOKENIZER), *request, guidance_scale=options.guidance)
        else:
            (image,) = draw_with_diffusers(model, *request, guidance_scale=options.guidance)
        done, ended = time.perf_counter(), time.process_time()
    if ours:
        write_configs(model, options.configs)
    return {
        "load_s": loaded - started,
        "draw_s": done - loaded,
        "load_cpu_s": ready - began,
        "draw_cpu_s": ended - ready,
        "anonymous_mib": memory.anonymous_mib,
        "resident_mib": memory.resident_mib,
        "drawn": image.size == (options.size, options.size),
    }


def run(engine: str, options: argparse.Namespace) -> dict[str, float]:
    """Measures one engine in a process of its own."""
    flags = ("precision", "size", "steps", "guidance", "file", "configs")
    arguments = [part for flag in flags for part in (f"--{flag}", str(getattr(options, flag)))]
    command = [sys.executable, "-m", "benchmarks.full_size_sdxl", "--engine", engine, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    sys.stdout.write(
        f"{engine}: load {result['load_s']:.1f} s (CPU {result['load_cpu_s']:.1f}), "
        f"draw {result['draw_s']:.1f} s (CPU {result['draw_cpu_s']:.1f}), "
        f"peak {result['anonymous_mib']:,.0f} MiB of its own, "
        f"{result['resident_mib']:,.0f} MiB with mapped pages\n"
    )
    sys.stdout.flush()
    return result


def main() -> None:
    """Reads the command line; makes the file; runs both engines and judges, or one of them as a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--folder", type=Path, help="where the weights are written and kept")
    parser.add_argument("--engine", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--configs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if shutil.disk_usage(folder).free < NEEDED_BYTES:
            sys.exit(f"{folder} has less than {NEEDED_BYTES:,} bytes free; give another --folder.")
        options.file, options.configs = folder / "full-size.safetensors", Path(temporary) / "configs"
        started = time.perf_counter()
        count = write_checkpoint(options.file)
        sys.stdout.write(
            f"{count / 1e9:.2f} B parameters written in {time.perf_counter() - started:.0f} s; "
            f"{options.precision}, {options.steps} steps of {options.size}×{options.size}, "
            f"guidance {options.guidance:g}, {torch.get_num_threads()} threads\n"
        )
        sys.stdout.flush()
        ours, theirs = run("ours", options), run("diffusers", options)
    sys.stdout.write(f"ours ÷ diffusers: draw {ours['draw_s'] / theirs['draw_s']:.3f}\n")
    sys.exit(1 if ours["draw_s"] > theirs["draw_s"] else 0)


if __name__ == "__main__":
    main()
