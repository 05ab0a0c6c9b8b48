"""Text embeddings equal those of the transformers models, and weights, chunks and several texts follow the rules."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules.engine.condition import (
    Conditioning,
    TextConditioner,
    adm_time_ids,
    refiner_conditioning,
    stack_conditionings,
)
from modules.engine.device import choose_policy
from modules.engine.embeddings import EmbeddingFolder
from modules.engine.loras import LoraChoice
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tokens import CLIP_G_PADDING, CLIP_L_PADDING, ClipTokenizer, chunk_prompt
from tests.tiny_sdxl import CLIP_G_WIDTH, CLIP_L_WIDTH, write_tiny

TOKENIZER = ClipTokenizer(Path(__file__).parents[2] / "models" / "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("condition")
    write_tiny(folder / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def store() -> ModelStore:
    return ModelStore(choose_policy("cpu", precision="fp32"))


@pytest.fixture(scope="module")
def model(store: ModelStore, folder: Path) -> SdxlModel:
    return store.base(folder / "base.safetensors")


@pytest.fixture
def conditioner() -> TextConditioner:
    return TextConditioner(TOKENIZER)


@torch.inference_mode()
def _expected(model: SdxlModel, text: str, clip_skip: int) -> tuple[Tensor, Tensor]:
    """What transformers' own forward passes give for an unweighted text."""
    ids_l = torch.tensor([chunk.tokens for chunk in chunk_prompt(text, TOKENIZER, padding=CLIP_L_PADDING)])
    ids_g = torch.tensor([chunk.tokens for chunk in chunk_prompt(text, TOKENIZER, padding=CLIP_G_PADDING)])
    out_l = model.clip_l(ids_l, output_hidden_states=True)
    out_g = model.clip_g(ids_g, output_hidden_states=True)
    hidden = torch.cat([out_l.hidden_states[-clip_skip], out_g.hidden_states[-clip_skip]], dim=-1)
    return hidden.reshape(1, -1, hidden.shape[-1]), out_g.text_embeds[:1]


@pytest.mark.parametrize("text", ["", "a red apple", "word " * 80])
@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_embeddings_equal_those_of_transformers(
    model: SdxlModel, conditioner: TextConditioner, text: str, clip_skip: int
) -> None:
    encoding = conditioner.encode(model, [text], clip_skip=clip_skip)
    hidden, pooled = _expected(model, text, clip_skip)

    torch.testing.assert_close(encoding.prompt_embeds, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoding.pooled_prompt_embeds, pooled, atol=1e-4, rtol=1e-4)


def test_more_skips_than_layers_mean_the_last_layer_with_its_norm(
    model: SdxlModel, conditioner: TextConditioner
) -> None:
    encoding = conditioner.encode(model, ["a cat"], clip_skip=12)
    ids = torch.tensor([chunk.tokens for chunk in chunk_prompt("a cat", TOKENIZER, padding=CLIP_L_PADDING)])
    with torch.inference_mode():
        normed = model.clip_l(ids).last_hidden_state

    torch.testing.assert_close(encoding.prompt_embeds[..., :CLIP_L_WIDTH], normed, atol=1e-4, rtol=1e-4)


