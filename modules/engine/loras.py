"""LoRA files merged into the weights of a model, and taken out again to the last bit."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.engine.tensorfile import Identity, TensorFile, file_identity, open_tensor_file
from modules.loads import loading

logger = logging.getLogger(__name__)

UNMATCHED_LIMIT = 12  # a file with more keys of no known layer is made for another model and left out as a whole
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# End of a key → what the tensor is; the longest matching end counts.
PARTS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".alpha": "alpha",
    ".a1.weight": "a1",
    ".a2.weight": "a2",
    ".b1.weight": "b1",
    ".b2.weight": "b2",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
} | {
    f".{part}": part
    for part in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
PART_ENDS = sorted(PARTS, key=len, reverse=True)

Parts = dict[str, Tensor]
Changes = dict[tuple[str, str], list[tuple[Parts, float]]]  # (network, parameter) → LoRAs with their weights


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and the weight it is merged with; 0 leaves it out."""

    path: Path
    weight: float


@dataclass(frozen=True)
class LoraReport:
    """What became of one LoRA.

    merged: layers it changed.
    unmatched: its keys that fit no layer of the model.
    skipped: it was left out as a whole, because more than `UNMATCHED_LIMIT` keys fit nothing.
    """

    name: str
    merged: int
    unmatched: tuple[str, ...]
    skipped: bool


@dataclass(frozen=True)
class Layer:
    """One layer of a network that LoRAs can change."""

    network: str
    path: str


