"""Weights kept in half precision and computed in float32 give what float32 weights give, in half the memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.engine.condition import TextConditioner
from modules.engine.decode import decode_latents
from modules.engine.device import FORMATS, Precision, choose_policy
from modules.engine.formats import NumberFormat, Widening, computed_format, is_widened, widen_in_use
from modules.engine.freeu import freeu
from modules.engine.latents import LatentStatistics, encode_pixels
from modules.engine.loras import LoraChoice
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tensorfile import open_tensor_file
from modules.engine.text_projections import TextProjections
from modules.engine.tokens import ClipTokenizer
from modules.engine.weights import build_vae
from modules.plan import FreeU
from tests.engine.networks import widened_policy
from tests.tiny_sdxl import write_tiny

TOKENIZER = ClipTokenizer(Path(__file__).parents[2] / "models" / "tokenizer")
HALVES: tuple[Precision, ...] = ("fp16", "bf16")
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module", params=HALVES)
def stored(request: pytest.FixtureRequest) -> Precision:
    """The format that weights are kept in, which is the file's."""
    half: Precision = request.param
    return half


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, stored: Precision) -> Path:
    return write_tiny(tmp_path_factory.mktemp(stored) / "tiny.safetensors", dtype=FORMATS[stored])


@pytest.fixture(scope="module")
def whole(path: Path) -> SdxlModel:
    return ModelStore(choose_policy("cpu", precision="fp32")).base(path)


@pytest.fixture(scope="module")
def half(path: Path, stored: Precision) -> SdxlModel:
    return ModelStore(widened_policy(stored)).base(path)


@torch.inference_mode()
def _forward(model: SdxlModel, *, remembered: TextProjections | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    facts = model.facts
    text = torch.randn(2, 77, facts.unet.context_width, generator=generator)
    added = {"text_embeds": torch.randn(2, facts.pooled_width, generator=generator), "time_ids": torch.ones(2, 6)}
    x = torch.randn(2, 4, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)

    def output() -> Tensor:
        result: Tensor = model.unet(x, torch.tensor(500), text, added_cond_kwargs=added, return_dict=False)[0]
        return result

    if remembered is None:
        return output()
    with remembered.in_use(text):
        return output() + output()


def test_half_the_memory(whole: SdxlModel, half: SdxlModel) -> None:
    def size(model: SdxlModel) -> int:
        networks = (model.unet, model.clip_l, model.clip_g)
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())

    assert size(half) / size(whole) < 0.51


def test_kept_weights_are_those_of_the_file_and_everything_else_is_whole(half: SdxlModel, stored: Precision) -> None:
    weight = half.unet.get_parameter(f"{QUERY}.weight")
    assert weight.dtype == FORMATS[stored]
    assert computed_format(half.unet) == computed_format(half.clip_g) == torch.float32
    assert {p.dtype for p in half.unet.parameters() if p.ndim == 1} == {torch.float32}


def test_the_unet_computes_the_same(whole: SdxlModel, half: SdxlModel) -> None:
    torch.testing.assert_close(_forward(half), _forward(whole), rtol=0, atol=2e-5)


def test_texts_are_encoded_to_the_same_bits(whole: SdxlModel, half: SdxlModel) -> None:
    ours, expected = (TextConditioner(TOKENIZER).encode(model, ["a (cat:1.3)", "dog"]) for model in (half, whole))

    assert torch.equal(ours.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(ours.pooled_prompt_embeds, expected.pooled_prompt_embeds)


def test_the_vae_decodes_and_encodes_the_same(path: Path, stored: Precision, whole: SdxlModel) -> None:
    number_format = NumberFormat(computed=torch.float32, stored=FORMATS[stored])
    vae = build_vae(open_tensor_file(path), scaling_factor=0.13025, number_format=number_format)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    statistics = LatentStatistics(0.13025)

    def both_ways(chosen: nn.Module) -> tuple[Tensor, Tensor]:
        (image,) = decode_latents(chosen, latents, statistics=statistics)
        pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        encoded = encode_pixels(chosen, pixels, statistics=statistics, generator=torch.Generator().manual_seed(2))
        return torch.tensor(list(image.tobytes()), dtype=torch.int16), encoded

    (image, encoded), (expected, expected_encoded) = both_ways(vae), both_ways(whole.vae)
    assert is_widened(vae)
    assert (image - expected).abs().max() <= 1
    torch.testing.assert_close(encoded, expected_encoded, rtol=0, atol=2e-5)


def test_remembered_text_projections_are_widened_too(half: SdxlModel) -> None:
    assert torch.equal(_forward(half, remembered=TextProjections(half.unet)), 2 * _forward(half))


def test_freeu_acts_and_leaves_no_trace(half: SdxlModel, whole: SdxlModel) -> None:
    before = _forward(half)
    factors = FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2)

    with freeu(half.unet, factors), freeu(whole.unet, factors):
        strengthened, expected = _forward(half), _forward(whole)

    assert not torch.equal(strengthened, before)
    torch.testing.assert_close(strengthened, expected, rtol=0, atol=2e-5)
    assert torch.equal(_forward(half), before)


def test_a_lora_acts_and_is_undone_to_the_bit(half: SdxlModel, tmp_path: Path) -> None:
    before, weight = _forward(half), half.unet.get_parameter(f"{QUERY}.weight")
    stored = weight.detach().clone()
    lora = {f"unet.{QUERY}.lora_B.weight": torch.ones(64, 4), f"unet.{QUERY}.lora_A.weight": torch.ones(4, 64)}
    save_file(lora, tmp_path / "x.safetensors")

    with half.loras.merged([LoraChoice(tmp_path / "x.safetensors", 0.5)]):
        assert torch.equal(weight, (stored.float() + 2.0).to(stored.dtype))
        assert not torch.equal(_forward(half), before)

    assert torch.equal(weight, stored)
    assert torch.equal(_forward(half), before)


def test_widening_reuses_its_memory_and_keeps_the_layout() -> None:
    widened = Widening(torch.float32)
    large = torch.randn(8, 4, 3, 3).half().contiguous(memory_format=torch.channels_last)
    first = widened(large)
    assert torch.equal(first, large.float())
    assert first.is_contiguous(memory_format=torch.channels_last)

    second = widened(torch.ones(4, 4, dtype=torch.float16))

    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, torch.ones(4, 4))


def test_memory_made_in_inference_mode_serves_outside_of_it() -> None:
    widened = Widening(torch.float32)
    with torch.inference_mode():
        widened(torch.ones(4, dtype=torch.float16))

    assert widened(torch.zeros(4, dtype=torch.float16)).sum() == 0


def test_a_network_of_one_format_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1))

    widen_in_use(network, torch.float32)

    assert [type(layer) for layer in network] == [nn.Linear, nn.Conv2d]
    assert not is_widened(network)
