"""The image tower is pulled to its captions, and the bank keeps its labels."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import EMBEDDED, LABELS, VOCABULARY
from training import vision
from training.art import ArtSet
from training.checkpoints import read_network
from training.prompts import PromptEncoder
from training.stages import StateFolder
from training.vision import contrastive_loss, describe_bank, image_embeds, load_bank, new_vision_tower, save_bank


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
    tower = new_vision_tower().eval()
    for height, width in ((128, 128), (256, 192)):
        embeds = image_embeds(tower, torch.zeros(2, 3, height, width))
        assert embeds.shape == (2, 192)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))


def test_bank_keeps_labels_and_finds_them_again(encoder: PromptEncoder, art: ArtSet, tmp_path: Path) -> None:
    bank, labels = describe_bank(encoder, art)
    assert labels == list(LABELS)
    save_bank(bank, labels, tmp_path / "bank.safetensors")
    loaded, named = load_bank(tmp_path / "bank.safetensors")
    assert named == labels
    torch.testing.assert_close(loaded, bank, rtol=0, atol=1e-3)
    queries = vision.text_embeds(encoder, [f"{label}, flat style" for label in labels])
    assert (queries @ loaded.T).argmax(1).tolist() == list(range(len(labels)))


@pytest.mark.slow
def test_vision_stage_writes_tower_and_bank(state: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--state", state.root, "--weights", EMBEDDED, "--vocabulary", VOCABULARY, "--samples", 16, "--batch", 8]
    monkeypatch.setattr("sys.argv", ["vision", *map(str, options)])
    vision.main()
    bank, labels = load_bank(state.file("export", "focale-describe.safetensors"))
    assert bank.shape == (len(labels), 192)
    assert state.file("export", "focale-vision.safetensors").stat().st_size < 6_000_000
