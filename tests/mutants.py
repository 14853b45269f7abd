"""One-line bugs, planted one at a time: the tests must notice every one (`make mutants`).

Each mutant names the file, the code it replaces (which must stand there exactly once), what it
becomes, and the test files that should turn red; a mutant that survives is a hole in the tests.
More lists stand in mutants_*.py, a file an area.
"""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import functools
import importlib
import json
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 - imported once, here, and not by every child
import pytest
import torch
import torch_fidelity  # noqa: F401
import torchmetrics  # noqa: F401
import torchvision  # noqa: F401
from covering import FAILED, NOTHING, Covering, Failing, tests_through
from mutant import PACKAGE, Mutant, at

ROOT = Path(__file__).parents[1]
WORKERS = 2
LIMIT = 180  # seconds for the tests of one mutant
WHOLE = 1800  # seconds for a test file without a bug, all of it
UNUSABLE = 70  # the code of a child in which pytest itself raised
# A library in memory may bring a plugin of pytest along, of which pytest warns that it comes late.
UNTOLD = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

MUTANTS = [
    *at(
        "diffusion/levels.py",
        "schedules",
        ("torch.sqrt((1 - alpha_bar) / alpha_bar)", "torch.sqrt(alpha_bar / (1 - alpha_bar))"),
        ("return 1 / (1 + sigma.square())", "return 1 / (1 + sigma)"),
        ("return torch.exp(-log_snr / 2)", "return torch.exp(-log_snr)"),
        ("return -2 * torch.log(sigma)", "return 2 * torch.log(sigma)"),
    ),
    *at(
        "diffusion/schedules.py",
        "schedules samplers",
        ("self.mean + self.std * torch", "self.mean - self.std * torch"),
        ("return (low + u * (high - low)) ** self.rho", "return low + u * (high - low)"),
        ("torch.linspace(1.0, 0.0, steps", "torch.linspace(1.0, 0.1, steps"),
        ("return self.sigma_min * torch.exp(u", "return torch.exp(u"),
    ),
    *at(
        "diffusion/preconditioning.py",
        "schedules objectives parity_edm",
        ("c_skip=self.sigma_data**2 / variance", "c_skip=self.sigma_data / variance"),
        ("c_out = sigma * self.sigma_data / variance.sqrt()", "c_out = sigma / variance.sqrt()"),
        ("c_in=1 / variance.sqrt()", "c_in=1 / variance"),
        ("c_noise=sigma.log() / 4", "c_noise=sigma.log()"),
        ("denoised = c_skip * x + c_out * output", "denoised = c_skip * x - c_out * output"),
        ("self.network(c_in * x,", "self.network(x,"),
    ),
    *at(
        "diffusion/objective.py",
        "objectives",
        ("return sigma.square().reciprocal()", "return sigma.reciprocal()"),
        ("(sigma.square() + self.sigma_data**2) / (", "(sigma.square() + self.sigma_data) / ("),
        ("square().flatten(1).sum(dim=1)", "square().flatten(1).mean(dim=1)"),
        ("square().flatten(1).mean(dim=1)", "square().flatten(1).sum(dim=1)"),
        ("denoise(image + level * noise,", "denoise(image + level.square() * noise,"),
        ("per_image(self.weight(sigma).sqrt(), image)", "per_image(self.weight(sigma), image)"),
    ),
    *at(
        "diffusion/classifier_free.py",
        "objectives",
        ("return start + weight *", "return image + weight *"),
    ),
    *at(
        "diffusion/conditions.py",
        "objectives",
        ("torch.full_like(label, -1)", "torch.full_like(label, 0)"),
    ),
    *at(
        "diffusion/guidance.py",
        "objectives",
        ("image.clamp(-limit, limit)", "image.clamp(-limit, 2 * limit)"),
    ),
    *at(
        "diffusion/random.py",
        "evaluation training",
        ("row.normal_(generator=source)", "row.uniform_(generator=source)"),
        ("for index in indices]", "for index in range(len(indices))]"),
    ),
    *at(
        "objectives/ddpm.py",
        "schedules objectives",
        ("c_out=-sigma", "c_out=sigma"),
        ("c_in=(1 + sigma.square()).rsqrt()", "c_in=(1 + sigma).rsqrt()"),
        ("weight=EpsWeight()", "weight=torch.ones_like"),
        ("reduce=pixel_mean", "reduce=lambda error: error.flatten(1).sum(dim=1)"),
    ),
    *at(
        "diffusion/timesteps.py",
        "schedules objectives",
        ("(u * self.T).floor()", "(u * (self.T - 1)).floor()"),
        ("torch.cumprod(1 - self.betas.to(device), dim=0)", "1 - self.betas.to(device)"),
        ("return (lower + fraction)", "return (upper + fraction)"),
        ("math.pi / 2).square()", "math.pi / 2)"),
        ("(1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest))\n\n\ndef Scaled",
         "(1 - alpha_bar[1:] / alpha_bar[:-1]))\n\n\ndef Scaled"),
    ),
    *at(
        "diffusion/paths.py",
        "schedules",
        ("self.beta_d / 2 * t.square()", "self.beta_d * t.square()"),
        ("/ 2 * (sigma + 1 / sigma)", "* (sigma + 1 / sigma)"),
        ("2 * self.beta_d * torch.log1p(", "self.beta_d * torch.log1p("),
        ("return 1 / (2 * t.sqrt())", "return 1 / t.sqrt()"),
        ("self.start + u * (self.end - self.start)", "self.start + u * self.end"),
    ),
    *at(
        "objectives/edm.py",
        "objectives experiments",
        ("LogNormal(P_mean, P_std)", "LogNormal(P_std, P_mean)"),
        ("preconditioning=Karras(sigma_data)", "preconditioning=Karras(1.0)"),
        ("weight=UnitOutput(sigma_data)", "weight=UnitOutput(1.0)"),
        ("Reduce = pixel_sum", "Reduce = lambda error: error.flatten(1).mean(dim=1)"),
    ),
    *at(
        "samplers/heun.py",
        "samplers",
        ("S_churn / (len(sigmas) - 1)", "S_churn"),
        ("math.sqrt(2) - 1)", "math.sqrt(2))"),
        ("S_tmin <= sigma <= S_tmax", "sigma <= S_tmax"),
    ),
    *at(
        "samplers/sampler.py",
        "samplers",
        ("math.sqrt(1 + start**2) if self.unit_start", "start if self.unit_start"),
        ("noise.to(torch.float64)", "noise.to(torch.float32)"),
        ("clipped(denoise, self.clip_denoised) if self", "denoise if self"),
    ),
    *at(
        "data/loader.py",
        "data_order",
        ("step * self.data.batch_size + self.rank * size", "step * size + self.rank * size"),
        ("image.flip(-1), image)", "image, image)"),
        ("range(self.start, self.stop))", "range(self.stop))"),
        ("images.labels[indices]", "images.labels[positions]"),
        ("            wanted -= weight", "            wanted -= 1 / len(weights)"),
        ('"resolution", torch.tensor([step])', '"resolution", torch.tensor([0])'),
        ("            if value < least:", "            if value < least - 1:"),
        ("min(weights.values()) <= 0", "min(weights.values()) < 0"),
        ("not weights or min(", "min("),
    ),
    *at(
        "data/crops.py",
        "crops",
        ("* (whole - sides + 1)", "* (whole - sides)"),
        ("left / whole, side / whole, side / whole", "left / whole, 1.0, 1.0"),
        ("* (high - low + 1)", "* (high - low)"),
        (", antialias=True", ""),
        ('f"crop {axis}"', '"crop"'),
    ),
    *at(
        "seeds.py",
        "evaluation training draws",
        ("(seed, *stream)", "(seed, *stream[1:])"),
        ("hashlib.blake2b(words", "hashlib.blake2b(words[:1]"),
    ),
    *at(
        "data/draws.py",
        "draws",
        ("* 2.0**-53", "* 2.0**-54"),
        ("(positions.numpy().astype(np.uint64) + 1)", "(positions.numpy().astype(np.uint64))"),
    ),
    *at(
        "data/dataset.py",
        "data_source",
        ("whole % resolution:", "False:"),
    ),
    *at(
        "data/means.py",
        "data_source reduce",
        ("= mean + ((twice > area) | (", "= mean + ((twice > area) & ("),
        ("(mean % 2 == 1)", "(mean % 2 == 0)"),
        ("(twice > area) |", "(twice >= area) |"),
        ("both >> wide(bits)", "both >> wide(bits + 1)"),
        ("wide(2**bits - 1)", "wide(2**bits - 2)"),
        ("range(0, count, together)", "range(0, together, together)"),
        ("np.uint16 if block <= 16 else", "np.uint16 if block <= 32 else"),
    ),
    *at(
        "positions.py",
        "position",
        ("(pixel + 0.5) / size", "pixel / size"),
        ("* frame - 0.5", "* frame"),
        ("return (k / (frame - 1))", "return (k / frame)"),
        ("(start + (pixel", "(0 * start + (pixel"),
    ),
    *at(
        "data/augment.py",
        "augment",
        ("a0, a1 = mirror < 1 / 2, flip < p / 2", "a0, a1 = mirror < 1 / 2, flip < p"),
        ("return samples / 2 - (size - 1) / 2", "return samples / 2 - size / 2 + 1 / 4"),
        ("self.translation * height * a7]", "self.translation * width * a7]"),
        ("swap * torch.sin(2 * a4 - a3)", "swap * torch.sin(2 * a4 + a3)"),
    ),
    *at(
        "images.py",
        "images",
        (".div_(127.5).sub_(1.0)", ".div_(128).sub_(1.0)"),
        (".add_(128.0)", ".add_(127.5)"),
        (".clamp_(0.0, 255.0)", ""),
    ),
    *at(
        "training/ema.py",
        "training",
        ("0.5 ** (batch_size / half_life)", "0.5 ** (half_life / batch_size)"),
        ("self.parameters, 1 - decay)", "self.parameters, decay)"),
        ("min(half_life, max(self", "max(half_life, max(self"),
        ("target.copy_(source)", "pass"),
    ),
    *at(
        "training/module.py",
        "training",
        ("u = (strata[mine] + uniform[mine, 0])", "u = (uniform[mine, 0])"),
        ("drawn.to(image.device) < share", "drawn.to(image.device) > share"),
        ('passed.sum() / len(batch["image"])', "passed.mean()"),
        ("resolution**2", "resolution"),
        ("nn.utils.clip_grads_with_norm_(trained, self.settings.grad_clip, norm)", "pass"),
        ("if not torch.isfinite(value):", "if False:"),
        ("            update(decay)", "            abs(decay)"),
    ),
    *at(
        "training/lr_schedule.py",
        "training",
        ("rise = images / self.warmup if", "rise = 2 * images / self.warmup if"),
        ("(total_images - images) / self.cooldown", "(total_images - 2 * images) / self.cooldown"),
        ("images) / self.cooldown", "images) / total_images"),
        ("min(rise, fall, 1.0)", "min(rise, 1.0)"),
        ("math.sqrt(self.decay_from / max", "(self.decay_from / max"),
        ("max(images, self.decay_from)", "(images + self.decay_from)"),
    ),
    *at(
        "training/history.py",
        "training",
        ('row["images"] <= images]', 'row["images"] < images]'),
    ),
    *at(
        "training/checkpoint.py",
        "training",
        ("weights_only=True", "weights_only=False"),
        ('section.get("format") not in READABLE', "False"),
        ("length == len(comment) and ", ""),
        ("sound = end[-_END_BYTES:].startswith(_END)", "sound = True"),
        ('section["format"] >= 2 and not digested', "False"),
        ("newest_first = found(folder)[::-1]", "newest_first = found(folder)"),
        ("            point_to(candidate)", "            abs(1)"),
    ),
    *at(
        "io/files.py",
        "training",
        ("os.replace(temporary, path)", "temporary.unlink()"),
    ),
    *at(
        "io/files.py",
        "training faults",
        ("path.unlink(missing_ok=True)", "str(path)"),
    ),
]  # fmt: skip


