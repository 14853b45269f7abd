"""Planted bugs of watching a run: held-out losses, the view, what follows a run."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "evaluation/held_out.py",
        "held_out",
        ("torch.arange(total - count, total)", "torch.arange(count)"),
        ("torch.arange(count) * total // count", "torch.arange(count)"),
        ("trained = dataset is None or images.fingerprint == training.fingerprint",
         "trained = dataset is None"),
        ("range(rows.start, rows.stop),", "range(size)[: rows.stop - rows.start],"),
        ("        if mine:\n", "        if True:\n"),
        ("(errors / linear[:, None]).mean(dim=0)", "errors.mean(dim=0)"),
        ("own_condition(images, indices,", "own_condition(images, torch.arange(count),"),
    ),
    *at(
        "training/held_out.py",
        "held_out",
        ("    denoiser.eval()\n", "    pass\n"),
        ("            part.training = mode\n", "            part.training = False\n"),
        ('denoiser = getattr(pl_module, weights)', "denoiser = pl_module.ema"),
        ("self.interval.passed(pl_module.images_seen) or last",
         "self.interval.passed(pl_module.images_seen)"),
    ),
    *at(
        "training/history.py",
        "held_out",
        ("images and is_evaluation(row)", "images and \"name\" in row"),
    ),
    *at(
        "data/synthetic.py",
        "held_out",
        ("seed=self.seed + 1, count=min", "seed=self.seed, count=min"),
    ),
    *at(
        "commands/compare.py",
        "compare",
        ('"resize", "weights", "sigmas")', '"resize", "weights")'),
        ("count - 1) * error", "count - 1) * error / count**0.5"),
    ),
]  # fmt: skip
