"""Guidance does what its formulas say, and nothing at neutral values."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modules.engine import guidance
from modules.engine.guidance import Guidance, anisotropic_filter

MIB = 2**20


def latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 16, 16), generator=torch.Generator().manual_seed(seed))


X, POSITIVE, NEGATIVE = (latents(seed) for seed in range(3))


def test_filter_gives_published_numbers() -> None:
    k = torch.arange(1024.0).view(1, 4, 16, 16)
    out = anisotropic_filter(k.sin(), (0.7 * k).cos())
    flat = out.flatten()
    assert flat[:3].tolist() == pytest.approx([-0.2197482, -0.0240513, 0.2828153], abs=1e-6)
    assert float(flat[777]) == pytest.approx(0.0247390, abs=1e-6)
    assert float(out.mean()) == pytest.approx(-3.39e-5, abs=1e-6)
    assert float(out.std()) == pytest.approx(0.1010125, abs=1e-6)


def slow_filter(error: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """The filter of one picture, pixel by pixel."""
    guide = (guide - guide.mean()) / (guide.std() + 1e-5)
    _, height, width = error.shape
    out = torch.zeros_like(error)

    def mirrored(i: int, size: int) -> int:
        i = abs(i)
        return i if i < size else 2 * (size - 1) - i

    for y in range(height):
        for x in range(width):
            total, mixed = 0.0, torch.zeros(4)
            for dy in range(-6, 7):
                for dx in range(-6, 7):
                    v, u = mirrored(y + dy, height), mirrored(x + dx, width)
                    difference = float((guide[:, v, u] - guide[:, y, x]).abs().sum())
                    weight = math.exp(-(difference**2 + dy * dy + dx * dx) / 18)
                    total += weight
                    mixed += weight * error[:, v, u]
            out[:, y, x] = mixed / total
    return out


def test_filter_equals_its_definition() -> None:
    error, guide = latents(5, 1, 4, 7, 9), latents(6, 1, 4, 7, 9)
    assert torch.allclose(anisotropic_filter(error, guide)[0], slow_filter(error[0], guide[0]), atol=1e-5)


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    error, guide = latents(5, 2, 4, 20, 18), latents(6, 2, 4, 20, 18)
    whole = anisotropic_filter(error, guide)
    monkeypatch.setattr(guidance, "BAND_BYTES", 4 * 2 * 169 * 18 * 3)
    assert anisotropic_filter(error, guide).equal(whole)


def test_filter_keeps_rows_apart() -> None:
    error, guide = latents(5, 3, 4, 16, 16), latents(6, 3, 4, 16, 16)
    batch = anisotropic_filter(error, guide)
    for row in range(3):
        part = slice(row, row + 1)
        assert torch.allclose(anisotropic_filter(error[part], guide[part]), batch[part], atol=1e-6)


def test_filter_takes_latents_smaller_than_its_window() -> None:
    assert anisotropic_filter(latents(0, 1, 4, 4, 30), latents(1, 1, 4, 4, 30)).isfinite().all()


def test_filter_of_a_128_latent_stays_under_200_mb() -> None:
    script = (
        "import resource, torch\n"
        "from modules.engine.guidance import anisotropic_filter\n"
        "torch.set_num_threads(1)\n"
        "small = torch.randn(1, 4, 16, 16)\n"
        "large = torch.randn(1, 4, 128, 128)\n"
        "anisotropic_filter(small, small)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "anisotropic_filter(large, large)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    unit = 1 if sys.platform == "darwin" else 1024
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) * unit < 200 * MIB


def reference(x, positive, negative, *, cfg: float, mimic: float, sharpness: float, p: float) -> torch.Tensor:
    """The published arithmetic, in terms of x - D."""
    e_p, e_n = x - positive, x - negative
    alpha = 0.001 * sharpness * p
    e_p = alpha * anisotropic_filter(e_p, positive) + (1 - alpha) * e_p
    real = e_n + cfg * (e_p - e_n)
    if cfg > mimic:
        return x - (p * real + (1 - p) * (e_n + mimic * (e_p - e_n)))
    return x - real


@given(cfg=st.floats(1, 30), mimic=st.floats(1, 30), sharpness=st.floats(0, 30), progress=st.floats(0, 1))
def test_combination_follows_the_formula(cfg: float, mimic: float, sharpness: float, progress: float) -> None:
    found = Guidance(cfg, mimic, sharpness).combined(X, POSITIVE, NEGATIVE, progress)
    expected = reference(X, POSITIVE, NEGATIVE, cfg=cfg, mimic=mimic, sharpness=sharpness, p=progress)
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4)


def test_adaptive_guidance_goes_from_mimic_to_real() -> None:
    guided = Guidance(10.0, 7.0)
    assert [guided.effective_scale(p) for p in (0.0, 0.5, 1.0)] == [7.0, 8.5, 10.0]
    assert Guidance(5.0, 7.0).effective_scale(0.0) == 5.0


def test_neutral_values_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Guidance(7.0).combined(X, POSITIVE, NEGATIVE, 0.5)
    assert Guidance(7.0, 7.0).combined(X, POSITIVE, NEGATIVE, 0.5).equal(plain)
    assert Guidance(7.0, 20.0).combined(X, POSITIVE, NEGATIVE, 0.5).equal(plain)
    assert Guidance(7.0, 20.0, 5.0).combined(X, POSITIVE, NEGATIVE, 0.0).equal(plain)
    assert not Guidance(7.0, 20.0, 5.0).combined(X, POSITIVE, NEGATIVE, 0.5).equal(plain)

    def forbidden(*_: object) -> None:
        raise AssertionError("a sharpness of 0 must not run the filter")

    monkeypatch.setattr(guidance, "anisotropic_filter", forbidden)
    Guidance(7.0, 7.0, 0.0).combined(X, POSITIVE, NEGATIVE, 1.0)


def test_a_scale_of_one_is_neutral() -> None:
    assert Guidance(1.0, 7.0, 30.0).is_neutral
    assert Guidance(1.0 + 1e-12).is_neutral
    assert not Guidance(1.01).is_neutral
