"""Loaded models: checkpoints and VAE files by path, kept by content, within a bound of memory."""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from modules.engine import keys
from modules.engine.device import DevicePolicy
from modules.engine.formats import is_widened
from modules.engine.latents import LatentStatistics
from modules.engine.loras import LoraStack
from modules.engine.tensorfile import Identity, TensorFile, file_identity, open_tensor_file
from modules.engine.upsampling import fold_upsampling
from modules.engine.weights import (
    BASES,
    REFINERS,
    Architecture,
    CheckpointFacts,
    build_clip_g,
    build_clip_l,
    build_unet,
    build_vae,
    recognise,
    without_prefix,
)
from modules.errors import ModelFileUnusable
from modules.loads import loading

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)
MIB = 1024 * 1024


@dataclass(frozen=True)
class SdxlModel:
    """A loaded checkpoint.

    identity: which content of which file it is.
    text_encoder, text_encoder_2: CLIP-L and CLIP-G; None in a refiner, which takes the base's embeddings.
    loras: the LoRAs merged into these weights; `loras.select(choices)` changes them.
    """

    path: Path
    identity: Identity
    facts: CheckpointFacts
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel | None
    text_encoder_2: CLIPTextModelWithProjection | None
    loras: LoraStack

    @property
    def clip_l(self) -> CLIPTextModel:
        """The first text encoder; only a base model has one."""
        assert self.text_encoder is not None
        return self.text_encoder

    @property
    def clip_g(self) -> CLIPTextModelWithProjection:
        """The second text encoder; only a base model has one."""
        assert self.text_encoder_2 is not None
        return self.text_encoder_2

    @property
    def version(self) -> object:
        """Equal exactly when the weights are: what embeddings and other results are cached under."""
        return self.identity, self.loras.selected

    @property
    def statistics(self) -> LatentStatistics:
        """How the VAE's latents become the UNet's."""
        return LatentStatistics(self.facts.scaling_factor)

    def networks(self) -> Iterable[nn.Module]:
        """Every network of the model."""
        optional = (self.unet, self.vae, self.text_encoder, self.text_encoder_2)
        return (network for network in optional if network is not None)


