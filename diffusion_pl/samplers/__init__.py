"""Samplers: one algorithm a file, each a function of a denoiser, a state and noise levels."""
