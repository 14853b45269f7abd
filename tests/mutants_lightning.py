"""Planted bugs of what Lightning's users bring along: schedules, groups, profilers, strategies."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "training/lr_schedule.py",
        "lr_schedule",
        ("        if images < self.warmup:", "        if images <= 0 * self.warmup:"),
        ("(images - self.warmup) / max", "images / max"),
        ("max(total_images - self.warmup, 1)", "max(total_images, 1)"),
        ("self.final + (1 - self.final) *", "self.final +"),
        ("return schedule(optimizer) if is_torch_s(schedule) else None", "return None"),
        ("ReduceLROnPlateau):", "()):"),
        ("            scheduler = schedule(optimizer)\n", "            return\n"),
        ("not 0 <= factor < math.inf", "not factor < math.inf"),
        ("for images in (0, total_images // 2, total_images):", "for images in ():"),
        ("inspect.signature(schedule).bind(0, total_images)", "inspect.signature(schedule)"),
    ),
    *at(
        "training/module.py",
        "lr_schedule",
        ("            scheduler.step()", "            pass"),
        ("if scheduler is None:\n            self.set_rate", "if True:\n            self.set_rate"),
        ('self.learning_rate = optimizer.param_groups[0]["lr"]', "pass"),
        ("self.lr_schedule(images, self", "self.lr_schedule(images + self.batch_size, self"),
    ),
    *at(
        "training/optimizers.py",
        "optimizers",
        ("parameter.ndim == self.ndim", "parameter.ndim >= self.ndim"),
        ("fits and any(fnmatchcase", "any(fnmatchcase"),
        ("full.removeprefix(NETWORK)", "full"),
        ("taken[takes.index(True)] if any", "taken[-1] if any"),
        ("**group.settings()}", "}"),
        ("            if not mine:", "            if False:"),
        ("            if value < 0:", "            if False:"),
        ("        if name not in optimizer.defaults:", "        if False:"),
        ("            each.state = self.state", "            pass"),
        ("            first += count", "            first = count"),
        ("            each.step()", "            each is self.optimizers[0] and each.step()"),
        ("dict(state_dict)\n        self._share()", "dict(state_dict)"),
        ("        super().load_state_dict(state_dict)\n", "        pass\n"),
        ("if p.requires_grad])", "])"),
        ("        made.step()\n", "        pass\n"),
        ("    if not isinstance(made, Optimizer):", "    if False:"),
    ),
    *at(
        "commands/parts.py",
        "optimizers",
        ("        whole.objective = objective", "        pass"),
        ("if grouped else {\"weight\": 1}", "if False else {\"weight\": 1}"),
    ),
    *at(
        "config/renaming.py",
        "lr_schedule",
        ("            node.setdefault(\"_target_\", target)", "            pass"),
        ("node = tree.setdefault(section, {})", "node = tree.get(section)"),
    ),
    *at(
        "config/reading.py",
        "lr_schedule",
        ("completed(renamed(plain(tree, source)))", "renamed(plain(tree, source))"),
        ("file, completed(tree), origins", "file, tree, origins"),
        ("    changes = renamed(dict(changes), config.tree, source)\n", ""),
    ),
]  # fmt: skip
