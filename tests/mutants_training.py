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
    *at(
        "networks/dropout.py",
        "dropout",
        ("if not self.training or not self.p:", "if not self.p:"),
        ("* (1 / (1 - self.p))", ""),
        ("x.permute(0, 2, 3, 1).shape if images", "x.shape if images"),
        ("(PLACES, window), (1, 1)", "(PLACES, window), (0, 1)"),
        ("[:, :count]", "[:, -count:]"),
        ("index_select(0, places)", "index_select(0, places[:1].expand(len(x)))"),
    ),
    *at(
        "training/masks.py",
        "dropout",
        ("* count + torch.arange(count)[:, None]", "* count + 0 * torch.arange(count)[:, None]"),
        ("* count + torch.arange(count)[:, None]", "+ torch.arange(count)[:, None]"),
        ("(drawn >= p)", "(drawn < p)"),
        ("and layer.p\n        ]\n        if", "\n        ]\n        if"),
        ("            layer.begin(", "            layer.begin and ("),
    ),
    *at(
        "training/module.py",
        "dropout training",
        ('self.masks.begin(batch["index"][part]',
         'self.masks.begin(torch.arange(part.stop - part.start)'),
        ('self.masks.begin(batch["index"][part]', 'self.masks.begin(batch["index"] % 8'),
        ('seed_of(self.seed, "dropout", positions[part.start])', "self.seed"),
    ),
    *at("networks/song_layers.py", "dropout", ("self.drop(F.silu(", "(F.silu(")),
    *at("networks/ddpm_unet.py", "dropout", ("self.drop(self.activate(", "(self.activate(")),
    *at("networks/adm.py", "dropout", ("self.drop(F.silu(", "(F.silu(")),
    *at("networks/simple_layers.py", "dropout", ("self.drop(F.silu(", "(F.silu(")),
    *at("networks/uvit.py", "dropout", ("self.dense1(self.drop(hidden))", "self.dense1(hidden)")),
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
        ("dropped = uniform[:, 1] <", "dropped = uniform[:, 0] <"),
        ("dropped = uniform[:, 1] <", "dropped = uniform[:, -1] <"),
    ),
    *at("networks/simple_layers.py", "joints", ("* math.sqrt(self.classes)", "")),
    *at(
        "networks/uvit.py",
        "joints",
        ("+ skips[-1] if self.residual", "if self.residual"),
        ("double(up(x - halved)) + skips[-1]", "double(up(x - halved)) + double(halved[:, :8])"),
    ),
    *at(
        "training/module.py",
        "training",
        ("            memory.begin_step()", "            pass"),
        ("            memory.end_step()", "            pass"),
    ),
]  # fmt: skip
