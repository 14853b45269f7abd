"""The order of images: a pure function, exact over epochs, ranks, resolutions and workers."""

from __future__ import annotations

import hashlib
import itertools
import random
import tracemalloc

import pytest
import torch
from loaders import loader

from diffusion_pl.data.order import Order
from diffusion_pl.errors import UserError
from diffusion_pl.images import Images


def numbered(count: int, labels: bool = True) -> Images:
    """Images whose left column says which they are."""
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, :, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    label = torch.arange(count) % 3 if labels else None
    return Images("numbered", pixels, "f" * 64, label, 3 if labels else 0)


def walk(count, batch_size, world_size=1, start=0, stop=12, workers=0, hflip=False, seed=5):
    """Every device's batch of every step, in the order of the run."""
    ranks = []
    for rank in range(world_size):
        settings = {"num_workers": workers, "hflip": hflip, "seed": seed}
        place = {"start": start, "rank": rank, "world_size": world_size}
        ranks.append(list(loader(numbered(count), batch_size, stop, **settings, **place)))
    return [batch for row in zip(*ranks, strict=True) for batch in row]


IMAGE = numbered(1)


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


def windowed():
    """Orders of all kinds of shards, empty ones among them."""
    source = random.Random(0)
    for _ in range(100):
        shards = [source.randrange(9) for _ in range(source.randrange(1, 12))]
        shards[0] += 1
        yield Order(sum(shards), source.randrange(99), tuple(shards), source.randrange(14))


def test_windows_of_any_shards_hold_every_image_once_an_epoch():
    for order in windowed():
        for epoch in range(3):
            images = order(order.count * epoch, order.count * (epoch + 1))
            assert sorted(images.tolist()) == list(range(order.count))


def test_any_piece_of_a_walk_by_windows_is_the_same_as_in_the_whole():
    source = random.Random(1)
    for order in windowed():
        whole = order(0, 3 * order.count).tolist()
        first, last = sorted(source.randrange(3 * order.count + 1) for _ in range(2))
        assert order(first, last).tolist() == whole[first:last]


