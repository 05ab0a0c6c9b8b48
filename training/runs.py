"""Runs a training loop in several processes, with checkpoints that survive being stopped.

A run is a folder. Its checkpoint holds float32 weights, their moving average, the optimiser and the sample count.
"""

import logging
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from training.optim import Optimizer, rank, world_size

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300.0
AVERAGED_SAMPLES = 10_000


class MovingAverage:
    """Exponential moving average of float32 parameters over the last 10,000 samples or so, kept by the first process
    only.

    Args:
        parameters: what is averaged.
        changed: called after `applied` has put other values into the parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], changed: Callable[[], None]) -> None:
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._parameters, self._changed = parameters, changed

    @torch.no_grad()
    def update(self, step: int, samples: int) -> None:
        """Move towards the parameters after a step on this many samples; in the first steps faster."""
        decay = math.exp(-samples / AVERAGED_SAMPLES)
        torch._foreach_lerp_(self.values, list(self._parameters), 1 - min(decay, (1 + step) / (10 + step)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network has the averaged weights."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        with torch.no_grad():
            torch._foreach_copy_(list(self._parameters), self.values)
        self._changed()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self._parameters), kept)
            self._changed()


class Run:
    """One stage's training run: counts samples, stops in time, writes checkpoints.

    Args:
        folder: where the checkpoint lies.
        network: everything trained and everything frozen; only trained weights are stored.
        minutes: wall time after which `going` ends.
        muon_ratio: as for Optimizer.
    """

    def __init__(
        self, folder: Path, network: nn.Module, *, minutes: float = float("inf"), muon_ratio: float | None = 2.0
    ) -> None:
        self.folder, self.network = folder, network
        self.names = [name for name, p in network.named_parameters() if p.requires_grad]
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = Optimizer(zip(self.names, trained, strict=True), muon_ratio=muon_ratio)
        self.parameters = self.optimizer.masters
        self.average = MovingAverage(self.parameters, self.optimizer.copy_masters)
        self.samples, self.steps = 0, 0
        self._ends = time.monotonic() + 60 * minutes
        self._next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS
        self._stopped = False

    @property
    def file(self) -> Path:
        """The checkpoint."""
        return self.folder / "checkpoint.pt"

    def stop_on_signals(self) -> None:
        """End after the present step, with a checkpoint, on SIGTERM and SIGINT."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self._stopped = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def going(self, until: int | None = None) -> bool:
        """Whether to make another step; all processes get the first one's answer."""
        over = self._stopped or time.monotonic() >= self._ends or (until is not None and self.samples >= until)
        flag = torch.tensor([float(over)])
        if world_size() > 1:
            dist.all_reduce(flag)
        return float(flag) == 0

    def finish_step(self, samples: int, rate: float) -> float:
        """Apply the gradients at this learning rate, count the samples; returns the gradient norm."""
        norm = self.optimizer.step(rate)
        self.samples += samples
        self.steps += 1
        if rank() == 0:
            self.average.update(self.steps, samples)
            if time.monotonic() >= self._next_checkpoint:
                self.save()
                self._next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS
        return norm

    def save(self) -> None:
        """Write the checkpoint, whole or not at all; only the first process does."""
        if rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "names": self.names,
            "weights": [p.detach() for p in self.parameters],
            "average": self.average.values,
            "optimizer": self.optimizer.state(),
            "samples": self.samples,
            "steps": self.steps,
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)
        logger.info("checkpoint at %d samples: %s", self.samples, self.file)

    def load(self, file: Path | None = None) -> None:
        """Continue from a checkpoint: this run's own, or another's.

        Raises:
            FileNotFoundError: there is none.
        """
        state = torch.load(file or self.file, map_location="cpu", weights_only=True)
        if state["names"] != self.names:
            raise ValueError(f"{file or self.file} holds another network")
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["weights"])
            torch._foreach_copy_(self.average.values, state["average"])
        self.optimizer.copy_masters()
        self.optimizer.load_state(state["optimizer"])
        self.samples, self.steps = state["samples"], state["steps"]


def averaged_weights(file: Path) -> dict[str, Tensor]:
    """The moving-average weights of a checkpoint, by name."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return dict(zip(state["names"], state["average"], strict=True))


def seeded(seed: int, *parts: object) -> random.Random:
    """A generator of this process's own, and torch seeded alike."""
    rng = random.Random(f"{seed}:{rank()}:{parts}")
    torch.manual_seed(rng.getrandbits(62))
    return rng


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process(number: int, count: int, port: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    from training.stages import start_logging

    start_logging()
    torch.set_num_threads(1)
    if count > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count)
    work(*arguments)
    if count > 1:
        dist.barrier()  # leaving while another still works aborts the process now and then
        dist.destroy_process_group()


def in_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(*arguments)` in this many processes of one thread each, joined by gloo.

    Two processes of one thread beat one of two threads as soon as anything else runs on the machine. SIGTERM is
    passed on, and the function returns when all have ended.
    """
    if count == 1:
        _process(0, 1, 0, work, arguments)
        return
    context = mp.start_processes(
        _process, (count, free_port(), work, arguments), nprocs=count, join=False, start_method="spawn"
    )
    assert context is not None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for pid in context.pids():
            if pid is not None:
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    while not context.join():
        pass
