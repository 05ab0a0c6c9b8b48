"""Runs ONNX files on the CPU: the small networks that ship with the program, and a user's own."""

import logging
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modules.errors import ModelFileMissing, ModelFileUnusable
from modules.loads import loading

logger = logging.getLogger(__name__)

Floats: TypeAlias = NDArray[np.float64]


class OnnxModel:
    """A network with one input; the same input gives the same output on the same machine."""

    def __init__(self, path: Path) -> None:
        """Load a file.

        Raises:
            ModelFileMissing: there is no such file.
            ModelFileUnusable: it is truncated, or no ONNX network that ONNX Runtime can run.
        """
        import onnxruntime  # only when a network is loaded: 45 MiB that text-to-image does without

        if not path.is_file():
            raise ModelFileMissing(f"{path.name!r} is not in {path.parent}.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; exporters leave harmless warnings
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            with loading("tool", path.name):
                self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise ModelFileUnusable(f"{path.name!r} cannot be read as an ONNX network: {error}") from error
        self._input = self._session.get_inputs()[0]
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        self.path = path

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """Sizes of the input; a name or None where any size will do."""
        return tuple(self._input.shape)

    def __call__(self, image: Floats, *outputs: str) -> list[Floats]:
        """The outputs named, or all of them in the file's order; the network computes in float32.

        Raises:
            ModelFileUnusable: the network does not take such an input.
        """
        try:
            found = self._session.run(list(outputs) or None, {self._input.name: image.astype(np.float32)})
        except Exception as error:  # see above
            raise ModelFileUnusable(f"{self.path.name!r} cannot run on {image.shape}: {error}") from error
        return [np.asarray(output, np.float64) for output in found]


def pixels_of(image: Image.Image) -> Floats:
    """(height, width, 3) values 0…255 of an RGB picture."""
    return np.asarray(image, np.float64)
