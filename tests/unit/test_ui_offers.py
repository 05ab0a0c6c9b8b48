"""What the page says about missing model files."""

from pathlib import Path

import pytest

from modules.files import Kind
from modules.plan import EMBEDDED_MODEL
from modules.provision import Lack
from modules.ui.offers import Offer, Offers, without_missing_loras
from tests.unit.test_provision import ANIME, DEFAULT, LIGHTNING, OFFSET, Machine

BASE = Lack(("base_model_name",), Kind.CHECKPOINT, "x.safetensors", "https://h/x", Path("models/checkpoints"))
VAE = Lack(("vae_name",), Kind.VAE, "v.safetensors", "https://h/v", Path("models/vae"))
LORA = Lack(("loras", 0, "model_name"), Kind.LORA, "l.safetensors", "https://h/l", Path("models/loras"))


@pytest.mark.parametrize(
    ("offer", "sentences", "label"),
    [
        (Offer(), (), "Download them when I press Generate"),
        (
            Offer((BASE,), (6_600_000_000,), EMBEDDED_MODEL),
            (
                "x.safetensors (6.6 GB) is not on this machine yet.",
                "Until then the small built-in demo model draws.",
            ),
            "Download it when I press Generate",
        ),
        (
            Offer((BASE, LORA), (6_000_000_000, 600_000_000), "old.safetensors"),
            (
                "x.safetensors (6.0 GB) and l.safetensors (600.0 MB) are not on this machine yet.",
                "Until then old.safetensors draws.",
            ),
            "Download them when I press Generate (6.6 GB)",
        ),
        (
            Offer((LORA,), (None,), "here.safetensors"),
            ("l.safetensors is not on this machine yet.", "Without it the LoRA is left out."),
            "Download it when I press Generate",
        ),
        (
            Offer((VAE,), (None,), "here.safetensors"),
            ("v.safetensors is not on this machine yet.", "Nothing can be drawn without it."),
            "Download it when I press Generate",
        ),
    ],
)
def test_an_offer_says_what_is_missing_how_large_it_is_and_what_happens_without(
    offer: Offer, sentences: tuple[str, ...], label: str
) -> None:
    assert (offer.sentences, offer.label) == (sentences, label)


def offers_of(machine: Machine) -> Offers:
    return Offers(machine.provision, machine.resources)


async def test_the_start_values_lack_the_default_files(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    offer = await offers_of(machine).of(machine.settings.page_defaults())
    assert [lack.name for lack in offer.lacks] == [DEFAULT, OFFSET]
    assert (offer.sizes, offer.stand_in, offer.is_needed) == ((None, None), EMBEDDED_MODEL, False)


async def test_what_the_mode_cannot_do_without_is_needed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.add("checkpoints", DEFAULT)
    asked = {**machine.settings.page_defaults(), "loras": [], "performance_selection": "Lightning"}
    offer = await offers_of(machine).of(asked)
    assert [lack.name for lack in offer.lacks] == [LIGHTNING]
    assert offer.is_needed
    assert offer.sentences[1] == "This performance mode cannot run without it, so Generate downloads it first."


async def test_nothing_is_offered_while_downloads_are_off_but_the_reason_is_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "--offline")
    asked = {**machine.settings.page_defaults(), "base_model_name": ANIME, "loras": []}
    assert await offers_of(machine).of(asked) == Offer()
    assert ANIME in offers_of(machine).refusal(asked)
    machine.add("checkpoints", ANIME)
    assert offers_of(machine).refusal(asked) == ""


async def test_values_that_make_no_request_are_offered_nothing(tmp_path: Path) -> None:
    assert await offers_of(Machine(tmp_path)).of({"guidance_scale": "much"}) == Offer()


def test_rows_that_are_not_fetched_are_switched_off() -> None:
    rows = [
        {"enabled": True, "model_name": "l.safetensors", "weight": 0.5},
        {"enabled": True, "model_name": "here.safetensors", "weight": 1.0},
        {"enabled": True, "model_name": "None", "weight": 1.0},
    ]
    kept = without_missing_loras(rows, Offer((BASE, LORA), (None, None)))
    assert [row["enabled"] for row in kept] == [False, True, True]
