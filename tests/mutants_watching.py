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
        "training/history.py",
        "compare",
        ('"resize", "weights", "sigmas")', '"resize", "weights")'),
    ),
    *at(
        "view.py",
        "watch",
        ("(following - self.images) / self.pace()", "following / self.pace()"),
        ("+ coming * self.cost", ""),
        ("(self.images // self.every + 1) *", "(self.images // self.every) *"),
        ("before + (loss - before) / count", "loss"),
        ("self.curve = self.curve[::2]", "self.curve = self.curve[-1:]"),
        ("return spaced[:height]", "return spaced"),
        ('Text(shown(self.name), style="bold")', 'Text(self.name, style="bold")'),
        ("round((1 - (math.log(y) - low) / span)", "round(((math.log(y) - low) / span)"),
        ("_DOTS[dot % 4][column % 2]", "_DOTS[column % 2][dot % 2]"),
    ),
    *at(
        "progress.py",
        "watch",
        ("        self.shown = now\n        if loss", "        if loss"),
        ("if loss is not None and (self.live or self.view.smoothed is None):", "if False:"),
        ("            self.console.show_cursor(True)", "            pass"),
        ("                transient=True,\n", "                screen=True,\n"),
    ),
    *at(
        "commands/watch.py",
        "watch",
        ("run.state == \"stopped\" and (run.run.folder / MARKER).exists()", "False"),
        ('{"running": "training"}.get(run.state, run.state)', "run.state"),
        ("view.messages.extend(", "list("),
        ("            continue\n", "            break\n"),
    ),
    *at(
        "commands/run_list.py",
        "run_list",
        ("last = (length - 1) * 2 // 3", "last = 0"),
        ("room = max(width - others, SHORTEST)", "room = width"),
        ("rows = [row for row in run.rows if is_evaluation(row)]",
         "rows = [row for row in run.rows if \"name\" in row]"),
    ),
    *at(
        "training/flops.py",
        "watch",
        ('or "MIG" in device', ""),
        ("precision not in (\"bf16\", \"fp16\")", "False"),
        ("    except Exception:", "    except KeyError:"),
        ('if getattr(network, "routing", None) is not None:', "if False:"),
        ("torch.zeros(1, channels, side, side", "torch.zeros(2, channels, side, side"),
    ),
    *at(
        "data/synthetic.py",
        "held_out",
        ("seed=self.seed + 1, count=min", "seed=self.seed, count=min"),
    ),
    *at(
        "commands/compare.py",
        "compare",
        ("error, count)\n        for", "error / count**0.5, count)\n        for"),
    ),
]  # fmt: skip
