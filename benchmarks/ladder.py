"""What pays: one line of a recipe changed at a time, at equal computation, three seeds each.

Every rung trains for as much CPU time as its base: its images are the base's, times the base's cost
of an image over its own, both measured side by side before. The distance of each seed is compared
with the base's of the same seed, so that the noise they share cancels; a rung pays or costs where
the 95 % interval of the mean change of ln(distance) leaves zero, and else cannot be told.

    make ladder                            # all that is not yet recorded, two runs at a time
    make ladder ARGS="--minutes 90"        # begin none after 90 minutes; the next call goes on
    make ladder ARGS="--only cooldown"     # rungs whose name has the word
    make ladder ARGS="--part 3/8"          # every eighth run from the third on: an array of jobs
    make ladder ARGS=--page                # write docs/what_pays.md from the record

A run that was stopped is resumed. The record is benchmarks/results/ladder.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.measure import forked_command, hardware
from diffusion_pl.commands.compare import interval_of
from diffusion_pl.evaluation.provenance import commit
from diffusion_pl.training.history import History

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "ladder.json"
PAGE = ROOT / "docs" / "what_pays.md"
RUNS = ROOT / "runs" / "ladder"
SEEDS = (0, 1, 2)
# Images whose cost is measured, after as many for warming up.
COSTED = 1024

# The data, the images of a base run, and what else they change. There are 330 runs, rungs times
# seeds, so that one may take a minute at most.
DATA: dict[str, tuple[int, list[str]]] = {
    "cifar10": (12_800, []),
    "synthetic64": (
        9_600,
        [
            "data.dataset={_target_: diffusion_pl.data.synthetic.Synthetic, count: 5000, "
            "resolution: 64, grounds: [flat], shapes: [disc, heart, triangle, square]}",
            "data.hflip=false",
            "network.resolution=64",
            "network.classes=4",
        ],
    ),
}
TRANSFORMER = "cifar10_jit_small"
SMALL = ["network.width=64", "network.depth=4"]
UNET = (
    "network={_target_: diffusion_pl.networks.song_unet.SongUNet, resolution: 32, classes: 10, "
    "model_channels: 16, channel_mult: [1, 2, 4], blocks: 1, attention: [8], dropout: 0.0}"
)
# At 64 pixels the transformer's patches are of 8, the U-Net has a level more.
AT_64 = {
    "transformer": ["network.patch_size=8"],
    "U-Net": ["network.channel_mult=[1,2,4,4]"],
}
OBJECTIVES: dict[str, str] = {
    "JiT": "objective={_target_: diffusion_pl.objectives.jit.JiT}",
    "EDM": "objective={_target_: diffusion_pl.objectives.edm.EDM}",
    "rectified flow": "objective={_target_: diffusion_pl.objectives.rectified_flow.RectifiedFlow}",
}
DDPM = "objective={_target_: diffusion_pl.objectives.ddpm.DDPM}"
# What the transformer predicts, under one schedule and one loss, the velocity's.
PREDICTIONS = {
    name: f"objective={{_target_: diffusion_pl.objectives.jit.JiT, predict: {name}}}"
    for name in ("image", "noise", "velocity", "edm")
}
SAVINGS: dict[str, list[str]] = {
    "routing": [
        "network.routing={_target_: diffusion_pl.networks.routing.Routing, rate: 0.5, first: 1, "
        "last: 2}"
    ],
    "Muon": [
        "optimizer={_target_: diffusion_pl.training.optimizers.Grouped, "
        "rest: {_target_: torch.optim.Adam, _partial_: true, lr: 2e-3, betas: [0.9, 0.95]}, "
        "groups: [{_target_: diffusion_pl.training.optimizers.Group, names: ['blocks.*'], ndim: 2, "
        "optimizer: {_target_: diffusion_pl.training.muon.Muon, _partial_: true, lr: 0.02}}]}"
    ],
    "no cooldown": ["lr_schedule.cooldown=0"],
    "EMA 4 times shorter": ["ema.ramp_up=0.025"],
    "EMA 4 times longer": ["ema.ramp_up=0.4"],
    "batch 8": ["data.batch_size=8"],
    "batch 64": ["data.batch_size=64"],
    "memory of 1,000 steps": ["optimizer.betas=[0.9,0.999]"],
}
# On the U-Net the matrices are the kernels of its convolutions.
OF_UNET: dict[str, list[str]] = {
    "Muon": [
        "optimizer={_target_: diffusion_pl.training.optimizers.Grouped, "
        "rest: {_target_: torch.optim.Adam, _partial_: true, lr: 2e-3, betas: [0.9, 0.95]}, "
        "groups: [{_target_: diffusion_pl.training.optimizers.Group, "
        "names: ['encoder.*', 'middle.*', 'decoder.*'], ndim: 4, optimizer: {_target_: "
        "diffusion_pl.training.muon.Muon, _partial_: true, lr: 0.02, flatten: true}}]}"
    ],
    "no cooldown": SAVINGS["no cooldown"],
    "batch 8": SAVINGS["batch 8"],
    "batch 64": SAVINGS["batch 64"],
}
# Losses over features. They are the features that the distance is measured over, too, so their
# verdict is by the distance over pixels.
SHAPES = "extractor: {{_target_: diffusion_pl.metrics.feature_maps.Shapes}}"
LOSSES: dict[str, tuple[str, float]] = {
    "perceptual loss": (
        "objective.extra=[{{_target_: diffusion_pl.diffusion.extra.Perceptual, " + SHAPES + ", "
        "weight: {0}, sigma_max: 1.0}}]",
        0.05,
    ),
    "alignment": (
        "objective.extra=[{{_target_: diffusion_pl.diffusion.extra.Alignment, " + SHAPES + ", "
        "weight: {0}, block: 2}}]",
        0.05,
    ),
}
# Around an objective; {0} is its node.
AROUND: dict[str, str] = {
    "learned uncertainty": (
        "objective={{_target_: diffusion_pl.diffusion.uncertainty.LearnedUncertainty, "
        "objective: {0}}}"
    ),
}
# What changes the cost of an image; of the others it is the base's.
COSTLY = ("routing", "Muon", "batch 8", "batch 64", "perceptual loss", "alignment")
# Of DDPM's objective alone, on the U-Net.
MIN_SNR = (
    "objective={_target_: diffusion_pl.objectives.ddpm.DDPM, weight: "
    "{_target_: diffusion_pl.diffusion.weights.MinSNR}}"
)


@dataclass(frozen=True)
class Rung:
    """One recipe.

    Args:
        data: key of DATA.
        base: what it is compared with, the name of a rung; its own for a base.
        name: of the rung.
        overrides: of the experiment.
        judge: features whose distance decides.
    """

    data: str
    base: str
    name: str
    overrides: tuple[str, ...]
    judge: str = "shapes"

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.data}/{self.name}"

    @property
    def by_pixels(self) -> bool:
        """Whether its distance over pixels is needed: where that decides, and of a base."""
        return self.judge == "pixels" or self.name == self.base

    @property
    def costly(self) -> bool:
        """Whether an image may cost another time than the base's."""
        return any(self.name.endswith(f", {word}") for word in COSTLY)


