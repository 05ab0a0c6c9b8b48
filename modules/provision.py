"""Finds the model files that a request names and this machine lacks, and fetches them as part of its task.

Where a file comes from is written in preset files and config.txt, which belong to the operator; a request can name a
file but never an address.
"""

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from modules.choices import DEFAULT_VAE, FIXED_BY_PERFORMANCE, NO_MODEL
from modules.control import Control
from modules.downloads import Source, Transfer, download, place_of, shown_size, size_of, source_of
from modules.errors import DownloadFailed, InvalidRequest, UnknownName
from modules.events import Event, Noticed, Progress
from modules.files import FOLDERS, Catalogue, Kind
from modules.plan import EMBEDDED_MODEL, PlanResources, effective, plan_models
from modules.presets import INITIAL, Download, downloads_of
from modules.record import Record
from modules.request import GenerationRequest, from_params
from modules.resources import Resources
from modules.settings import Settings

logger = logging.getLogger(__name__)

Field: TypeAlias = tuple[str | int, ...]

PROGRESS_INTERVAL_S: Final = 0.25

PERFORMANCE_LORAS: Mapping[str, str] = MappingProxyType(
    {
        "sdxl_lcm_lora.safetensors": "https://huggingface.co/lllyasviel/misc/resolve/main/sdxl_lcm_lora.safetensors",
        "sdxl_lightning_4step_lora.safetensors": (
            "https://huggingface.co/mashb1t/misc/resolve/main/sdxl_lightning_4step_lora.safetensors"
        ),
        "sdxl_hyper_sd_4step_lora.safetensors": (
            "https://huggingface.co/mashb1t/misc/resolve/main/sdxl_hyper_sd_4step_lora.safetensors"
        ),
    }
)
"""LoRA of a performance mode → where it comes from, unless a preset or config.txt says otherwise."""

_KINDS: Mapping[str, Kind] = MappingProxyType({folder: kind for kind, folder in FOLDERS.items()})


@dataclass(frozen=True, slots=True)
class Lack:
    """A model file that a request names, that is not here, and that has a source.

    field: the parameter that names it. kind, name: as in the catalogue. folder: where it belongs.
    """

    field: Field
    kind: Kind
    name: str
    url: str
    folder: Path


