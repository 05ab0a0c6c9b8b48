"""Loads a synthetic full-size SDXL checkpoint and draws with it, beside diffusers' pipeline on the same file.

    python -m benchmarks.full_size_sdxl                              2 steps of 512×512
    python -m benchmarks.full_size_sdxl --rounds 2 --folder DIR      each engine twice in turn; DIR keeps the file
    python -m benchmarks.full_size_sdxl --size 128 --guidance 1

Writes 6.9 GB of random weights in bfloat16, then runs each engine in a process of its own: our store with --precision
(bf16: kept in bfloat16, and computed in it only by a CPU that has instructions for that), and diffusers in the fastest
form this machine can run: bfloat16 with such instructions, else float32, else (--layerwise, or when float32 leaves less
than 1 GiB free) its layerwise casting, kept in bfloat16 and computed in float32. Both VAEs compute in the same format;
where that is bfloat16, ours also draws once, not judged, with the float32 that a user's VAE has on a CPU. Prints
seconds to load, seconds to draw and peak memory: what the process holds itself, and with the mapped pages of the file,
which the system may drop at any time. --diffusers-bf16 SIZE also draws SIZE×SIZE in diffusers' bfloat16, to show what
that costs without instructions.
Exits with 1 when ours draws slower, or takes longer to load and draw, or needs more than 24 GiB. Our weights stay views
of the file, so the system reads them while the first picture is drawn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from benchmarks.engine_vs_diffusers import TOKENIZER, diffusers_pipeline, draw_with_diffusers, draw_with_ours
from modules.engine.device import choose_policy, cpu_has_bf16
from modules.engine.memory import HUGE_PAGES, keep_freed_memory
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
BAR_MIB = 24 * 1024
LEFT_MIB = 1024
OUT_OF_MEMORY = 75  # exit status


@dataclass
class ShapeWriter(TensorWriter):
    """Notes shapes and scales instead of making tensors."""

    entries: dict[str, tuple[tuple[int, ...], float, float]] = field(default_factory=dict)

    def put(self, name: str, *shape: int, scale: float | None = None, centre: float = 0.0) -> None:
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        self.entries[name] = (shape, fan_in**-0.5 if scale is None else scale, centre)


def write_checkpoint(path: Path) -> int:
    """Writes a full-size SDXL checkpoint of random bfloat16 weights, tensor by tensor; gives its parameter count."""
    writer = ShapeWriter(torch.Generator().manual_seed(0), torch.bfloat16)
    write_unet(writer, FULL_UNET)
    write_vae(writer, widths=(128, 256, 512, 512), layers=2)
    write_clip(writer, "conditioner.embedders.0.transformer.text_model.", 768, layers=12)
    write_open_clip(writer, "conditioner.embedders.1.model.", 1280, layers=32)
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, (shape, _, _) in writer.entries.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = torch.randn(SAMPLE_VALUES, generator=writer.generator)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, scale, centre in writer.entries.values():
            for part in _parts(values, torch.Size(shape).numel()):
                file.write((part * scale + centre).bfloat16().view(torch.int16).numpy().tobytes())
    return offset // 2


def _parts(values: Tensor, count: int) -> list[Tensor]:
    whole, rest = divmod(count, len(values))
    return [values] * whole + ([values[:rest]] if rest else [])


class MemoryWatch:
    """Samples this process's memory until it is left; ends the process rather than take the last of the machine's.

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
            if psutil.virtual_memory().available < LEFT_MIB * 1024 * 1024:
                os._exit(OUT_OF_MEMORY)
            lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
            fields = {line[0]: int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "VmHWM:")}
            self.anonymous_mib = max(self.anonymous_mib, fields["RssAnon:"])
            self.resident_mib = max(self.resident_mib, fields["VmHWM:"])


def load_ours(options: argparse.Namespace) -> SdxlModel:
    """The checkpoint, loaded by our store; the VAE in the form named, "fp32" being a user's on a CPU."""
    policy = choose_policy(
        "cpu", precision=options.precision, text_precision=options.precision, vae_precision=options.form
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
    """diffusers' pipeline with the checkpoint loaded by its own loader, in one of its forms."""
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(options.file),
        config=str(options.configs),
        local_files_only=True,
        torch_dtype=torch.bfloat16 if options.form == "bf16" else torch.float32,
    )
    if options.form == "layerwise":
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(options: argparse.Namespace) -> dict[str, float | bool]:
    """Loads and draws once with one engine, in this process."""
    ours, request = options.engine == "ours", (1, options.steps, options.size)
    if ours or options.our_memory_for_all:
        keep_freed_memory()
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


