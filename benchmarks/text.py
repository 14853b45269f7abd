"""Captions encoded by MiniLM: 10,000 by the command, killed half way and repeated; and side by side
with transformers' BertModel, where it is installed.

Captions are all different and of a photograph's length, 7 to 20 tokens. transformers gets them
sorted by length in padded batches of as many. CPU seconds are of all threads, and do not count
other processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import interleaved, median, record
from diffusion_pl import cli, text
from diffusion_pl.data.shard_format import PROGRESS
from diffusion_pl.text import minilm

BATCH = 32
WORDS = "a the red blue dark striped small man dog street tree table with on near two white".split()  # noqa: SIM905
IMAGES = 100  # that have the captions


def captions(count: int) -> list[str]:
    """Random words, seeded, none of them twice."""
    draw = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(WORDS, k=draw.randint(5, 18)))] = None
    return list(found)


def of_transformers() -> Callable[[list[str]], None]:
    """transformers' tokenizer and network on the same files."""
    from transformers import BertModel, BertTokenizer

    folder = minilm._folder()
    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    network = BertModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def encode(asked: list[str]) -> None:
        ordered = sorted(asked, key=len)
        for first in range(0, len(ordered), BATCH):
            part = tokenizer(ordered[first : first + BATCH], padding=True, return_tensors="pt")
            network(**part).last_hidden_state.half()

    return encode


def prepared(work: Path, asked: list[str]) -> Path:
    """A prepared set with these captions."""
    source, path = work / "source", work / "whole"
    source.mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(source / f"{number:03}.png")
        words = "\n".join(asked[number::IMAGES])
        (source / f"{number:03}.txt").write_text(words)
    assert cli.main(["prepare", str(source), str(path), "--resolutions", "8"]) == 0
    return path


def encoding(path: Path) -> subprocess.Popen[str]:
    """The command, begun."""
    words = [sys.executable, "-m", "diffusion_pl", "prepare", str(path), "--encode", "minilm"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(path: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command."""
    before, began = _children(), time.perf_counter()
    _, said = (process := encoding(path)).communicate()
    assert process.returncode == 0, said
    return time.perf_counter() - began, _children() - before


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bytes_of(path: Path) -> dict[str, bytes]:
    """The files of a set's texts."""
    return {p.name: p.read_bytes() for p in (path / "text").rglob("*.f16")}


def command(count: int) -> dict[str, Any]:
    """The command once, and killed after half of that time and repeated."""
    with tempfile.TemporaryDirectory() as name:
        whole = prepared(Path(name), captions(count))
        killed = shutil.copytree(whole, Path(name) / "killed")
        wall, cpu = finished(whole)
        process = encoding(killed)
        time.sleep(wall / 2)
        process.kill()
        process.wait()
        kept = sum(len(np.load(file)["rows"]) for file in killed.rglob(f"{PROGRESS}/*.npz"))
        rest, _ = finished(killed)
        assert bytes_of(whole) == bytes_of(killed)
        return {
            "captions": count,
            "seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "MB": round(sum(map(len, bytes_of(whole).values())) / 1e6, 1),
            "killed after": round(wall / 2, 1),
            "captions kept": kept,
            "seconds of the rest": round(rest, 1),
            "load average": round(os.getloadavg()[2], 1),
        }


def beside() -> dict[str, float]:
    """Seconds for 1,000 captions, ours and theirs in turns."""
    encoder, theirs, some = text.encoder("minilm", 32), of_transformers(), captions(1000)
    turns = interleaved({"ours": lambda: encoder.encode(some), "theirs": lambda: theirs(some)}, 5)
    return {name: round(median(values), 2) for name, values in turns.items()}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    figures["command"] = command(parser.parse_args().count)
    if importlib.util.find_spec("transformers"):
        figures["seconds for 1,000 captions"] = beside()
    record("text", figures)


if __name__ == "__main__":
    main()
