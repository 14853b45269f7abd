"""Counted random numbers: uniform, and a pure function of seed, stream and position."""

from __future__ import annotations

import pytest
import torch

from diffusion_pl.data.draws import uniforms


def test_the_numbers_are_those_of_splitmix64(monkeypatch):
    # Published first outputs of SplitMix64 from the state 1234567 (Vigna's reference).
    monkeypatch.setattr("diffusion_pl.data.draws.seed_of", lambda *words: 1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniforms(0, "", torch.arange(3)).tolist()
    assert drawn == [(bits >> 11) / 2**53 for bits in published]


def test_they_are_uniform_and_independent_between_neighbours_seeds_and_streams():
    first = uniforms(0, "a", torch.arange(10_000))
    assert 0 <= first.min() < 0.001
    assert 0.999 < first.max() < 1
    # Standard deviations over 10,000: a mean's 0.003, a variance's 0.0008, a correlation's 0.01.
    assert first.mean() == pytest.approx(0.5, abs=0.012)
    assert first.var() == pytest.approx(1 / 12, abs=0.003)
    others = (uniforms(1, "a", torch.arange(10_000)), uniforms(0, "b", torch.arange(10_000)))
    for second in (first.roll(1), *others):
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.04


def test_a_number_does_not_depend_on_which_others_are_drawn():
    whole = uniforms(5, "x", torch.arange(100))
    assert torch.equal(uniforms(5, "x", torch.tensor([97, 3])), whole[[97, 3]])
