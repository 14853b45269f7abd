"""Post-hoc EMA: averages of any length from snapshots of two (EDM2).

Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.

| part | formula | equation |
|---|---|---|
| profile | p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t | 1 |
| update | beta = (1 - 1 / step)^(gamma + 1) | 2 |
| length | sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) | 3 |
| reconstruction | combination of snapshots with the nearest profile, least squares | C.2 |
| its sum | coefficients over their sum, so that constant weights stay | released code |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular, write_atomically
from diffusion_pl.training.history import DAMAGED

logger = logging.getLogger(__name__)

FOLDER = "posthoc"  # in a run's folder

# Lengths sigma_rel of the two averages: standard deviation of the profile over the training so far.
LENGTHS = (0.05, 0.10)

# Relative error of a reconstructed profile above which a warning is logged: weights that move
# evenly are then off by a thousandth of their way and more.
FAR = 0.05


def gamma_of(length: float) -> float:
    """The exponent of a profile of relative standard deviation `length`.

    Args:
        length: sigma_rel in (0, 0.25]; 1 / 12^(1/2) = 0.289 would be the plain mean.

    Raises:
        UserError: outside that range.
    """
    if not 0 < length <= 0.25:
        raise UserError(f"an average's length must be in (0, 0.25] (got {length})")
    low, high = 0.0, 2.0 / length  # sigma_rel falls with gamma, and is below 1 / gamma
    for _ in range(200):
        middle = (low + high) / 2
        width = (middle + 1) ** 0.5 / (middle + 2) / (middle + 3) ** 0.5
        low, high = (middle, high) if width > length else (low, middle)
    return (low + high) / 2


def decay(gamma: float, step: int) -> float:
    """Weight of the old average in update number `step`, from 1."""
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

    Few snapshots cannot form every profile, and the nearest combination would not sum to 1 and
    would scale the weights; so it is divided by its sum.

    Args:
        times: of the snapshots, in images.
        gammas: their exponents.
        time: of the wanted average, in images.
        gamma: its exponent.

    Returns:
        A coefficient for each snapshot; they sum to 1.
    """
    gram, right, _ = _overlaps(times, gammas, time, gamma)
    # Neighbouring profiles are nearly collinear, so small singular values are cut off.
    solution: Tensor = torch.linalg.lstsq(
        gram, right[:, None], rcond=1e-12, driver="gelsd"
    ).solution[:, 0]
    return (solution / solution.sum()).tolist()


def misfit(
    shares: Sequence[float],
    times: Sequence[float],
    gammas: Sequence[float],
    time: float,
    gamma: float,
) -> float:
    """How far the profile of some coefficients is from the wanted one.

    Args:
        shares: the coefficients; the others as for `mixture`.

    Returns:
        Root of the integral of the squared difference, over that of the wanted profile's square.
    """
    gram, right, square = _overlaps(times, gammas, time, gamma)
    c = torch.tensor(shares, dtype=torch.float64)
    return float(((c @ gram @ c - 2 * c @ right + square) / square).clamp(min=0).sqrt())


def _overlaps(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Overlaps: snapshots with one another, snapshots with the wanted, the wanted with itself."""
    t, g = (torch.tensor(values, dtype=torch.float64) for values in (times, gammas))
    wanted = torch.tensor([time, gamma], dtype=torch.float64)
    gram = overlap(t[:, None], g[:, None], t, g)
    right = overlap(t, g, wanted[0], wanted[1])
    return gram, right, overlap(wanted[0], wanted[1], wanted[0], wanted[1])


def save_snapshot(folder: Path, images: int, averages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the state of the averages after `images` images, atomically."""
    tensors = {
        f"{number}.{key}": value.detach().cpu().contiguous()
        for number, average in enumerate(averages)
        for key, value in average.items()
    }
    content = save(tensors)
    write_atomically(snapshot_of(folder, images), lambda file: file.write(content))


def snapshot_of(folder: Path, images: int) -> Path:
    """The file of the snapshot after `images` images."""
    return folder / f"{images:012d}.safetensors"


def set_damaged_aside(folder: Path) -> None:
    """Rename damaged snapshots, with a warning each; the others still make averages."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(regular(path), framework="pt"):  # checks its length, too
                continue
        except (OSError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())
        path.rename(path.with_name(path.name + DAMAGED))
        logger.warning("%s: is damaged (%s) and set aside", path, reason)


@dataclass(frozen=True)
class Recipe:
    """Coefficients of a reconstructed average.

    Args:
        shares: for each snapshot, coefficients in the order of LENGTHS; all of them sum to 1.
        misfit: relative error of the profile.
    """

    shares: Mapping[Path, Sequence[float]]
    misfit: float


def recipe(folder: Path, images: int, length: float) -> Recipe:
    """Coefficients of an average of any length from a run's snapshots; no file is read.

    Args:
        folder: of the snapshots.
        images: time of the average; rounded down to that of a snapshot.
        length: sigma_rel.

    Raises:
        UserError: no snapshots, or a length out of range.
    """
    gamma = gamma_of(length)
    files = [path for path in sorted(folder.glob("*.safetensors")) if int(path.stem) <= images]
    if not files:
        raise UserError(
            f"{folder}: has no snapshots to make an average of another length from; train with "
            f"ema.posthoc_every=N, images between two snapshots, such as {max(1, images // 32):,}; "
            "what was not kept in training cannot be averaged afterwards"
        )
    gammas = [gamma_of(kept) for kept in LENGTHS]
    wanted = ([float(path.stem) for path in files for _ in gammas], gammas * len(files))
    shares = mixture(*wanted, float(files[-1].stem), gamma)
    far = misfit(shares, *wanted, float(files[-1].stem), gamma)
    each = [shares[first : first + len(gammas)] for first in range(0, len(shares), len(gammas))]
    return Recipe(dict(zip(files, each, strict=True)), far)


def reconstruct(folder: Path, images: int, length: float) -> dict[str, Tensor]:
    """The weights of an average of any length; warns if they can only be approximated.

    Args:
        folder: of the snapshots.
        images: as for `recipe`.
        length: sigma_rel.

    Raises:
        UserError: no snapshots, a damaged one, or a length out of range.
    """
    made = recipe(folder, images, length)
    if made.misfit > FAR:
        logger.warning(
            "%s: %d snapshots make an average of length %g only roughly: its profile is off by "
            "%.0f %%; those of %s are exact, and more snapshots (ema.posthoc_every) help others",
            folder, len(made.shares), length, 100 * made.misfit, " and ".join(map(str, LENGTHS)),
        )  # fmt: skip
    total: dict[str, Tensor] = {}
    for path, own in made.shares.items():
        _add(path, own, total)
    return {
        key: value.float() if value.is_floating_point() else value for key, value in total.items()
    }


def _add(path: Path, shares: Sequence[float], total: dict[str, Tensor]) -> None:
    """Add a snapshot's averages to a sum; integers are those of the last snapshot."""
    try:
        with safe_open(regular(path), framework="pt") as file:
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
        raise UserError(f"{path}: not a snapshot of averages ({reason})") from error
