"""Text is projected once, to the same bits, and the network keeps no trace of it."""

import pytest
import torch

from modules.engine.text_projections import TextProjections, _text_linears
from tests.engine.networks import POOLED_WIDTH, TEXT_WIDTH, tiny_unet

LAYERS = 22  # 11 transformer blocks, keys and values


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def text(seed: int, tokens: int = 77) -> torch.Tensor:
    return torch.randn(1, tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def forward(unet, prompt_embeds: torch.Tensor, projections: TextProjections | None = None, seed: int = 0):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    added = {"text_embeds": torch.zeros(1, POOLED_WIDTH), "time_ids": torch.zeros(1, 6)}

    def output() -> torch.Tensor:
        return unet(x, torch.tensor(500), prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]

    if projections is None:
        return output()
    with projections.in_use(prompt_embeds):
        return output()


@pytest.fixture
def projected(unet, monkeypatch) -> list:
    """Layers as they really compute a projection."""
    computed: list = []
    original = torch.nn.Linear.forward

    def counting(self, x):
        if self in layers:
            computed.append(self)
        return original(self, x)

    layers = set(_text_linears(unet))
    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    return computed


def test_results_are_the_same_bits(unet) -> None:
    projections = TextProjections(unet)
    for seed in range(3):
        assert forward(unet, prompt := text(1), projections, seed).equal(forward(unet, prompt, seed=seed))


def test_a_text_is_projected_once(unet, projected: list) -> None:
    projections, prompt = TextProjections(unet), text(1)
    for seed in range(3):
        forward(unet, prompt, projections, seed)
    assert len(projected) == LAYERS
    assert len(set(projected)) == LAYERS


def test_two_texts_take_turns_and_a_third_displaces_the_oldest(unet, projected: list) -> None:
    projections, prompts = TextProjections(unet), [text(1), text(2, 154), text(3)]
    for index in (0, 1, 0, 1):
        assert forward(unet, prompts[index], projections).equal(forward(unet, prompts[index]))
    projected.clear()
    for index in (0, 1):
        forward(unet, prompts[index], projections)
    assert projected == []
    forward(unet, prompts[2], projections)
    forward(unet, prompts[0], projections)
    assert len(projected) == 2 * LAYERS


def test_equal_values_in_another_tensor_are_another_text(unet, projected: list) -> None:
    projections, prompt = TextProjections(unet), text(1)
    forward(unet, prompt, projections)
    forward(unet, prompt.clone(), projections)
    assert len(projected) == 2 * LAYERS


def test_beyond_the_memory_limit_nothing_is_kept(unet, projected: list) -> None:
    width = sum(layer.out_features for layer in _text_linears(unet))
    needed, prompt = 77 * width * 4 * 2, text(1)
    for limit, computed in ((needed, LAYERS), (needed - 1, 2 * LAYERS)):
        projected.clear()
        projections = TextProjections(unet, memory_limit_bytes=limit)
        forward(unet, prompt, projections)
        forward(unet, prompt, projections)
        assert len(projected) == computed


def test_undo_restores(unet) -> None:
    prompt, plain = text(1), forward(unet, text(1))
    with pytest.raises(KeyError), TextProjections(unet).in_use(prompt):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in unet.modules())
    assert forward(unet, prompt).equal(plain)


def test_layers_that_something_else_has_replaced_are_left_alone(unet) -> None:
    layer = next(_text_linears(unet))

    def replaced(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight)

    layer.forward = replaced
    try:
        prompt = text(1)
        assert layer not in list(_text_linears(unet))
        forward(unet, prompt, TextProjections(unet))
        assert layer.forward is replaced
    finally:
        del layer.forward