def rungs() -> Iterator[Rung]:
    """Every rung, a base before what is compared with it."""
    for data, (_, own) in DATA.items():
        for network in ("transformer", "U-Net"):
            fixed = [*([UNET] if network == "U-Net" else SMALL), *own]
            fixed += AT_64[network] if data == "synthetic64" else []
            for predicted, node in PREDICTIONS.items():
                base = f"{network}, image"
                yield Rung(data, base, f"{network}, {predicted}", (*fixed, node))
        fixed = [UNET, *own, *(AT_64["U-Net"] if data == "synthetic64" else [])]
        for of, node in (("EDM", OBJECTIVES["EDM"]), ("DDPM", DDPM)):
            base = f"U-Net, {of}'s objective"
            yield Rung(data, base, base, (*fixed, node))
            for saving, words in OF_UNET.items():
                yield Rung(data, base, f"{base}, {saving}", (*fixed, node, *words))
        yield Rung(data, base, f"{base}, min-SNR", (*fixed, MIN_SNR))
        fixed = [*SMALL, *own, *(AT_64["transformer"] if data == "synthetic64" else [])]
        yield Rung(data, "transformer, image", "DDPM", (*fixed, DDPM))
        for objective, node in OBJECTIVES.items():
            base = "transformer, image" if objective == "JiT" else objective
            if objective != "JiT":
                yield Rung(data, base, objective, (*fixed, node))
            yield from _on(data, objective, base, (*fixed, node))


