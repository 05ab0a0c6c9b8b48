"""What the page says about model files that are missing, and whether the next run fetches them."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from modules.choices import NO_MODEL
from modules.downloads import shown_size
from modules.errors import UnknownName
from modules.files import Kind
from modules.plan import EMBEDDED_MODEL, plan_models
from modules.provision import Lack, Provision
from modules.request import GenerationRequest
from modules.resources import Resources


@dataclass(frozen=True, slots=True)
class Offer:
    """What is missing for the next run.

    lacks: the files. sizes: bytes of each, None where it is not known. stand_in: the model that draws without them.
    is_needed: the run cannot do without, so that they are fetched in any case.
    """

    lacks: tuple[Lack, ...] = ()
    sizes: tuple[int | None, ...] = ()
    stand_in: str = ""
    is_needed: bool = False

    @property
    def sentences(self) -> tuple[str, ...]:
        """What is missing, and what happens without it."""
        if not self.lacks:
            return ()
        files = _joined([_file(lack, size) for lack, size in zip(self.lacks, self.sizes, strict=True)])
        return (f"{files} {'is' if len(self.lacks) == 1 else 'are'} not on this machine yet.", self._without)

    @property
    def label(self) -> str:
        """Of the box that has them fetched."""
        total = sum(size or 0 for size in self.sizes)
        size = f" ({shown_size(total)})" if None not in self.sizes and len(self.lacks) > 1 else ""
        return f"Download {'it' if len(self.lacks) == 1 else 'them'} when I press Generate{size}"

    @property
    def _without(self) -> str:
        if self.is_needed:
            return "This performance mode cannot run without it, so Generate downloads it first."
        if any(lack.kind is Kind.CHECKPOINT and lack.field == ("base_model_name",) for lack in self.lacks):
            who = "the small built-in demo model" if self.stand_in == EMBEDDED_MODEL else self.stand_in
            return f"Until then {who} draws." if who else "Nothing can be drawn without it."
        if all(lack.kind is Kind.LORA for lack in self.lacks):
            return f"Without {'it' if len(self.lacks) == 1 else 'them'} the LoRA is left out."
        return "Nothing can be drawn without it."


@dataclass
class Offers:
    """Finds what is missing for what the page says; asks for a size only when somebody shows interest."""

    provision: Provision
    resources: Resources
    _sizes: dict[str, int | None] = field(default_factory=dict)

    async def of(self, fields: Mapping[str, object], *, with_sizes: bool = False) -> Offer:
        """What is missing for a request made of these fields; nothing while downloads are switched off."""
        try:
            request = GenerationRequest.model_validate({**fields, "download_missing": False})
        except ValidationError:
            return Offer()  # the run will say what is wrong
        if self.provision.switched_off_by:
            return Offer()
        lacks, needed, stand_in = await asyncio.to_thread(self._look, request)
        if with_sizes:
            unknown = [lack for lack in lacks if self._sizes.get(lack.url) is None]
            found = await asyncio.gather(*(asyncio.to_thread(self.provision.size, lack) for lack in unknown))
            self._sizes |= {lack.url: size for lack, size in zip(unknown, found, strict=True)}
        sizes = tuple(self._sizes.get(lack.url) for lack in lacks)
        return Offer(lacks, sizes, stand_in, bool(lacks) and lacks == needed)

    def _look(self, request: GenerationRequest) -> tuple[tuple[Lack, ...], tuple[Lack, ...], str]:
        """(all that is missing, what cannot be done without, the model that draws without it)."""
        lacks = self.provision.offers(request)
        if not lacks:
            return (), (), ""
        try:
            plain = GenerationRequest(base_model_name=request.base_model_name)
            stand_in = plan_models(plain, self.resources.plan_resources()).checkpoint.name
        except UnknownName:
            stand_in = ""
        return lacks, self.provision.lacks(request), stand_in

    def refusal(self, fields: Mapping[str, object]) -> str:
        """Why what is missing is not offered, "" when downloads are allowed or nothing is missing."""
        if not self.provision.switched_off_by:
            return ""
        lacks = self.provision.offers(GenerationRequest.model_validate(dict(fields)))
        return self.provision.refusal(lacks) if lacks else ""


def without_missing_loras(rows: Sequence[Mapping[str, object]], offer: Offer) -> list[dict[str, object]]:
    """LoRA rows with those switched off whose file is missing and not to be fetched."""
    missing = {lack.name for lack in offer.lacks if lack.kind is Kind.LORA}
    return [
        {**row, "enabled": bool(row["enabled"]) and (row["model_name"] == NO_MODEL or row["model_name"] not in missing)}
        for row in rows
    ]


def _joined(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _file(lack: Lack, size: int | None) -> str:
    return f"{lack.name} ({shown_size(size)})" if size else lack.name
