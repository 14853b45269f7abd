"""How near samplers come in how many evaluations, and what a step costs beyond the network.

Three measurements, on denoisers that are exact: the error against the exact solution of the ODE and
the distance of the samples from the data; the multistep rule against Heun's method on problems that
it was not chosen on; the time of a step with a denoiser that costs nothing, beside diffusers.
The tables and the plot of docs/samplers.md come from here.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from benchmarks.measure import interleaved, median, record
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.dpm_solver import dpmpp_2m, dpmpp_3m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.exponential_adams import exponential_adams
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Integrator
from diffusion_pl.samplers.unipc import unipc

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the exact problems are the tests' own
from analytic import Mixture  # noqa: E402
from problems import held_out, pictures, relative_error, start  # noqa: E402

DOCS = ROOT / "docs"
SHAPE = (64, 3, 32, 32)

ODE: dict[str, Integrator] = {
    "euler (DDIM)": euler,
    "heun": heun,
    "midpoint": partial(heun, alpha=0.5),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "exponential_adams": exponential_adams,
    "unipc, order 2": unipc,
    "unipc, order 3": partial(unipc, order=3),
    "deis": deis,
}
SDE: dict[str, Integrator] = {
    "ancestral, small": ancestral,
    "ancestral, large": partial(ancestral, variance="large"),
    "ddim, eta 0.5": partial(ancestral, eta=0.5),
    "heun, churn 40": partial(heun, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003),
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "dpmpp_3m_sde": partial(dpmpp_3m, eta=1.0),
    "exponential_adams_sde": partial(exponential_adams, eta=1.0),
}
DIFFUSERS: dict[str, Callable[[], Any]] = {
    "DDIM": DDIMScheduler,
    "DDPM": DDPMScheduler,
    "HeunDiscrete": partial(HeunDiscreteScheduler, use_karras_sigmas=True),
    "DPMSolverMultistep": partial(DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "DEISMultistep": partial(DEISMultistepScheduler, solver_order=3, use_karras_sigmas=True),
    "UniPCMultistep": partial(UniPCMultistepScheduler, use_karras_sigmas=True),
    "EDMEuler": EDMEulerScheduler,
    "EDMDPMSolverMultistep": EDMDPMSolverMultistepScheduler,
}


def steps_for(name: str, evaluations: int) -> int:
    """The most steps that cost no more than so many evaluations of the network."""
    if name.startswith("heun"):
        return (evaluations + 1) // 2
    return evaluations // 2 if name == "midpoint" else evaluations


def flow_errors(evaluations: list[int]) -> dict[str, list[float]]:
    """Relative error at the end on 64 image modes, of every deterministic sampler."""
    problem = pictures(64, 0.1, 16, seed=3)
    x = start(problem, 64, seed=0)
    exact = problem.end(x, 80.0)
    errors = {}
    for name, integrate in ODE.items():
        grids = [levels(Rho(), steps_for(name, count)) for count in evaluations]
        ends = [integrate(problem.denoise, x, sigmas, torch.randn_like) for sigmas in grids]
        errors[name] = [relative_error(end, exact) for end in ends]
    return errors


def distances(evaluations: list[int]) -> dict[str, list[float]]:
    """Kolmogorov-Smirnov distance of 65,536 pixels from the mixture of three on a line.

    So many exact samples lie 0.0032 off in the median, 0.828 / sqrt(65,536).
    """
    data, count, side = Mixture(), 64, 32
    found = {}
    for name, integrate in {**ODE, **SDE}.items():
        found[name] = []
        for evaluation in evaluations:
            noise = ImageNoise(5, range(count))
            x = 80.0 * noise(torch.empty(count, 1, side, side, dtype=torch.float64))
            sigmas = levels(Rho(), steps_for(name, evaluation))
            end = integrate(data.denoise, x, sigmas, noise).flatten().sort().values
            empirical = (torch.arange(len(end), dtype=torch.float64) + 0.5) / len(end)
            found[name].append((data.cdf(end) - empirical).abs().max().item())
    return found


def multistep() -> dict[str, Any]:
    """`deis` at 18 and 35 evaluations and Heun's method at 35, on all held-out problems."""
    cases: dict[str, list[float]] = {}
    for problem in held_out():
        for seed in (1, 2):
            x = start(problem, 64, seed)
            exact = problem.end(x, 80.0)
            cases[f"{problem.name}, seed {seed}"] = [
                relative_error(
                    run(problem.denoise, x, levels(Rho(), steps), torch.randn_like), exact
                )
                for run, steps in ((heun, 18), (deis, 18), (deis, 35))
            ]
    heuns, few, many = zip(*cases.values(), strict=True)
    return {
        "cases": cases,
        "median error of Heun at 35": statistics.median(heuns),
        "median error of deis at 18": statistics.median(few),
        "median error of deis at 35": statistics.median(many),
        "deis at 18 / Heun at 35, median": _median_ratio(few, heuns),
        "deis at 18 / Heun at 35, largest": max(a / b for a, b in zip(few, heuns, strict=True)),
        "deis at 35 / Heun at 35, median": _median_ratio(many, heuns),
    }


