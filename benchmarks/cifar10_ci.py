"""The number that CI reproduces: a fixed small recipe on CIFAR-10, against ten seeds' interval.

`make ci-fid` trains experiments/cifar10_ci.yaml, and fails if a number of it lies outside the
interval that benchmarks/results/cifar10_ci.json holds. Of the samples there are two distances,
over the embedded classifier's features and over means of pixels; of the averaged weights two
errors, means over high and over low noise levels; of the images that the network saw in its first
steps the distance from the data, over means of pixels. The last three hardly differ from seed to
seed and notice what the others cannot. The interval is where one more run of such a recipe lies
with 99 % probability, if runs are normally distributed about the seeds' mean:

    mean +- t(0.995, n - 1) s sqrt(1 + 1 / n)

Where Inception's weights are in torch's cache, FID is measured as well, and decides once an
interval of it is recorded. `--record` trains the seeds and writes that file; `--bugs` plants three
bugs, one at a time, and says whether each leaves the interval.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from benchmarks.measure import hardware
from diffusion_pl.metrics import inception
from diffusion_pl.training.history import History, is_evaluation

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "cifar10_ci.json"
EXPERIMENT = "cifar10_ci"
SEEN = 8000  # images of the first steps
PLACES = (
    "data/cifar10/cifar-10-python.tar.gz",
    "../shared/data/cifar-10-subset-python.tar.gz",  # beside the project where CI has it
)

# What is planted, where, and what it becomes.
BUGS = {
    "the average's decay, counted in steps instead of images": (
        "training/ema.py",
        "return 0.5 ** (batch_size / half_life)",
        "return 0.5 ** (1 / half_life)",
    ),
    "c_noise, scaled to DDPM's 1,000 timesteps": (
        "diffusion/preconditioning.py",
        "c_noise=sigma.log() / 4",
        "c_noise=1000 * sigma.log() / 4",
    ),
    "the mirror image of half of the image": (
        "data/loader.py",
        "image.flip(-1), image)",
        "torch.cat([image[..., :8].flip(-1), image[..., 8:]], -1), image)",
    ),
}


def train(data: str, seed: int, run: Path, code: Path = ROOT) -> list[dict[str, Any]]:
    """Train and measure once: distances over two extractors, and FID where it can be had."""
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    words = ["-m", "diffusion_pl", "train", EXPERIMENT, f"seed={seed}", "--run", str(run)]
    words += [
        f"data.dataset.path={run.parent / 'shards'}",
        f"data.dataset.made_of.source.path={data}",
    ]
    _command(words, code)
    rows = [row for row in History(run / "metrics.jsonl").rows() if is_evaluation(row)]
    found = [next(row for row in reversed(rows) if row["name"].startswith("fd@"))]
    extractors = ["pixels"]
    if (Path(torch.hub.get_dir()) / "checkpoints" / inception.FILE).exists():
        extractors.append("inception")
    for extractor in extractors:
        found += _distance(run, extractor, code)
    found += _errors(run, found[0], code)
    found += _seen(run, code)
    seconds = round(time.monotonic() - started)
    return [{**row, "whole_seconds": seconds} for row in found]


def _distance(images: Path, extractor: str, code: Path, *more: str) -> list[dict[str, Any]]:
    """The distance of the images of a run or a file, in one number."""
    words = ["-m", "diffusion_pl", "evaluate", str(images), "--features", extractor]
    answer = json.loads(_command([*words, "--metrics", "frechet", *more], code))
    measures: list[dict[str, Any]] = answer["measures"]
    return measures


def _seen(run: Path, code: Path) -> list[dict[str, Any]]:
    """The distance of images as the network sees them from the data, in one number."""
    images = run / "seen.npz"
    _command([str(Path(__file__).with_name("seen.py")), str(run), str(SEEN), str(images)], code)
    rows = _distance(images, "pixels", code, "--reference", str(run.parent / "shards"))
    images.unlink()
    return [{**row, "name": f"seen-{row['name']}"} for row in rows]


def _errors(run: Path, like: dict[str, Any], code: Path) -> list[dict[str, Any]]:
    """The error of the averaged weights over that of the best linear denoiser, in two numbers.

    Above sigma 1 the content of an image is decided, below its details.
    """
    words = ["-m", "diffusion_pl", "losses", str(run), "--count", "1000", "--levels", "10"]
    answer = json.loads(_command(words, code))
    levels = answer["levels"]["ema"]
    kept = {key: like[key] for key in ("commit", "fingerprint")}
    found = []
    for name, chosen in (
        ("coarse", [level for level in levels if level["sigma"] > 1]),
        ("fine", [level for level in levels if level["sigma"] <= 1]),
    ):
        value = statistics.fmean(level["loss"] for level in chosen)
        sigmas = [round(level["sigma"], 4) for level in chosen]
        title = f"loss-{name}@{answer['count']}/{answer['data']}"
        found.append({"name": title, "value": value, "sigmas": sigmas, **kept})
    return found


def _command(words: Sequence[str], code: Path) -> str:
    """What Python answers with that code of ours; the end of everything if it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with {done.returncode}")
    return done.stdout


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one more value lies with 99 % probability."""
    count = len(values)
    reach = student.ppf(0.995, count - 1) * statistics.stdev(values) * (1 + 1 / count) ** 0.5
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


def record(data: str, seeds: int, runs: Path) -> None:
    """Train the seeds and write the interval of each number with how it was made.

    The file holds a record for each set of images, under its name.
    """
    trained = [train(data, seed, runs / f"seed-{seed}") for seed in range(seeds)]
    numbers = {}
    for rows in zip(*trained, strict=True):
        values = [row["value"] for row in rows]
        kept = (
            "reference",
            "fingerprint",
            "extractor",
            "resize",
            "sampler",
            "evaluations",
            "sigmas",
        )
        numbers[rows[0]["name"]] = {
            "interval": interval(values),
            "mean": statistics.fmean(values),
            "standard_deviation": statistics.stdev(values),
            "values": values,
            **{key: rows[0][key] for key in kept if key in rows[0]},
        }
    images = trained[0][0]["name"].split("/")[1]
    made = {
        "how": f"seeds 0 to {seeds - 1} of {EXPERIMENT}.yaml: make ci-fid ARGS=--record",
        "made": time.strftime("%Y-%m-%d"),
        "commit": trained[0][0]["commit"],
        "seconds": [rows[0]["whole_seconds"] for rows in trained],
        "machine": hardware(),
        "numbers": numbers,
    }
    others = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(others | {images: made}, indent=2) + "\n")
    for name, number in numbers.items():
        print(f"{name}: {number['values']}; recorded in {RECORD.relative_to(ROOT)}")


def report(what: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Print every number beside its interval; whether all that have one lie within."""
    known, verdicts = recorded(), []
    for row in rows:
        number = known.get(row["name"])
        said = f"{what}: {row['name']} = {row['value']:.4g} ({row['whole_seconds']} s)"
        if number is None or number["fingerprint"] != row["fingerprint"]:
            print(f"{said}; no interval of it is recorded for these images")
            continue
        low, high = number["interval"]
        within = bool(low <= row["value"] <= high)
        place = "inside" if within else "OUTSIDE"
        seeds = f"{len(number['values'])} seeds, mean {number['mean']:.4g}"
        print(f"{said}, {place} [{low:.4g}, {high:.4g}] of {seeds}")
        verdicts.append(within)
    return bool(verdicts) and all(verdicts)


