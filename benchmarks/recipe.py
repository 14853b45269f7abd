"""cifar10_small beside the settings it had before: the distance at the end, and the time to it.

Three seeds of each are trained in turn, former first, each by its own `train` command on all cores
(as many processes as its settings say, the cores shared among their threads), and measured as their
experiment says and over pixels. The wall and the CPU time are the whole command's, from its start
to its last number; for the quiet time of an image, --time trains both for a few thousand images in
turn, and the former in one process of all cores too, and records the medians.

    make bench BENCH=recipe                # all that is not yet recorded
    .venv/bin/python -m benchmarks.recipe --time
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import command, hardware
from diffusion_pl.evaluation.provenance import commit
from diffusion_pl.training.history import History

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "recipe.json"
RUNS = ROOT / "runs" / "recipe"
EXPERIMENT = "cifar10_small"
SEEDS = (0, 1, 2)
TIMED = 3_200
TURNS = 5

# What cifar10_small was until 2026-11-30.
FORMER = [
    "optimizer={_target_: torch.optim.Adam, _partial_: true, lr: 4e-3, betas: [0.9, 0.999], "
    "eps: 1e-8, fused: true}",
    "lr_schedule={_target_: diffusion_pl.training.lr_schedule.WarmupDecay, warmup: 2000}",
    "ema={_target_: diffusion_pl.training.ema.EMA, half_life: 8000, ramp_up: 0.1}",
    "data.batch_size=32",
    "trainer.total_images=89600",
    "trainer.checkpoint_every=44800",
    "trainer.devices=2",
]  # fmt: skip
RECIPES: dict[str, list[str]] = {"former": FORMER, "recipe": ["trainer.devices=1"]}
IN_ONE = "former in one process"
TIMES = {**RECIPES, IN_ONE: [*FORMER, "trainer.devices=1"]}


def threads(overrides: list[str]) -> int:
    """The threads of each process, so that all have every core between them."""
    processes = next(int(w.partition("=")[2]) for w in reversed(overrides) if "devices=" in w)
    return max(1, (os.cpu_count() or 1) // processes)


def train(name: str, seed: int) -> dict[str, Any]:
    """Train a recipe to its end and measure it."""
    run = RUNS / f"{name}-{seed}"
    # The experiment's own evaluations on the way would count as time of training.
    words = [*RECIPES[name], f"seed={seed}", "evaluation.every=1_000_000", "evaluation.losses=null"]
    words += ["--run", str(run)]
    _, wall, cpu = command("train", EXPERIMENT, *words, threads=threads(RECIPES[name]))
    rows = History(run / "metrics.jsonl").rows()
    end = next(row for row in reversed(rows) if str(row.get("name", "")).startswith("fd@"))
    said, _, _ = command(
        "evaluate", str(run), "--features", "pixels", "--metrics", "frechet", "--json"
    )
    return {
        "recipe": name,
        "seed": seed,
        "overrides": RECIPES[name],
        "images": end["images"],
        "name": end["name"],
        "shapes": end["value"],
        "pixels": json.loads(said)["measures"][0]["value"],
        "seconds": round(wall),
        "cpu_seconds": round(cpu),
        "commit": commit(),
    }


def timed(name: str, turn: int) -> tuple[float, float]:
    """Wall and CPU seconds of an image, less the start: of twice as many images less once."""
    found = []
    for images in (TIMED, 2 * TIMED):
        run = RUNS / "timed" / f"{name}-{turn}-{images}-{os.getpid()}"
        words = [*TIMES[name], f"trainer.total_images={images}", "evaluation.count=1"]
        words += ["evaluation.metrics=[]", "evaluation.every=1_000_000"]
        words += ["evaluation.losses=null", f"trainer.checkpoint_every={images}"]
        words += [] if "former" in name else [f"lr_schedule.cooldown={images // 2}"]
        words += ["--run", str(run)]
        _, wall, cpu = command("train", EXPERIMENT, *words, threads=threads(TIMES[name]))
        found.append((wall, cpu))
    (wall, cpu), (wall_2, cpu_2) = found
    return (wall_2 - wall) / TIMED, (cpu_2 - cpu) / TIMED


def main() -> None:
    """Measure what is asked for and write the record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--time", action="store_true", help="of an image, in turn")
    options.add_argument("--only", choices=list(RECIPES))
    chosen = options.parse_args()

    def read() -> dict[str, Any]:
        return json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": [], "images": {}}

    known = read()

    def write() -> None:
        whole = {**known, "date": time.strftime("%Y-%m-%d"), "hardware": hardware()}
        RECORD.write_text(json.dumps(whole, indent=1) + "\n")

    if chosen.time:
        turns = [{name: timed(name, turn) for name in TIMES} for turn in range(TURNS)]
        for at, kind in enumerate(("seconds", "cpu_seconds")):
            of_image = {name: statistics.median(turn[name][at] for turn in turns) for name in TIMES}
            ratios = {
                other: [round(turn["recipe"][at] / turn[other][at], 3) for turn in turns]
                for other in ("former", IN_ONE)
            }
            known["images"][kind] = {**of_image, "ratios of the recipe": ratios}
        write()
    else:
        for seed in SEEDS:
            for name in [chosen.only] if chosen.only else list(RECIPES):
                done = [
                    row for row in known["runs"] if (row["recipe"], row["seed"]) == (name, seed)
                ]
                if not any(row["overrides"] == RECIPES[name] for row in done):
                    row = train(name, seed)
                    known = read()
                    known["runs"] = [*(each for each in known["runs"] if each not in done), row]
                    write()
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
