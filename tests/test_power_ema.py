"""Averages of any length after the fact: the profile by its integral, the mixture by its aim."""

from __future__ import annotations

import json
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.integrate import quad
from test_commands_models import TINY
from torch import nn

from diffusion_pl.commands import ema, runs
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.power_ema import (
    LENGTHS,
    decay,
    gamma_of,
    misfit,
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


def test_the_coefficients_are_edm2s():
    """Algorithm 3 with its normalisation, solved a second time, by hand, for three snapshots."""
    times, gammas = [10.0, 20.0, 20.0], [7.0, 7.0, 17.0]

    def product(t, g, s, h):  # by quadrature
        return quad(lambda tau: profile(tau, t, g) * profile(tau, s, h), 0, min(t, s))[0]

    gram = [
        [product(*one, *two) for two in zip(times, gammas, strict=True)]
        for one in zip(times, gammas, strict=True)
    ]
    right = [product(*one, 20.0, 4.0) for one in zip(times, gammas, strict=True)]
    solved = np.linalg.solve(gram, right)
    assert abs(solved.sum() - 1) > 0.01  # what the division is for
    found = mixture(times, gammas, 20.0, 4.0)
    assert found == pytest.approx(solved / solved.sum(), rel=1e-6)
    # How far the profile is, by quadrature too.
    square = quad(lambda tau: profile(tau, 20, 4.0) ** 2, 0, 20)[0]

    def difference(tau):
        parts = zip(found, times, gammas, strict=True)
        made = sum(c * profile(tau, t, g) for c, t, g in parts if tau <= t)
        return (made - profile(tau, 20, 4.0)) ** 2

    distance = quad(difference, 0, 10)[0] + quad(difference, 10, 20)[0]
    wanted = (distance / square) ** 0.5
    assert misfit(found, times, gammas, 20.0, 4.0) == pytest.approx(wanted, rel=1e-6)


class Weights(nn.Module):
    """A weight vector and a counter."""

    def __init__(self, count=200, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((count,), value))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_constant_weights_come_back_as_themselves(tmp_path, count):
    value = 0.7310585975646973  # any float32
    for number in range(1, count + 1):
        save_snapshot(tmp_path, 1000 * number, [Weights(3, value).state_dict() for _ in LENGTHS])
    for length in (0.001, 0.02, *LENGTHS, 0.07, 0.15, 0.2, 0.25):
        made = reconstruct(tmp_path, 1000 * count, length)
        assert made["weight"].tolist() == Weights(3, value).weight.tolist(), length


def test_a_reconstruction_is_the_average_that_was_never_kept(tmp_path):
    """Of weights far from zero that both wander and move one way: a wrong sum shows."""
    torch.manual_seed(0)
    steps, every = 400, 20
    lengths = (0.04, 0.06, 0.075, 0.12, 0.15)
    wanted = {length: torch.zeros(200, dtype=torch.float64) for length in lengths}
    current = Weights().double()
    kept = [Weights().double() for _ in LENGTHS]
    with torch.no_grad():
        current.weight += 5
        for step in range(1, steps + 1):
            current.weight += (1 + torch.randn(200, dtype=torch.float64)) / steps
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
        assert error < 1e-3, length  # of the way that the average lags behind
        assert (state["weight"] - average).abs().max() < 1e-3
        assert state["steps"] == steps
    # The moment is that of the checkpoint, not of the newest snapshot.
    early = reconstruct(tmp_path, 8 * 100 + 7, LENGTHS[0])
    assert early["steps"] == 100


def test_a_length_that_the_snapshots_make_only_roughly_is_told(tmp_path, caplog):
    for images in (100, 200):
        save_snapshot(tmp_path, images, [Weights().state_dict() for _ in LENGTHS])
    for length in (*LENGTHS, 0.06):
        reconstruct(tmp_path, 200, length)
    assert not caplog.records
    reconstruct(tmp_path, 200, 0.25)
    [told] = caplog.messages
    assert "2 snapshots make an average of length 0.25 only roughly" in told
    assert "off by 73 %" in told and "those of 0.05 and 0.1 are exact" in told


def test_snapshots_that_are_not_there_or_damaged_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="train with ema.posthoc_every=N, .* such as 3; what"):
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
    yaml = yaml.replace(
        "total_images: 16, checkpoint_every: 16", "total_images: 32, checkpoint_every: 8"
    )
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
    # A row says how far the profile is that four snapshots made.
    rows = [json.loads(line) for line in Path(result["rows"]).read_text().splitlines()]
    assert [row.get("ema_misfit") for row in rows] == [None, None, 0.0, 0.2226]
    # A kept length is what the checkpoint holds.
    state = checkpoints.load(checkpoints.latest(home / "runs/tiny/checkpoints"))["state_dict"]
    made = runs.open_model(home / "runs/tiny", f"ema:{LENGTHS[1]}").denoiser.state_dict()
    for key, value in made.items():
        torch.testing.assert_close(value, state[f"profiles.1.{key}"], rtol=1e-5, atol=1e-6)
    code, result, err = answer("sample", "runs/tiny", "--weights", "ema:0.5", "--count", 1)
    assert (code, result) == (2, None) and "must be in (0, 0.25]" in err


