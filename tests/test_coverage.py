"""Every image exactly once an epoch, on any ranks, workers and shards, from any point of the run.

10,000 random runs, without starting processes: the loader hands step i of those that are
left to worker i modulo the workers, and gives the batches out in order, so a worker here does its
steps after each other in this process. A few runs then go through real workers.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from loaders import loader
from torch import Tensor

from diffusion_pl.data.loader import Loader
from diffusion_pl.data.order import Order
from diffusion_pl.images import Images

CASES = 10_000
CHUNKS = 20
SIDES = (1, 2)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """What one start of a run has: processes, and what each reads with."""

    ranks: int
    workers: int


@dataclass(frozen=True)
class Case:
    """A run that is stopped once and goes on, perhaps on other machines.

    Args:
        shards: images in each, some without any; at least one image in all.
        window: shards shuffled together, 0 all.
        batch_size: images of a step over all ranks.
        first: what the run starts on.
        second: what it goes on with.
        resume: steps that are done by then.
        stop: steps in all, at least an epoch.
        weights: of the steps at each resolution, or None for the largest.
    """

    seed: int
    shards: tuple[int, ...]
    window: int
    batch_size: int
    first: Group
    second: Group
    resume: int
    stop: int
    hflip: bool
    weights: dict[int, float] | None

    @property
    def count(self) -> int:
        """Images in the data set."""
        return sum(self.shards)


def drawn(source: random.Random) -> Case:
    """A random case; the batch divides over the ranks of both starts."""
    first, second = source.randint(1, 8), source.randint(1, 8)
    shards = [source.choice((0, 1, 1, 2, 2, 5)) for _ in range(source.randint(1, 17))]
    shards[source.randrange(len(shards))] += source.randint(1, 6)
    count = sum(shards)
    if source.random() < 0.3:
        second = first
    # Up to 7 images a device; more rarely few, which makes many steps.
    batch_size = math.lcm(first, second) * max(source.randint(1, 7) for _ in range(2))
    epoch = -(-count // batch_size)
    stop = epoch + source.randint(0, epoch)
    return Case(
        seed=source.randrange(2**31),
        shards=tuple(shards),
        window=max(source.randint(0, len(shards) + 1) for _ in range(2)),
        batch_size=batch_size,
        first=Group(first, source.randint(0, 4)),
        second=Group(second, source.randint(0, 4)),
        resume=source.randint(0, stop),
        stop=stop,
        hflip=source.random() < 0.1,
        weights={1: 1.0, 2: 2.0} if source.random() < 0.1 else None,
    )


def cases(chunk: int, count: int = CASES // CHUNKS) -> Iterator[Case]:
    """Some of the random cases, always the same."""
    source = random.Random(f"coverage {chunk}")
    return (drawn(source) for _ in range(count))


@lru_cache
def numbered(count: int) -> dict[int, Images]:
    """Images whose first pixel is their number; a mirrored one shows it where it is wider."""
    numbers = torch.arange(count, dtype=torch.uint8)
    found = {}
    for side in SIDES:
        pixels = torch.full((count, 1, side, side), 255, dtype=torch.uint8)
        pixels[:, 0, :, 0] = numbers[:, None]
        found[side] = Images("numbered", pixels, "f" * 64, torch.arange(count) % 3, 3)
    return found


def loaded(case: Case, rank: int, group: Group, start: int) -> Loader:
    """What a rank iterates over from a start on."""
    images = {
        side: replace(each, shards=case.shards, window=case.window)
        for side, each in numbered(case.count).items()
    }
    return loader(
        images,
        case.batch_size,
        case.stop,
        seed=case.seed,
        resolution_weights=case.weights,
        hflip=case.hflip,
        num_workers=group.workers,
        start=start,
        rank=rank,
        world_size=group.ranks,
    )


def simulated(case: Case, group: Group, start: int) -> Iterator[tuple[Batch, ...]]:
    """Every step's batches by rank; the workers do their steps one after the other."""
    loaders = [loaded(case, rank, group, start) for rank in range(group.ranks)]
    if group.workers == 0:
        return zip(*loaders, strict=True)
    found = {}
    for worker in range(group.workers):
        for step in range(start + worker, case.stop, group.workers):
            found[step] = tuple(each[step] for each in loaders)
    return (found[step] for step in range(start, case.stop))