def _on(data: str, objective: str, base: str, words: tuple[str, ...]) -> Iterator[Rung]:
    """The savings on one objective of the transformer."""
    *fixed, node = words
    for saving, more in SAVINGS.items():
        yield Rung(data, base, f"{objective}, {saving}", (*words, *more))
    # EDM's loss is a sum over the pixels, the others are means.
    side = 64 if data == "synthetic64" else 32
    scale = 3 * side * side if objective == "EDM" else 1
    for saving, (template, weight) in LOSSES.items():
        more = [template.format(weight * scale)]
        yield Rung(data, base, f"{objective}, {saving}", (*words, *more), "pixels")
    for saving, template in AROUND.items():
        around = template.format(node.partition("=")[2])
        yield Rung(data, base, f"{objective}, {saving}", (*fixed, around))


class Record:
    """What has been measured, written after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        known = json.loads(path.read_text()) if path.exists() else {}
        self.costs: dict[str, Any] = known.get("costs", {})
        self.runs: list[dict[str, Any]] = known.get("runs", [])

    def has(self, rung: Rung, seed: int) -> bool:
        """Whether a run of these very overrides is recorded."""
        return any(self._same(row, rung) and row["seed"] == seed for row in self.runs)

    def add(self, rung: Rung, seed: int, row: Mapping[str, Any]) -> None:
        """Record a run in the place of any before it."""
        with self.lock:
            kept = [r for r in self.runs if (r["rung"], r["seed"]) != (rung.key, seed)]
            about = {"rung": rung.key, "seed": seed, "overrides": list(rung.overrides)}
            self.runs = [*kept, {**about, **row}]
            self.write()

    def cost(self, rung: Rung) -> float | None:
        """The CPU time of an image over the base's; None if it was not measured."""
        known = self.costs.get(rung.key, {})
        return known["ratio"] if known.get("overrides") == list(rung.overrides) else None

    def add_cost(self, rung: Rung, ratio: float) -> None:
        """Record a cost."""
        with self.lock:
            self.costs[rung.key] = {"overrides": list(rung.overrides), "ratio": round(ratio, 4)}
            self.write()

    def write(self) -> None:
        """Write all of it."""
        whole = {"hardware": hardware(), "costs": self.costs, "runs": self.runs}
        self.path.write_text(json.dumps(whole, indent=1) + "\n")

    def distances(self, rung: Rung, judge: str) -> dict[int, float]:
        """The distance of each seed over some features."""
        rows = (row for row in self.runs if self._same(row, rung) and judge in row)
        return {row["seed"]: row[judge] for row in rows}

    @staticmethod
    def _same(row: Mapping[str, Any], rung: Rung) -> bool:
        return bool(row["rung"] == rung.key and row["overrides"] == list(rung.overrides))


def cpu_seconds(words: Sequence[str], core: int | None = None) -> float:
    """User and system time of a training; ends everything if it fails."""
    return forked_command("train", TRANSFORMER, "trainer.devices=1", *words, core=core)[2]


