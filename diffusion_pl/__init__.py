"""Image diffusion models in one frame: train, sample, evaluate and compare by YAML."""

__version__ = "0.1.0"
