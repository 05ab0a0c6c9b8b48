"""The training loop and command line that every LoRA stage shares; a stage brings its loss."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.engine.tensorfile import open_tensor_file
from training.checkpoints import read_network
from training.lora import LowRank, adapt, kohya_tensors, save_lora
from training.optim import Schedule
from training.precision import add_precision_option, chosen_dtype, prepare
from training.runs import Run
from training.stages import StateFolder, stage_parser

logger = logging.getLogger(__name__)

MakeLoss = Callable[[nn.ModuleDict, dict[str, LowRank], int], Callable[[], Tensor]]
"""Given the network, its adapters and the samples done before, gives what draws a batch and returns its loss."""


def lora_parser(description: str | None, *, samples: int, rank: int, rate: float) -> argparse.ArgumentParser:
    """Parser of a LoRA stage with its own defaults."""
    parser = stage_parser(description or "")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint that the LoRA is for")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--target", type=Path, required=True, help="LoRA file to write")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=rank)
    parser.add_argument("--rate", type=float, default=rate)
    add_precision_option(parser)
    return parser


def train_lora(arguments: argparse.Namespace, *, name: str, title: str, make_loss: MakeLoss) -> None:
    """Adapt the UNet of `--weights`, train by the stage's loss, and write the LoRA file.

    Args:
        name: the stage's folder among the runs.
        title: what the file calls itself.
    """
    network = read_network(arguments.weights, arguments.vocabulary)
    torch.manual_seed(arguments.seed)
    network.requires_grad_(False)
    prepare(network, chosen_dtype(arguments.precision))
    adapters = adapt(network["unet"], rank=arguments.rank)
    folder = StateFolder(arguments.state).file("runs", name)
    run = Run(folder, network, minutes=arguments.minutes, muon_ratio=None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    schedule = Schedule(arguments.rate, warmup=500, decay_from=arguments.samples // 2, decay_to=arguments.samples)
    next_loss = make_loss(network, adapters, run.samples)
    while run.going(arguments.samples):
        loss = next_loss()
        loss.backward()
        run.finish_step(arguments.batch, schedule.rate(run.samples))
        if run.steps % 25 == 0:
            logger.info("%d samples: loss %.4f", run.samples, float(loss.detach()))
    run.save()
    with run.average.applied():
        tensors = kohya_tensors(adapters, network["unet"], open_tensor_file(arguments.weights).shapes)
    save_lora(tensors, arguments.target, title=title, rank=arguments.rank)
