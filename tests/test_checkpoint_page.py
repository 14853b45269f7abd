"""The page on checkpoints: what it tells readers from outside to type does what it says."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_pl.training import checkpoint as checkpoints


def test_the_page_on_checkpoints_reads_one_without_this_package(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    tree = {
        "state_dict": {"ema.network.w": torch.ones(3), "denoiser.network.w": torch.zeros(3)},
        "diffusion_pl": {"format": 2, "images": 40_000, "config": {"network": {"blocks": 1}}},
    }
    checkpoints.save(tree, tmp_path / "000000040000.ckpt")
    monkeypatch.chdir(tmp_path)
    known = {}
    exec(program, known)
    assert torch.equal(known["average"]["w"], torch.ones(3))
