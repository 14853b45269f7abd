"""CPU seconds of the commands that should answer at once."""

from __future__ import annotations

import resource
import subprocess
import sys

from benchmarks.measure import median, record

COMMANDS = {
    "help": ["--help"],
    "experiments": ["experiments"],
    "check quickstart": ["check", "quickstart"],
    "check cifar10_edm": ["check", "cifar10_edm"],
}
ROUNDS = 5


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "diffusion_pl", *words], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in turns and record."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, words in COMMANDS.items():
            times[name].append(cpu_seconds(words))
    record("commands", {f"{name}, CPU s": round(median(t), 3) for name, t in times.items()})


if __name__ == "__main__":
    main()