@dataclass
class ModelStore:
    """Loads models by path and keeps them; a file that changed is loaded anew.

    memory_limit_mib: bound on the weights kept; beyond it the models used longest ago go. None: no bound.
    """

    policy: DevicePolicy
    memory_limit_mib: int | None = None
    _models: OrderedDict[tuple[Identity, bool], SdxlModel] = field(default_factory=OrderedDict)
    _vaes: OrderedDict[tuple[Identity, float], AutoencoderKL] = field(default_factory=OrderedDict)

    def base(self, path: Path) -> SdxlModel:
        """The base model of a checkpoint file (or of its shards).

        Raises:
            ModelFileMissing: no such file.
            ModelFileUnusable: truncated, a pickle with objects in it, or not an SDXL base model.
        """
        return self._model(path, refiner=False)

    def refiner(self, path: Path) -> SdxlModel:
        """A refiner: SDXL base, SDXL refiner or Stable Diffusion 1.5, without its text encoders.

        Raises:
            ModelFileMissing, ModelFileUnusable: as for `base`.
        """
        return self._model(path, refiner=True)

    def vae(self, path: Path, *, scaling_factor: float) -> AutoencoderKL:
        """The VAE of a VAE file or of a checkpoint, in original or diffusers names.

        Raises:
            ModelFileMissing, ModelFileUnusable: no such file, or no VAE in it.
        """
        key = (file_identity(path), scaling_factor)
        if key not in self._vaes:
            with loading("vae", path.name):
                made = build_vae(open_tensor_file(path), scaling_factor=scaling_factor, number_format=self.policy.vae)
                self._vaes[key] = self._place(made)
        self._vaes.move_to_end(key)
        self._shrink()
        return self._vaes[key]

    def forget(self) -> None:
        """Lets all models go."""
        self._models.clear()
        self._vaes.clear()

    def _model(self, path: Path, *, refiner: bool) -> SdxlModel:
        key = (file_identity(path), refiner)
        if key not in self._models:
            with loading("refiner" if refiner else "checkpoint", path.name):
                self._models[key] = self._load(path, key[0], refiner=refiner)
        self._models.move_to_end(key)
        self._shrink()
        return self._models[key]

    def _load(self, path: Path, identity: Identity, *, refiner: bool) -> SdxlModel:
        started = time.perf_counter()
        file = open_tensor_file(path)
        facts = recognise(file)
        usable = REFINERS if refiner else BASES
        if facts.architecture not in usable:
            role = "a refiner" if refiner else "a base model"
            raise ModelFileUnusable(
                f"{path.name!r} is {_described(facts.architecture)} and cannot be used as {role}; "
                f"{', '.join(usable[:-1])} or {usable[-1]} is needed."
            )
        model = self._build(path, identity, file, facts, with_text=not refiner)
        logger.info("Loaded %s (%s) in %.1f s.", path.name, facts.architecture, time.perf_counter() - started)
        return model

    def _build(
        self, path: Path, identity: Identity, file: TensorFile, facts: CheckpointFacts, *, with_text: bool
    ) -> SdxlModel:
        policy = self.policy
        unet = build_unet(file, facts, number_format=policy.unet_for(_parameters(file, keys.UNET_PREFIX)))
        vae = build_vae(file, scaling_factor=facts.scaling_factor, number_format=policy.vae)
        clip_l = clip_g = None
        if with_text:
            format_l, format_g = (
                policy.text_for(_parameters(file, prefix)) for prefix in (keys.CLIP_L_PREFIX, keys.CLIP_G_PREFIX)
            )
            clip_l = build_clip_l(file, keys.CLIP_L_PREFIX, number_format=format_l)
            clip_g = build_clip_g(file, keys.CLIP_G_PREFIX, number_format=format_g)
        unet = self._place(unet)
        clip_l = self._place(clip_l) if clip_l else None
        clip_g = self._place(clip_g) if clip_g else None
        networks = {"unet": unet, "text_encoder": clip_l, "text_encoder_2": clip_g}
        originals = without_prefix(file.shapes, keys.UNET_PREFIX)
        return SdxlModel(
            path=path,
            identity=identity,
            facts=facts,
            unet=unet,
            vae=self._place(vae),
            text_encoder=clip_l,
            text_encoder_2=clip_g,
            loras=LoraStack(
                {name: network for name, network in networks.items() if network is not None},
                keys.unet_names(originals, facts.unet.layers),
            ),
        )

    def _place(self, network: Network) -> Network:
        """Moves a network to its device; convolutions get the layout they are fast in, upsampling its short way.

        On a CPU the layout is a tenth of a VAE's time in float32. Weights that are widened for each use stay as they
        are: views of the mapped file.
        """
        if self.policy.channels_last and not is_widened(network):
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        fold_upsampling(network)
        device = self.policy.vae_device if isinstance(network, AutoencoderKL) else self.policy.device
        return network.to(device) if device.type != "cpu" else network

    def _shrink(self) -> None:
        """Lets models go, the one used longest ago first, until the rest fits; the newest always stays."""
        if self.memory_limit_mib is None:
            return
        while self.memory_mib() > self.memory_limit_mib and len(self._models) + len(self._vaes) > 1:
            oldest: OrderedDict[tuple[Identity, bool], SdxlModel] | OrderedDict[tuple[Identity, float], AutoencoderKL]
            oldest = self._vaes if len(self._vaes) > 1 or len(self._models) == 1 else self._models
            oldest.popitem(last=False)

    def memory_mib(self) -> float:
        """Size of all weights kept, in MiB."""
        networks = [network for model in self._models.values() for network in model.networks()]
        return sum(_bytes(network) for network in [*networks, *self._vaes.values()]) / MIB


def _bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def _parameters(file: TensorFile, prefix: str) -> int:
    """How many numbers the tensors have whose names start with `prefix`."""
    return sum(torch.Size(shape).numel() for name, shape in file.shapes.items() if name.startswith(prefix))


def _described(architecture: Architecture) -> str:
    return "of an unknown build" if architecture is Architecture.UNKNOWN else f"a {architecture} checkpoint"
