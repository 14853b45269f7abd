"""What the processes of a run agree on: for one process, in arithmetic, and among three of them."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_metrics_fid import Known, exact, moments_of, normal, reference_of
from test_metrics_reference import Corners, ImageFiles, draw
from torch import Tensor, distributed

from diffusion_pl import ranks
from diffusion_pl.metrics import real_images
from diffusion_pl.metrics.accumulated import Kept, Summed
from diffusion_pl.metrics.features import TILE, Features
from diffusion_pl.metrics.fid import Frechet, expected_bias
from diffusion_pl.metrics.reference import Reference

WORLD = 3

# Images to measure: four tiles, which three ranks share unevenly, and two, which leave one idle.
MANY, FEW = 3 * TILE + 5, TILE + 1


class Idle(ImageFiles):
    """Images that a rank without a share of them asks for the first tile of, and for no other."""

    def read(self, indices: Tensor) -> Tensor:
        assert len(indices) > 0
        return super().read(indices)


def rows_of(rank: int) -> Tensor:
    """Two rows, none, three."""
    return torch.arange(12.0).reshape(6, 2)[{0: slice(0, 2), 1: slice(0), 2: slice(3, 6)}[rank]]


def features_of(count: int) -> Tensor:
    """In single precision, as extractors give them."""
    return normal(count, 4, seed=2).float()


def distance_of(part: Tensor, count: int) -> Summed:
    """The distance over 100 known features, having seen a part of `count`."""
    metric = Frechet().build(Known(4), reference_of(normal(100, 4, seed=1)), count)
    for batch in part.split(5):
        if len(batch):
            metric.update(Features(batch))
    return metric


def totals(values: Tensor) -> dict[str, float]:
    """What a metric that keeps its features in order may be of."""
    values = values.double()
    place = torch.arange(1, len(values) + 1, dtype=torch.float64)
    return {"count": len(values), "sum": values.sum().item(), "order": (place @ values)[0].item()}


def kept(part: Tensor) -> Kept:
    metric = Kept("pooled", 4, totals)
    for batch in part.split(5):
        if len(batch):
            metric.update(Features(batch))
    return metric


def among_others(rank: int, folder: Path) -> dict[str, Any]:
    """What one of several processes sees."""
    os.environ["LOCAL_RANK"] = str(rank)
    mine = torch.tensor([[rank + 1.0, 10.0 * rank]], dtype=torch.float64)
    seen: dict[str, Any] = {
        "number": (ranks.rank(), ranks.world_size(), ranks.leads_machine()),
        "shares": [ranks.rank_range(count, TILE) for count in (MANY, FEW)],
        "sum": ranks.sum_over_ranks(mine),
        "sum of columns": ranks.sum_over_ranks(torch.arange(6).reshape(2, 3).T + rank),
        "own": mine,
        "rows": ranks.gather(rows_of(rank)),
        "numbers": ranks.gather(torch.full((rank,), rank)),
        "agree": [
            ranks.all_agree(answer) for answer in (True, False, rank != 0, rank != 1, rank == 2)
        ],
    }
    for count in (MANY, FEW):
        done: list[tuple[int, int]] = []
        seen[f"reference of {count}"] = real_images.compute(
            Idle(draw(count)),
            Corners(),
            keep=True,
            progress=lambda *step, done=done: done.append(step),
        )
        seen[f"progress of {count}"] = done
    # The first process has its answer already, and must not leave the others waiting.
    place = folder / str(rank)
    if ranks.rank() == 0:
        path = real_images.path_of(place, ImageFiles(draw(FEW)), Corners(), keep=True)
        seen[f"reference of {FEW}"].save(path)
    seen["cached"] = real_images.cached(place, ImageFiles(draw(FEW)), Corners(), keep=True)
    seen["written"] = [path.name for path in place.glob("*")]
    for count in (20, 4):
        # The last rank, and of four images the second too, sees none.
        share = {20: (range(13), range(13, 20), range(0)), 4: (range(4), range(0), range(0))}
        part = features_of(count)[share[count][rank].start : share[count][rank].stop]
        for name, metric in (("distance", distance_of(part, 20)), ("kept", kept(part))):
            # The second time from memory, the third from all states again.
            values = [metric.compute(), metric.compute()]
            metric._computed = None
            seen[f"{name} of {count}"] = [*values, metric.compute()]
            seen[f"notes of {name} of {count}"] = dict(metric.notes)
    return seen


def main(folder: Path) -> None:
    """Fork, before torch has any threads, one process a rank; each writes what it sees."""
    torch.set_num_threads(1)
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if not child:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'meeting'}",
                rank=rank,
                world_size=WORLD,
                timeout=datetime.timedelta(seconds=20),
            )
            torch.save(among_others(rank, folder), folder / f"{rank}.pt")
            distributed.destroy_process_group()
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("tile", [1, 4, 32])
def test_shares_are_whole_tiles_that_cover_everything_once_in_order(
    monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    for world in (1, 2, 3, 4, 7, 8):
        monkeypatch.setattr(ranks, "world_size", lambda world=world: world)
        for count in [*range(40), 63, 64, 65, 127, 128, 1000]:
            shares = []
            for rank in range(world):
                monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
                shares.append(ranks.rank_range(count, tile))
            case = (world, count, shares)
            assert [i for share in shares for i in share] == list(range(count)), case
            assert all(share.start % tile == 0 for share in shares if share), case
            assert all(len(share) % tile == 0 for share in shares if share.stop < count), case
            assert shares[0] or count == 0, case
            tiles = [-(-len(share) // tile) for share in shares]
            assert max(tiles) - min(tiles) <= 1, case


NUMBERS = ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_LOCALID"]


@pytest.mark.parametrize(
    ("told", "leads_machine", "leads_run", "is_helper"),
    [
        # Started by hand: the first process, and those that it starts.
        ("", True, True, False),
        ("LOCAL_RANK=1 NODE_RANK=0", False, False, True),
        # By hand on a second machine, with those that it starts.
        ("NODE_RANK=1", True, False, False),
        ("LOCAL_RANK=1 NODE_RANK=1", False, False, True),
        # By srun, 2 nodes x 2 tasks; nobody is another's helper.
        ("SLURM_PROCID=0 SLURM_LOCALID=0", True, True, False),
        ("SLURM_PROCID=1 SLURM_LOCALID=1", False, False, False),
        ("SLURM_PROCID=2 SLURM_LOCALID=0", True, False, False),
        ("SLURM_PROCID=3 SLURM_LOCALID=1", False, False, False),
        # In a job's script without srun, which is task 0.
        ("SLURM_PROCID=0 SLURM_LOCALID=0 LOCAL_RANK=1 NODE_RANK=0", False, False, True),
        # By torchrun, 2 nodes x 2.
        ("RANK=0 LOCAL_RANK=0", True, True, False),
        ("RANK=1 LOCAL_RANK=1", False, False, False),
        ("RANK=2 LOCAL_RANK=0", True, False, False),
    ],
)
def test_whoever_starts_a_process_tells_it_its_place(
    monkeypatch: pytest.MonkeyPatch,
    told: str,
    leads_machine: bool,
    leads_run: bool,
    is_helper: bool,
) -> None:
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in (word.split("=") for word in told.split()):
        monkeypatch.setenv(name, value)
    assert ranks.leads_machine() == leads_machine
    assert ranks.leads_run() == leads_run
    assert ranks.is_started_by_lightning() == is_helper


def test_alone_a_process_answers_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world_size(), ranks.leads_machine()) == (0, 1, True)
    assert ranks.rank_range(70, TILE) == range(70)
    values = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(ranks.sum_over_ranks(values), values)
    assert torch.equal(ranks.gather(values), values)
    assert ranks.all_agree(True) is True
    assert ranks.all_agree(False) is False
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not ranks.leads_machine()


def test_each_of_three_knows_its_number(seen: list[dict[str, Any]]) -> None:
    assert [one["number"] for one in seen] == [(0, 3, True), (1, 3, False), (2, 3, False)]
    shares = [range(2 * TILE), range(2 * TILE, 3 * TILE), range(3 * TILE, MANY)]
    assert [one["shares"][0] for one in seen] == shares
    assert [len(one["shares"][1]) for one in seen] == [TILE, 1, 0]


def test_sums_are_over_all_and_leave_what_was_summed(seen: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(seen):
        assert one["sum"].tolist() == [[6, 30]]
        assert one["sum"].dtype == torch.float64
        assert one["own"].tolist() == [[rank + 1, 10 * rank]]
        assert one["sum of columns"].tolist() == [[3, 12], [6, 15], [9, 18]]


def test_rows_of_uneven_numbers_are_gathered_in_order(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert one["rows"].tolist() == [[0, 1], [2, 3], [6, 7], [8, 9], [10, 11]]
        assert one["numbers"].tolist() == [1, 2, 2]
        assert one["numbers"].dtype == torch.int64


def test_they_agree_only_when_all_say_yes(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert one["agree"] == [True, False, False, False, False]


def assert_same(got: Reference, expected: Reference) -> None:
    close = {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(got.mean, expected.mean, **close)
    torch.testing.assert_close(got.covariance, expected.covariance, **close)
    assert got.spatial is not None and expected.spatial is not None
    torch.testing.assert_close(got.spatial.mean, expected.spatial.mean, **close)
    torch.testing.assert_close(got.spatial.covariance, expected.spatial.covariance, **close)
    assert got.features is not None and expected.features is not None
    assert torch.equal(got.features, expected.features), "another order"
    assert got.count == expected.count == got.spatial.count


@pytest.mark.parametrize("count", [MANY, FEW])
def test_three_measure_the_reference_that_one_measures(
    seen: list[dict[str, Any]], count: int
) -> None:
    expected = real_images.compute(ImageFiles(draw(count)), Corners(), keep=True)
    for one in seen:
        assert_same(one[f"reference of {count}"], expected)


def test_progress_is_of_each_rank_s_own_share(seen: list[dict[str, Any]]) -> None:
    done = [[(TILE, 2 * TILE), (2 * TILE, 2 * TILE)], [(TILE, TILE)], [(5, 5)]]
    assert [one[f"progress of {MANY}"] for one in seen] == done
    assert [one[f"progress of {FEW}"] for one in seen] == [[(TILE, TILE)], [(1, 1)], []]


def test_where_a_rank_lacks_the_file_all_measure_and_the_machine_s_first_writes(
    seen: list[dict[str, Any]],
) -> None:
    expected = real_images.compute(ImageFiles(draw(FEW)), Corners(), keep=True)
    for one in seen:
        assert_same(one["cached"], expected)
    assert [len(one["written"]) for one in seen] == [1, 0, 0]


def test_a_distance_over_three_is_that_over_all_images(seen: list[dict[str, Any]]) -> None:
    real = normal(100, 4, seed=1)
    for count in (20, 4):
        generated = features_of(count)
        for one in seen:
            values = [value["fd"] for value in one[f"distance of {count}"]]
            assert values == pytest.approx([exact(real, generated.double())] * 3, rel=1e-9)
    bias = expected_bias(features_of(20), moments_of(real))
    for one in seen:
        assert one["notes of distance of 20"] == {"bias": pytest.approx(bias, rel=1e-9)}


def test_kept_features_are_those_of_all_in_order(seen: list[dict[str, Any]]) -> None:
    for count in (20, 4):
        expected = pytest.approx(totals(features_of(count)), rel=1e-12)
        for one in seen:
            assert one[f"kept of {count}"] == [expected] * 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
