"""The optional language model of "Fooocus V2", with a tiny random GPT-2 made here."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel

from modules.engine.expander import ExpansionModel, PromptExpander, find_model
from modules.expansion import expand_prompt

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["soft", "light", "golden", "highly", "detailed", "cinematic", "sharp", "focus", "elegant", "intricate"]
TEXT = " ".join(WORDS * 20 + ["a", "fox", "in", "the", "snow", "dog", "tree"] * 20)

pytestmark = pytest.mark.engine


def make_model(folder: Path, *, words: list[str] | None = None) -> Path:
    """A GPT-2 of two layers with random weights, a tokeniser that knows our words, and a list of words."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=256, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    if words is not None:
        (folder / "positive.txt").write_text("\n".join([*words, ""]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("expansion") / "fooocus_expansion", words=[*WORDS, "Absent"])


@pytest.fixture(scope="module")
def model(folder: Path) -> ExpansionModel:
    return ExpansionModel(folder)


def added(model: ExpansionModel, prompt: str, seed: int) -> list[str]:
    """The words that were added to a prompt."""
    text = model.expand(prompt, seed)
    assert text.startswith(prompt)
    return text.removeprefix(prompt).replace(",", " ").split()


def test_only_listed_words_come_and_each_at_most_once(model: ExpansionModel) -> None:
    for seed in range(8):
        words = added(model, "a fox", seed)
        assert words
        assert set(words) <= set(WORDS)
        assert len(words) == len(set(words))


def test_words_of_the_prompt_do_not_come_again(model: ExpansionModel) -> None:
    for seed in range(8):
        assert not {"golden", "light"} & set(added(model, "a golden light", seed))


def test_the_same_seed_gives_the_same_words_and_another_one_others(model: ExpansionModel, folder: Path) -> None:
    assert model.expand("a fox", 5) == ExpansionModel(folder).expand("a fox", 5)
    assert len({model.expand("a fox", seed) for seed in range(10)}) > 5


def test_a_seed_counts_modulo_32_bits_and_no_other_generator_is_touched(model: ExpansionModel) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert model.expand("a fox", 5) == model.expand("a fox", 5 + 2**32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prompt", ["a fox", "a fox in the snow, " * 12])
def test_the_chunk_is_filled_with_tokens(folder: Path, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = ExpansionModel(folder)
    decoded: list[list[int]] = []
    real = fresh._tokenizer.decode
    monkeypatch.setattr(fresh._tokenizer, "decode", lambda ids, **rest: decoded.append(ids) or real(ids, **rest))
    fresh.expand(prompt, 3)
    assert len(decoded[0]) % 75 == 0


def test_a_prompt_that_fills_its_chunk_stays_as_it_is(model: ExpansionModel) -> None:
    prompt = "a fox"
    while len(model._tokenizer(f"{prompt},")["input_ids"]) % 75:
        prompt += " fox"
    assert model.expand(prompt, 1) == prompt


def test_a_prompt_too_long_for_the_model_stays_as_it_is(model: ExpansionModel) -> None:
    prompt = " ".join(["fox"] * 240)
    assert model.expand(prompt, 1) == prompt


@pytest.mark.parametrize("prompt", ["", "  ", " , . "])
def test_nothing_comes_of_nothing(model: ExpansionModel, prompt: str) -> None:
    assert model.expand(prompt, 1) == ""


def test_spaces_and_ends_are_tidied(model: ExpansionModel) -> None:
    assert model.expand("  a   fox, ", 2) == model.expand("a fox", 2)


def test_a_model_without_a_word_list_writes_freely_until_it_ends(tmp_path: Path) -> None:
    free = ExpansionModel(make_model(tmp_path / "free"))
    words = set(added(free, "a fox", 1))
    assert not words <= set(WORDS)
    monkeyed = {free.expand("a fox", seed).count("<|endoftext|>") for seed in range(5)}
    assert monkeyed == {0}


# -- which model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def missing(tmp_path: Path) -> Path:
    (tmp_path / "prompt_expansion" / "fooocus_expansion").mkdir(parents=True)
    return tmp_path / "prompt_expansion" / "fooocus_expansion"


def test_without_a_model_our_own_words_are_used(missing: Path) -> None:
    expander = PromptExpander(missing)
    assert expander("a fox", 3) == expand_prompt("a fox", 3)
    assert not expander.has_model
    assert expander.problem == ""


def test_a_model_that_is_put_there_is_used_at_once_and_after_its_removal_no_more(missing: Path) -> None:
    expander = PromptExpander(missing)
    expander("a fox", 3)
    other = make_model(missing.parent / "magic", words=WORDS)
    assert find_model(missing) == other
    assert expander.has_model
    assert expander("a fox", 3) == ExpansionModel(other).expand("a fox", 3)
    (other / "config.json").unlink()
    assert expander("a fox", 3) == expand_prompt("a fox", 3)


def test_the_configured_folder_counts_before_its_siblings(missing: Path) -> None:
    make_model(missing.parent / "a_first_by_name", words=WORDS)
    missing.rmdir()
    make_model(missing, words=WORDS)
    assert find_model(missing) == missing


def test_a_broken_model_is_told_once_and_our_own_words_take_its_place(missing: Path) -> None:
    (missing / "config.json").write_text("{}")
    (missing / "pytorch_model.bin").write_bytes(b"not weights")
    expander = PromptExpander(missing)
    assert expander("a fox", 3) == expand_prompt("a fox", 3)
    assert "cannot be used" in expander.problem
    assert not expander.has_model
    expander.forget()
    assert expander.problem == ""


def test_the_worker_plans_with_the_model_of_the_user(tmp_path: Path) -> None:
    from modules.generate import EngineWorkbench
    from modules.plan import make_plan
    from modules.request import GenerationRequest
    from modules.settings import Settings

    model = make_model(tmp_path / "models" / "prompt_expansion" / "fooocus_expansion", words=WORDS)
    (tmp_path / "models" / "embedded").symlink_to(ROOT / "models" / "embedded")
    (tmp_path / "models" / "tokenizer").symlink_to(ROOT / "models" / "tokenizer")
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    settings = Settings.load(["--device", "cpu", "--temp-path", str(tmp_path / "temp")], env={}, root=tmp_path)
    settings.prepare()
    bench = EngineWorkbench(settings)
    request = GenerationRequest(
        prompt="a fox",
        style_selections=["Fooocus V2", "SAI Anime"],
        base_model_name="focale-tiny.safetensors",
        image_seed=4,
    )
    texts = make_plan(request, bench.resources.plan_resources()).images[0].texts
    assert texts.expansion == ExpansionModel(model).expand("a fox", 4)
    assert texts.positive_texts[-1] == texts.expansion
    assert texts.positive_pooled == len(texts.positive_texts) - 1