class Provision:
    """Decides which files a request may have fetched, and fetches them; a `Preparer` of the queue."""

    def __init__(self, settings: Settings, resources: Resources) -> None:
        """Look for files in `resources`; fetch under the rules of `settings`."""
        self._settings = settings
        self._resources = resources

    @property
    def switched_off_by(self) -> str:
        """The flag that forbids downloads, "" while they are allowed."""
        if self._settings.offline:
            return "--offline"
        return "--disable-preset-download" if self._settings.disable_preset_download else ""

    def offers(self, request: GenerationRequest) -> tuple[Lack, ...]:
        """Every file the request names that is not here and has a source; a predecessor that is here counts for one."""
        resources = self._resources.plan_resources()
        missing = list(self._missing(request, resources))
        will_have = {name for _field, kind, name in missing if kind is Kind.CHECKPOINT}
        return self._with_source(request, [*missing, *self._mode_lora(request, resources, will_have)])

    def lacks(self, request: GenerationRequest) -> tuple[Lack, ...]:
        """The files that are to be fetched before the request can run.

        All offers if the request asks for them, by `download_missing` or by naming a preset; else only the LoRA
        without which its performance mode cannot run at all.
        """
        if request.download_missing or request.preset != INITIAL:
            return self.offers(request)
        return self._with_source(request, self._mode_lora(request, self._resources.plan_resources(), set()))

    def check(self, request: GenerationRequest) -> Catalogue:
        """The catalogue as it will be when the request runs.

        Raises:
            InvalidRequest: it needs files that may not be fetched; the message names them and their addresses.
        """
        catalogue = self._resources.catalogue
        lacks = self.lacks(request)
        if lacks and self.switched_off_by:
            raise InvalidRequest(_blamed(request, lacks), self.refusal(lacks), [lack.name for lack in lacks])
        for kind in {lack.kind for lack in lacks}:
            catalogue = catalogue.with_files(kind, [lack.name for lack in lacks if lack.kind is kind])
        return catalogue

    def refusal(self, lacks: Iterable[Lack]) -> str:
        """Why files are not fetched, and what to do instead."""
        lacks = list(lacks)
        files = ", ".join(f"{lack.name} ({self._shown_url(lack)})" for lack in lacks)
        folders = " and ".join(dict.fromkeys(f"models/{FOLDERS[lack.kind]}" for lack in lacks))
        what = "a file that is" if len(lacks) == 1 else f"{len(lacks)} files that are"
        return (
            f"This needs {what} not here, and downloads are switched off ({self.switched_off_by}): {files}. "
            f"Put {'it' if len(lacks) == 1 else 'them'} into {folders}, or start the server without that flag."
        )

    def notes_at_start(self) -> list[str]:
        """What the configured start values lack, a sentence each; nothing is fetched for a start."""
        lacks = self.offers(GenerationRequest.model_validate(self._settings.request_defaults()))
        if lacks and self.switched_off_by:
            return [self.refusal(lacks)]
        return [
            f"{lack.name} is not in models/{FOLDERS[lack.kind]} yet. The page offers to download it; over the API a "
            "request that names a preset, or sends download_missing, fetches it first."
            for lack in lacks
        ]

    def is_known(self, kind_folder: str, name: str) -> bool:
        """True for a file that has a source; the kind by the name of its folder."""
        return (_KINDS[kind_folder], name.replace("\\", "/")) in self._sources(GenerationRequest())

    def size(self, lack: Lack) -> int | None:
        """Bytes of a file, as its server says; None when it does not, or may not be asked. Blocks."""
        try:
            return None if self.switched_off_by else size_of(self._source(lack))
        except DownloadFailed:
            return None

    # -- the preparer -------------------------------------------------------------------------------------------

    def is_needed(self, record: Record) -> bool:
        """True when the task lacks files that may be fetched."""
        return not self.switched_off_by and bool(self.lacks(from_params(record.req_params)))

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """Fetch what the task lacks; see `preparation.Preparer`.

        Raises:
            DownloadFailed, StorageFull: see `downloads.download`. Interrupted: `control` says stop.
        """
        lacks = self.lacks(from_params(record.req_params))
        sizes = [self.size(lack) or 0 for lack in lacks] if len(lacks) > 1 else [1]
        for number, lack in enumerate(lacks):
            share = _Share(sum(sizes[:number]) or number, sizes[number] or 1, sum(sizes) or len(sizes))
            yield from self._fetched(lack, share, control)

    def _fetched(self, lack: Lack, share: "_Share", control: Control) -> Iterator[Event]:
        """Fetch one file, telling of it now and then."""
        target = place_of(lack.folder, lack.name)
        told_s, stage = 0.0, ""
        yield Progress(share.percent(0.0), f"Downloading {lack.name} ...")
        if target.is_file():
            return
        with closing(download(self._source(lack), target)) as transfers:  # type: ignore[type-var]
            for transfer in transfers:
                control.check()
                if transfer.stage != stage or time.monotonic() - told_s >= PROGRESS_INTERVAL_S:
                    told_s, stage = time.monotonic(), transfer.stage
                    yield Progress(share.percent(_done(transfer)), progress_text(lack.name, transfer))
        yield Noticed(f"Downloaded {lack.name}, {shown_size(target.stat().st_size)}.")

    # -- what is missing ----------------------------------------------------------------------------------------

    def _missing(self, request: GenerationRequest, resources: PlanResources) -> Iterator[tuple[Field, Kind, str]]:
        """(field, kind, name) of every file that the request names and that is not here."""
        find = self._find
        predecessors = resources.predecessors.get(request.base_model_name, ())
        if request.base_model_name == resources.default_model:
            predecessors = (*predecessors, *resources.previous_default_models)
        for field, kind, name in _named(request, resources.max_loras):
            if find(kind, name):
                continue
            if field == ("base_model_name",) and any(find(kind, older) for older in predecessors):
                continue
            yield field, kind, name
        for kind, name in self._sources(request):
            if kind in _MENTIONS and not find(kind, name) and _is_mentioned(kind, name, request):
                yield ("prompt",), kind, name

    def _find(self, kind: Kind, name: str) -> bool:
        """True for a file that is here, also for one that the catalogue does not list, such as NAME.pt."""
        catalogue = self._resources.catalogue
        is_unlisted = kind is Kind.EMBEDDING and (catalogue.folder(kind) / name).is_file()
        return is_unlisted or catalogue.find(kind, name) is not None

    def _mode_lora(
        self, request: GenerationRequest, resources: PlanResources, will_have: set[str]
    ) -> Iterator[tuple[Field, Kind, str]]:
        """The LoRA of the performance mode, when it is missing and the model is not the demo model, which has its own.

        Args:
            will_have: checkpoints that are fetched before.
        """
        lora = FIXED_BY_PERFORMANCE[request.performance_selection].lora
        if lora is None or resources.catalogue.find(Kind.LORA, lora) is not None:
            return
        try:
            base = GenerationRequest(base_model_name=request.base_model_name)
            is_demo = plan_models(base, resources).checkpoint.name == EMBEDDED_MODEL
        except UnknownName:
            is_demo = False
        if request.base_model_name in will_have or not is_demo:
            yield ("performance_selection",), Kind.LORA, lora

    # -- where it comes from ------------------------------------------------------------------------------------

    def _with_source(self, request: GenerationRequest, missing: Iterable[tuple[Field, Kind, str]]) -> tuple[Lack, ...]:
        """Those of the missing files that have a source, each once."""
        found: dict[tuple[Kind, str], Lack] = {}
        sources: Mapping[tuple[Kind, str], str] | None = None
        for field, kind, name in missing:
            sources = self._sources(request) if sources is None else sources
            key = (kind, name.replace("\\", "/"))
            if key in sources:
                folder = self._resources.catalogue.folder(kind)
                found.setdefault(key, Lack(field, kind, key[1], sources[key], folder))
        return tuple(found.values())

    def _sources(self, request: GenerationRequest) -> dict[tuple[Kind, str], str]:
        """(kind, name) → URL; the request's own preset counts most, then config.txt, then the other presets."""
        presets = self._resources.presets.presets()
        own = [preset for preset in presets if preset.name == request.preset]
        rows: list[Download] = [Download("loras", name, url) for name, url in PERFORMANCE_LORAS.items()]
        rows += [row for preset in reversed(presets) for row in preset.downloads]
        rows += downloads_of(dict(self._settings.config))
        rows += [row for preset in own for row in preset.downloads]
        return {(_KINDS[row.folder], row.file): row.url for row in rows}

    def _source(self, lack: Lack) -> Source:
        return source_of(lack.url, mirror=self._settings.hf_mirror)

    def _shown_url(self, lack: Lack) -> str:
        try:
            return self._source(lack).shown
        except DownloadFailed:
            return "its source is no http or https URL"