def recorded() -> dict[str, Any]:
    """The numbers whose intervals are known, of whatever images."""
    try:
        sets: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
    except FileNotFoundError as error:
        raise SystemExit(f"{RECORD}: nothing is recorded; make ci-fid ARGS=--record") from error
    return {name: number for made in sets.values() for name, number in made["numbers"].items()}


def bugs(data: str, runs: Path) -> bool:
    """Plant each bug in a copy of the code; whether all leave the interval."""
    missed = 0
    for number, (what, (file, right, wrong)) in enumerate(BUGS.items()):
        code = runs.resolve() / f"bug-{number}"
        shutil.rmtree(code, ignore_errors=True)
        for part in ("diffusion_pl", "experiments"):
            shutil.copytree(ROOT / part, code / part)
        planted = code / "diffusion_pl" / file
        text = planted.read_text()
        assert text.count(right) == 1, f"{file}: {right}"
        planted.write_text(text.replace(right, wrong))
        missed += report(what, train(data, 0, code / "run", code))
    return not missed


def main() -> None:
    """Check, record or plant bugs."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("--data", help="CIFAR-10's archive; looked for where it usually lies")
    options.add_argument("--record", action="store_true", help="write the interval anew")
    options.add_argument("--seeds", type=int, default=5, help="of --record, from 0 on (5)")
    options.add_argument("--bugs", action="store_true", help="see that three bugs are noticed")
    options.add_argument("--runs", type=Path, default=Path("runs/ci"), help="where it trains")
    chosen = options.parse_args()
    data = chosen.data or next((place for place in PLACES if (ROOT / place).exists()), None)
    if data is None:
        print(f"ci-fid: skipped, since CIFAR-10 is at none of {', '.join(PLACES)}")
        return
    data = str((ROOT / data).resolve())
    if chosen.record:
        record(data, chosen.seeds, chosen.runs.resolve())
    elif chosen.bugs:
        raise SystemExit(0 if bugs(data, chosen.runs) else 1)
    elif not report("ci-fid", train(data, 0, chosen.runs.resolve() / "check")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