def with_workers(case: Case, group: Group, start: int) -> Iterator[tuple[Batch, ...]]:
    """The same from real workers; the ranks take turns."""
    return zip(*(loaded(case, rank, group, start) for rank in range(group.ranks)), strict=True)


Run = Callable[[Case, Group, int], Iterator[tuple[Batch, ...]]]


def global_batches(case: Case, group: Group, start: int, run: Run) -> list[Batch]:
    """The batches of every step over all ranks, which must have the steps together."""
    steps = []
    for step, row in enumerate(run(case, group, start), start):
        # torch.cat refuses parts of different resolutions.
        joined = {key: torch.cat([batch[key] for batch in row]) for key in row[0]}
        wanted = torch.arange(step * case.batch_size, (step + 1) * case.batch_size)
        assert {len(batch["index"]) for batch in row} == {case.batch_size // group.ranks}, case
        assert torch.equal(joined["index"], wanted), case
        steps.append(joined)
    assert len(steps) == case.stop - start, case
    return steps


def numbers(batches: list[Batch]) -> Tensor:
    """Which images were seen, in order; a mirrored one has its number in the last column."""
    rows = [torch.minimum(b["image"][:, 0, 0, 0], b["image"][:, 0, 0, -1]) for b in batches]
    return torch.cat(rows).long()


def check(case: Case, run: Run) -> None:
    """A run and what goes on from the middle of it."""
    whole = global_batches(case, case.first, 0, run)
    seen = numbers(whole)
    assert torch.equal(torch.cat([batch["label"] for batch in whole]), seen % 3), case
    epochs = len(seen) // case.count
    assert epochs >= 1
    for epoch in seen[: epochs * case.count].view(epochs, case.count):
        assert torch.equal(epoch.sort().values, torch.arange(case.count)), case
    # What is left of the last epoch has nothing twice.
    assert torch.bincount(seen[epochs * case.count :], minlength=1).max() <= 1, case
    rest = global_batches(case, case.second, case.resume, run)
    for old, new in zip(whole[case.resume :], rest, strict=True):
        assert old.keys() == new.keys(), case
        assert all(torch.equal(old[key], new[key]) for key in old), case


def test_the_cases_reach_everything_they_promise():
    found = [case for chunk in range(CHUNKS) for case in cases(chunk)]
    assert len(found) == CASES
    groups = [group for case in found for group in (case.first, case.second)]
    assert {(group.ranks, group.workers) for group in groups} == set(
        itertools.product(range(1, 9), range(5))
    )
    assert {len(case.shards) for case in found} == set(range(1, 18))
    assert {case.window - len(case.shards) for case in found} >= set(range(-17, 2))
    for several in (
        lambda case: 0 < case.window < len(case.shards),
        lambda case: case.first.ranks != case.second.ranks,
        lambda case: 0 < case.resume < case.stop,
        lambda case: case.count % case.batch_size,
        lambda case: case.batch_size > case.count,
        lambda case: 0 in case.shards,
    ):
        assert sum(map(bool, map(several, found))) > CASES // 50


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_image_comes_once_an_epoch_and_a_run_goes_on_to_the_same_bits(chunk):
    for case in cases(chunk):
        check(case, simulated)


def test_sets_that_differ_in_their_shards_alone_are_walked_apart():
    orders = [Order(24, 3, shards, 2) for shards in ((8, 8, 8), (2, 20, 2), (1,) * 24)]
    for first in range(0, 48, 4):
        for order in orders:
            images = order(first, first + 4)
            again = Order(24, 3, order.shards, 2)(0, 48)  # the whole, at a time
            assert torch.equal(images, again[first : first + 4])
    for order in orders:
        assert torch.equal(order(0, 24).sort().values, torch.arange(24))


@pytest.mark.parametrize("workers", [(0, 1), (1, 0), (1, 4), (2, 3), (3, 2), (4, 1)])
def test_real_workers_give_what_was_simulated(workers):
    source = random.Random(f"workers {workers}")
    case = drawn(source)
    while not 2 <= case.resume <= case.stop - 5:
        case = drawn(source)
    first, second = workers
    case = replace(
        case,
        first=Group(min(case.first.ranks, 2), first),
        second=Group(min(case.second.ranks, 2), second),
        batch_size=2 * case.batch_size,
    )
    check(case, with_workers)
    whole = global_batches(case, case.first, 0, simulated)
    real = global_batches(case, case.second, case.resume, with_workers)
    for one, other in zip(whole[case.resume :], real, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