def test_weight_moves_a_token_away_from_the_empty_text_and_keeps_the_mean(
    model: SdxlModel, conditioner: TextConditioner
) -> None:
    plain = conditioner.encode(model, ["a red apple"]).prompt_embeds
    empty = conditioner.encode(model, [""]).prompt_embeds
    weighted = conditioner.encode(model, ["a (red:1.4) apple"]).prompt_embeds

    for channels in (slice(0, CLIP_L_WIDTH), slice(CLIP_L_WIDTH, None)):  # each encoder on its own
        moved = plain[..., channels].clone()
        moved[0, 2] = (plain[0, 2, channels] - empty[0, 2, channels]) * 1.4 + empty[0, 2, channels]
        expected = moved * (plain[..., channels].mean() / moved.mean())
        torch.testing.assert_close(weighted[..., channels], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(weighted[..., channels].mean(), plain[..., channels].mean())


def test_weights_do_not_reach_other_chunks_or_the_pooled_vector(model: SdxlModel, conditioner: TextConditioner) -> None:
    plain = conditioner.encode(model, ["word " * 80])
    weighted = conditioner.encode(model, ["word " * 78 + "(word:1.5) word"])

    torch.testing.assert_close(weighted.prompt_embeds[:, :77], plain.prompt_embeds[:, :77])
    assert not torch.allclose(weighted.prompt_embeds[:, 77:], plain.prompt_embeds[:, 77:])
    torch.testing.assert_close(weighted.pooled_prompt_embeds, plain.pooled_prompt_embeds)


def test_texts_are_joined_and_their_pooled_vectors_summed(model: SdxlModel, conditioner: TextConditioner) -> None:
    parts = [conditioner.encode(model, [text]) for text in ("one", "two", "three")]
    joined = conditioner.encode(model, ["one", "two", "three"], pooled_texts=2)

    assert torch.equal(joined.prompt_embeds, torch.cat([part.prompt_embeds for part in parts], dim=1))
    summed = parts[0].pooled_prompt_embeds + parts[1].pooled_prompt_embeds
    torch.testing.assert_close(joined.pooled_prompt_embeds, summed)


def test_embeddings_do_not_depend_on_what_was_encoded_before(model: SdxlModel) -> None:
    fresh = TextConditioner(TOKENIZER).encode(model, ["a cat"]).prompt_embeds
    used = TextConditioner(TOKENIZER)
    for text in ("(dog:1.2) " * 90, "", "a cat"):
        used.encode(model, [text])

    assert torch.equal(used.encode(model, ["a cat"]).prompt_embeds, fresh)


def test_texts_are_encoded_once_until_loras_change(
    model: SdxlModel, conditioner: TextConditioner, tmp_path: Path
) -> None:
    first = conditioner.encode(model, ["a cat"]).prompt_embeds
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    lora = {f"{layer}.lora_up.weight": torch.ones(256, 1), f"{layer}.lora_down.weight": torch.ones(1, 64)}
    save_file(lora, tmp_path / "x.safetensors")
    with model.loras.merged([LoraChoice(tmp_path / "x.safetensors", 1.0)]):
        changed = conditioner.encode(model, ["a cat"]).prompt_embeds

    assert not torch.allclose(changed, first)
    assert torch.equal(conditioner.encode(model, ["a cat"]).prompt_embeds, first)
    assert len(conditioner._cache) == 2


@pytest.mark.parametrize(
    ("size", "scaler", "emphasised", "consistent"),
    [
        ((1152, 896), 1.5, (1344, 1728, 0, 0, 896, 1152), (896, 1152, 0, 0, 896, 1152)),
        ((1152, 896), 0.8, (716, 921, 0, 0, 896, 1152), (896, 1152, 0, 0, 896, 1152)),
        ((144, 112), 1.0, (112, 144, 0, 0, 128, 128), (128, 128, 0, 0, 128, 128)),
    ],
)
def test_size_numbers(
    size: tuple[int, int], scaler: float, emphasised: tuple[int, ...], consistent: tuple[int, ...]
) -> None:
    assert adm_time_ids(*size, scaler) == (emphasised, consistent)


def test_condition_expands_and_stacks_to_batches(model: SdxlModel, conditioner: TextConditioner) -> None:
    one = conditioner.condition(model, ["a"], width=128, height=64, adm_scaler=1.5)
    two = conditioner.condition(model, ["b"], width=128, height=64, adm_scaler=1.5)
    long = conditioner.condition(model, ["b", "c"], width=128, height=64, adm_scaler=1.5)

    assert one.expand(3).prompt_embeds.shape == (3, 77, CLIP_L_WIDTH + CLIP_G_WIDTH)
    stacked = stack_conditionings([one, two])
    assert stacked.batch == 2
    assert stacked.time_ids.tolist() == [[96, 192, 0, 0, 64, 128]] * 2
    assert torch.equal(stacked.pooled_prompt_embeds[1:], two.pooled_prompt_embeds)
    with pytest.raises(ValueError, match="77, 154"):
        stack_conditionings([one, long])


def test_refiners_get_their_part_of_the_conditioning(
    model: SdxlModel, store: ModelStore, folder: Path, conditioner: TextConditioner
) -> None:
    cond = conditioner.condition(model, ["a", "b"], width=136, height=72, adm_scaler=1.5)
    refiner = store.refiner(write_tiny(folder / "refiner.safetensors", "refiner"))
    sd15 = store.refiner(write_tiny(folder / "sd15.safetensors", "sd15"))

    for_refiner = refiner_conditioning(cond, base=model, refiner=refiner, positive=False, width=136, height=72)
    for_sd15 = refiner_conditioning(cond, base=model, refiner=sd15, positive=True, width=136, height=72)

    assert torch.equal(for_refiner.prompt_embeds, cond.prompt_embeds[..., CLIP_L_WIDTH:])
    assert for_refiner.time_ids.tolist() == [[72, 136, 0, 0, 2.5]]  # the plain size, neither scaled nor rounded
    assert _runs(refiner, for_refiner)
    first = cond.prompt_embeds[..., :CLIP_L_WIDTH]
    assert torch.equal(for_sd15.prompt_embeds, model.clip_l.final_layer_norm(first))
    assert for_sd15.pooled_prompt_embeds.shape == (1, 0)
    alike = store.refiner(folder / "base.safetensors")
    same = refiner_conditioning(cond, base=model, refiner=alike, positive=True, width=136, height=72)
    assert same is cond


@torch.inference_mode()
def _runs(model: SdxlModel, cond: Conditioning) -> bool:
    out = model.unet(
        torch.zeros(1, 4, 8, 8),
        10.0,
        encoder_hidden_states=cond.prompt_embeds,
        added_cond_kwargs={"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids},
    ).sample
    return bool(out.isfinite().all())


def test_embedding_file_replaces_its_word(model: SdxlModel, tmp_path: Path) -> None:
    """A textual inversion made of a word's own vectors is that word."""
    (cat,) = TOKENIZER.word("cat")
    vectors = {
        "clip_l": model.clip_l.embeddings.token_embedding.weight[cat : cat + 1].clone(),
        "clip_g": model.clip_g.text_model.embeddings.token_embedding.weight[cat : cat + 1].clone(),
    }
    (tmp_path / "animals").mkdir()
    save_file(vectors, tmp_path / "animals" / "kitten.safetensors")
    conditioner = TextConditioner(TOKENIZER, embeddings=EmbeddingFolder(tmp_path))

    ours = conditioner.encode(model, ["a embedding:kitten sits"]).prompt_embeds

    assert torch.equal(ours, conditioner.encode(model, ["a cat sits"]).prompt_embeds)


def test_embedding_of_another_width_leaves_only_padding(
    model: SdxlModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"string_to_param": {"*": torch.ones(2, CLIP_L_WIDTH)}}, tmp_path / "old.pt")
    conditioner = TextConditioner(TOKENIZER, embeddings=EmbeddingFolder(tmp_path))

    ours = conditioner.encode(model, ["a embedding:old cat"]).prompt_embeds
    plain = conditioner.encode(model, ["a cat"]).prompt_embeds

    assert torch.equal(ours[..., CLIP_L_WIDTH:], plain[..., CLIP_L_WIDTH:])  # CLIP-G dropped them
    assert not torch.equal(ours[..., :CLIP_L_WIDTH], plain[..., :CLIP_L_WIDTH])
    assert "do not have the text encoder's width" in caplog.text


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "missing", "sub/../../secret"])
def test_embedding_names_never_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "embeddings").mkdir()
    save_file({"emb": torch.ones(1, 4)}, tmp_path / "secret.safetensors")

    assert EmbeddingFolder(tmp_path / "embeddings").vectors(name, "clip_l") is None


def test_longer_embedding_for_one_encoder_gives_both_the_same_length(model: SdxlModel, tmp_path: Path) -> None:
    vectors = {"clip_l": torch.ones(80, CLIP_L_WIDTH), "clip_g": torch.ones(1, CLIP_G_WIDTH)}
    save_file(vectors, tmp_path / "long.safetensors")
    conditioner = TextConditioner(TOKENIZER, embeddings=EmbeddingFolder(tmp_path))

    assert conditioner.encode(model, ["embedding:long"]).prompt_embeds.shape[1] == 154
