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
]  # fmt: skip
