"""What a worker does before it computes: its memory settings, and imports without what pictures never need."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from modules.engine.memory import prepare_memory

# The classes of the networks, in the order they are imported; and what else their packages would import first.
NETWORKS = (
    ("diffusers.models.unets.unet_2d_condition", ("transformers", "accelerate", "scipy", "peft")),
    ("diffusers.models.autoencoders.autoencoder_kl", ("transformers", "accelerate", "scipy", "peft")),
    ("transformers.models.clip.modeling_clip", ("accelerate", "scipy")),
)
COMPILER = "torch._dynamo"
# Its own code reads the text of 1,600 files to know what it offers; the worker asks for single modules in it.
MODEL_PACKAGE = "transformers.models"


def prepare_environment() -> None:
    """Sets how memory is taken, and imports the networks' classes; for a process that has not imported torch."""
    prepare_memory()
    distributed = importlib.import_module("torch.distributed")
    with (
        _without_compiler(),
        _answering_nothing(distributed, "is_available"),  # else transformers imports tensors spread over machines
        _answering_nothing(importlib.metadata, "packages_distributions"),  # diffusers reads what pip installed, whole
    ):
        for module, unneeded in NETWORKS:
            with _left_out(unneeded):
                if module.startswith(MODEL_PACKAGE):
                    _leave_unopened(MODEL_PACKAGE)
                importlib.import_module(module)


@contextmanager
def _left_out(packages: Sequence[str]) -> Iterator[None]:
    """Inside, packages that are not imported yet seem not to be installed.

    They are optional to what is imported here, and cost more processor time than all the rest.
    """
    hidden = [package for package in packages if package not in sys.modules]
    try:
        for package in hidden:
            sys.modules[package] = None  # type: ignore[assignment]  # documented: importing it raises
        yield
    finally:
        for package in hidden:
            sys.modules.pop(package, None)


@contextmanager
def _answering_nothing(module: ModuleType, function: str) -> Iterator[None]:
    """Inside, a function answers with an empty table, which also counts as no."""
    whole = getattr(module, function)
    setattr(module, function, dict)
    try:
        yield
    finally:
        setattr(module, function, whole)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside, marking a function as not to be compiled leaves it as it is; nothing here is ever compiled.

    diffusers marks functions when it is imported, for which torch imports its compiler.
    """
    if COMPILER in sys.modules:
        yield
        return
    found = importlib.util.find_spec(COMPILER)
    assert found is not None
    stand_in = _Unmarking(COMPILER)
    stand_in.__path__ = list(found.submodule_search_locations or ())  # parts of it can be imported all the same
    sys.modules[COMPILER] = stand_in
    try:
        yield
    finally:
        sys.modules.pop(COMPILER, None)


def _leave_unopened(package: str) -> None:
    """From now on importing a module of a package does not run the package's own code, unless it has run already."""
    found = importlib.util.find_spec(package)
    if package not in sys.modules and found is not None:
        sys.modules[package] = _Unopened(package)
        sys.modules[package].__path__ = list(found.submodule_search_locations or ())


class _Unopened(ModuleType):
    """A package whose modules can be imported, and whose own code runs when anything else is asked of it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        module = f"{self.__name__}.{name}"
        if importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        if sys.modules[self.__name__] is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _Unmarking(ModuleType):
    """Every function of this module is a decorator that changes nothing."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unmarked


def _unmarked(function: Callable[..., object] | None = None, *_: object, **__: object) -> object:
    return _unmarked if function is None else function
