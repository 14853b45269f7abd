"""Averages of any length after the fact, from snapshots of two (Karras et al. 2024, EDM2).

Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.

| part | formula | equation |
|---|---|---|
| profile | p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t | 1 |
| update | beta = (1 - 1 / step)^(gamma + 1) | 2 |
| length | sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) | 3 |
| reconstruction | the combination of snapshots whose profile is nearest in least squares | C.2 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_pl.training.writing import write_atomically

FOLDER = "posthoc"  # of a run, where its snapshots lie

# The two averages that are kept, by their lengths: the standard deviation of the profile as a share
# of the training so far.
LENGTHS = (0.05, 0.10)


def gamma_of(length: float) -> float:
    """The exponent of a profile of relative standard deviation `length`.

    Args:
        length: sigma_rel in (0, 0.25]; 1 / 12^(1/2) = 0.289 would be the plain mean.

    Raises:
        ValueError: outside that range.
    """
    if not 0 < length <= 0.25:
        raise ValueError(f"an average's length must be in (0, 0.25] (got {length})")
    low, high = 0.0, 2.0 / length  # sigma_rel falls with gamma, and is below 1 / gamma
    for _ in range(200):
        middle = (low + high) / 2
        width = (middle + 1) ** 0.5 / (middle + 2) / (middle + 3) ** 0.5
        low, high = (middle, high) if width > length else (low, middle)
    return (low + high) / 2


def decay(gamma: float, step: int) -> float:
    """Weight that the old average keeps in update number `step`, 1 for the first."""
    return (1 - 1 / step) ** (gamma + 1)


def overlap(time: Tensor, gamma: Tensor, other_time: Tensor, other_gamma: Tensor) -> Tensor:
    """The integral of the product of two profiles, float64; arguments broadcast.

    (g + 1)(h + 1) / (t^(g + 1) s^(h + 1)) int_0^min(t, s) tau^(g + h) dtau, in logarithms: the
    powers alone would overflow.
    """
    shorter = torch.minimum(time, other_time).log()
    power = (gamma + other_gamma + 1) * shorter
    power = power - (gamma + 1) * time.log() - (other_gamma + 1) * other_time.log()
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * power.exp()


def mixture(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> list[float]:
    """Coefficients of the snapshots whose combined profile is nearest to the wanted one.

    Args:
        times: of the snapshots, in images.
        gammas: their exponents.
        time: of the wanted average, in images.
        gamma: its exponent.

    Returns:
        One coefficient a snapshot; they add up to nearly 1.
    """
    t, g = (torch.tensor(values, dtype=torch.float64) for values in (times, gammas))
    wanted = torch.tensor([time, gamma], dtype=torch.float64)
    gram = overlap(t[:, None], g[:, None], t, g)
    right = overlap(t, g, wanted[0], wanted[1])
    # Neighbouring profiles are nearly alike, so the system is solved by its larger directions.
    solution: Tensor = torch.linalg.lstsq(
        gram, right[:, None], rcond=1e-12, driver="gelsd"
    ).solution
    return solution[:, 0].tolist()


def save_snapshot(folder: Path, images: int, averages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the state of the averages after `images` images; whole or not at all."""
    tensors = {
        f"{number}.{key}": value.detach().cpu().contiguous()
        for number, average in enumerate(averages)
        for key, value in average.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = save(tensors)
    write_atomically(folder / f"{images:012d}.safetensors", lambda file: file.write(content))


def reconstruct(folder: Path, images: int, length: float) -> dict[str, Tensor]:
    """The weights of an average of any length, from a run's snapshots.

    Args:
        folder: of the snapshots.
        images: the moment, at most that of the last snapshot; the nearest one before it is taken.
        length: sigma_rel.

    Raises:
        ValueError: no snapshots, a damaged one, or a length out of range.
    """
    gamma = gamma_of(length)
    files = [path for path in sorted(folder.glob("*.safetensors")) if int(path.stem) <= images]
    if not files:
        raise ValueError(
            f"{folder}: has no snapshots to make an average of another length from; train with "
            "ema.posthoc_every"
        )
    gammas = [gamma_of(kept) for kept in LENGTHS]
    times = [float(path.stem) for path in files for _ in gammas]
    shares = mixture(times, gammas * len(files), float(files[-1].stem), gamma)
    total: dict[str, Tensor] = {}
    for number, path in enumerate(files):
        own = shares[number * len(gammas) : (number + 1) * len(gammas)]
        _add(path, own, total)
    return {
        key: value.float() if value.is_floating_point() else value for key, value in total.items()
    }


def _add(path: Path, shares: Sequence[float], total: dict[str, Tensor]) -> None:
    """Add a snapshot's averages to a sum; whole numbers are those of the last."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                number, _, key = name.partition(".")
                value = file.get_tensor(name)
                if not value.is_floating_point():
                    total[key] = value
                elif key in total:
                    total[key] += shares[int(number)] * value.double()
                else:
                    total[key] = shares[int(number)] * value.double()
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a snapshot of averages ({reason})") from error