@dataclass(frozen=True)
class Run:
    """What is run in a process of its own: an engine in one of its forms, at a size.

    form: of diffusers' pipeline, or of our VAE.
    """

    engine: str
    form: str
    size: int


def run(wanted: Run, options: argparse.Namespace) -> dict[str, float] | None:
    """Measures one run; None when it would have taken the machine's last memory."""
    arguments = ["--engine", wanted.engine, "--form", wanted.form, "--size", str(wanted.size)]
    if options.our_memory_for_all:
        arguments.append("--our-memory-for-all")
    for flag in ("precision", "steps", "guidance", "file", "configs"):
        arguments += [f"--{flag}", str(getattr(options, flag))]
    command = [sys.executable, "-m", "benchmarks.full_size_sdxl", *arguments]
    environment = dict(os.environ) | (HUGE_PAGES if wanted.engine == "ours" or options.our_memory_for_all else {})
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if process.returncode == OUT_OF_MEMORY:
        say(f"{wanted.engine} ({wanted.form}): stopped, it left less than {LEFT_MIB:,} MiB of memory free")
        return None
    process.check_returncode()
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    say(
        f"{wanted.engine} ({options.precision + ', VAE ' if wanted.engine == 'ours' else ''}{wanted.form}, "
        f"{wanted.size}×{wanted.size}): "
        f"load {result['load_s']:.1f} s (CPU {result['load_cpu_s']:.1f}), "
        f"draw {result['draw_s']:.1f} s (CPU {result['draw_cpu_s']:.1f}), "
        f"peak {result['anonymous_mib']:,.0f} MiB of its own, {result['resident_mib']:,.0f} MiB with mapped pages"
    )
    return result


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare(options: argparse.Namespace) -> bool:
    """Runs both engines in turn; whether ours kept to its bounds."""
    form = "bf16" if cpu_has_bf16() else "layerwise" if options.layerwise else "fp32"
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(options.rounds):
        vae = "bf16" if form == "bf16" else "fp32"
        ours.append(run(Run("ours", vae, options.size), options) or sys.exit("Ours ran out of memory."))
        result = run(Run("diffusers", form, options.size), options)
        if result is None:
            form = "layerwise"
            result = run(Run("diffusers", form, options.size), options)
        theirs.append(result or sys.exit("diffusers ran out of memory in every form."))
    if form == "bf16":
        run(Run("ours", "fp32", options.size), options)
    if options.diffusers_bf16:
        run(Run("diffusers", "bf16", options.diffusers_bf16), options)
    for result in (*ours, *theirs):
        result["whole_s"] = result["load_s"] + result["draw_s"]
    keys = {"load and draw": "whole_s", "draw": "draw_s", "draw CPU": "draw_cpu_s", "own memory": "anonymous_mib"}
    ratios = {
        what: statistics.median(mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True))
        for what, key in keys.items()
    }
    say("ours ÷ diffusers: " + ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items()))
    peak, whole = max(mine["resident_mib"] for mine in ours), ratios["load and draw"]
    say(f"ours at most {peak / 1024:.1f} GiB resident (bar 24)")
    say(f"ratios (bar 1.00): load and draw {whole:.3f}, draw alone {ratios['draw']:.3f}")
    return peak <= BAR_MIB and whole <= 1.0 and ratios["draw"] <= 1.0


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="bf16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layerwise", action="store_true", help="diffusers' layerwise casting instead of float32")
    parser.add_argument("--diffusers-bf16", type=int, metavar="SIZE", help="also diffusers' bfloat16 at this size")
    parser.add_argument("--our-memory-for-all", action="store_true", help="our memory settings for diffusers too")
    parser.add_argument("--folder", type=Path, help="where the weights are written and kept")
    parser.add_argument("--engine", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    parser.add_argument("--form", default="", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--configs", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Makes the file; runs both engines and judges, or one of them as a child."""
    options = parse_options()
    if options.engine:
        say(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        options.file, options.configs = folder / "full-size.safetensors", Path(temporary) / "configs"
        if not options.file.is_file():
            if shutil.disk_usage(folder).free < NEEDED_BYTES:
                sys.exit(f"{folder} has less than {NEEDED_BYTES:,} bytes free; give another --folder.")
            count = write_checkpoint(options.file)
            say(f"{count / 1e9:.2f} B parameters written")
        say(
            f"{options.steps} steps of {options.size}×{options.size}, guidance {options.guidance:g}, "
            f"{torch.get_num_threads()} threads, bfloat16 instructions: {'yes' if cpu_has_bf16() else 'no'}"
        )
        kept = compare(options)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
