"""An exported checkpoint is what the engine loads, and training goes on from it; text is encoded as by the engine."""

import shutil
from pathlib import Path

import pytest
import torch

from modules.engine.condition import TextConditioner, adm_time_ids
from modules.engine.device import choose_policy
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tensorfile import open_tensor_file
from modules.engine.tokens import ClipTokenizer
from modules.engine.weights import recognise
from tests.training.conftest import EMBEDDED, TABLES, VOCABULARY
from training.bootstrap import main as bootstrap
from training.checkpoints import read_network, read_vae
from training.export import main as export_main
from training.export import original_tensors
from training.generate import draw, evenly_spaced_sigmas, load_family
from training.nets import TOKEN_TABLE_KEYS, alphas_cumprod, load_token_tables, load_vae
from training.prompts import PromptEncoder, consistent_time_ids, joined, scaled_time_ids
from training.runs import averaged_weights
from training.stages import StateFolder
from training.whiten import fold


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    """The embedded model's text towers, as the trainer holds them."""
    network = read_network(EMBEDDED, VOCABULARY).eval()["text"]
    assert isinstance(network, PromptEncoder)
    return network


@pytest.fixture(scope="module")
def engine_model() -> SdxlModel:
    """The embedded model, as the engine holds it."""
    return ModelStore(choose_policy("cpu", precision="fp32")).base(EMBEDDED)


@pytest.mark.parametrize("texts", [("",), ("a red apple, 3d style",), ("a rocket", "sharp focus, beautiful")])
@torch.inference_mode()
def test_text_is_encoded_as_by_the_engine(
    encoder: PromptEncoder, engine_model: SdxlModel, texts: tuple[str, ...]
) -> None:
    expected = TextConditioner(ClipTokenizer(VOCABULARY)).encode(engine_model, texts)
    encoding = joined([encoder([text]) for text in texts])
    torch.testing.assert_close(encoding.hidden, expected.prompt_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoding.pooled, expected.pooled_prompt_embeds, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_short_chunks_differ_from_whole_ones_in_padding_only(encoder: PromptEncoder) -> None:
    short, whole = encoder(["a red apple"], 24), encoder(["a red apple"])
    torch.testing.assert_close(short.hidden, whole.hidden[:, :24], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(short.pooled, whole.pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "height"), [(144, 112), (112, 144), (128, 128), (160, 96), (256, 256)])
def test_size_numbers_are_the_engines(width: int, height: int) -> None:
    emphasised, consistent = adm_time_ids(width, height, 1.5)
    assert scaled_time_ids(height, width, 1.5) == tuple(map(float, emphasised))
    assert consistent_time_ids(height, width) == tuple(map(float, consistent))


def test_noise_levels_end_where_the_schedule_does() -> None:
    timesteps, sigmas = evenly_spaced_sigmas(30)
    assert timesteps[0] == 999
    assert len(sigmas) == 31
    assert float(sigmas[0]) == pytest.approx(14.6146, abs=1e-3)
    assert float(sigmas[-1]) == 0
    assert bool((sigmas.diff() < 0).all())
    assert float(alphas_cumprod()[0]) == pytest.approx(1 - 0.00085)


@pytest.fixture(scope="module")
def exported(state: StateFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, taken into a run of its own and exported again."""
    root, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("export")
    shutil.copytree(state.file("art"), root / "art")
    common = ["--state", str(root), "--vocabulary", str(VOCABULARY)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bootstrap", *common, "--weights", str(EMBEDDED)])
        bootstrap()
        options = ["--template", str(EMBEDDED), "--tables", str(TABLES), "--target", str(target / "copy")]
        patch.setattr("sys.argv", ["export", *common, *options])
        export_main()
    names = averaged_weights(root / "runs" / "unet" / "checkpoint.pt")
    assert not [name for name in names if "token_embedding" in name]
    return target / "copy.safetensors"


def test_export_of_an_import_is_the_same_checkpoint(exported: Path) -> None:
    one, other = open_tensor_file(EMBEDDED), open_tensor_file(exported)
    assert one.shapes == other.shapes
    for name in one.shapes:
        assert torch.equal(one.read(name), other.read(name)), name
    assert recognise(other).native_size == 128
    first, second = load_token_tables(TABLES), (other.read(key) for key in TOKEN_TABLE_KEYS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shards_are_small_enough_for_the_repository(exported: Path) -> None:
    shards = sorted(exported.parent.glob("copy-*.safetensors"))
    assert [shard.name for shard in shards] == [f"copy-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(shard.stat().st_size < 60_000_000 for shard in shards)


def test_tensor_of_another_shape_is_refused() -> None:
    network, shapes = read_network(EMBEDDED, VOCABULARY), dict(open_tensor_file(EMBEDDED).shapes)
    name = next(name for name in shapes if name.endswith("input_blocks.0.0.weight"))
    with pytest.raises(ValueError, match="input_blocks"):
        original_tensors({name: (64, 5, 3, 3)}, network["unet"], network["text"], read_vae(EMBEDDED))


def test_drawing_depends_on_prompt_and_seed_alone() -> None:
    family = load_family(EMBEDDED, VOCABULARY)
    together = draw(family, ["a red apple", "a rocket"], [0, 1], steps=2, height=64, width=64)
    alone = draw(family, ["a rocket"], [1], steps=2, height=64, width=64)
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)
    assert float((together[0] - together[1]).abs().mean()) > 0.05


@pytest.mark.slow
def test_start_with_another_vae_keeps_its_pictures_and_nears_the_old_latents(
    state: StateFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(state.file("art"), tmp_path / "art")
    other, known = read_vae(EMBEDDED), read_vae(EMBEDDED)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    fold(other, turn, torch.zeros(4, dtype=torch.float64))
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr("training.bootstrap.PICTURES", 8)
    options = ["--state", tmp_path, "--vocabulary", VOCABULARY, "--weights", EMBEDDED, "--vae", tmp_path / "other"]
    monkeypatch.setattr("sys.argv", ["bootstrap", *map(str, options)])
    bootstrap()
    aligned = load_vae(tmp_path / "vae")
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        before, after = known.encode(pixels).latent_dist.mean, aligned.encode(pixels).latent_dist.mean
        torch.testing.assert_close(aligned.decode(after).sample, known.decode(before).sample, rtol=0, atol=0.02)
    assert float((after - before).square().mean() / before.var()) < 0.2
