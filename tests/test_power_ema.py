"""Averages of any length after the fact: the profile by its integral, the mixture by its aim."""

from __future__ import annotations

import homes
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from test_commands_models import TINY
from torch import nn

from diffusion_pl.commands import runs
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.power_ema import (
    LENGTHS,
    decay,
    gamma_of,
    mixture,
    overlap,
    reconstruct,
    save_snapshot,
)


def profile(tau, time, gamma):
    return (gamma + 1) * tau**gamma / time ** (gamma + 1)


def test_the_published_lengths_have_the_published_exponents():
    # Karras 2024, section 3.1.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.25])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    gamma = gamma_of(length)
    mean = quad(lambda tau: tau * profile(tau, 1, gamma), 0, 1)[0]
    square = quad(lambda tau: (tau - mean) ** 2 * profile(tau, 1, gamma), 0, 1)[0]
    assert square**0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.26, float("nan")])
def test_lengths_without_a_profile_are_refused(length):
    with pytest.raises(ValueError, match="must be in"):
        gamma_of(length)


def test_updates_give_each_step_its_share_of_the_profile():
    # The weight of step i after n steps is that of (i - 1, i] in the profile.
    gamma, steps = 3.0, 50
    shares = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        shares *= decay(gamma, step)
        shares[step - 1] += 1 - decay(gamma, step)
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(shares, edges.pow(gamma + 1).diff())


def test_the_overlap_is_the_integral_of_the_product():
    for t, g, s, h in ((1.0, 6.9, 0.7, 16.9), (2.0, 3.0, 2.0, 9.0), (0.3, 12.0, 1.0, 6.0)):
        by_hand = quad(lambda x, a=(t, g), b=(s, h): profile(x, *a) * profile(x, *b), 0, min(t, s))[
            0
        ]
        values = (torch.tensor(value, dtype=torch.float64) for value in (t, g, s, h))
        assert overlap(*values).item() == pytest.approx(by_hand, rel=1e-9)
    # Images by the hundred million do not overflow.
    far = [torch.tensor(value, dtype=torch.float64) for value in (2e8, 17.0, 1e8, 7.0)]
    near = [torch.tensor(value, dtype=torch.float64) for value in (2.0, 17.0, 1.0, 7.0)]
    assert (overlap(*far) * 1e8).item() == pytest.approx(overlap(*near).item(), rel=1e-9)


def test_a_kept_average_is_made_of_itself_alone():
    gammas = [gamma_of(length) for length in LENGTHS]
    times = [t for t in (10.0, 20.0, 30.0) for _ in gammas]
    shares = mixture(times, gammas * 3, 30.0, gammas[1])
    assert shares == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6)


class Wandering(nn.Module):
    """A weight vector that walks at random, and a counter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(200))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def test_a_reconstruction_is_the_average_that_was_never_kept(tmp_path):
    torch.manual_seed(0)
    wanted = {length: torch.zeros(200) for length in (0.06, 0.075, 0.12)}
    current = Wandering()
    kept = [Wandering() for _ in LENGTHS]
    steps, every = 400, 20
    with torch.no_grad():
        for step in range(1, steps + 1):
            current.weight += torch.randn(200)
            for average, length in zip(kept, LENGTHS, strict=True):
                average.weight.lerp_(current.weight, 1 - decay(gamma_of(length), step))
                average.steps.fill_(step)
            for length, average in wanted.items():
                average.lerp_(current.weight, 1 - decay(gamma_of(length), step))
            if step % every == 0:
                save_snapshot(tmp_path, 8 * step, [average.state_dict() for average in kept])
    for length, average in wanted.items():
        state = reconstruct(tmp_path, 8 * steps, length)
        error = (state["weight"] - average).norm() / (average - current.weight).norm()
        assert error < 0.03, length
        assert state["steps"] == steps
    # The moment is that of the checkpoint, not of the newest snapshot.
    early = reconstruct(tmp_path, 8 * 100 + 7, LENGTHS[0])
    assert early["steps"] == 100


def test_snapshots_that_are_not_there_or_damaged_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="train with ema.posthoc_every"):
        reconstruct(tmp_path, 100, 0.1)
    (tmp_path / "000000000008.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a snapshot"):
        reconstruct(tmp_path, 100, 0.1)
    with pytest.raises(ValueError, match="posthoc_every must be positive"):
        EMA(half_life=1, posthoc_every=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run that keeps snapshots, and the same stopped half way and gone on with."""
    folder = tmp_path_factory.mktemp("home")
    yaml = TINY.replace("half_life: 20}", "half_life: 20, posthoc_every: 8}")
    yaml = yaml.replace("images: 16, checkpoint_every: 16", "images: 32, checkpoint_every: 8")
    return homes.trained(folder, yaml, ("--run", "runs/again"))


def test_a_run_can_be_drawn_with_any_average(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    answer = homes.answering(capsys)
    files = sorted(path.name for path in (home / "runs/tiny/posthoc").iterdir())
    assert files == [f"{images:012d}.safetensors" for images in (8, 16, 24, 32)]
    words = ("sweep", "runs/tiny", "--count", 20, "--features", "pixels", "--metrics", "frechet")
    code, result, err = answer(*words, "--weights", "ema,denoiser,ema:0.05,ema:0.2")
    assert code == 0, err
    assert [point["weights"] for point in result["points"]] == [
        "ema", "denoiser", "ema:0.05", "ema:0.2",
    ]  # fmt: skip
    # A kept length is what the checkpoint holds.
    state = checkpoints.load(checkpoints.latest(home / "runs/tiny/checkpoints"))["state_dict"]
    made = runs.open_model(home / "runs/tiny", f"ema:{LENGTHS[1]}").denoiser.state_dict()
    for key, value in made.items():
        torch.testing.assert_close(value, state[f"profiles.1.{key}"], rtol=1e-5, atol=1e-6)
    code, result, err = answer("sample", "runs/tiny", "--weights", "ema:0.5", "--count", 1)
    assert (code, result) == (2, None) and "must be in (0, 0.25]" in err


def test_the_averages_go_on_bit_for_bit(home, monkeypatch):
    monkeypatch.chdir(home)
    again = home / "runs/again"
    *_, before, last = sorted((again / "checkpoints").glob("*.ckpt"))
    last.unlink()
    checkpoints.point_to(before)
    assert homes.main(["train", "tiny", "--run", "runs/again"]) == 0
    one, two = (
        checkpoints.load(checkpoints.latest(home / "runs" / name / "checkpoints"))["state_dict"]
        for name in ("tiny", "again")
    )
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert any(key.startswith("profiles.0.") for key in one)


def test_a_run_updates_each_average_by_its_own_exponent_from_the_first_step_on(home):
    def snapshot(images):
        return load_file(home / "runs/tiny/posthoc" / f"{images:012d}.safetensors")

    # The first update keeps nothing of the beginning: both are the weights after one step.
    first = snapshot(8)
    keys = [key.removeprefix("0.") for key in first if key.startswith("0.")]
    assert all(torch.equal(first[f"0.{key}"], first[f"1.{key}"]) for key in keys)
    # The longer average lags further behind.
    last = snapshot(32)
    state = checkpoints.load(checkpoints.latest(home / "runs/tiny/checkpoints"))["state_dict"]
    behind = [
        sum((last[f"{number}.{key}"] - state[f"denoiser.{key}"]).norm() for key in keys)
        for number in (0, 1)
    ]
    assert 0 < behind[0] < behind[1]
