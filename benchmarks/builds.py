"""This build beside another revision of it: ratios of benchmarks run in turn.

A worktree of the revision is made beside this one and both run their own benchmarks, a round each
in turn, so that a busy moment hits both alike. Printed are the median ratio of this build to the
base and its spread over the rounds, for every number that both have. A number has fallen where it
is worse by more than 10 % in every round; then the exit code is 1.

    make bench-compare BASE=v0.9 [BENCH="commands loop"] [ARGS="--rounds 5 --out FILE"]

Of numbers whose name has "/s" or "share of" more is better, of all others less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GROUPS = ("commands", "loop")
FALL = 1.10
MORE_IS_BETTER = ("/s", "per second", "share of")


@dataclass(frozen=True)
class Ratio:
    """A number of this build over that of the base.

    Args:
        name: group and number.
        rounds: the ratio in each round.
        more: whether more is better.
    """

    name: str
    rounds: tuple[float, ...]
    more: bool

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def fallen(self) -> bool:
        """Whether it is worse by more than FALL in every round."""
        worse = [1 / each if self.more else each for each in self.rounds]
        return min(worse) > FALL


def numbers(figures: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, by the path to each."""
    if isinstance(figures, Mapping):
        for key, value in figures.items():
            yield from numbers(value, f"{name}: {key}" if name else str(key))
    elif isinstance(figures, list):
        for place, value in enumerate(figures):
            yield from numbers(value, f"{name}[{place}]")
    elif isinstance(figures, int | float) and not isinstance(figures, bool):
        yield name, float(figures)


@contextmanager
def worktree(root: Path, revision: str) -> Iterator[Path]:
    """A worktree of a revision, which is gone afterwards.

    Raises:
        SystemExit: there is no such revision.
    """
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        place = Path(folder) / "tree"
        made = subprocess.run(
            ["git", "worktree", "add", "--detach", str(place), revision],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            raise SystemExit(f"no worktree of {revision}: {made.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(place)],
                cwd=root, capture_output=True, check=True,
            )  # fmt: skip


def measured(tree: Path, group: str) -> dict[str, float]:
    """The numbers of one run of a group in a tree.

    Raises:
        SystemExit: it failed.
    """
    results = tree / "benchmarks" / "results"
    before = {path: path.stat().st_mtime_ns for path in results.glob(f"{group}-*.json")}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{group}"], cwd=tree, stdout=errors, stderr=errors,
            env={**os.environ, "PYTHONPATH": str(tree)}, check=False,
        )  # fmt: skip
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{group} failed in {tree}:\n{errors.read()[-2000:]}")
    written = [
        path for path in results.glob(f"{group}-*.json")
        if before.get(path) != path.stat().st_mtime_ns
    ]  # fmt: skip
    if len(written) != 1:
        raise SystemExit(f"{group} wrote {len(written)} records in {results}")
    return dict(numbers(json.loads(written[0].read_text())["figures"]))


def compared(root: Path, base: str, groups: Sequence[str], rounds: int) -> list[Ratio]:
    """Every number that both builds have.

    The tree of this build is a worktree, too, with what is changed and not committed, so that no
    record of it is overwritten.
    """
    found: dict[str, list[float]] = {}
    with worktree(root, base) as there, worktree(root, "HEAD") as here:
        change = subprocess.run(
            ["git", "diff", "HEAD", "--binary"], cwd=root, capture_output=True, check=True
        ).stdout
        if change:
            subprocess.run(["git", "apply"], cwd=here, input=change, check=True)
        for turn in range(rounds):
            for group in groups:
                # The first of a pair takes turns, too.
                order = (here, there) if turn % 2 else (there, here)
                both = {tree: measured(tree, group) for tree in order}
                for name, value in both[here].items():
                    if both[there].get(name):
                        found.setdefault(f"{group}: {name}", []).append(value / both[there][name])
    return [
        Ratio(name, tuple(ratios), any(word in name for word in MORE_IS_BETTER))
        for name, ratios in found.items()
        if len(ratios) == rounds and min(ratios) > 0
    ]


def table(ratios: Sequence[Ratio]) -> list[str]:
    """A line for each number."""
    width = max((len(each.name) for each in ratios), default=0)
    return [
        f"{each.name:{width}}  {each.median:6.3f}  ({min(each.rounds):.3f} to "
        f"{max(each.rounds):.3f}){'  more is better' * each.more}{'  FALLEN' * each.fallen}"
        for each in ratios
    ]


def main() -> int:
    """Compare and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("base", help="revision")
    options.add_argument("groups", nargs="*", default=list(GROUPS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--out", type=Path, help="JSON of the ratios")
    chosen = options.parse_args()
    ratios = compared(ROOT, chosen.base, chosen.groups or list(GROUPS), chosen.rounds)
    print(f"this build over {chosen.base}, median of {chosen.rounds} rounds (least to most)")
    print("\n".join(table(ratios)))
    if chosen.out:
        rows = {each.name: {"rounds": each.rounds, "fallen": each.fallen} for each in ratios}
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(each.fallen for each in ratios))


if __name__ == "__main__":
    sys.exit(main())
