"""Many faults, one after the other, at random places: no hang, no lost run, every end bit-equal.

`make soak` lets runs befall themselves at random passes and readings until so many faults have
happened, starts each again until it is finished, and holds what it leaves against a run that
nothing befell. It writes its counts to benchmarks/results/ and, as a table, to docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from faults import KINDS, assert_equal, at, befallen, left, marked, newest, spoil, write
from started import LIMIT, train

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "soak.json"
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- the soak's table -->\n", "<!-- its end -->\n"
STARTS = 12  # of one run, after which it counts as lost


class Soak:
    """Counts of what happened.

    Args:
        place: folder of the runs.
        seed: of everything random.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.source = place, random.Random(seed)
        self.faults: dict[str, list[float]] = defaultdict(list)  # seconds until all were gone
        self.hangs = self.untrue = self.lost = self.unequal = self.runs = 0
        self.whole: dict[tuple, object] = {}

    def straight(self, ranks: int, words: tuple) -> object:
        """What a run leaves that nothing befalls."""
        if (ranks, words) not in self.whole:
            name = f"straight-{ranks}-{len(words)}"
            assert train(self.place, name, *words, ranks=ranks).codes == [0] * ranks
            self.whole[ranks, words] = left(self.place, name)
        return self.whole[ranks, words]

    def run(self) -> None:
        """One run, from its beginning through faults to its end."""
        ranks, words = self.source.choice([1, 2]), self.source.choice([(), ("data.num_workers=1",)])
        # A process that is stopped alone has nobody to notice it.
        kinds = [
            kind
            for kind in KINDS.values()
            if kind.words in ((), words) and not (ranks == 1 and None in kind.codes)
        ]
        whole, name = self.straight(ranks, words), f"run-{self.runs}"
        self.runs += 1
        for _ in range(STARTS):
            kind = self.source.choice(kinds) if self.source.random() < 0.8 else None
            if self._start(name, ranks, words, kind):
                break
        else:
            self.lost += 1
            return
        try:
            assert_equal(whole, left(self.place, name))
        except AssertionError as error:
            self.unequal += 1
            print(f"{name}: {error}", file=sys.stderr)
        shutil.rmtree(self.place / "runs" / name)

    def _start(self, name: str, ranks: int, words: tuple, kind) -> bool:
        """Start a run, for the first time or again; whether it ended with its budget."""
        faults = {}
        if kind is not None:
            number = at(kind, ranks, self.source)
            faults = dict.fromkeys(befallen(kind, ranks, self.source), f"{kind.fault}:{number}")
        # One that is stopped stays; the others have ended by then.
        limit = 60 if kind is not None and None in kind.codes else LIMIT
        ended = train(self.place, name, *words, ranks=ranks, faults=faults, limit=limit)
        if ended.codes == [0] * ranks and not marked(self.place, name):
            return True  # its fault lay beyond its end
        title = next(title for title, other in KINDS.items() if other is kind)
        self.faults[title].append(ended.seconds)
        hung = ended.codes.count(None)
        if hung > (None in kind.codes):
            self.hangs += 1
            print(f"{name}: {title} {faults} hung: {ended.codes}", file=sys.stderr)
        if (
            not set(ended.codes) - {None} <= set(kind.codes)
            or marked(self.place, name) < kind.marked
        ):
            self.untrue += 1
            print(f"{name}: {title} {faults} ended with {ended.codes}", file=sys.stderr)
        if kind.damage:
            spoil(newest(self.place, name), self.source)
        return False

    @property
    def count(self) -> int:
        """Faults that happened."""
        return sum(map(len, self.faults.values()))


def table(record: dict) -> str:
    """The counts as the page shows them."""
    rows = []
    for kind, found in record["kinds"].items():
        median, most = found["median_seconds"], found["most_seconds"]
        rows.append(f"| {kind} | {found['count']} | {median:.1f} | {most:.1f} |")
    lines = [
        f"{record['faults']} faults in {record['runs']} runs, in {record['minutes']:.0f} minutes,",
        f"{record['machine']} ({record['made']}): {record['hangs']} hangs, {record['lost']} lost",
        f"runs, {record['untrue']} untrue exit codes or marks, {record['unequal']} ends that",
        "differ in any bit from a run that nothing befell.",
        "",
        "| fault | times | seconds from the first rank's end to the last's, median | most |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n\n"


def main() -> None:
    """Let faults happen, and write what came of them."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("--faults", type=int, default=100, help="how many at least (100)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--record", action="store_true", help="write the record and the page")
    chosen = options.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "experiments").mkdir()
        shutil.copy(ROOT / "experiments" / "base.yaml", place / "experiments")
        write(place)
        soak = Soak(place, chosen.seed)
        while soak.count < chosen.faults:
            soak.run()
            print(f"{soak.count} faults, {soak.runs} runs, {soak.hangs} hangs, {soak.lost} lost, "
                  f"{soak.unequal} unequal, {soak.untrue} untrue", file=sys.stderr)  # fmt: skip
    record = {
        "made": time.strftime("%Y-%m-%d"),
        "machine": f"two cores of {platform.machine()}",
        "seed": chosen.seed,
        "minutes": (time.monotonic() - started) / 60,
        "faults": soak.count,
        **{key: getattr(soak, key) for key in ("runs", "hangs", "lost", "untrue", "unequal")},
        "kinds": {
            kind: {
                "count": len(seconds),
                "median_seconds": statistics.median(seconds),
                "most_seconds": max(seconds),
            }
            for kind, seconds in sorted(soak.faults.items())
        },
    }
    print(json.dumps(record, indent=2))
    if chosen.record:
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        text = PAGE.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(record)}{END}{after}")
    raise SystemExit(bool(soak.hangs or soak.lost or soak.untrue or soak.unequal))


if __name__ == "__main__":
    main()