def test_the_best_of_several_lengths_is_measured_and_exported(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    answer = homes.answering(capsys)
    lengths = (0.05, 0.1, 0.2)
    more = ("--count", 10, "--features", "pixels", "--metrics", "frechet")
    words = ("ema", "runs/tiny", "--lengths", ",".join(map(str, lengths)), "--blocks", 2, *more)
    code, result, err = answer(*words, "--out", "best.safetensors")
    assert code == 0, err
    values = []
    for length, point in zip(lengths, result["points"], strict=True):
        code, measured, _ = answer(
            "evaluate", "runs/tiny", "--weights", f"ema:{length}", "--blocks", 2, *more
        )
        [row] = measured["measures"]
        assert (point["value"], point["blocks"]) == (row["value"], row["blocks"])
        # Of two blocks: mean and half their difference times t(0.975, 1) = 12.7062.
        one, two = row["blocks"]
        reach = 12.7062 * abs(one - two) / 2
        ends = ((one + two) / 2 - reach, (one + two) / 2 + reach)
        assert point["interval"] == pytest.approx(ends, rel=1e-4)
        values.append(row["value"])
    assert result["best"] == lengths[values.index(min(values))]
    assert [point["misfit"] for point in result["points"]] == pytest.approx(
        [0, 0, 0.2226], abs=1e-3
    )
    state = load_file("best.safetensors")
    made = runs.open_model(Path("runs/tiny"), f"ema:{result['best']:g}").denoiser.state_dict()
    assert all(torch.equal(value, made[key]) for key, value in state.items())
    with safe_open("best.safetensors", "pt") as file:
        about = json.loads(file.metadata()["diffusion_pl"])
    assert about["weights"] == f"ema:{result['best']:g}" and len(about["chosen_by"]) == 3
    card = Path(result["card"]).read_text()
    assert f"{min(values):.5g}" in card and "Which reference" in card
    assert f"| weights | averaged, of relative length {result['best']:g} (sigma_rel" in card
    assert answer("import", "safetensors", "best.safetensors", "runs/best")[0] == 0
    # What was measured before is not measured again, and no file is written over.
    seen = [json.loads(line) for line in Path("runs/tiny/evaluations.jsonl").read_text().split("\n")
            if '"block"' in line]  # fmt: skip
    assert len(seen) == 3 * 2
    code, _, err = answer(*words, "--out", "best.safetensors")
    assert code == 2 and "best.safetensors: exists already; name another file: --out" in err


def test_the_best_is_the_highest_where_higher_is_better_and_doubt_is_said():
    def points(name, *blocks):
        return [ema.Point(0.1 * n, name, sum(b) / len(b), b, 0.0) for n, b in enumerate(blocks, 1)]

    distances = points("fid@10/x", (5.0, 5.1), (4.0, 4.2), (4.1, 4.15))
    best = ema.best_of(distances)
    assert best.length == 0.2
    # In pairs: 1.0 and 0.9 more, 0.95 -+ 12.7062 * 0.05, though the intervals themselves overlap.
    assert ema.above(distances[0], best) == pytest.approx((0.31469, 1.58531), abs=1e-4)
    assert distances[0].interval[0] < best.interval[1]
    assert ema.undecided(distances[:2], best) is None
    # 0.1 more and 0.05 less: an interval that holds 0.
    assert ema.undecided(distances, best) == "0.3 cannot be told from it on these images"
    assert "--blocks 3" in ema.undecided(points("fid@1/x", (1.0,)), points("fid@1/x", (1.0,))[0])
    shares = points("precision@10/x", (0.2, 0.21), (0.7, 0.71), (0.5, 0.52))
    assert ema.best_of(shares).length == 0.2
    assert ema.undecided(shares, shares[1]) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lengths", "0.3"), "an average's length must be in (0, 0.25] (got 0.3)"),
        (("--blocks", "0"), "--blocks: must be at least 1"),
        (("--metrics", "fid"), "there is no fid; choose from frechet"),
        (("--set", "evaluation.metrics=[]"), "its evaluation has no metrics; name one: --metrics"),
    ],
)
def test_averages_that_cannot_be_measured_are_one_line(home, monkeypatch, capsys, words, message):
    monkeypatch.chdir(home)
    code, result, err = homes.answering(capsys)("ema", "runs/tiny", "--count", 8, *words)
    assert (code, result) == (2, None) and message in err, err
    assert err.count("\n") == 1 and not Path("runs/tiny/ema.safetensors").exists()


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
