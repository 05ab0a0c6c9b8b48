"""Every stage runs from its command line, writes what the next one reads, and can be resumed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont

from tests.training.conftest import EMBEDDED, LABELS, TABLES, VOCABULARY
from training import evaluate, judge, latents, text, unet, vae
from training.art import (
    UNSEEN_STYLE,
    ArtSet,
    Concept,
    Glyph,
    codes_by_name,
    draw_glyph,
    glyphs,
    icon_svgs,
    normalised_code,
    read_concepts,
    write_art,
)
from training.judge import Judge, accuracy, load_judge
from training.latents import load_cache
from training.packages import PACKAGES, ArtChecksumMismatch, fetch
from training.runs import averaged_weights
from training.stages import StateFolder
from training.vae import held_out_concepts, measure, psnr

Stage = Callable[..., None]
TEXT_OPTIONS = ("--tables", TABLES, "--vocabulary", VOCABULARY, "--processes", 1)
UNET_OPTIONS = (*TEXT_OPTIONS, "--precision", "fp32", "--small", 1)  # the made-up latents are of 64 px


@pytest.fixture
def stage(state: StateFolder, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Runs a stage's `main` as its command line would."""

    def run(module: object, *options: object) -> None:
        monkeypatch.setattr("sys.argv", ["stage", "--state", str(state.root), *map(str, options)])
        threads = torch.get_num_threads()
        try:
            module.main()
        finally:
            torch.set_num_threads(threads)

    return run


def samples_of(state: StateFolder, run: str) -> int:
    content = torch.load(state.file("runs", run, "checkpoint.pt"), weights_only=True)
    return int(content["samples"])


def test_latents_are_cached_with_item_and_colour(stage: Stage, state: StateFolder, art: ArtSet) -> None:
    stage(latents, "--height", 48, "--width", 64, "--concepts", 2, "--seed", 3)
    file = state.file("latents", "48x64-3.safetensors")
    cache = load_cache(file)
    file.unlink()
    assert cache.latents.shape == (6, 4, 6, 8)
    assert sorted(cache.items) == art.pick(limit=2)
    assert len(cache.colours) == 6


@pytest.mark.slow
def test_text_stage_lowers_its_error_and_hands_over_to_the_unet(stage: Stage, state: StateFolder) -> None:
    stage(text, *TEXT_OPTIONS, "--samples", 24, "--batch", 8)
    assert samples_of(state, "text") == 24
    towers = state.file("runs", "text", "checkpoint.pt")
    stage(unet, *UNET_OPTIONS, "--towers", towers, "--samples", 8, "--batch", 1, "--rate", 0)
    prepared, trained = averaged_weights(towers), averaged_weights(state.file("runs", "unet", "checkpoint.pt"))
    name = "text.second.text_projection.weight"
    assert torch.equal(prepared[name], trained[name])


@pytest.mark.slow
def test_unet_stage_resumes_and_finishes(stage: Stage, state: StateFolder) -> None:
    stage(unet, *UNET_OPTIONS, "--run", "smoke", "--samples", 8, "--batch", 1, "--concepts", 3)
    stage(unet, *UNET_OPTIONS, "--run", "smoke", "--samples", 12, "--batch", 1, "--resume")
    assert samples_of(state, "smoke") == 12
    flat = state.file("runs", "smoke", "checkpoint.pt")
    stage(unet, *UNET_OPTIONS, "--run", "last", "--resume", "--start-from", flat, "--finish", 8, "--batch", 1)
    assert samples_of(state, "smoke") == 12
    assert samples_of(state, "last") == 20


def test_unet_stage_out_of_time_still_leaves_a_checkpoint(stage: Stage, state: StateFolder) -> None:
    stage(unet, *UNET_OPTIONS, "--run", "short", "--minutes", 0)
    assert samples_of(state, "short") == 0