# -- what a request names -------------------------------------------------------------------------------------------

_MENTIONS: Mapping[Kind, str] = MappingProxyType(
    {Kind.LORA: r"<lora:\s*{stem}\s*:", Kind.EMBEDDING: r"embedding:\s*{stem}\b"}
)


def _named(request: GenerationRequest, max_loras: int) -> Iterator[tuple[Field, Kind, str]]:
    """(field, kind, name) of every file that fields of the request name."""
    request = effective(request)
    yield ("base_model_name",), Kind.CHECKPOINT, request.base_model_name
    if request.refiner_model_name not in (NO_MODEL, request.base_model_name):
        yield ("refiner_model_name",), Kind.CHECKPOINT, request.refiner_model_name
    if request.vae_name != DEFAULT_VAE:
        yield ("vae_name",), Kind.VAE, request.vae_name
    for position, row in enumerate(request.loras[:max_loras]):
        if row.enabled and row.is_active:
            yield ("loras", position, "model_name"), Kind.LORA, row.model_name


def _is_mentioned(kind: Kind, name: str, request: GenerationRequest) -> bool:
    """True when the prompts speak of a LoRA or an embedding by its stem."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    pattern = _MENTIONS[kind].format(stem=re.escape(stem))
    return re.search(pattern, f"{request.prompt}\n{request.negative_prompt}") is not None


def _blamed(request: GenerationRequest, lacks: Iterable[Lack]) -> str | Field:
    """The field of a request that asks for files which may not be fetched."""
    if request.preset != INITIAL:
        return "preset"
    return "download_missing" if request.download_missing else next(iter(lacks)).field


# -- words and numbers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Share:
    """The part that one file has in all bytes of a task: those before it, its own, and all."""

    before: int
    own: int
    all: int

    def percent(self, done: float) -> int:
        """Percent of all, when this share of the file (0 … 1) is there."""
        return min(100, int(100 * (self.before + self.own * done) / self.all))


def _done(transfer: Transfer) -> float:
    """Share of the file that is there; checking counts as there."""
    if transfer.stage == "checking":
        return 1.0
    return min(1.0, transfer.done / transfer.total) if transfer.total else 0.0


def progress_text(name: str, transfer: Transfer) -> str:
    """What a person reads while a file comes: "Downloading x.safetensors, 1.2 of 6.6 GB ..."."""
    share = _of(transfer.done, transfer.total)
    match transfer.stage:
        case "waiting":
            return f"Waiting for another download of {name}, {share} so far ..."
        case "retrying":
            return f"The connection broke off; trying again to download {name}, {share} ..."
        case "checking":
            return f"Checking {name}, {share} ..."
        case _:
            return f"Downloading {name}, {share} ..."


def _of(done: int, total: int | None) -> str:
    """ "1.2 of 6.6 GB"; one unit for both where it can be."""
    if total is None:
        return shown_size(done)
    whole, parts = shown_size(total), shown_size(done)
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if whole.endswith(unit):
            return f"{done / size:.1f} of {whole}"
    return f"{parts} of {whole}"
