"""The plainest extractor: exact means of areas, which see where things are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion_pl.metrics import extractors, real_images
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.pixels import SIDE, Pixels


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_features_are_the_means_of_blocks_in_units_of_the_full_range(side: int) -> None:
    images = draw(5, 3, side, side)
    seen = Pixels()(images)
    step = side // SIDE
    expected = [
        images[:, channel, y : y + step, x : x + step].double().mean(dim=(1, 2)) / 255
        for channel in range(3)
        for y in range(0, side, step)
        for x in range(0, side, step)
    ]
    torch.testing.assert_close(seen.pooled.double(), torch.stack(expected, 1), rtol=0, atol=1e-7)
    assert seen.pooled.shape == (5, Pixels.dimension)
    assert seen.pooled.dtype == torch.float32
    assert (seen.logits, seen.spatial) == (None, None)


def test_black_is_zero_and_white_is_one() -> None:
    for value, expected in ((0, 0.0), (255, 1.0)):
        images = torch.full((2, 3, 16, 16), value, dtype=torch.uint8)
        assert torch.equal(Pixels()(images).pooled, torch.full((2, 192), expected))


def test_a_grey_image_is_its_channel_three_times() -> None:
    grey = draw(4, 1, 16, 16)
    seen = Pixels()(grey).pooled
    assert torch.equal(seen, Pixels()(grey.repeat(1, 3, 1, 1)).pooled)
    assert torch.equal(seen[:, :64], seen[:, 64:128])


class Squares:
    """White squares of 8 pixels on black, at places of a grid."""

    name, fingerprint, resolution = "squares", "f", 32

    def __init__(self, shift: int) -> None:
        self.images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
        for index in range(64):
            y, x = index // 8 + shift, index % 8 + shift
            self.images[index, :, y : y + 8, x : x + 8] = 255

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


def test_a_distance_over_them_sees_where_things_are() -> None:
    here, shifted = Squares(0), Squares(12)
    assert here.images.sum() == shifted.images.sum(), "the same but for the place"
    known = real_images.compute(here, Pixels())
    distances = []
    for images in (here.images, shifted.images):
        metric = Frechet().build(Pixels(), known, 64)
        metric.update(Pixels()(images))
        distances.append(metric.compute()["fd"])
    assert distances[0] < 1e-9
    # The two mean images: each square's share of 64 areas is 4, and they hardly overlap.
    assert distances[1] > 1


def test_it_knows_no_classes_so_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="classifier score: pixels knows no classes"):
        InceptionScore().build(Pixels(), None, 100)


def test_it_has_no_spatial_features() -> None:
    known = real_images.compute(Squares(0), Pixels())
    with pytest.raises(ValueError, match="pixels has no spatial features"):
        Frechet(of="spatial").build(Pixels(), known, 64)


def test_it_is_loaded_by_name_and_reads_no_weights() -> None:
    extractor = extractors.load("pixels")
    assert isinstance(extractor, Pixels)
    assert extractor.name == "pixels"
    assert len(extractor.digest) == 12
    with pytest.raises(ValueError, match="pixels has its own weights; remove weights='w'"):
        extractors.load("pixels", weights="w")
    with pytest.raises(ValueError, match="pixels computes in fp32 only"):
        extractors.load("pixels", precision="bf16")


def test_what_is_not_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        Pixels()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got \(1, 5, 8, 8\)"):
        Pixels()(torch.zeros(1, 5, 8, 8, dtype=torch.uint8))