def test_share_that_leaves_no_size_is_refused(stage: Stage) -> None:
    with pytest.raises(ValueError, match=r"small share 0\.0"):
        stage(unet, *TEXT_OPTIONS, "--run", "nothing", "--small", 0)


@pytest.mark.parametrize("plan", [unet.TextPlan(24, 1, True), unet.TextPlan(77, 2, False), unet.TextPlan(32, 0, True)])
def test_loss_starts_near_one_and_trains_the_towers_if_planned(
    state: StateFolder, art: ArtSet, plan: unet.TextPlan
) -> None:
    network = unet.build_network(TABLES, VOCABULARY, seed=0)
    rng = unet.seeded(0, "test")
    buckets = unet.load_buckets(state.file("latents"), art, batch=2, choice=unet.Choice())
    loss = unet.NoiseTrainer(network, art, shared=rng, own=rng).loss(buckets[0], plan)
    loss.backward()
    assert 0.3 < float(loss.detach()) < 3
    learned = network["text"].second.text_projection.weight.grad is not None
    assert learned == plan.gradient


def test_timesteps_are_weighed_as_min_snr() -> None:
    noising = unet.min_snr_noising()
    ratio = noising.signal / (1 - noising.signal)
    effective = noising.probabilities * noising.weights
    wanted = ratio.clamp(max=5) / ratio
    assert float(noising.probabilities.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(effective, wanted / wanted.sum(), rtol=1e-4, atol=1e-7)


def test_pictures_that_no_network_saw_are_measured_where_they_were_built(
    state: StateFolder, art: ArtSet, tmp_path: Path
) -> None:
    (tmp_path / "art").symlink_to(state.file("art"))
    measured, network = StateFolder(tmp_path), vae.load_vae(state.file("vae"))
    assert UNSEEN_STYLE not in vae.report(network, measured)
    items = [(index, UNSEEN_STYLE) for index in range(len(art.concepts))]
    write_art(measured.file("unseen"), art.concepts, items, art.pixels[: len(items)])
    assert 0 < vae.report(network, measured)[UNSEEN_STYLE] < 60


@pytest.mark.slow
def test_vae_stage_trains_whitens_and_measures(stage: Stage, state: StateFolder, art: ArtSet) -> None:
    kept = {file.name: file.read_bytes() for file in state.file("vae").iterdir()}
    try:
        stage(vae, "--samples", 10, "--batch", 3, "--processes", 1, "--precision", "fp32")
        trained = vae.load_vae(state.file("vae"))
        assert math.isfinite(measure(trained, art, style="twemoji"))
    finally:
        for name, content in kept.items():
            state.file("vae", name).write_bytes(content)
    assert samples_of(state, "vae") >= 10


def test_psnr_of_a_known_error() -> None:
    assert psnr(torch.full((1, 3, 8, 8), 0.2), torch.zeros(1, 3, 8, 8)) == pytest.approx(20.0)


def test_held_out_concepts_are_seeded(art: ArtSet) -> None:
    assert held_out_concepts(art, 1) == held_out_concepts(art, 1)
    assert len(held_out_concepts(art, 1)) == 1


@pytest.mark.slow
def test_judge_learns_the_made_up_art(stage: Stage, state: StateFolder, art: ArtSet) -> None:
    stage(judge, "--samples", 960, "--batch", 32, "--rate", 4e-3)
    trained = load_judge(state.file("judge.safetensors"))
    first, five = accuracy(trained, art, style="flat")
    assert first >= 0.5
    assert five >= first


@pytest.mark.slow
def test_evaluation_scores_every_measure(stage: Stage, state: StateFolder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = Judge(len(LABELS)).eval()
    judge.save_file(fresh.state_dict(), state.file("judge.safetensors"))
    options = ("--weights", EMBEDDED, "--vocabulary", VOCABULARY, "--output", tmp_path)
    stage(evaluate, *options, "--per-concept", 1, "--steps", 1, "--concepts", 2, "--processes", 1)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert all(0 <= value <= 1 for value in scores.values() if not math.isnan(value))
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"{name}.png" for name in ("concepts", "backgrounds", "unseen", "pairs")
    }


def test_missing_judge_says_how_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.judge"):
        load_judge(tmp_path / "judge.safetensors")


def test_tampered_package_is_refused(tmp_path: Path) -> None:
    package = PACKAGES["noto"]
    (tmp_path / package.tarball).write_bytes(b"not the package")
    with pytest.raises(ArtChecksumMismatch, match=package.sha256):
        fetch(package, tmp_path)


def test_names_and_icons_are_read_from_the_packages_own_files(tmp_path: Path) -> None:
    rows = [
        {"hexcode": "1F34E", "label": "red apple", "tags": ["Fruit", "rød"], "group": 4},
        {"hexcode": "1F550", "label": "one o\u2019clock", "group": 5},
        {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    ]
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "data.json").write_text(json.dumps(rows))
    apple, clock = read_concepts(tmp_path)
    assert (apple.code, apple.tags, apple.core) == ("1f34e", ("fruit",), True)
    assert (clock.label, clock.core) == ("one o'clock", False)
    (tmp_path / "icons.json").write_text(
        json.dumps(
            {
                "icons": {"red-apple": {"body": "<path/>"}},
                "aliases": {"apple": {"parent": "red-apple"}},
                "width": 32,
                "height": 32,
            }
        )
    )
    (tmp_path / "chars.json").write_text(json.dumps({"1f34e-fe0f": "apple", "1f550": "missing"}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "icons.json").write_text((tmp_path / "icons.json").read_text())
    svgs = icon_svgs(tmp_path)
    (other / "chars.json").write_text("{}")
    assert icon_svgs(other, {"apple": "1f34e"}) == svgs
    with pytest.raises(ValueError, match="names no code points"):
        icon_svgs(other)
    assert list(svgs) == ["1f34e"]
    assert "<path/>" in svgs["1f34e"]
    assert normalised_code("1F3F3-FE0F_200d") == "1f3f3-200d"


def test_codes_are_found_by_the_names_packages_give(tmp_path: Path) -> None:
    (tmp_path / "en" / "shortcodes").mkdir(parents=True)
    rows = [{"hexcode": "1F34E", "label": "red apple", "group": 4}, {"hexcode": "1F600", "label": "grinning face"}]
    (tmp_path / "en" / "data.json").write_text(json.dumps([{"group": 0} | row for row in rows]))
    short = {"1F34E": "apple", "1F600": ["gleeful", "red_apple"]}
    (tmp_path / "en" / "shortcodes" / "chat.json").write_text(json.dumps(short))
    codes = codes_by_name(tmp_path, {"1f600": "grin-face"}, {"1f34e": "grin-face"})
    assert codes == {
        "redapple": "1f34e",  # the label counts more than the short code
        "apple": "1f34e",
        "grinningface": "1f600",
        "grinface": "1f600",  # the package listed first counts
        "gleeful": "1f600",
    }


def test_glyphs_are_drawn_in_black_in_the_middle(tmp_path: Path) -> None:
    font = tmp_path / "font.ttf"
    font.write_bytes(ImageFont.load_default(20).path.getvalue())
    letter, letters = (Concept(code, code, (), "objects", True) for code in ("41", "41-42"))
    sources = glyphs(font, [letter, letters])
    assert list(sources) == ["41"]
    glyph = sources["41"]
    assert isinstance(glyph, Glyph)
    picture = np.asarray(draw_glyph(glyph, size_px=64))
    rows, columns = np.nonzero(picture[..., 3] > 128)
    assert picture[..., :3].max() == 0
    assert abs(columns.mean() - 31.5) < 2
    assert abs((rows.min() + rows.max()) / 2 - 31.5) < 8
    assert len(rows) > 100