def test_ranks_and_workers_share_a_walk_by_windows_exactly():
    source = random.Random(2)
    for order in itertools.islice(windowed(), 20):
        world, workers, size = (source.randrange(1, 4) for _ in range(3))
        # Steps until the run has gone round twice at least.
        steps = -(-2 * order.count // (world * size))
        seen = []
        for worker in range(workers):
            for step in range(worker, steps, workers):
                for rank in range(world):
                    share = loader(IMAGE, world * size, rank=rank, world_size=world).positions(step)
                    seen += order(share.start, share.stop).tolist()
        assert sorted(seen) == sorted(order(0, steps * world * size).tolist())
        counts = torch.bincount(torch.tensor(seen), minlength=order.count)
        assert counts.min() >= 2
        assert counts.max() <= -(-steps * world * size // order.count)


def test_a_window_holds_a_few_whole_shards_shuffled_together():
    order = Order(60, 3, (10,) * 6, 2)
    for epoch in range(2):
        walk = order(60 * epoch, 60 * epoch + 60)
        shards = [sorted(set((part // 10).tolist())) for part in walk.split(20)]
        assert all(len(each) == 2 for each in shards)
        assert sorted(itertools.chain(*shards)) == list(range(6))
        # Images of both shards alternate about half of the time, unlike one shard after the other.
        changes = (walk[1:] // 10 != walk[:-1] // 10).sum()
        assert changes > 20
    # Epochs and windows differ in which shards stand together, and in how these are shuffled.
    first, second, third = order(0, 180).split(60)
    together = [set((epoch[:20] // 10).tolist()) for epoch in (first, second, third)]
    assert together[0] != together[1] or together[1] != together[2]
    whole = Order(60, 3, (60,), 0)(0, 60)
    assert first.tolist() != second.tolist()
    ranks = [
        tuple(part.argsort().tolist())
        for epoch in (first, second, whole)
        for part in epoch.split(20)
    ]
    assert len(set(ranks)) == 9
    firsts = [Order(60, seed, (10,) * 6, 2)(0, 20) // 10 for seed in range(9)]
    assert len({frozenset(shards.tolist()) for shards in firsts}) > 3


@pytest.mark.parametrize("window", [0, 6, 7])
def test_a_window_of_all_shards_is_the_order_without_any(window):
    assert Order(60, 3, (10,) * 6, window)(0, 130).tolist() == Order(60, 3)(0, 130).tolist()


def test_the_order_of_a_run_is_that_of_earlier_versions():
    generator = torch.Generator()
    digest = hashlib.blake2b(b"3/order/1", digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    assert torch.equal(Order(50, 3)(50, 100), torch.randperm(50, generator=generator))


def test_a_walk_by_windows_costs_the_same_however_many_images_there_are():
    def held(count):
        order = Order(count, 0, (1000,) * (count // 1000), 10)
        tracemalloc.start()
        for step in range(20):
            order(count // 2 + 640 * step, count // 2 + 640 * step + 64)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    held(100_000)
    # 10,000 images are numbered at a time in either; the shards themselves are numbered too.
    assert held(10_000_000) < held(100_000) + 10_000 * 100


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="data.dataset.window must not be negative"):
        Order(8, 0, (4, 4), -1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_a_global_batch_holds_the_same_images_however_it_is_cut(world_size):
    batches = walk(40, 12, world_size, stop=2)
    assert positions(batches) == list(range(24))
    images = torch.cat([batch["image"][:, 0, 0, 0] for batch in batches]).tolist()
    assert images == Order(40, 5)(0, 24).tolist()
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), torch.tensor(images) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_anywhere_with_any_number_of_workers(workers):
    whole = walk(40, 8, stop=9, hflip=True)
    rest = walk(40, 8, start=4, stop=9, workers=workers, hflip=True)
    assert len(rest) == 5
    for old, new in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in ("image", "index", "label"))


class Broken:
    shape = (8, 1, 2, 2)

    def __init__(self, error):
        self.error = error

    def read(self, indices):
        raise self.error


def read_from(store, workers):
    return next(iter(loader(Images("broken", store, "f"), 4, 2, num_workers=workers)))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_the_data_is_told_in_one_line(workers):
    damaged = Broken(UserError("shards/000001.tar: 000001003.64.png is damaged"))
    with pytest.raises(UserError, match=r"^shards/000001.tar: \S+ is damaged$"):
        read_from(damaged, workers)


def test_a_bug_in_a_reader_keeps_the_lines_where_it_happened():
    with pytest.raises(RuntimeError, match=r"(?s)in read.*ValueError: not enough values"):
        read_from(Broken(ValueError("not enough values to unpack")), 1)


def test_half_of_the_images_are_flipped_by_seed_and_position():
    def flips(seed):
        batches = walk(200, 100, stop=100, hflip=True, seed=seed)
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
    batches = walk(40, 8, stop=5)
    assert all((batch["image"][:, 0, :, 1] == 0).all() for batch in batches)


def test_images_without_labels_give_batches_without():
    assert set(loader(numbered(8, labels=False), 4)[0]) == {"image", "index"}


def test_the_length_is_the_whole_run_s():
    rest = loader(numbered(8), 4, 10, start=3)
    assert len(rest) == 10
    assert len(list(rest)) == 7


def test_a_remainder_is_refused():
    with pytest.raises(ValueError, match="global batch of 10 does not divide over 4 devices"):
        loader(IMAGE, 10, world_size=4)


def test_pixels_reach_the_model_unchanged():
    batch = loader(numbered(8), 8)[0]
    assert batch["image"].dtype == torch.uint8
    assert sorted(batch["image"][:, 0, 0, 0].tolist()) == list(range(8))


def test_a_step_has_one_resolution_on_all_devices_and_resolutions_their_shares():
    weights = {16: 1, 32: 3, 64: 4}
    chosen = [
        loader(IMAGE, 1, seed=seed, resolution_weights=weights).resolution(step)
        for seed in (0, 1)
        for step in range(2000)
    ]
    # Of 4,000 draws a share of 1/2 strays by 0.008 (a standard deviation).
    for resolution, share in ((16, 1 / 8), (32, 3 / 8), (64, 1 / 2)):
        assert chosen.count(resolution) / 4000 == pytest.approx(share, abs=0.03)
    assert chosen[:2000] != chosen[2000:]
    images = {
        side: Images("n", torch.zeros(8, 1, side, side, dtype=torch.uint8), "f", None, 0)
        for side in (2, 4)
    }
    halves = {2: 0.5, 4: 0.5}
    ranks = [
        loader(images, 4, rank=rank, world_size=2, resolution_weights=halves) for rank in (0, 1)
    ]
    sides = [[batches[step]["image"].shape[3] for step in range(20)] for batches in ranks]
    assert sides[0] == sides[1]
    assert set(sides[0]) == {2, 4}


@pytest.mark.parametrize("weights", [{}, {16: 0.0, 32: 1.0}, {16: -1.0}])
def test_weights_are_positive(weights):
    with pytest.raises(ValueError, match="data.resolution_weights must be positive"):
        loader(IMAGE, 1, resolution_weights=weights)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_settings_of_the_batches_are_in_range(name, value):
    with pytest.raises(ValueError, match=rf"data.{name} must be at least .* \(got {value}\)"):
        loader(IMAGE, **{"batch_size": 1, name: value})
