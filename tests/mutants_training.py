"""Planted bugs in what is joined to training: the evaluation's cost, averages, dropout."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "evaluation/generator.py",
        "calls",
        ("self._sample([0], _rehearsed(self.denoiser, counted), guide)",
         "self._sample([0], _rehearsed(self.denoiser, counted), None)"),
        ("self.counted[x.shape[-1]] += len(x)", "self.counted[x.shape[-1]] += 1"),
        ("if size not in self.outputs:", "if True:"),
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
    *at(
        "training/counted.py",
        "dropout",
        ("* count + torch.arange(count)[:, None]", "* count + 0 * torch.arange(count)[:, None]"),
        ("* count + torch.arange(count)[:, None]", "+ torch.arange(count)[:, None]"),
        ("isinstance(layer, Counted) and layer.p:", "isinstance(layer, Counted):"),
        ("                layer.begin(", "                layer.begin and ("),
    ),
    *at(
        "training/module.py",
        "dropout training",
        ('self.counted.begin(batch["index"][part]',
         'self.counted.begin(torch.arange(part.stop - part.start)'),
        ('self.counted.begin(batch["index"][part]', 'self.counted.begin(batch["index"] % 8'),
        ('seed_of(self.seed, "dropout", positions[part.start])', "self.seed"),
    ),
    *at(
        "diffusion/preconditioning.py",
        "joints",
        ("in self.preconditioning(sigma)]", "in self.preconditioning(sigma.float())]"),
    ),
    *at(
        "training/module.py",
        "joints",
        ("self.augment(image, uniform[:, 2:])", "self.augment(image, uniform[:, 1:-1])"),
        ("self.augment(image, uniform[:, 2:])",
         "self.augment(image, uniform[:, [0, *range(2, uniform.shape[1] - 1)]])"),
        ("else uniform[:, 1]", "else uniform[:, 0]"),
        ("else uniform[:, 1]", "else uniform[:, -1]"),
    ),
    *at(
        "training/module.py",
        "training",
        ("            memory.begin_step()", "            pass"),
        ("            memory.end_step()", "            pass"),
    ),
]  # fmt: skip
