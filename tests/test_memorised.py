"""Nearest training images: distances by hand, copies found, a training image not its own copy."""

from __future__ import annotations

import pytest
import torch

from diffusion_pl.errors import UserError
from diffusion_pl.images import Images
from diffusion_pl.metrics.memorised import nearest


def images_of(*values, side=4):
    """Images of one grey value each."""
    return torch.stack([torch.full((3, side, side), value, dtype=torch.uint8) for value in values])


def store(images):
    return Images("made", images, "0" * 64)


def test_distances_are_root_mean_squares_in_units_of_white():
    found = nearest(images_of(100), store(images_of(0, 255, 90, 130)), torch.arange(4))
    assert found.indices.tolist() == [[2, 3]]
    assert found.distances.tolist() == [pytest.approx([10 / 255, 30 / 255])]
    assert found.ratios.tolist() == pytest.approx([1 / 3])


def test_a_copy_has_the_ratio_0_and_is_memorised():
    images = torch.randint(0, 256, (2500, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    data = store(images.to(torch.uint8))
    places = torch.tensor([0, 999, 1000, 2499])  # in several pieces
    found = nearest(data.read(places), data, torch.arange(2500))
    assert found.indices[:, 0].tolist() == places.tolist()
    assert found.distances[:, 0].tolist() == [0.0] * 4  # exactly
    assert found.memorised == 1.0
    # Against all differences at once.
    whole = (data.store[places][:, None].double() - data.store.double()) / 255
    every = whole.square().mean(dim=(2, 3, 4)).sqrt()
    torch.testing.assert_close(found.distances, every.topk(2, largest=False).values)


def test_a_training_image_is_not_its_own_neighbour():
    data = store(images_of(0, 10, 28, 70))
    own = torch.tensor([0, 3])
    found = nearest(data.read(own), data, torch.arange(4), own=own)
    assert found.indices.tolist() == [[1, 2], [2, 1]]
    assert found.ratios.tolist() == pytest.approx([10 / 28, 42 / 60])
    assert found.memorised == 0.0  # both are above 1/3


def test_an_image_that_is_there_twice_is_its_own_copy():
    data = store(images_of(5, 5, 5, 9))
    found = nearest(images_of(5), data, torch.arange(4))
    assert found.ratios.tolist() == [0.0]


def test_mirror_images_count_where_training_flips():
    ramp = torch.arange(0, 64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
    data = store(torch.cat([ramp, images_of(0, 255, side=8)]))
    mirrored = ramp.flip(-1)
    assert nearest(mirrored, data, torch.arange(3)).distances[0, 0] > 0
    found = nearest(mirrored, data, torch.arange(3), mirrored=True)
    assert found.distances[0, 0] == 0 and found.indices[0, 0] == 0


def test_large_images_are_compared_by_means_of_areas():
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 200
    checks = checks.to(torch.uint8).expand(1, 3, 64, 64)  # 100 on every 2 by 2 pixels
    found = nearest(checks, store(images_of(100, 151, side=64)), torch.arange(2))
    assert found.distances.tolist() == [pytest.approx([0.0, 51 / 255])]


def test_only_the_images_named_are_searched():
    found = nearest(images_of(0), store(images_of(0, 20, 40)), torch.tensor([1, 2]))
    assert found.indices.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("queries", "among", "own", "problem"),
    [
        (images_of(0), torch.tensor([0]), None, "too few"),
        (images_of(0), torch.tensor([0, 1]), torch.tensor([0]), "too few"),
        (images_of(0, side=8), torch.tensor([0, 1]), None, "the data's are (3, 4, 4)"),
    ],
)
def test_what_cannot_be_searched_is_refused(queries, among, own, problem):
    with pytest.raises(UserError) as raised:
        nearest(queries, store(images_of(0, 1, 2)), among, own=own)
    assert problem in str(raised.value)
