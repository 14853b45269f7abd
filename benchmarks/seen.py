"""Write images of a run's first steps as its network sees them: python seen.py RUN COUNT NPZ."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import lightning
import numpy as np
import torch
from torch import Tensor

from diffusion_pl import config
from diffusion_pl.commands import parts, train
from diffusion_pl.training.run_data import RunData


def seen(run: Path, count: int) -> Tensor:
    """Images uint8 (count, C, R, R), in the order of one device's steps from the first."""
    kept = run / "config.yaml"
    experiment = config.load_resolved(config.load(kept).tree, str(kept), [])
    parts.bind(experiment)
    built = train.build(experiment)
    data = RunData(built.data, built.settings, built.network, built.seed)
    data.prepare_data()
    data.setup("fit")
    alone = SimpleNamespace(global_rank=0, world_size=1, global_step=0)
    data.trainer = cast(lightning.Trainer, alone)
    steps = -(-count // built.data.batch_size)
    batches = itertools.islice(data.train_dataloader(), steps)
    return torch.cat([batch["image"] for batch in batches])[:count]


if __name__ == "__main__":
    images = seen(Path(sys.argv[1]), int(sys.argv[2]))
    np.savez(sys.argv[3], images.permute(0, 2, 3, 1).numpy())
