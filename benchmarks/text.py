"""Captions encoded by MiniLM: seconds for 10,000, and side by side with transformers' BertModel.

Captions are those of a photograph's length, 7 to 20 tokens. transformers gets them sorted by length
in padded batches of as many. CPU seconds are of all threads, and do not count other processes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from transformers import BertModel, BertTokenizer

from benchmarks.measure import interleaved, median, record
from diffusion_pl import text
from diffusion_pl.text import minilm

BATCH = 32
WORDS = "a the red blue dark striped small man dog street tree table with on near two white".split()  # noqa: SIM905


def captions(count: int) -> list[str]:
    """Random words, seeded."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 18))) for _ in range(count)]


def of_transformers() -> Callable[[list[str]], None]:
    """transformers' tokenizer and network on the same files."""
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


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    started = time.perf_counter()
    encoder = text.encoder("minilm", 32)
    loaded = time.perf_counter() - started
    asked = captions(count)
    wall, cpu = time.perf_counter(), time.process_time()
    found = encoder.encode(asked)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    theirs = of_transformers()
    some = asked[:1000]
    turns = interleaved({"ours": lambda: encoder.encode(some), "theirs": lambda: theirs(some)}, 3)
    record(
        "text",
        {
            "threads": torch.get_num_threads(),
            "load_seconds": round(loaded, 2),
            "captions": count,
            "mean_tokens": round(found.mask.sum().item() / count, 2),
            "seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "seconds_for_1000": round(median(turns["ours"]), 2),
            "seconds_for_1000_of_transformers": round(median(turns["theirs"]), 2),
        },
    )


if __name__ == "__main__":
    main()
