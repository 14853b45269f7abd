"""Bugs in what compares and lists runs."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "commands/compare.py",
        "compare",
        ('(min(row["images"], images) - seen)', '(row["images"] - seen)'),
        ("float(student.ppf(0.975, count - 1))", "float(student.ppf(0.95, count - 1))"),
        ("statistics.stdev(values) / count**0.5", "statistics.stdev(values)"),
        ('if same and row["images"] == self.images and', "if same and"),
        ("most < low if higher else high < least", "most < low"),
        ("-known[name][0] if higher else known[name][1]", "known[name][1]"),
        ("if seconds <= now]", "]"),
        ('rows["text encoder"] = ', "_ = "),
        ('"prompt", "prompts",', '"prompt",'),
        ('each.tree["objective"] != found[0].tree["objective"]', "False"),
    ),
    *at(
        "training/history.py",
        "compare",
        ('SAME = ("name", "fingerprint", "extractor", "resize",', 'SAME = ("name", "resize",'),
        ('"resize", "weights", "sigmas")', '"resize", "time", "sigmas")'),
    ),
    *at(
        "commands/run_list.py",
        "run_list",
        ("if run.images >= run.budget:", "if run.images > run.budget:"),
        ("if holder is not None:", "if False:"),
        ("if failed.is_file():", "if False:"),
        ("            folders.clear()\n            yield", "            yield"),
        ("if seconds >= length:", "if seconds > length:"),
    ),
]