def copy_of_the_project(folder: Path) -> Path:
    """A copy to plant bugs in, without what tests do not need."""
    copy = folder / "copy" / ROOT.name
    ignored = shutil.ignore_patterns("__pycache__")
    for part in (PACKAGE, "tests", "experiments", "benchmarks", "docs"):
        shutil.copytree(ROOT / part, copy / part, ignore=ignored)
    for file in ROOT.iterdir():  # README.md, pyproject.toml, ...: some tests read them
        if file.is_file():
            shutil.copy(file, copy)
    # Compiled once; by its hash a planted file is told from what was compiled, at any time stamp.
    compileall.compile_dir(
        copy, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
    )
    shared = ROOT.parent / "shared"
    if shared.exists():
        (copy.parent / "shared").symlink_to(shared)
    return copy


def outcome(mutant: Mutant, copy: Path, output: Path, covered: Mapping[str, dict[str, Any]]) -> str:
    """Plant a bug in the copy, run its tests in a child of this process, and take the bug out.

    Args:
        mutant: the bug.
        copy: of the project.
        output: a file for what the tests print.
        covered: of each test file that passes without any bug, what `Covering` wrote; a test that
            fails anyway notices nothing.

    Returns:
        "noticed", "survived", or what is wrong with the mutant itself.
    """
    for tests in mutant.tests:
        if tests not in covered:
            return f"broken: {tests} fails without the bug"
    file = copy / mutant.file
    text = file.read_text()
    if text.count(mutant.right) != 1:
        return f"stale: {mutant.right!r} stands {text.count(mutant.right)} times"

    def with_the_bug(tests: Sequence[str]) -> int | None:
        file.write_text(text.replace(mutant.right, mutant.wrong))
        try:
            return code_of(tests, output)
        finally:
            file.write_text(text)

    tried: Sequence[str] = tests_through(mutant, text, covered)
    code = with_the_bug(tried) if tried else 0
    if code == 1 and all(passes_alone(test, output) for test in failed(output)):
        return "noticed"
    if code in (0, 1):  # other processes run it, or a test that needs those before it
        tried = mutant.tests
        code = with_the_bug(tried)
    # 1: tests ran and some failed. Below 0: a crash.
    if code == 1 or (code is not None and code < 0):
        return "noticed"
    if code is None:
        # A loop without end is noticed, unless the tests are as slow without the bug.
        clean = code_of(tried, output)
        return "noticed" if clean == 0 else f"broken: in {LIMIT} s the tests ended with {clean}"
    return "survived" if code == 0 else f"broken: pytest ended with {code}"


