"""What every stage's command line shares: where state lies, how long to run, how to log."""

import argparse
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateFolder:
    """Where packages, data sets, checkpoints and exports of the trainer live.

    Attributes:
        root: the folder; never inside version control.
    """

    root: Path

    def file(self, *parts: str) -> Path:
        """Path under the root, with its parent folder made."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def default_state() -> Path:
    """The folder of FOCALE_TRAINING_STATE, else training/state beside this file (git-ignored)."""
    return Path(os.environ.get("FOCALE_TRAINING_STATE", Path(__file__).with_name("state")))


def stage_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the options that every stage understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--state", type=Path, default=default_state(), help="folder for data and checkpoints")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this much wall time")
    parser.add_argument("--concepts", type=int, default=None, help="use only the first N core concepts")
    parser.add_argument("--only", type=Path, default=None, help="file of labels, one a line: use only these concepts")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random in the stage")
    parser.add_argument("--resume", action="store_true", help="continue from the stage's own checkpoint")
    return parser


def start_logging() -> None:
    """Log to standard error, with times."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
