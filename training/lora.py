"""Low-rank adapters on the UNet: put on, switched off for a teacher, and written as a kohya LoRA file.

Hu et al. 2021 (arXiv:2106.09685). The adapters are weight parametrisations: linear layers and convolutions alike.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modules.engine import keys
from training.nets import LAYERS

ATTENTION_ENDS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESNET_ENDS = ("conv1", "conv2")


class LowRank(nn.Module):
    """Adds up·down·(alpha / rank) to a layer's weight; `up` starts at zero, so that at first nothing changes.

    The factors are float32 whatever the weight is.

    Args:
        shape: of the weight: (out, in) or (out, in, height, width).
    """

    def __init__(self, shape: torch.Size, rank: int, alpha: float) -> None:
        super().__init__()
        inputs = shape[1:].numel()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(shape[0], rank))
        self.scale, self.alpha, self.enabled = alpha / rank, alpha, True

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the adapter's change."""
        if not self.enabled:
            return weight
        return weight + (self.up @ self.down * self.scale).view(weight.shape).to(weight.dtype)


def adapt(unet: nn.Module, *, rank: int, alpha: float | None = None, convolutions: bool = True) -> dict[str, LowRank]:
    """Freeze the UNet and put an adapter on every attention layer and, if asked, every resnet convolution.

    Returns:
        the adapters by the path of their layer.
    """
    unet.requires_grad_(False)
    ends = ATTENTION_ENDS + (RESNET_ENDS if convolutions else ())
    adapters = {}
    for path, layer in list(unet.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and path.endswith(ends):
            adapters[path] = LowRank(layer.weight.shape, rank, rank if alpha is None else alpha)
            parametrize.register_parametrization(layer, "weight", adapters[path])
    return adapters


@contextmanager
def switched_off(adapters: Mapping[str, LowRank]) -> Iterator[None]:
    """Within the block the network is the unadapted one."""
    for adapter in adapters.values():
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.enabled = True


def kohya_tensors(
    adapters: Mapping[str, LowRank], unet: nn.Module, originals: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The adapters under kohya's names for SDXL: the original layout's block numbers, joined by underscores.

    Args:
        originals: names (with prefix) and shapes of a checkpoint of the same architecture.
    """
    stems = [name.removeprefix(keys.UNET_PREFIX) for name in originals if name.startswith(keys.UNET_PREFIX)]
    by_path = {
        path.rpartition(".")[0]: stem.rpartition(".")[0] for stem, path in keys.unet_names(stems, LAYERS).items()
    }
    tensors = {}
    for path, adapter in adapters.items():
        shape = unet.get_submodule(path).weight.shape
        rank = len(adapter.down)
        name = f"lora_unet_{by_path[path].replace('.', '_')}"
        down, up = adapter.down.detach(), adapter.up.detach()
        if len(shape) == 4:
            down, up = down.view(rank, *shape[1:]), up[:, :, None, None]
        tensors[f"{name}.lora_down.weight"] = down.half().contiguous()
        tensors[f"{name}.lora_up.weight"] = up.half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(adapter.alpha)).half()
    return tensors


def save_lora(tensors: Mapping[str, Tensor], file: Path, *, title: str, rank: int) -> None:
    """Write a LoRA file with the metadata that other programs look for."""
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "modelspec.title": title,
        "modelspec.license": "Apache-2.0; artwork notices in NOTICE.md",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, metadata=metadata)
