"""LoRAs change exactly the layers they name, by the formula of their kind, and leave no trace when taken out."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules.engine.device import choose_policy
from modules.engine.loras import LoraChoice
from modules.engine.store import ModelStore, SdxlModel
from modules.errors import ModelFileMissing
from tests.engine.networks import widened_policy
from tests.tiny_sdxl import write_tiny

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
QUERY_KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "down_blocks.0.resnets.0.conv1"
CONV_KOHYA = "lora_unet_input_blocks_1_0_in_layers_2"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> SdxlModel:
    """A tiny SDXL model in float32."""
    path = write_tiny(tmp_path_factory.mktemp("lora") / "tiny.safetensors")
    return ModelStore(choose_policy("cpu", precision="fp32")).base(path)


@pytest.fixture
def model(loaded: SdxlModel) -> Iterator[SdxlModel]:
    """The model, checked to be pristine again after the test has restored it."""
    before = _state(loaded)
    yield loaded
    loaded.loras.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(loaded).items())


def _state(model: SdxlModel) -> dict[str, Tensor]:
    networks = {"unet": model.unet, "te1": model.clip_l, "te2": model.clip_g}
    return {
        f"{short}.{name}": tensor.clone()
        for short, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def _lora(folder: Path, tensors: dict[str, Tensor], name: str = "x.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def _weight(model: SdxlModel, path: str = QUERY) -> Tensor:
    weight = model.unet.get_parameter(f"{path}.weight")
    return weight.detach().clone()


UP, DOWN = _random(64, 4, seed=1), _random(4, 64, seed=2)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (f"{QUERY_KOHYA}.lora_up.weight", f"{QUERY_KOHYA}.lora_down.weight"),
        (
            f"lora_unet_{QUERY.replace('.', '_')}.lora_up.weight",
            f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight",
        ),
        (f"unet.{QUERY}.lora_B.weight", f"unet.{QUERY}.lora_A.weight"),
        (f"{QUERY}.lora.up.weight", f"{QUERY}.lora.down.weight"),
        (
            f"unet.{QUERY.replace('.to_q', '')}.processor.to_q_lora.up.weight",
            f"unet.{QUERY.replace('.to_q', '')}.processor.to_q_lora.down.weight",
        ),
        (f"base_model.model.{QUERY}.lora_B.weight", f"base_model.model.{QUERY}.lora_A.weight"),
    ],
)
def test_every_spelling_finds_its_layer(model: SdxlModel, tmp_path: Path, up: str, down: str) -> None:
    before = _weight(model)
    (report,) = model.loras.select([LoraChoice(_lora(tmp_path, {up: UP, down: DOWN}), 0.5)])

    assert (report.merged, report.unmatched, report.skipped) == (1, (), False)
    torch.testing.assert_close(_weight(model), before + 0.5 * UP @ DOWN)


def test_alpha_scales_by_the_rank(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)
    path = _lora(
        tmp_path,
        {
            f"{QUERY_KOHYA}.lora_up.weight": UP,
            f"{QUERY_KOHYA}.lora_down.weight": DOWN,
            f"{QUERY_KOHYA}.alpha": torch.tensor(2.0),
        },
    )
    model.loras.select([LoraChoice(path, 1.0)])

    torch.testing.assert_close(_weight(model), before + (2 / 4) * UP @ DOWN)


def test_attention_output_is_found_without_its_index(model: SdxlModel, tmp_path: Path) -> None:
    path = f"{QUERY.replace('to_q', 'to_out')}"
    before = _weight(model, f"{path}.0")
    model.loras.select(
        [LoraChoice(_lora(tmp_path, {f"unet.{path}.lora_B.weight": UP, f"unet.{path}.lora_A.weight": DOWN}), 1.0)]
    )

    torch.testing.assert_close(_weight(model, f"{path}.0"), before + UP @ DOWN)


@pytest.mark.parametrize(
    ("network", "prefix"),
    [
        ("te1", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("te1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("te1", f"text_encoder.text_model.{TEXT}"),
        ("te2", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
        ("te2", f"text_encoder_2.text_model.{TEXT}"),
    ],
)
def test_text_encoders_are_merged_too(model: SdxlModel, tmp_path: Path, network: str, prefix: str) -> None:
    tower = model.clip_l if network == "te1" else model.clip_g
    name = f"{TEXT}.weight" if network == "te1" else f"text_model.{TEXT}.weight"
    before = tower.get_parameter(name).detach().clone()
    up, down = _random(before.shape[0], 2), _random(2, before.shape[1])

    model.loras.select(
        [LoraChoice(_lora(tmp_path, {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down}), 1.0)]
    )

    torch.testing.assert_close(tower.get_parameter(name).detach(), before + up @ down)


def test_convolution_with_and_without_a_core(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model, CONV)
    up, down = _random(64, 4, 1, 1), _random(4, 64, 3, 3)
    model.loras.select(
        [LoraChoice(_lora(tmp_path, {f"{CONV_KOHYA}.lora_up.weight": up, f"{CONV_KOHYA}.lora_down.weight": down}), 1.0)]
    )
    expected = torch.einsum("or,rikl->oikl", up.flatten(1), down)
    torch.testing.assert_close(_weight(model, CONV), before + expected)

    mid, narrow = _random(4, 4, 3, 3, seed=5), _random(4, 64, 1, 1, seed=6)
    tucker = {
        f"{CONV_KOHYA}.lora_up.weight": up,
        f"{CONV_KOHYA}.lora_mid.weight": mid,
        f"{CONV_KOHYA}.lora_down.weight": narrow,
    }
    model.loras.select([LoraChoice(_lora(tmp_path, tucker, "tucker.safetensors"), 1.0)])
    expected = sum(
        up[:, r, 0, 0][:, None, None, None] * mid[r, s][None, None] * narrow[s, :, 0, 0][None, :, None, None]
        for r in range(4)
        for s in range(4)
    )
    torch.testing.assert_close(_weight(model, CONV), before + expected)


def test_loha_is_an_elementwise_product(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)
    a = {name: _random(64, 3, seed=i) for i, name in enumerate(("hada_w1_a", "hada_w2_a"))}
    b = {name: _random(3, 64, seed=i + 5) for i, name in enumerate(("hada_w1_b", "hada_w2_b"))}
    tensors = {f"{QUERY_KOHYA}.{name}": tensor for name, tensor in (a | b).items()}
    path = _lora(tmp_path, tensors | {f"{QUERY_KOHYA}.alpha": torch.tensor(6.0)})

    model.loras.select([LoraChoice(path, 1.0)])

    expected = 2 * (a["hada_w1_a"] @ b["hada_w1_b"]) * (a["hada_w2_a"] @ b["hada_w2_b"])
    torch.testing.assert_close(_weight(model), before + expected)


def test_lokr_is_a_kronecker_product(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)
    whole, a, b = _random(4, 8), _random(16, 2, seed=1), _random(2, 8, seed=2)
    tensors = {"lokr_w1": whole, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    path = _lora(tmp_path, {f"{QUERY_KOHYA}.{name}": tensor for name, tensor in tensors.items()})

    model.loras.select([LoraChoice(path, 1.0)])

    torch.testing.assert_close(_weight(model), before + 0.5 * torch.kron(whole, a @ b))


def test_glora_looks_at_the_weight_itself(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)
    a1, a2, b1, b2 = _random(4, 64), _random(64, 4, seed=1), _random(4, 64, seed=2), _random(64, 4, seed=3)
    tensors = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    path = _lora(tmp_path, {f"{QUERY_KOHYA}.{name}.weight": tensor for name, tensor in tensors.items()})

    model.loras.select([LoraChoice(path, 1.0)])

    torch.testing.assert_close(_weight(model), before + b2 @ b1 + (before @ a2) @ a1)


def test_differences_are_added_to_weights_biases_and_norms(model: SdxlModel, tmp_path: Path) -> None:
    norm = "down_blocks.0.resnets.0.norm1"
    before, bias = _weight(model, CONV), model.unet.get_parameter(f"{CONV}.bias").clone()
    scale = _weight(model, norm)
    tensors = {
        f"{CONV_KOHYA}.diff": _random(64, 64, 3, 3),
        f"{CONV_KOHYA}.diff_b": _random(64),
        f"lora_unet_{norm.replace('.', '_')}.w_norm": _random(64, seed=3),
    }
    model.loras.select([LoraChoice(_lora(tmp_path, tensors), -0.5)])

    torch.testing.assert_close(_weight(model, CONV), before - 0.5 * tensors[f"{CONV_KOHYA}.diff"])
    torch.testing.assert_close(model.unet.get_parameter(f"{CONV}.bias"), bias - 0.5 * _random(64))
    torch.testing.assert_close(_weight(model, norm), scale - 0.5 * _random(64, seed=3))


def test_several_loras_add_up_and_selecting_again_starts_from_pristine_weights(
    model: SdxlModel, tmp_path: Path
) -> None:
    before = _weight(model)
    first = LoraChoice(_lora(tmp_path, _plain(UP, DOWN), "a.safetensors"), 1.0)
    second = LoraChoice(_lora(tmp_path, _plain(DOWN.t(), UP.t()), "b.safetensors"), 0.25)

    model.loras.select([first, second])
    torch.testing.assert_close(_weight(model), before + UP @ DOWN + 0.25 * DOWN.t() @ UP.t())
    both = _weight(model)
    model.loras.select([second])
    model.loras.select([first, second])

    assert torch.equal(_weight(model), both)


def test_a_weight_and_its_opposite_cancel(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)
    path = _lora(tmp_path, _plain(UP, DOWN))

    model.loras.select([LoraChoice(path, 0.7), LoraChoice(path, -0.7)])

    torch.testing.assert_close(_weight(model), before)


def _plain(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    return {f"{QUERY_KOHYA}.lora_up.weight": up, f"{QUERY_KOHYA}.lora_down.weight": down}


def test_twelve_unknown_keys_are_borne_and_thirteen_are_not(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)
    known = _plain(UP, DOWN)
    for count, skipped in ((12, False), (13, True)):
        unknown = {f"lora_unet_elsewhere_{index}.lora_up.weight": torch.zeros(1) for index in range(count)}
        path = _lora(tmp_path, known | unknown, f"{count}.safetensors")
        (report,) = model.loras.select([LoraChoice(path, 1.0)])

        assert report.skipped is skipped
        assert len(report.unmatched) == count
        assert torch.equal(_weight(model), before) is skipped


def test_lora_of_another_width_is_unmatched(model: SdxlModel, tmp_path: Path) -> None:
    path = _lora(tmp_path, _plain(_random(640, 4), _random(4, 640)))

    (report,) = model.loras.select([LoraChoice(path, 1.0)])

    assert report.merged == 0
    assert len(report.unmatched) == 2


def test_weight_zero_changes_nothing(model: SdxlModel, tmp_path: Path) -> None:
    before = _state(model)

    model.loras.select([LoraChoice(_lora(tmp_path, _plain(UP, DOWN)), 0.0)])

    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(model).items())


def test_version_tells_merged_weights_apart(model: SdxlModel, tmp_path: Path) -> None:
    choice = LoraChoice(_lora(tmp_path, _plain(UP, DOWN)), 1.0)
    pristine = model.version
    with model.loras.merged([choice]) as reports:
        assert reports[0].merged == 1
        assert model.version != pristine
    assert model.version == pristine


def test_missing_file_leaves_pristine_weights(model: SdxlModel, tmp_path: Path) -> None:
    before = _weight(model)

    with pytest.raises(ModelFileMissing):
        model.loras.select([LoraChoice(tmp_path / "none.safetensors", 1.0)])
    assert torch.equal(_weight(model), before)


def test_half_precision_weights_are_merged_in_float32_and_restored_exactly(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path_factory.mktemp("half") / "tiny.safetensors")
    half = ModelStore(widened_policy("bf16")).base(path)
    before = _weight(half)
    small = _plain(UP * 0.1, DOWN * 0.1)

    choices = [LoraChoice(_lora(tmp_path, small, f"{index}.safetensors"), 1.0) for index in range(3)]
    with half.loras.merged(choices):
        merged = _weight(half)

    assert torch.equal(merged, (before.float() + 3 * (UP * 0.1) @ (DOWN * 0.1)).to(torch.bfloat16))
    assert torch.equal(_weight(half), before)


@pytest.mark.parametrize("by_output", [True, False], ids=["output channels", "input channels"])
@pytest.mark.parametrize(
    ("layer", "kohya", "down_shape"), [(QUERY, QUERY_KOHYA, (4, 64)), (CONV, CONV_KOHYA, (4, 64, 3, 3))]
)
def test_dora_gives_the_changed_weight_norms_of_its_own(
    model: SdxlModel, tmp_path: Path, layer: str, kohya: str, down_shape: tuple[int, ...], by_output: bool
) -> None:
    """DoRA, arXiv:2402.09353, eq. 5, at half its strength; magnitudes per output, or per input as LyCORIS once did."""
    before = _weight(model, layer)
    down = _random(*down_shape, seed=3)
    ones = [1] * (before.ndim - 2)
    magnitude = _random(64, seed=4).abs().reshape([64, 1, *ones] if by_output else [1, 64, *ones]) + 0.5
    tensors = {
        f"{kohya}.lora_up.weight": UP.reshape(64, 4, *ones),
        f"{kohya}.lora_down.weight": down,
        f"{kohya}.alpha": torch.tensor(2.0),
        f"{kohya}.dora_scale": magnitude,
    }

    model.loras.select([LoraChoice(_lora(tmp_path, tensors), 0.5)])

    moved = before + 0.5 * (UP @ down.flatten(1)).reshape(before.shape)
    axes = [axis for axis in range(before.ndim) if axis != (0 if by_output else 1)]
    expected = magnitude * moved / moved.square().sum(axes, keepdim=True).sqrt()
    torch.testing.assert_close(_weight(model, layer), before + 0.5 * (expected - before))


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_of_diffusers_with_the_norms_of_the_weight_itself_changes_nothing(
    model: SdxlModel, tmp_path: Path, end: str
) -> None:
    before = _weight(model)
    tensors = {
        f"unet.{QUERY}.lora_B.weight": torch.zeros(64, 4),
        f"unet.{QUERY}.lora_A.weight": DOWN,
        f"unet.{QUERY}.{end}": before.norm(dim=1),
    }

    (report,) = model.loras.select([LoraChoice(_lora(tmp_path, tensors), 1.0)])

    assert (report.merged, report.unmatched) == (1, ())
    torch.testing.assert_close(_weight(model), before)


def test_dora_of_another_width_is_not_merged_without_its_magnitudes(model: SdxlModel, tmp_path: Path) -> None:
    tensors = {
        f"{QUERY_KOHYA}.lora_up.weight": UP,
        f"{QUERY_KOHYA}.lora_down.weight": DOWN,
        f"{QUERY_KOHYA}.dora_scale": torch.ones(1, 7),
    }

    (report,) = model.loras.select([LoraChoice(_lora(tmp_path, tensors), 1.0)])

    assert report.merged == 0
    assert len(report.unmatched) == 3
