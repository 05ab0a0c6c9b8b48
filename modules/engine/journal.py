"""Keeps every estimate of the model on disk while a run lasts, so that a run cut short goes on without repeating them.

Samplers are deterministic in their seeds and in the model's estimates. Replaying the estimates therefore leads any
sampler to the very state it was in, whatever it remembers between steps, at no cost in model evaluations.
"""

import hashlib
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from modules.engine.sampler_contract import Denoise

logger = logging.getLogger(__name__)

MAGIC = b"FOCJRNL1"
_FRAME = struct.Struct("<I")  # CRC-32 of the frame's bytes


class DenoisedJournal:
    """The estimates of one batch, appended to a file as they are made.

    replayed: how many estimates of an earlier attempt can be used.
    """

    def __init__(self, path: Path, *, identity: str, shape: tuple[int, ...]) -> None:
        """Open or begin the journal of a batch; a torn or foreign file is begun anew.

        Args:
            path: its folder is made if it is missing.
            identity: everything the estimates depend on, as text; another identity is another run.
            shape: (B, 4, h, w) of each estimate, float32.
        """
        self._path = path
        self._shape = shape
        self._size = 4 * int(np.prod(shape))
        self._header = MAGIC + hashlib.sha256(f"{identity}\0{shape}".encode()).digest()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close() or discard()
        self.replayed = self._usable_frames()
        self._count = 0

    def wrap(self, denoise: Denoise) -> Denoise:
        """A `denoise` that answers from the journal as long as it can, then asks the model and notes its answer."""

        def remembering(x: Tensor, sigma: float) -> Tensor:
            index, self._count = self._count, self._count + 1
            if index < self.replayed:
                return self._read(index).to(x.device)
            denoised = denoise(x, sigma)
            self._append(denoised)
            return denoised

        return remembering

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Keep the file for a later attempt."""
        self._file.close()

    def discard(self) -> None:
        """The run is over: remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _usable_frames(self) -> int:
        """How many whole frames follow a header of this run; whatever else is in the file is cut off."""
        content_size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if content_size < len(self._header) or self._file.read(len(self._header)) != self._header:
            self._file.truncate(0)
            self._file.write(self._header)
            return 0
        frames = 0
        while (stored := self._file.read(_FRAME.size + self._size)) and len(stored) == _FRAME.size + self._size:
            if _FRAME.unpack_from(stored)[0] != zlib.crc32(stored[_FRAME.size :]):
                break
            frames += 1
        self._file.truncate(len(self._header) + frames * (_FRAME.size + self._size))
        return frames

    def _read(self, index: int) -> Tensor:
        self._file.seek(len(self._header) + index * (_FRAME.size + self._size) + _FRAME.size)
        values = np.frombuffer(self._file.read(self._size), dtype=np.float32)
        return torch.from_numpy(values.reshape(self._shape).copy())

    def _append(self, denoised: Tensor) -> None:
        """Note an estimate; a disk that is full costs the chance to resume, not the picture."""
        content = denoised.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        try:
            self._file.write(_FRAME.pack(zlib.crc32(content)) + content)
        except OSError as error:
            logger.warning("The journal %s cannot be written: %s", self._path.name, error)


def discard_journals(folder: Path, task_id: str) -> None:
    """Remove every journal of a task that has ended."""
    for path in folder.glob(f"{task_id}-*.denoised"):
        path.unlink(missing_ok=True)