def failed(output: Path) -> list[str]:
    """The tests that failed in the last child that printed to a file."""
    marks = (line.partition(FAILED) for line in output.read_text(errors="replace").splitlines())
    return [test for before, mark, test in marks if mark and not before]


@functools.cache
def passes_alone(test: str, output: Path) -> bool:
    """Whether one test passes without a bug and without those before it."""
    return code_of([test], output) == 0


def code_of(
    tests: Sequence[str], output: Path, limit: float = LIMIT, covering: Path | None = None
) -> int | None:
    """The exit code of tests in a child of this process, None after so many seconds.

    Args:
        tests: files, or ids of tests.
        output: a file for what they print.
        limit: seconds.
        covering: a file for what each test runs; nothing is kept when not given.
    """
    # A child has the libraries in memory already; the package it imports afresh.
    child = os.fork()
    if not child:
        code = UNUSABLE
        try:
            os.setsid()
            with output.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                plugins = [Covering(Path.cwd(), covering)] if covering else [Failing()]
                code = pytest.main(["-x", "-m", "not slow", *UNTOLD, *tests], plugins)
        finally:
            os._exit(code)
    try:
        return ended(child, limit)
    finally:
        end_what_is_left()


def adopt() -> None:
    """Become the parent of processes whose own has ended (Linux), in whatever session they are."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_what_is_left() -> None:
    """Kill what a test that failed has left running, which would slow all that follow."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    while children.exists() and (left := children.read_text().split()):
        for process in map(int, left):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def ended(child: int, limit: float) -> int | None:
    """The exit code of a child, None when it had to be stopped."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@contextlib.contextmanager
def at_work() -> Iterator[tuple[Path, Path]]:
    """A copy of the project to work in, and a file for what its tests print."""
    adopt()
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_project(Path(folder))
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ.update(PYTHONPATH=str(copy))
        yield copy, Path(folder) / "output"


def cover(files: Sequence[str], results: Path) -> None:
    """Run test files without a bug; what its tests run is written of each that passes."""
    with at_work() as (_, output):
        for file in files:
            seen = results / f"{file.replace('/', '.')}.json"
            if code_of([file], output, WHOLE, seen) == 0:
                continue
            seen.unlink(missing_ok=True)
            if code_of([file], output, WHOLE) == 0:  # it fails when it is traced alone
                seen.write_text(json.dumps(NOTHING))


def covered_by(files: Sequence[str], results: Path) -> dict[str, dict[str, Any]]:
    """What `cover` wrote, by test file."""
    seen = {file: results / f"{file.replace('/', '.')}.json" for file in files}
    return {file: json.loads(path.read_text()) for file, path in seen.items() if path.exists()}


def work(mutants: Sequence[Mutant], results: Path, covered: Mapping[str, dict[str, Any]]) -> None:
    """Try some mutants one after the other, a line of results each."""
    with at_work() as (copy, output), results.open("w") as lines:
        for mutant in mutants:
            result = outcome(mutant, copy, output, covered)
            lines.write(json.dumps([mutant.file, mutant.right, mutant.wrong, result]) + "\n")
            lines.flush()
            if result != "noticed":
                # Said at once: a worker ends by os._exit, which drops what a buffer holds.
                told = f"{mutant.file}: {mutant.right!r} -> {mutant.wrong!r}: {result}"
                print(told, flush=True)


def in_workers(task: Callable[[int], None]) -> None:
    """Run a task in each worker, with its number."""
    workers = []
    for number in range(WORKERS):
        worker = os.fork()
        if not worker:
            task(number)
            os._exit(0)
        workers.append(worker)
    for worker in workers:
        os.waitpid(worker, 0)


def everything() -> list[Mutant]:
    """The mutants of every list."""
    found = list(MUTANTS)
    for file in sorted(Path(__file__).parent.glob("mutants_*.py")):
        found += importlib.import_module(file.stem).MUTANTS
    return found


def main() -> int:
    """Try every mutant, or those whose file has a word of the command line in its path."""
    wanted = [m for m in everything() if not sys.argv[1:] or any(w in m.file for w in sys.argv[1:])]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = sorted({file for mutant in wanted for file in mutant.tests})
        in_workers(lambda number: cover(files[number::WORKERS], folder))
        covered = covered_by(files, folder)
        in_workers(
            lambda number: work(wanted[number::WORKERS], folder / f"{number}.jsonl", covered)
        )
        results = [
            line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()
        ]
    count = sum(json.loads(line)[-1] == "noticed" for line in results)
    print(f"{count} of {len(wanted)} planted bugs noticed")
    return 0 if count == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