@dataclass
class LoraStack:
    """The LoRAs merged into one model's UNet and text encoders.

    networks: by their names "unet", "text_encoder", "text_encoder_2".
    unet_names: original name of every UNet parameter → its diffusers name.
    """

    networks: Mapping[str, nn.Module]
    unet_names: Mapping[str, str]
    selected: tuple[tuple[Identity, float], ...] = ()
    _reports: list[LoraReport] = field(default_factory=list)
    _originals: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _layers: dict[str, Layer] | None = None

    def select(self, choices: Sequence[LoraChoice]) -> list[LoraReport]:
        """Merges exactly these LoRAs, in this order, into the pristine weights; a repeated choice costs nothing.

        Raises:
            ModelFileMissing, ModelFileUnusable: a file is missing or damaged; the weights are then pristine.
        """
        wanted = tuple((file_identity(choice.path), choice.weight) for choice in choices)
        if wanted == self.selected:
            return list(self._reports)
        self.restore()
        reports = self._merge(choices)
        self.selected, self._reports = wanted, reports
        return list(reports)

    @contextmanager
    def merged(self, choices: Sequence[LoraChoice]) -> Iterator[list[LoraReport]]:
        """Merges LoRAs for the length of a `with` block and restores the pristine weights after it."""
        try:
            yield self.select(choices)
        finally:
            self.restore()

    def restore(self) -> None:
        """Puts the pristine weights back, bit for bit."""
        for (network, name), original in self._originals.items():
            parameter = self.networks[network].get_parameter(name)
            parameter.data = original.to(parameter.device)
        self._originals.clear()
        self.selected, self._reports = (), []

    @torch.no_grad()
    def _merge(self, choices: Sequence[LoraChoice]) -> list[LoraReport]:
        changes: Changes = {}
        reports = []
        for choice in choices:
            with loading("lora", choice.path.name):
                reports.append(self._gather(changes, choice))
        for key, steps in changes.items():
            self._change(key, steps)
        return reports

    def _gather(self, changes: Changes, choice: LoraChoice) -> LoraReport:
        """Notes what one LoRA changes, unless too much of it fits no layer."""
        found, unmatched = self._match(open_tensor_file(choice.path))
        skipped = len(unmatched) > UNMATCHED_LIMIT
        if not skipped and choice.weight:
            for layer, parts in found.items():
                for end in _changed_parameters(parts):
                    changes.setdefault((layer.network, f"{layer.path}.{end}"), []).append((parts, choice.weight))
        if skipped:
            logger.warning("%s is left out: %d of its keys fit no layer.", choice.path.name, len(unmatched))
        merged = 0 if skipped or not choice.weight else len(found)
        return LoraReport(choice.path.name, merged, tuple(unmatched), skipped)

    def _change(self, key: tuple[str, str], steps: Iterable[tuple[Parts, float]]) -> None:
        """Changes one parameter by several LoRAs in turn: summed in float32, of one parameter at a time."""
        network, name = key
        parameter = self.networks[network].get_parameter(name)
        total = parameter.data.to(torch.float32, copy=True)
        for parts, weight in steps:
            device_parts = {role: tensor.to(total.device, torch.float32) for role, tensor in parts.items()}
            change = device_parts["diff_b"] if name.endswith(".bias") else weight_change(device_parts, total)
            total += weight * change.reshape(total.shape)
        # Where the networks live on an accelerator, its memory is too precious for the pristine copies.
        self._originals[key] = parameter.data.cpu()
        parameter.data = total.to(parameter.dtype)

    def _match(self, file: TensorFile) -> tuple[dict[Layer, Parts], list[str]]:
        """Tensors of a LoRA file by layer, and the keys that fit none."""
        found: dict[Layer, Parts] = {}
        sources: dict[Layer, list[str]] = {}
        unmatched: list[str] = []
        layers = self._known_layers()
        for key in file.shapes:
            end = next((end for end in PART_ENDS if key.endswith(end)), None)
            layer = layers.get(key[: -len(end)].removeprefix("base_model.model.")) if end else None
            if end is None or layer is None:
                unmatched.append(key)
                continue
            found.setdefault(layer, {})[PARTS[end]] = file.read(key)
            sources.setdefault(layer, []).append(key)
        for layer in [layer for layer, parts in found.items() if not self._fits(layer, parts)]:
            del found[layer]
            unmatched.extend(sources[layer])
        return found, unmatched

    def _fits(self, layer: Layer, parts: Parts) -> bool:
        """Whether the tensors make a change of the layer's own shape; files for other models often do not."""
        parameters = dict(self.networks[layer.network].get_submodule(layer.path).named_parameters(recurse=False))
        if "diff_b" in parts and ("bias" not in parameters or parameters["bias"].shape != parts["diff_b"].shape):
            return False
        if not parts.keys() - {"diff_b", "alpha"}:
            return "diff_b" in parts
        try:
            change = weight_change(
                {name: tensor.to("meta", torch.float32) for name, tensor in parts.items()},
                parameters["weight"].to("meta", torch.float32),
            )
        except (KeyError, RuntimeError):
            return False
        return change.numel() == parameters["weight"].numel()

    def _known_layers(self) -> dict[str, Layer]:
        if self._layers is None:
            self._layers = dict(self._unet_layers()) if "unet" in self.networks else {}
            for name, shorts in (("text_encoder", ("te1", "te")), ("text_encoder_2", ("te2",))):
                if name in self.networks:
                    self._layers |= dict(_text_layers(name, self.networks[name], shorts))
        return self._layers

    def _unet_layers(self) -> Iterable[tuple[str, Layer]]:
        """Every spelling of every UNet layer: original and diffusers paths, flat or dotted, with usual prefixes."""
        for original_parameter, parameter in self.unet_names.items():
            original, path = original_parameter.rpartition(".")[0], parameter.rpartition(".")[0]
            layer = Layer("unet", path)
            yield f"lora_unet_{original.replace('.', '_')}", layer
            yield f"lora_unet_{path.replace('.', '_')}", layer
            for prefix in ("diffusion_model.", "model.diffusion_model."):
                yield prefix + original, layer
            for spelling in _attention_spellings(path):
                yield spelling, layer
                yield f"unet.{spelling}", layer


def _changed_parameters(parts: Parts) -> Iterable[str]:
    """Which parameters of a layer a LoRA changes: "weight", "bias" or both."""
    if parts.keys() - {"diff_b", "alpha"}:
        yield "weight"
    if "diff_b" in parts:
        yield "bias"


def _attention_spellings(path: str) -> Iterable[str]:
    """Dotted spellings of a diffusers path; old files write attention layers as parts of a processor."""
    yield path
    block, _, layer = path.rpartition(".to_")
    if layer in ("q", "k", "v"):
        yield f"{block}.processor.to_{layer}"
    if layer == "out.0":
        yield f"{block}.to_out"
        yield f"{block}.processor.to_out"


