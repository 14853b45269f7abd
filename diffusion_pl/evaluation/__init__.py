"""Sampling and evaluation of images, for training and the commands alike."""

from diffusion_pl.evaluation.generator import ImageGenerator, Sampler, batches
from diffusion_pl.evaluation.measuring import evaluate, reference_of
from diffusion_pl.evaluation.settings import Evaluation

__all__ = ["Evaluation", "ImageGenerator", "Sampler", "batches", "evaluate", "reference_of"]