def _median_ratio(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def costs(repetitions: int = 11, steps: int = 18) -> dict[str, float]:
    """Microseconds an evaluation beyond a denoiser that costs nothing, ours beside diffusers."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(SHAPE, generator=generator)
    x = 80 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noise = ImageNoise(0, range(len(x)))
    sigmas, calls = levels(Rho(), steps), {}

    def denoise(state: Tensor, sigma: Tensor) -> Tensor:
        calls[current[0]] += 1
        return output

    current = [""]

    def ours(name: str, integrate: Integrator) -> None:
        current[0], calls[name] = name, 0
        integrate(denoise, x, sigmas, noise)

    def theirs(name: str, make: Callable[[], Any]) -> None:
        scheduler, state, calls[name] = schedulers[name], x.float(), 0
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(state, timestep)
            calls[name] += 1
            state = scheduler.step(output, timestep, state).prev_sample

    schedulers = {f"diffusers {name}": make() for name, make in DIFFUSERS.items()}
    cases = {name: partial(ours, name, run) for name, run in {**ODE, **SDE}.items()}
    cases |= {name: partial(theirs, name, make) for name, make in schedulers.items()}
    with torch.inference_mode():
        seconds = interleaved(cases, repetitions, warm_ups=2)
    return {name: round(1e6 * median(each) / calls[name], 1) for name, each in seconds.items()}


def plot(
    evaluations: list[int], errors: Mapping[str, list[float]], far: Mapping[str, list[float]]
) -> None:
    """Error and distance against evaluations, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, curves, title in (
        (axes[0], errors, "error against the ODE's solution, 64 image modes"),
        (axes[1], far, "distance of samples from the mixture (KS)"),
    ):
        for name, values in curves.items():
            # The same sampler has the same colour in both.
            colour = f"C{list({**ODE, **SDE}).index(name) % 10}"
            axis.loglog(evaluations, values, "--" if name in SDE else "-", color=colour, label=name)
        axis.set(title=title, xlabel="evaluations of the network")
        axis.set_xticks(evaluations, labels=[str(count) for count in evaluations])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    axes[1].axhline(0.0032, color="black", linewidth=1, linestyle=":")
    figure.savefig(DOCS / "samplers.png", dpi=110)


def table(evaluations: list[int], rows: Mapping[str, list[float]], shown: list[int]) -> str:
    """A Markdown table of some columns."""
    heads = ["sampler", *(f"{count} evaluations" for count in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, values in rows.items():
        cells = [f"{values[evaluations.index(count)]:.1e}" for count in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    """Put text between the page's two marks of that name."""
    page = DOCS / "samplers.md"
    before, _, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    page.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end -->\n{after}")


def main() -> None:
    """Measure, record, and bring the page up to date."""
    torch.set_num_threads(1)  # one: beside other processes two threads wait for each other
    evaluations = [9, 13, 18, 25, 35, 51, 79, 127]
    errors, far = flow_errors(evaluations), distances(evaluations)
    goal, cost = multistep(), costs()
    plot(evaluations, errors, far)
    shown = [9, 18, 35, 79]
    write("errors", table(evaluations, errors, shown))
    write("distances", table(evaluations, far, shown))
    lines = [f"| {name} | {value:.2g} |" for name, value in goal.items() if name != "cases"]
    write("multistep", "\n".join(["| 28 cases | |", "|---|---|", *lines]))
    lines = [
        f"| {name} | {value:.0f} |" for name, value in sorted(cost.items(), key=lambda i: i[1])
    ]
    write("cost", "\n".join(["| 64 x 3 x 32 x 32 | us an evaluation |", "|---|---|", *lines]))
    record(
        "samplers",
        {
            "evaluations": evaluations,
            "relative error": errors,
            "KS distance": far,
            "multistep": goal,
            "us an evaluation beyond the network, one thread": cost,
        },
    )


if __name__ == "__main__":
    main()
