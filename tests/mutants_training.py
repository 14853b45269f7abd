"""Planted bugs in what is joined to training: the evaluation's cost, averages, dropout."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "evaluation/drawing.py",
        "calls",
        ("self._draw(_rehearsed(self.denoiser, counted), guide, [0])",
         "self._draw(_rehearsed(self.denoiser, counted), None, [0])"),
        ("self.counted[x.shape[-1]] += len(x)", "self.counted[x.shape[-1]] += 1"),
        ("if size not in self.answered:", "if True:"),
        ("return like.new_zeros(len(x), *like.shape[1:])", "return torch.zeros_like(x)"),
        ("return like.new_zeros(len(x), *like.shape[1:])", "return torch.zeros_like(like)"),
        ("size = x.shape[1:]", "size = torch.Size([1])"),
    ),
    *at(
        "training/power_ema.py",
        "power_ema",
        ("(solution / solution.sum())", "solution"),
        ("(solution / solution.sum())", "(solution / solution.norm())"),
        ("- 2 * c @ right", "- c @ right"),
        ("if made.misfit > FAR:", "if made.misfit > 20 * FAR:"),
        ("if made.misfit > FAR:", "if made.misfit > 0.1 * FAR:"),
        ("shares[first : first + len(gammas)]", "shares[: len(gammas)]"),
    ),
    *at(
        "commands/runs.py",
        "power_ema",
        ('ema["ema_misfit"] = round(made.misfit, 4)', "pass"),
    ),
]  # fmt: skip
