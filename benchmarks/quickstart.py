"""The quickstart beside what it was: how many images show the shape that they were asked for.

Each seed of both is trained by its own `train` command, as its file says, the former first. Of each
class 100 images are sampled with the run's own sampler and guidance, and counted are those that the
embedded classifier, which knows eight shapes, names right. The wall time is the whole command's.

    make bench BENCH=quickstart
    .venv/bin/python -m benchmarks.quickstart --only now --seeds 0 --set trainer.total_images=64000
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import command, hardware
from diffusion_pl.api import Run
from diffusion_pl.evaluation.provenance import commit
from diffusion_pl.metrics import shapes
from diffusion_pl.scene_words import SHAPES
from diffusion_pl.training.history import History

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "quickstart.json"
RUNS = ROOT / "runs" / "quickstart_bench"
OF_A_CLASS = 100

# What it was until 2026-12-01: a U-ViT, without guidance.
FORMER = [
    "network={_target_: diffusion_pl.networks.uvit.UViT, resolution: 16, classes: 4, halvings: 1, "
    "model_channels: 128, channel_mult: [1], blocks: [], transformers: 4, heads: 4, "
    "embedding_channels: 128, position_frequencies: 3, dropout: 0.0}",
    "objective={_target_: diffusion_pl.objectives.edm.EDM, P_mean: -0.7}",
    "optimizer={_target_: torch.optim.Adam, _partial_: true, lr: 3e-3, betas: [0.9, 0.95], "
    "eps: 1e-8, fused: true}",
    "lr_schedule={_target_: diffusion_pl.training.lr_schedule.WarmupDecay, warmup: 2000, "
    "cooldown: 28000}",
    "data.batch_size=16",
    "ema={_target_: diffusion_pl.training.ema.EMA, half_life: 2000, ramp_up: 0.1}",
    "evaluation.guidance=1.0",
    "evaluation.every=28000",
    "evaluation.losses={_target_: diffusion_pl.evaluation.settings.Losses, every: 14000, "
    "count: 32, levels: 6}",
    "trainer.total_images=56000",
    "trainer.checkpoint_every=28000",
    "trainer.log_every=2000",
    "trainer.dropout={label: 0.0}",
    "trainer.devices=2",
]
RECIPES: dict[str, list[str]] = {"former": FORMER, "now": []}


def named(run: Path) -> dict[str, float]:
    """The share of images of each class that the classifier names right."""
    judge = shapes.load()
    opened = Run(run)
    found = {}
    for name in opened.class_names:
        images = opened.sample(OF_A_CLASS, label=name)
        logits = judge(images).logits
        assert logits is not None
        right = logits.argmax(dim=1) == SHAPES.index(name)
        found[name] = round(float(right.double().mean()), 3)
    return found


def train(name: str, seed: int, more: list[str]) -> dict[str, Any]:
    """Train one and measure it."""
    run = RUNS / f"{name}-{seed}-{os.getpid()}"
    words = [*RECIPES[name], *more]
    devices = [word for word in words if word.startswith("trainer.devices=")]
    processes = int(devices[-1].partition("=")[2]) if devices else 1
    threads = max(1, (os.cpu_count() or 1) // processes)
    _, wall, cpu = command(
        "train", "quickstart", *words, f"seed={seed}", "--run", str(run), threads=threads
    )
    rows = History(run / "metrics.jsonl").rows()
    last: dict[str, Any] = {}
    for row in rows:
        if "name" in row and "value" in row:
            last[row["name"].partition("@")[0]] = row["value"]
        if "images" in row:
            last["images"] = row["images"]
    right = named(run)
    shutil.rmtree(run)
    return {
        "recipe": name,
        "seed": seed,
        "overrides": words,
        "images": last["images"],
        "fd": last["fd"],
        "cs": last["cs"],
        "named right": round(sum(right.values()) / len(right), 4),
        "by class": right,
        "seconds": round(wall),
        "cpu_seconds": round(cpu),
        "commit": commit(),
    }


def main() -> None:
    """Measure what is asked for and write the record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", choices=list(RECIPES))
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--set", nargs="+", default=[], help="KEY=VALUE, which is not recorded")
    chosen = options.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else []
    for seed in chosen.seeds:
        for name in [chosen.only] if chosen.only else list(RECIPES):
            row = train(name, seed, chosen.set)
            print(json.dumps({**row, "overrides": chosen.set}), flush=True)
            if not chosen.set:
                rows = [r for r in rows if (r["recipe"], r["seed"]) != (name, seed)] + [row]
                whole = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "runs": rows}
                RECORD.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
