"""Textual inversion files: the vectors behind `embedding:NAME` in a prompt."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from modules.engine.tensorfile import TensorFile, file_identity, open_tensor_file
from modules.errors import ModelFileUnusable

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pt", ".bin")


class EmbeddingFolder:
    """Finds embeddings by name in a folder and its sub-folders; a file that changed is read again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[tuple[tuple[str, int, int], ...], TensorFile] = {}

    def vectors(self, name: str, tower: str) -> Sequence[Tensor] | None:
        """The vectors of an embedding for one text tower, each (width,), or None where there is no such file.

        Args:
            name: file name, with or without suffix and sub-folder; a path out of the folder finds nothing.
            tower: "clip_l" or "clip_g".
        """
        path = self.find(name)
        if path is None:
            return None
        try:
            tensor = self._tensor(path, tower)
        except ModelFileUnusable as error:
            logger.warning("The embedding %r is not used: %s", name, error)
            return None
        return list(tensor.float().reshape(-1, tensor.shape[-1]))

    def find(self, name: str) -> Path | None:
        """The file of an embedding: the exact name first, then with each known suffix."""
        root = self.folder.resolve()
        if not name or not root.is_dir():
            return None
        folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
        for candidate in (name, *(name + suffix for suffix in SUFFIXES)):
            for folder in folders:
                path = (folder / candidate).resolve()
                if path.is_relative_to(root) and path.suffix in SUFFIXES and path.is_file():
                    return path
        return None

    def _tensor(self, path: Path, tower: str) -> Tensor:
        """The published layouts: `string_to_param`, one tensor per tower, or a single tensor of any name."""
        identity = file_identity(path)
        if identity not in self._files:
            self._files[identity] = open_tensor_file(path)
        file = self._files[identity]
        params = [key for key in file.shapes if key.startswith("string_to_param")]
        key = params[0] if params else tower if tower in file.shapes else next(iter(file.shapes), None)
        if key is None or not file.shapes[key]:
            raise ModelFileUnusable(f"{path.name!r} holds no vectors.")
        return file.read(key)
