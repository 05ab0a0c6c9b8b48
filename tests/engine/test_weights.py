"""Checkpoints are recognised by their shapes and built into the very networks that diffusers' own converters give."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor

from modules.engine import keys
from modules.engine.device import choose_policy
from modules.engine.formats import NumberFormat
from modules.engine.store import ModelStore
from modules.engine.tensorfile import open_tensor_file
from modules.engine.weights import (
    Architecture,
    build_clip_g,
    build_clip_l,
    build_unet,
    build_vae,
    recognise,
)
from modules.errors import ModelFileMissing, ModelFileUnusable
from tests.engine.networks import widened_policy
from tests.tiny_sdxl import Layout, tiny_tensors, write_tiny

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded" / "focale-tiny.safetensors"
CONVOLUTION = {
    "unet": "down_blocks.0.resnets.0.conv1.weight",
    "vae": "decoder.up_blocks.0.resnets.0.conv1.weight",
}
G_PREFIX = "conditioner.embedders.1.model."
L_PREFIX = "conditioner.embedders.0.transformer.text_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint of every layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for layout in ("sdxl", "ssd1b", "refiner", "sd15"):
        write_tiny(folder / f"{layout}.safetensors", layout)
    return folder


def _store() -> ModelStore:
    return ModelStore(choose_policy("cpu", precision="fp32"))


@pytest.mark.parametrize(
    ("layout", "architecture"),
    [
        ("sdxl", Architecture.SDXL),
        ("ssd1b", Architecture.SSD_1B),
        ("refiner", Architecture.SDXL_REFINER),
        ("sd15", Architecture.SD15),
    ],
)
def test_layouts_are_told_apart_by_shapes(folder: Path, layout: str, architecture: Architecture) -> None:
    assert recognise(open_tensor_file(folder / f"{layout}.safetensors")).architecture is architecture


@pytest.mark.parametrize("layout", ["sdxl", "refiner", "sd15"])
def test_unet_equals_the_one_of_the_diffusers_converter(folder: Path, layout: Layout) -> None:
    file = open_tensor_file(folder / f"{layout}.safetensors")
    unet = build_unet(file, recognise(file), number_format=NumberFormat.plain(torch.float16))

    converted = convert_ldm_unet_checkpoint(tiny_tensors(layout), dict(unet.config))

    _assert_equal_states(unet.state_dict(), converted)


def test_distilled_unet_with_uneven_depths_runs(folder: Path) -> None:
    file = open_tensor_file(folder / "ssd1b.safetensors")
    facts = recognise(file)
    unet = build_unet(file, facts, number_format=NumberFormat.plain(torch.float32))
    depths = [len(attention.transformer_blocks) for attention in unet.up_blocks[0].attentions]

    with torch.inference_mode():
        out = unet(
            torch.zeros(1, 4, 8, 8),
            1.0,
            encoder_hidden_states=torch.zeros(1, 77, facts.unet.context_width),
            added_cond_kwargs={"text_embeds": torch.zeros(1, facts.pooled_width), "time_ids": torch.zeros(1, 6)},
        ).sample

    assert depths == [4, 4, 10]
    assert len(unet.mid_block.resnets) == 1
    assert out.isfinite().all()
    assert len(unet.state_dict()) == sum(name.startswith(keys.UNET_PREFIX) for name in file.shapes)


def test_vae_equals_the_one_of_the_diffusers_converter(folder: Path) -> None:
    file = open_tensor_file(folder / "sdxl.safetensors")
    vae = build_vae(file, scaling_factor=0.13025, number_format=NumberFormat.plain(torch.float16))

    _assert_equal_states(vae.state_dict(), convert_ldm_vae_checkpoint(tiny_tensors(), dict(vae.config)))


def test_second_text_encoder_equals_the_one_of_the_diffusers_converter(folder: Path) -> None:
    file = open_tensor_file(folder / "sdxl.safetensors")
    tower = build_clip_g(file, G_PREFIX, number_format=NumberFormat.plain(torch.float16))

    converted = convert_open_clip_checkpoint(tower, tiny_tensors(), prefix=G_PREFIX)

    _assert_equal_states(tower.state_dict(), converted)


def test_first_text_encoder_has_every_tensor_of_the_file(folder: Path) -> None:
    tower = build_clip_l(
        open_tensor_file(folder / "sdxl.safetensors"), L_PREFIX, number_format=NumberFormat.plain(torch.float16)
    )
    original = {name.removeprefix(L_PREFIX): t for name, t in tiny_tensors().items() if name.startswith(L_PREFIX)}

    _assert_equal_states(tower.state_dict(), original)
    assert tower.config.num_attention_heads == 1  # 64 channels a head, as published


def _assert_equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    names = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items() if "position_ids" not in name}
    mine = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    assert mine.keys() == names.keys()
    different = [name for name in mine if not torch.equal(mine[name], names[name].reshape(mine[name].shape))]
    assert different == []


def test_tensors_of_the_right_format_are_not_copied(folder: Path) -> None:
    file = open_tensor_file(folder / "sdxl.safetensors")
    unet = build_unet(file, recognise(file), number_format=NumberFormat.plain(torch.float16))

    mapped = file.read(f"{keys.UNET_PREFIX}input_blocks.1.0.in_layers.2.weight")

    assert unet.down_blocks[0].resnets[0].conv1.weight.data_ptr() == mapped.data_ptr()


def test_embedded_model_tells_what_its_shapes_cannot() -> None:
    file = open_tensor_file(EMBEDDED)
    facts = recognise(file)

    assert facts.architecture is Architecture.SDXL
    assert (facts.native_size, facts.time_id_width, facts.pooled_width) == (128, 32, 192)
    assert build_clip_l(file, L_PREFIX, number_format=NumberFormat.plain(torch.float32)).config.num_attention_heads == 4
    assert build_clip_g(file, G_PREFIX, number_format=NumberFormat.plain(torch.float32)).config.num_attention_heads == 6
    assert (
        build_vae(file, scaling_factor=0.13025, number_format=NumberFormat.plain(torch.float32)).config.norm_num_groups
        == 16
    )
    assert facts.latent_rgb.bias != (0.0, 0.0, 0.0)


def test_key_v_pred_means_v_prediction(tmp_path: Path) -> None:
    save_file(tiny_tensors() | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")

    assert recognise(open_tensor_file(tmp_path / "v.safetensors")).prediction == "v_prediction"


def test_shards_are_one_checkpoint(tmp_path: Path, folder: Path) -> None:
    names = sorted(tensors := tiny_tensors())
    for index in range(3):
        part = {name: tensors[name] for name in names[index::3]}
        save_file(part, tmp_path / f"model-{index + 1:05d}-of-00003.safetensors")

    sharded = _store().base(tmp_path / "model.safetensors")
    whole = _store().base(folder / "sdxl.safetensors")

    _assert_equal_states(sharded.unet.state_dict(), whole.unet.state_dict())


def test_missing_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")

    with pytest.raises(ModelFileMissing, match=r"model-00002-of-00002\.safetensors is missing"):
        open_tensor_file(tmp_path / "model.safetensors")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match=r"'none\.safetensors' is not in"):
        _store().base(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 5000, 0.5, -1])
def test_truncated_file_is_refused_before_loading(tmp_path: Path, folder: Path, kept: float) -> None:
    content = (folder / "sdxl.safetensors").read_bytes()
    length = int(len(content) * kept) if 0 < kept < 1 else int(kept)
    (tmp_path / "cut.safetensors").write_bytes(content[:length])

    with pytest.raises(ModelFileUnusable, match=r"truncated|not a safetensors file"):
        _store().base(tmp_path / "cut.safetensors")


def test_damaged_header_is_refused(tmp_path: Path) -> None:
    text = b'{"a": {"shape": "none"}}'
    (tmp_path / "bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    with pytest.raises(ModelFileUnusable, match="damaged safetensors header"):
        _store().base(tmp_path / "bad.safetensors")


def test_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.safetensors")

    with pytest.raises(ModelFileUnusable, match="not a safetensors file but a pickle"):
        _store().base(tmp_path / "model.safetensors")


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "made"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (victim,)  # type: ignore[return-value]

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))

    with pytest.raises(ModelFileUnusable, match="tensors only"):
        _store().base(tmp_path / "evil.ckpt")
    assert not victim.exists()


def test_ckpt_of_tensors_loads_like_safetensors(tmp_path: Path, folder: Path) -> None:
    torch.save({"state_dict": tiny_tensors(), "epoch": 3}, tmp_path / "model.ckpt")

    model = _store().base(tmp_path / "model.ckpt")

    _assert_equal_states(model.unet.state_dict(), _store().base(folder / "sdxl.safetensors").unet.state_dict())


@pytest.mark.parametrize("layout", ["refiner", "sd15"])
def test_refiner_layouts_are_no_base_models(folder: Path, layout: str) -> None:
    store = _store()

    with pytest.raises(ModelFileUnusable, match="cannot be used as a base model"):
        store.base(folder / f"{layout}.safetensors")
    assert store.refiner(folder / f"{layout}.safetensors").text_encoder is None


def test_file_without_a_unet_is_refused(tmp_path: Path) -> None:
    save_file({"lora.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")

    with pytest.raises(ModelFileUnusable, match="is not an SDXL checkpoint"):
        _store().base(tmp_path / "lora.safetensors")


def test_checkpoint_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors[f"{keys.UNET_PREFIX}out.2.bias"]
    save_file(tensors, tmp_path / "hole.safetensors")

    with pytest.raises(ModelFileUnusable, match=r"lacks 1 tensors .* 'conv_out.bias'"):
        _store().base(tmp_path / "hole.safetensors")


def test_store_keeps_models_until_their_file_changes(tmp_path: Path) -> None:
    store = _store()
    path = write_tiny(tmp_path / "model.safetensors")
    first = store.base(path)

    assert store.base(path) is first
    write_tiny(tmp_path / "next.safetensors", seed=1).replace(path)
    assert store.base(path).identity != first.identity


def test_store_lets_old_models_go_beyond_its_bound(folder: Path) -> None:
    store = ModelStore(choose_policy("cpu", precision="fp32"), memory_limit_mib=50)
    base = store.base(folder / "sdxl.safetensors")

    store.refiner(folder / "refiner.safetensors")

    assert store.base(folder / "sdxl.safetensors") is not base
    assert store.memory_mib() > 0


def test_vae_file_in_either_naming_gives_the_same_vae(tmp_path: Path, folder: Path) -> None:
    store = _store()
    inside = store.base(folder / "sdxl.safetensors").vae
    prefix = keys.VAE_PREFIX
    original = {n.removeprefix(prefix): t for n, t in tiny_tensors().items() if n.startswith(prefix)}
    save_file(original, tmp_path / "original.safetensors")
    plain = {name: tensor.contiguous() for name, tensor in inside.state_dict().items()}
    save_file(plain, tmp_path / "diffusers.safetensors")

    for name in ("original", "diffusers"):
        vae = store.vae(tmp_path / f"{name}.safetensors", scaling_factor=0.13025)
        _assert_equal_states(vae.state_dict(), inside.state_dict())


def test_inpaint_checkpoint_is_recognised_by_its_input_channels(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    name = f"{keys.UNET_PREFIX}input_blocks.0.0.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name], tensors[name][:, :1]], dim=1)
    save_file(tensors, tmp_path / "inpaint.safetensors")

    facts = recognise(open_tensor_file(tmp_path / "inpaint.safetensors"))

    assert facts.architecture is Architecture.SDXL_INPAINT
    assert facts.unet.in_channels == 9


def test_metadata_of_preview_colours_is_read(tmp_path: Path) -> None:
    rgb = {"factors": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], "bias": [0.5, 0, 0]}
    save_file(tiny_tensors(), tmp_path / "rgb.safetensors", metadata={"focale.latent_rgb": json.dumps(rgb)})

    facts = recognise(open_tensor_file(tmp_path / "rgb.safetensors"))

    assert facts.latent_rgb.factors[1] == (0.0, 1.0, 0.0)
    assert facts.latent_rgb.bias == (0.5, 0.0, 0.0)


def test_convolutions_get_the_fast_layout_unless_they_are_views_of_the_file(folder: Path) -> None:
    plain = _store().base(folder / "sdxl.safetensors")
    widened = ModelStore(widened_policy("fp16")).base(folder / "sdxl.safetensors")

    for network in ("unet", "vae"):
        assert (
            getattr(plain, network).get_parameter(CONVOLUTION[network]).is_contiguous(memory_format=torch.channels_last)
        )
    assert widened.unet.get_parameter(CONVOLUTION["unet"]).is_contiguous()


def test_networks_go_to_the_device_and_the_vae_to_its_own(folder: Path) -> None:
    policy = replace(choose_policy("cpu", precision="fp32"), device=torch.device("meta"))

    model = ModelStore(policy).base(folder / "sdxl.safetensors")

    assert model.unet.device.type == model.clip_l.device.type == model.clip_g.device.type == "meta"
    assert model.vae.device.type == "cpu"


def test_shards_of_a_name_with_brackets_are_found(tmp_path: Path) -> None:
    for index in (1, 2):
        save_file({f"t{index}": torch.zeros(1)}, tmp_path / f"a[v1]-{index:05d}-of-00002.safetensors")

    file = open_tensor_file(tmp_path / "a[v1].safetensors")

    assert set(file.shapes) == {"t1", "t2"}
    assert torch.equal(file.read("t2"), torch.zeros(1))


def test_unet_of_unknown_build_is_named_as_such(tmp_path: Path) -> None:
    tensors = {name: t for name, t in tiny_tensors().items() if not name.startswith("conditioner.")}
    save_file(tensors, tmp_path / "odd.safetensors")

    with pytest.raises(ModelFileUnusable, match="is of an unknown build and cannot be used as a base model"):
        _store().base(tmp_path / "odd.safetensors")
