"""Objectives with weights and a memory of their own, in whole training runs."""

from __future__ import annotations

import torch
from test_training import experiment, same

from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.diffusion.uncertainty import LearnedUncertainty
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.improved_ddpm import ImportanceSampled
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.run import fit


def objective(seed):
    """Both at once; the seed decides the Fourier features, which a checkpoint must restore."""
    torch.manual_seed(seed)
    learned = LearnedUncertainty(DDPM(T=4, beta_1=0.1, beta_T=0.6), channels=4)
    return ImportanceSampled(learned, LinearBetas(4, 0.1, 0.6), keep=2)


def trained(folder, images, seed):
    folder.mkdir(exist_ok=True)
    made = experiment(images=images, objective=objective(seed))
    fit(made, folder, folder.parent / "references", StopRequest())
    return checkpoints.load(checkpoints.latest(folder / "checkpoints"))


def test_a_stopped_run_goes_on_with_what_the_objective_learned_and_remembers(tmp_path):
    whole = trained(tmp_path / "whole", 32, seed=0)
    trained(tmp_path / "stopped", 16, seed=0)
    resumed = trained(tmp_path / "stopped", 32, seed=1)
    same(whole, resumed)
    state = resumed["state_dict"]
    assert state["objective.seen"].sum() == 32
    assert state["objective.objective.weight"].abs().min() > 0
    # The average is of the denoiser alone.
    assert not any(key.startswith("ema.objective") for key in state)
