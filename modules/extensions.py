"""What an extension can do, what it is given, and how the extensions in the `extensions` folder are found."""

import argparse
import importlib
import logging
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from modules.errors import ExtensionFailed
from modules.events import Event
from modules.files import Catalogue
from modules.handlers import Handlers
from modules.history import History
from modules.jobs import Job, JobQueue
from modules.provision import Provision
from modules.resources import Resources
from modules.settings import Settings
from modules.signing import UrlSigner
from modules.state import ServerState
from modules.styles import StyleTable

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent.parent / "extensions"

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything an extension may use; the page uses the same.

    settings: what was configured. state: what is remembered between starts, the API switch among it.
    handlers: the only door to generation. jobs: the queue, to watch it. history: records of all tasks.
    resources: model files, styles, wildcards and presets, as their files say now.
    provision: which files a request lacks, and where they come from.
    signer: makes URLs of results and inputs work without a key.
    """

    settings: Settings
    state: ServerState
    handlers: Handlers
    jobs: JobQueue
    history: History
    resources: Resources
    provision: Provision
    signer: UrlSigner

    @property
    def files(self) -> Catalogue:
        """Names of the model files present."""
        return self.resources.catalogue

    @property
    def styles(self) -> StyleTable:
        """The style table, read again when a file of it changed."""
        return self.resources.styles


@dataclass(frozen=True, kw_only=True)
class Routes:
    """An ASGI application and the paths it answers.

    segments: first path segments that belong to it (`tasks` owns `/tasks` and all below it), on every port.
    linkable: those of them that another site may link to; a link never changes anything there.
    public: whole paths that need no key.
    signed: segments whose GET and HEAD also accept a signature made by `Services.signer`.
    always: segments that go on answering while the API is switched off.
    """

    app: AsgiApp
    segments: frozenset[str]
    linkable: frozenset[str] = frozenset()
    public: frozenset[str] = frozenset()
    signed: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()


class Extension:
    """Base of every extension; each method does nothing unless overridden. They are called in this order."""

    name: str = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add command line flags; their values arrive in `services.settings.extra`, by destination."""

    def add_tab(self, services: Services) -> None:
        """Add to the page: called inside its `gr.Blocks`, in a tab of its own; never with `--nowebui`."""

    def mount(self, services: Services) -> Routes | None:
        """The routes of this extension, or None. Called once, before the server listens."""

    async def start(self, services: Services) -> None:
        """Begin to work; runs in the server's loop, before the queue takes up its first task."""

    def on_event(self, job: Job, event: Event) -> None:
        """Something happened to a task: it is stored, followers see it next. Must return at once."""

    async def stop(self) -> None:
        """End what `start` began; the requests are over, the queue still lives."""


@dataclass(frozen=True)
class LoadedExtensions:
    """The extensions in use, in order of their names, and a sentence for each that could not be loaded."""

    extensions: tuple[Extension, ...] = ()
    problems: tuple[str, ...] = field(default=())

    def argument_adders(self) -> Sequence[Callable[[argparse.ArgumentParser], None]]:
        """One callable per extension for the parser of the command line."""
        return [extension.add_arguments for extension in self.extensions]


def load_extensions(folder: Path = FOLDER, package: str = "extensions") -> LoadedExtensions:
    """Import every package in the folder and make the extension that its `extension()` returns.

    A package that fails is left out and reported; the others go on.
    """
    found: list[Extension] = []
    problems: list[str] = []
    for module in sorted(pkgutil.iter_modules([str(folder)]), key=lambda module: module.name):
        if not module.ispkg:
            continue
        try:
            found.append(_make(f"{package}.{module.name}"))
        except Exception as error:  # a stranger's code may raise anything; the server must start without it
            logger.exception("Extension %s cannot be loaded", module.name)
            problems.append(f"Extension {module.name!r} is left out: {type(error).__name__}: {error}")
    return LoadedExtensions(tuple(found), tuple(problems))


def _make(module_name: str) -> Extension:
    """The extension of one package.

    Raises:
        ExtensionFailed: the package has no `extension()` that returns an `Extension`.
    """
    module = importlib.import_module(module_name)
    factory = getattr(module, "extension", None)
    extension: object = factory() if callable(factory) else None
    if not isinstance(extension, Extension):
        raise ExtensionFailed(f"{module_name} needs a function extension() that returns an Extension.")
    extension.name = extension.name or module_name.rpartition(".")[2]
    return extension


def tell_extensions(extensions: Iterable[Extension], jobs: JobQueue) -> None:
    """Let every extension hear the events of all tasks; the queue shields tasks from failing listeners."""
    for extension in extensions:
        jobs.on_event(extension.on_event)


def owners(routes: Mapping[str, Routes]) -> dict[str, Routes]:
    """First path segment → routes that own it.

    Args:
        routes: extension name → its routes.
    Raises:
        ExtensionFailed: two extensions claim the same segment, or one claims the page's root.
    """
    owned: dict[str, tuple[str, Routes]] = {}
    for name, one in routes.items():
        for segment in one.segments:
            if not segment or "/" in segment:
                raise ExtensionFailed(f"Extension {name!r} claims {segment!r}, which is not one path segment.")
            if segment in owned:
                raise ExtensionFailed(f"Extensions {owned[segment][0]!r} and {name!r} both claim /{segment}.")
            owned[segment] = (name, one)
    return {segment: one for segment, (_name, one) in owned.items()}
