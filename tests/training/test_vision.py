"""The image tower is pulled to its captions, and the bank keeps its labels."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modules.engine.concepts import BANK_FILE, TOWER_FILE, Bank, ConceptFinder
from modules.engine.image_tower import image_embeds, new_image_tower
from tests.training.conftest import EMBEDDED, LABELS, VOCABULARY
from training import vision
from training.art import ArtSet
from training.checkpoints import read_network
from training.prompts import PromptEncoder
from training.stages import StateFolder
from training.vision import bent, contrastive_loss, label_bank


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    network = read_network(EMBEDDED, VOCABULARY)["text"].eval()
    assert isinstance(network, PromptEncoder)
    return network


def test_loss_is_least_for_matching_pairs() -> None:
    rows = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale, groups = torch.tensor(30.0), torch.arange(6)
    matched = contrastive_loss(rows, rows, scale, groups)
    assert matched.item() < 0.05
    assert contrastive_loss(rows, rows.roll(1, 0), scale, groups).item() > 10 * matched.item() + 1


def test_same_picture_twice_in_a_batch_is_not_wrong() -> None:
    row = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows = torch.cat([row, row, -row])
    grouped = contrastive_loss(rows, rows, torch.tensor(30.0), torch.tensor([0, 0, 1]))
    apart = contrastive_loss(rows, rows, torch.tensor(30.0), torch.tensor([0, 1, 2]))
    assert grouped.item() == pytest.approx(apart.item(), abs=1e-5)  # half of the right answers each: ln 2 both ways
    wrong = contrastive_loss(rows, rows, torch.tensor(30.0), torch.tensor([0, 1, 0]))
    assert wrong.item() > grouped.item() + 1


@torch.inference_mode()
def test_pictures_of_any_size_give_unit_embeddings() -> None:
    tower = new_image_tower().eval()
    for height, width in ((128, 128), (256, 192)):
        embeds = image_embeds(tower, torch.zeros(2, 3, height, width))
        assert embeds.shape == (2, 192)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))


def test_bank_keeps_labels_and_finds_them_again(encoder: PromptEncoder, art: ArtSet, tmp_path: Path) -> None:
    rows, labels = label_bank(encoder, art)
    assert labels == list(LABELS)
    Bank(rows, labels, 20.0).save(tmp_path / "bank.safetensors")
    bank = Bank.load(tmp_path / "bank.safetensors")
    torch.testing.assert_close(bank.rows, rows, rtol=0, atol=1e-3)
    queries = vision.text_embeds(encoder, [f"{label}, flat style" for label in labels])
    assert [tags[0].name for tags in bank.guesses(queries)] == labels
    assert sum(tag.probability for tag in bank.guesses(queries, 99)[0]) == pytest.approx(1)


def test_pictures_are_bent_a_little() -> None:
    rows = torch.linspace(-1, 1, 96).expand(2, 3, 96, 96)
    torch.manual_seed(0)
    shifts = (bent(rows) - rows).abs()
    assert 0.01 < shifts.mean() < 0.08
    assert shifts[:, :, 0, 48].max() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_vision_stage_writes_what_the_program_reads(
    processes: int, state: StateFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--state", state.root, "--weights", EMBEDDED, "--vocabulary", VOCABULARY, "--samples", 16, "--batch", 8]
    monkeypatch.setattr("sys.argv", ["vision", *map(str, options), "--processes", str(processes)])
    vision.main()
    folder = state.file("export")
    guesses = ConceptFinder(folder)(Image.new("RGB", (80, 60), "red"))
    assert {tag.name for tag in guesses} <= set(LABELS)
    assert len(guesses) == 5
    with caplog.at_level("INFO"):
        monkeypatch.setattr("sys.argv", ["vision", *map(str, options[:6]), "--measure", str(folder)])
        vision.main()
    assert "describe, twemoji (style never seen): top-5" in caplog.text
    assert (folder / TOWER_FILE).stat().st_size + (folder / BANK_FILE).stat().st_size < 9_000_000
