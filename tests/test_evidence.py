"""What a data set and a short training say: spectra, copies and mirror images made to measure."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_pl.data.dataset import load
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.evidence import evidence_of, learned, spectrum
from diffusion_pl.images import from_bytes


def noise_of(slope: float, side: int = 32, count: int = 200) -> torch.Tensor:
    """Gaussian noise whose power is f^-slope."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(count, 1, side, side, generator=generator, dtype=torch.float64)
    along = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (along[:, None].square() + along.square()).sqrt().clamp_min(1)
    return torch.fft.ifft2(torch.fft.fft2(white) * radius ** (-slope / 2)).real


def images_of(pixels: torch.Tensor, labels=None):
    return load("made", pixels, labels, classes=0 if labels is None else 3)


def noisy(count: int, seed: int = 0, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0, 3.0])
def test_the_slope_of_a_power_law_is_found(slope):
    found, _ = spectrum(noise_of(slope))
    assert found == pytest.approx(slope, abs=0.05)


def test_the_power_above_half_of_nyquist_is_found():
    # White noise: the share of frequencies outside of a circle of radius R/4, without the mean's.
    along = torch.fft.fftfreq(32, 1 / 32)
    outside = (along[:, None].square() + along.square()).sqrt() > 8
    _, fine = spectrum(noise_of(0.0, count=400))
    assert fine == pytest.approx(outside.sum().item() / (32 * 32 - 1), abs=0.01)
    # A wave of four periods has nothing there, one of twelve all.
    x = torch.arange(32) / 32
    for periods, share in ((4, 0.0), (12, 1.0)):
        wave = torch.sin(2 * math.pi * periods * x).expand(1, 1, 32, 32).double()
        assert spectrum(wave)[1] == pytest.approx(share, abs=1e-9)


def test_images_too_small_or_flat_have_no_spectrum():
    assert spectrum(torch.rand(3, 3, 4, 4)) == (None, None)
    assert spectrum(torch.ones(3, 3, 16, 16)) == (None, None)


def test_the_standard_deviation_is_that_of_all_values():
    pixels = noisy(300)
    found = evidence_of(images_of(pixels))
    clean = from_bytes(pixels).double()
    assert found.std == pytest.approx(clean.std().item(), rel=1e-6)
    # Uniform over 256 values in [-1, 1].
    assert found.std == pytest.approx(math.sqrt((256**2 - 1) / 12) / 127.5, rel=0.01)
    assert found.mean == pytest.approx(0, abs=0.01) and found.seen == 300


def test_copies_and_near_copies_are_told_apart():
    pixels = noisy(100)
    pixels[50:55] = pixels[:5]  # ten images that another equals
    pixels[60:63] = pixels[10:13] ^ 1  # six that are all but equal to another
    found = evidence_of(images_of(pixels))
    assert found.copies == pytest.approx(0.10) and found.near == pytest.approx(0.06)
    clean = evidence_of(images_of(noisy(100)))
    assert (clean.copies, clean.near) == (0.0, 0.0)


def test_mirror_images_belong_where_the_data_have_no_direction():
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(0, 5, (300,), generator=generator)
    pixels = torch.zeros(300, 3, 16, 16, dtype=torch.uint8)
    for image, at in zip(pixels, place.tolist(), strict=True):
        image[:, :, at : at + 4] = 200  # a bar in the left half
    pixels += noisy(300, 2, 16) // 16
    assert evidence_of(images_of(pixels)).mirrored > 2
    either = torch.where((torch.arange(300) % 2 > 0)[:, None, None, None], pixels.flip(-1), pixels)
    assert evidence_of(images_of(either)).mirrored == pytest.approx(1, abs=0.03)


def test_classes_are_counted():
    labels = torch.tensor([2] * 5 + [0] * 12 + [1] * 3)
    assert evidence_of(images_of(noisy(20), labels)).class_counts == (12, 3, 5)
    assert evidence_of(images_of(noisy(20), labels.clamp(max=1))).class_counts == (12, 8, 0)
    assert evidence_of(images_of(noisy(20))).class_counts == ()


def test_few_images_have_no_neighbours_and_one_colour_is_refused():
    found = evidence_of(images_of(noisy(3)))
    assert found.near is None and found.mirrored is None
    with pytest.raises(UserError, match="every pixel has one value"):
        evidence_of(images_of(torch.full((20, 3, 8, 8), 7, dtype=torch.uint8)))


def levels(losses, low=-6.0, high=4.0):
    places = torch.linspace(low, high, len(losses)).tolist()
    return [{"sigma": math.exp(at), "loss": loss} for at, loss in zip(places, losses, strict=True)]


def test_the_levels_that_were_learned_are_those_where_the_loss_fell():
    places = torch.linspace(-6, 4, 101, dtype=torch.float64)
    fall = torch.exp(-0.5 * ((places + 1.1) / 0.9) ** 2) * 0.3
    found = learned(levels([0.9] * 101), levels((0.9 - fall).tolist()))
    assert found.P_mean == pytest.approx(-1.1, abs=0.01)
    assert found.P_std == pytest.approx(0.9, abs=0.02)
    assert found.levels[0][:3] == (pytest.approx(math.exp(-6)), 0.9, pytest.approx(0.9))


def test_only_what_falls_below_one_is_learned():
    found = learned(levels([1.2, 1.2, 1.1, 1.2, 0.9]), levels([1.01, 1.0, 0.9, 1.3, 0.9]))
    assert [fall for *_, fall in found.levels] == pytest.approx([0, 0, 0.1, 0, 0])
    assert found.P_mean == pytest.approx(-1.0)


def test_a_loss_that_rises_counts_for_nothing():
    before, after = [0.5, 0.5, 0.5, 0.5, 0.5], [0.9, 0.5, 0.3, 0.4999, 0.6]
    found = learned(levels(before), levels(after))
    assert found.P_mean == pytest.approx(-1.0) and found.P_std == 0
    with pytest.raises(UserError, match="fell at no noise level"):
        learned(levels(before), levels([0.5, 0.6, 0.5, 0.7, 0.5]))
