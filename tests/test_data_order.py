"""The order of images: a pure function, exact over epochs, ranks, accumulation and workers."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffusion_pl.data.loader import Loader, MicroBatches, Share
from diffusion_pl.data.order import Order
from diffusion_pl.data.source import Images


def numbered(count: int, labels: bool = True) -> Images:
    """Images whose left column says which they are."""
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, :, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    label = torch.arange(count) % 3 if labels else None
    return Images("numbered", pixels, "f" * 64, label, 3 if labels else 0)


def walk(count, batch_size, size, world_size, start=0, stop=12, workers=0, hflip=False, seed=5):
    """Every micro-batch of the run as (step, rank, batch), in the order of the run."""
    ranks = []
    for rank in range(world_size):
        share = Share(batch_size, size, rank, world_size)
        batches = MicroBatches(numbered(count), Order(count, seed), share, hflip)
        ranks.append(list(Loader(batches, start, stop, workers)))
    return [batch for row in zip(*ranks, strict=True) for batch in row]


def positions(batches):
    return torch.cat([batch["index"] for batch in batches]).tolist()


def test_every_image_comes_once_an_epoch():
    order = Order(count=17, seed=3)
    for epoch in range(5):
        images = order(17 * epoch, 17 * (epoch + 1))
        assert sorted(images.tolist()) == list(range(17))


def test_epochs_are_shuffled_differently_and_by_the_seed():
    order = Order(count=50, seed=3)
    assert order(0, 50).tolist() != order(50, 100).tolist()
    assert order(0, 50).tolist() != Order(50, 4)(0, 50).tolist()
    assert order(0, 50).tolist() == Order(50, 3)(0, 50).tolist()


def test_any_piece_of_the_walk_is_the_same_as_in_the_whole():
    order = Order(count=7, seed=0)
    whole = order(0, 40).tolist()
    for first, last in itertools.combinations(range(0, 41, 3), 2):
        assert order(first, last).tolist() == whole[first:last]


@pytest.mark.parametrize(("size", "world_size"), [(12, 1), (4, 1), (6, 2), (2, 3), (1, 4)])
def test_a_global_batch_holds_the_same_images_however_it_is_cut(size, world_size):
    micro_batches = 2 * 12 // (size * world_size)
    batches = walk(40, 12, size, world_size, stop=micro_batches)
    assert positions(batches) == list(range(24))
    images = torch.cat([batch["image"][:, 0, 0, 0] for batch in batches]).tolist()
    assert images == Order(40, 5)(0, 24).tolist()
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), torch.tensor(images) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_anywhere_with_any_number_of_workers(workers):
    whole = walk(40, 8, 8, 1, stop=9, hflip=True)
    rest = walk(40, 8, 8, 1, start=4, stop=9, workers=workers, hflip=True)
    assert len(rest) == 5
    for old, new in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in ("image", "index", "label"))


def test_half_of_the_images_are_flipped_by_seed_and_position():
    def flips(seed):
        batches = walk(200, 100, 100, 1, stop=100, hflip=True, seed=seed)
        # Image 0 is blank, so a flip of it does not show.
        shown = [batch["image"][:, 0, 0] for batch in batches]
        return torch.cat([row[row.sum(1) > 0][:, 1] > 0 for row in shown])

    first, other = flips(0), flips(1)
    # 10,000 fair coins: a standard deviation is 0.005.
    assert first.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (first == other).float().mean() == pytest.approx(0.5, abs=0.02)
    neighbours = (first[1:] == first[:-1]).float().mean()
    assert neighbours == pytest.approx(0.5, abs=0.02)


def test_without_flips_images_stay_as_they_are():
    batches = walk(40, 8, 8, 1, stop=5)
    assert all((batch["image"][:, 0, :, 1] == 0).all() for batch in batches)


def test_images_without_labels_give_batches_without():
    batches = MicroBatches(numbered(8, labels=False), Order(8, 0), Share(4, 4), hflip=False)
    assert set(batches[0]) == {"image", "index"}


def test_the_length_is_the_whole_run_s():
    batches = MicroBatches(numbered(8), Order(8, 0), Share(4, 2), hflip=False)
    assert len(Loader(batches, 3, 10)) == 10
    assert len(list(Loader(batches, 3, 10))) == 7


def test_a_remainder_is_refused():
    with pytest.raises(ValueError, match="cannot make a global batch of 10"):
        Share(10, 4, 0, 1)


def test_pixels_reach_the_model_unchanged():
    batches = MicroBatches(numbered(8), Order(8, 0), Share(8, 8), hflip=False)
    assert batches[0]["image"].dtype == torch.uint8
    assert sorted(batches[0]["image"][:, 0, 0, 0].tolist()) == list(range(8))
