"""Experiments as YAML: read, check against the signatures they configure, and build."""

from diffusion_pl.config.binding import check
from diffusion_pl.config.building import build
from diffusion_pl.config.reading import (
    EXPERIMENTS,
    all_experiments,
    experiments,
    load,
    load_resolved,
    load_text,
    parse_assignment,
    replaced,
)
from diffusion_pl.config.tree import Config, ConfigError, differences, dump, leaves

__all__ = [
    "EXPERIMENTS",
    "Config",
    "ConfigError",
    "all_experiments",
    "build",
    "check",
    "differences",
    "dump",
    "experiments",
    "leaves",
    "load",
    "load_resolved",
    "load_text",
    "parse_assignment",
    "replaced",
]