def _text_layers(name: str, tower: nn.Module, shorts: Sequence[str]) -> Iterable[tuple[str, Layer]]:
    """Every spelling of the layers of a text encoder, with and without transformers' `text_model.`."""
    for path, module in tower.named_modules():
        if not isinstance(module, nn.Linear) or path.rpartition(".")[2] not in TEXT_LAYERS:
            continue
        inner = path.removeprefix("text_model.")
        layer = Layer(name, path)
        for short in shorts:
            yield f"lora_{short}_text_model_{inner.replace('.', '_')}", layer
        yield f"{name}.text_model.{inner}", layer
        yield f"{name}.{inner}", layer


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    """What a LoRA of weight 1 adds to a layer's weight, by the published formula of its kind.

    Args:
        parts: the LoRA's tensors for this layer by role, all of one format.
        weight: the layer's weight before; only GLoRA and DoRA look at its values.
    Returns:
        As many values as `weight` has, of any shape.
    Raises:
        KeyError: a tensor is missing; RuntimeError: shapes do not fit together.
    """
    change = _direction_change(parts, weight)
    return _decomposed(parts["magnitude"], change.reshape(weight.shape), weight) if "magnitude" in parts else change


def _direction_change(parts: Parts, weight: Tensor) -> Tensor:
    if "diff" in parts:
        return parts["diff"]
    if "up" in parts:
        return _lora(parts)
    if "hada_w1_a" in parts:
        return _loha(parts)
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        return _lokr(parts)
    return _glora(parts, weight)


def _decomposed(magnitude: Tensor, change: Tensor, weight: Tensor) -> Tensor:
    """m · (W + ΔW) / ‖W + ΔW‖ − W: the changed weight gets norms of its own (DoRA, arXiv:2402.09353, eq. 5).

    The norms are those of the output channels where there is one magnitude for each, else of the input channels,
    as the first versions of LyCORIS had it.
    """
    moved = weight + change
    outputs, inputs = weight.shape[:2]
    ones = (1,) * (weight.ndim - 2)
    if magnitude.shape[0] == outputs and magnitude.numel() == outputs:
        shape, across = (outputs, 1, *ones), tuple(range(1, weight.ndim))
    else:
        shape, across = (1, inputs, *ones), (0, *range(2, weight.ndim))
    norms: Tensor = torch.linalg.vector_norm(moved, dim=across, keepdim=True)
    return magnitude.reshape(shape) * moved / norms.clamp(min=torch.finfo(moved.dtype).tiny) - weight


def _scale(parts: Parts, rank: int) -> Tensor | float:
    return parts["alpha"] / rank if "alpha" in parts else 1.0


def _lora(parts: Parts) -> Tensor:
    """up @ down · alpha / rank (arXiv:2106.09685); with a Tucker core in the middle for some convolutions."""
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:
        change = torch.einsum("or,rskl,si->oikl", up, parts["mid"], down.flatten(1))
        return change * _scale(parts, down.shape[0])
    return up @ down.flatten(1) * _scale(parts, down.shape[0])


def _loha(parts: Parts) -> Tensor:
    """The elementwise product of two low-rank matrices (LyCORIS, arXiv:2309.14859)."""
    factors = [
        _core(parts.get(f"hada_t{index}"), parts[f"hada_w{index}_a"], parts[f"hada_w{index}_b"]) for index in (1, 2)
    ]
    return factors[0] * factors[1] * _scale(parts, parts["hada_w1_b"].shape[0])


def _lokr(parts: Parts) -> Tensor:
    """The Kronecker product of two matrices, each whole or of low rank (LyCORIS, arXiv:2309.14859)."""
    rank = 0
    factors = []
    for index in (1, 2):
        whole = parts.get(f"lokr_w{index}")
        if whole is None:
            low = parts[f"lokr_w{index}_b"]
            whole = _core(parts.get("lokr_t2") if index == 2 else None, parts[f"lokr_w{index}_a"], low)
            rank = low.shape[0]
        factors.append(whole)
    left, right = factors
    if right.ndim == 4:
        left = left[:, :, None, None]
    return torch.kron(left, right) * (_scale(parts, rank) if rank else 1.0)


def _core(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _glora(parts: Parts, weight: Tensor) -> Tensor:
    """b2 @ b1 + (W @ a2) @ a1 (arXiv:2306.07967)."""
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    change = b2 @ b1 + (weight.flatten(1) @ a2) @ a1
    return change * _scale(parts, parts["a1"].shape[0])
