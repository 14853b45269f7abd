"""Bugs in Muon, and in the neighbours that a JiT convolves."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "training/muon.py",
        "muon",
        ("A, B, C = 3.4445, -4.7750, 2.0315", "A, B, C = 3.4445, -4.7750, 2.0351"),
        ("STEPS = 5", "STEPS = 6"),
        (".norm(dim=1)[:, None, None] + 1e-7)", ".norm() + 1e-7)"),
        (".norm(dim=1)[:, None, None] + 1e-7)", ".norm(dim=1)[:, None, None])"),
        ("gram = x @ x.mT\n", "gram = x @ x.mT / 2\n"),
        ("torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A", "gram, x, beta=A"),
        (
            "p = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)",
            "p = torch.baddbmm(gram, gram, gram, beta=C, alpha=B)",
        ),
        ("gram = p @ gram @ p", "gram = p @ gram"),
        ("whole_p = p @ whole_p", "whole_p = p + whole_p"),
        ("if step < STEPS - 1:", "if step < STEPS - 2:"),
        ("gram = gram / norm.square()", "gram = gram / norm"),
        (".sum(dim=1).sqrt()[:, None, None] + 1e-7", ".sum(dim=1).sqrt()[:, None, None] + 1e-30"),
        ("whole_p = 1 / norm * torch.eye(", "whole_p = torch.eye("),
        ("with torch.autocast(matrices[0].device.type, enabled=False):", "if True:"),
        ("update if update.shape[0] <= update.shape[1] else update.mT", "update"),
        ("math.sqrt(max(1.0, rows / columns))", "math.sqrt(max(1.0, columns / rows))"),
        ("math.sqrt(max(1.0, rows / columns))", "math.sqrt(rows / columns)"),
        ("0.2 * math.sqrt(max(rows, columns))", "0.2 * math.sqrt(min(rows, columns))"),
        ('1 - group["lr"] * group["weight_decay"]', '1 - group["weight_decay"]'),
        ('alpha=-group["lr"] * factor', 'alpha=group["lr"] * factor'),
        (
            'average.lerp_(parameter.grad, 1 - group["momentum"])',
            'average.lerp_(parameter.grad, group["momentum"])',
        ),
        (
            'parameter.grad.lerp(average, group["momentum"])',
            'parameter.grad.lerp(average, 1 - group["momentum"])',
        ),
        ('if group["nesterov"]:', "if True:"),
        ("if parameter.ndim != 2 and not", "if False and not"),
        ("not (flatten and parameter.ndim > 2)", "not parameter.ndim > 2"),
        ("parameter.numel() // rows", "parameter.shape[1]"),
        (
            "self._momentum(parameter, group)).flatten(1)",
            "self._momentum(parameter, group)).flatten(0, -2)",
        ),
        ("if parameter.grad is not None:", "if True:"),
        ("0 <= momentum < 1", "0 <= momentum <= 1"),
    ),
    *at(
        "training/muon.py",
        "optimizers",
        ("like.device_mesh, [Replicate()] *", "like.device_mesh, list(like.placements) *"),
    ),
    *at(
        "networks/jit.py",
        "jit",
        ("groups=width)", "groups=1)"),
        ("padding=side // 2,", 'padding=side // 2, padding_mode="circular",'),
        (
            "patches = x[:, front:].transpose(1, 2).unflatten(2, grid)",
            "patches = x[:, front:].transpose(1, 2).unflatten(2, grid[::-1])",
        ),
        (
            "return x + (F.pad(added, (0, 0, front, 0)) if front else added)",
            "return x + (F.pad(added, (0, 0, 0, front)) if front else added)",
        ),
        (
            "return x + (F.pad(added, (0, 0, front, 0)) if front else added)",
            "return F.pad(added, (0, 0, front, 0)) if front else added",
        ),
        ("hidden = self.neighbours(hidden, grid)", "pass"),
        ("convolution % 2 == 0", "False"),
        ("convolution < 0 or", ""),
        ("if convolution and routing is not None:", "if False:"),
    ),
]