def cost(rung: Rung, base: Rung, core: int) -> float:
    """The CPU time of an image over the base's.

    Both train COSTED images and twice as many, all four at once on one core, so that whatever else
    the machine does slows them alike; the difference is without the start and the end.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cost-", dir=RUNS))

    def taken(case: tuple[Rung, int]) -> float:
        one, images = case
        return cpu_seconds(
            [
                *one.overrides,
                f"trainer.total_images={images}", f"trainer.checkpoint_every={images}",
                f"evaluation.every={images}", "evaluation.count=1",
                "evaluation.metrics=[]", "evaluation.losses=null",
                "--run", str(folder / f"{one.name}-{images}"),
            ],
            core,
        )  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        cases = [(one, images) for one in (rung, base) for images in (COSTED, 2 * COSTED)]
        short, long, short_base, long_base = pool.map(taken, cases)
    shutil.rmtree(folder)
    return (long - short) / (long_base - short_base)


def over_pixels(run: Path) -> float:
    """The distance of a run over pixels."""
    words = ["--features", "pixels", "--metrics", "frechet", "--json"]
    said, _, _ = forked_command("evaluate", str(run), *words)
    return float(json.loads(said)["measures"][0]["value"])


def train(rung: Rung, seed: int, images: int) -> dict[str, Any]:
    """Train a rung and read its last distance; over pixels too where it is needed."""
    run = RUNS / rung.key.replace(", ", "_").replace(" ", "-") / str(seed)
    given = any("cooldown" in word for word in rung.overrides)
    cooldown = [] if given else [f"lr_schedule.cooldown={images // 2}"]
    started = time.monotonic()
    seconds = cpu_seconds(
        [
            *cooldown, *rung.overrides, f"seed={seed}", f"trainer.total_images={images}",
            f"trainer.checkpoint_every={images}", f"evaluation.every={images}",
            "evaluation.losses=null",
            "--run", str(run),
        ]
    )  # fmt: skip
    rows = History(run / "metrics.jsonl").rows()
    row = next(row for row in reversed(rows) if str(row.get("name", "")).startswith("fd@"))
    return {
        "name": row["name"],
        "shapes": row["value"],
        **({"pixels": over_pixels(run)} if rung.by_pixels else {}),
        "images": images,
        "cpu_seconds": round(seconds),
        "seconds": round(time.monotonic() - started),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def climb(
    record: Record, chosen: Sequence[Rung], minutes: float, workers: int, images: int | None = None
) -> None:
    """Do every run of the chosen rungs that is not recorded, seed by seed."""
    every = {rung.key: rung for rung in rungs()}
    until = time.monotonic() + 60 * minutes
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[:workers]:
        cores.put(core)

    def one(rung: Rung, seed: int) -> None:
        if time.monotonic() > until or record.has(rung, seed):
            return
        base = every[f"{rung.data}/{rung.base}"]
        if rung.costly and not record.cost(rung):
            core = cores.get()  # each worker has one
            record.add_cost(rung, cost(rung, base, core))
            cores.put(core)
        ratio = record.cost(rung) or 1.0
        given = next((w for w in rung.overrides if w.startswith("data.batch_size=")), "=16")
        batch = int(given.partition("=")[2])
        whole = images or DATA[rung.data][0]
        row = train(rung, seed, max(1, round(whole / ratio / batch)) * batch)
        record.add(rung, seed, row)
        print(f"{rung.key}, seed {seed}: {row['shapes']:.4g} ({row['seconds']} s)", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(one, rung, seed) for seed in SEEDS for rung in chosen]:
            done.result()


def verdict(record: Record, rung: Rung, base: Rung) -> tuple[str, float, float]:
    """Whether a rung pays, and the interval of its distance over the base's."""
    mine, theirs = (record.distances(one, rung.judge) for one in (rung, base))
    both = [seed for seed in SEEDS if seed in mine and seed in theirs]
    changes = [math.log(mine[seed] / theirs[seed]) for seed in both]
    if len(changes) < len(SEEDS):
        return f"{len(changes)} of {len(SEEDS)} seeds", math.nan, math.nan
    low, high = map(math.exp, interval_of(changes))
    word = "pays" if high < 1 else "costs" if low > 1 else "cannot be told"
    return word, low, high


def page(record: Record) -> str:
    """The table of docs/what_pays.md."""
    every = {rung.key: rung for rung in rungs()}
    lines = [
        "| data | rung | distance, three seeds | over its base | cost of an image | |",
        "|---|---|---|---|---|---|",
    ]
    for rung in every.values():
        base = every[f"{rung.data}/{rung.base}"]
        values = record.distances(rung, rung.judge)
        if not values:
            continue
        found = ", ".join(f"{values[seed]:.2f}" for seed in sorted(values))
        if rung.key == base.key:
            lines.append(f"| {rung.data} | **{rung.name}** | {found} | base | 1 | |")
            continue
        word, low, high = verdict(record, rung, base)
        ratio = record.cost(rung) or 1.0
        over = "" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
        name = rung.name + (" (over pixels)" if rung.judge == "pixels" else "")
        lines.append(f"| {rung.data} | {name} | {found} | {over} | {ratio:.2f} | {word} |")
    return "\n".join(lines) if record.runs else "No run is recorded yet."


def write_page(record: Record) -> None:
    """Put the table between the marks of the page."""
    text = PAGE.read_text()
    head, rest = text.split("<!-- ladder -->\n")
    tail = rest.split("<!-- end -->")[1]
    PAGE.write_text(f"{head}<!-- ladder -->\n{page(record)}\n<!-- end -->{tail}")


def main() -> None:
    """Run what is asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", action="append", default=[], help="a word of the rung's name")
    options.add_argument("--minutes", type=float, default=math.inf)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--part", default="1/1", help="K/N: every N-th rung from the K-th on")
    options.add_argument("--page", action="store_true")
    options.add_argument("--images", type=int, help="of a base, to try the ladder itself")
    options.add_argument("--record", type=Path, default=RECORD)
    chosen = options.parse_args()
    record = Record(chosen.record)
    if chosen.page:
        write_page(record)
        return
    part, parts = map(int, chosen.part.split("/"))
    wanted = [r for r in rungs() if all(word in r.key for word in chosen.only)]
    climb(record, wanted[part - 1 :: parts], chosen.minutes, chosen.workers, chosen.images)
    print(page(record))
    if chosen.record == RECORD:
        write_page(record)


if __name__ == "__main__":
    main()
