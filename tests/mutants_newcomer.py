"""Planted bugs in what somebody new meets on the way from photographs to a shared model."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "cli.py",
        "newcomer",
        ("if sys.stderr.isatty() and not is_later_rank():", "if not is_later_rank():"),
        ("if sys.stderr.isatty() and not is_later_rank():", "if False:"),
        ("return INTERRUPTED", "return 1"),
        ('{"prepare", "sample", "sweep", "ema"}', '{"prepare", "sweep", "ema"}'),
    ),
    *at(
        "commands/results.py",
        "newcomer",
        ("(sys.stdout.isatty() or self.in_pipes) and not as_json", "not as_json"),
        (" and not as_json:", ":"),
    ),
    *at(
        "commands/hints.py",
        "newcomer",
        ("or not _in_checkout()", ""),
        ('" -m diffusion_pl sample " in', '"" in'),
        ("one = shlex.quote(names[0])", "one = names[0]"),
        ("if len(names) > _CLASSES", "if len(names) > _CLASSES + 1"),
    ),
    *at(
        "commands/sample.py",
        "newcomer",
        ("count * sum(generator.calls().values())", "count"),
        ("[] if generator.guide is None else [generator.guide.denoiser]", "[]"),
    ),
    *at(
        "commands/train.py",
        "newcomer",
        ("and folder is not None and source.made_of is None:", "and False:"),
        ("elif isinstance(source, ImageFolder) and not", "elif False and not"),
    ),
    *at(
        "training/beginning.py",
        "newcomer",
        ('about["class_names"] = list(names)', "pass"),
        ("all(type(name) is str for name in names)", "True"),
        ("isinstance(names, list) and all(", "all("),
    ),
    *at(
        "commands/check.py",
        "newcomer",
        ("if classes not in (0, manifest.classes):", "if False:"),
        ("'' if near is None else", "'' if True else"),
        ("source.prepare()  # what is made already is only looked at", "pass"),
    ),
    *at(
        "commands/runs.py",
        "newcomer",
        ("if folder is None or folder.is_absolute() or folder.exists():", "if True:"),
        ("folder.is_absolute() or folder.exists():", "folder.is_absolute():"),
        ("folder is None or folder.is_absolute() or", "folder is None or"),
    ),
    *at(
        "commands/evaluate.py",
        "newcomer",
        ("not runs.is_run(Path(named))", "False"),
        ("type(named) is not str", "False"),
        ("metrics=own.metrics or default.metrics", "metrics=default.metrics"),
    ),
    *at(
        "commands/losses.py",
        "newcomer",
        ('about["count"] < count', 'about["count"] <= count'),
    ),
    *at(
        "data/write_shards.py",
        "newcomer",
        ("< recipe.descending[0]:", "<= recipe.descending[0]:"),
        ("< recipe.descending[0]:", "< recipe.descending[-1]:"),
        ("(the smallest {min(sides)})", "(the smallest {max(sides)})"),
        ("[side for part in shards for side in part.enlarged]", "shards[0].enlarged"),
    ),
    *at(
        "data/recipe.py",
        "newcomer",
        ('max(size) if self.fit == "pad" else min(size)', "min(size)"),
    ),
    *at(
        "commands/recommend.py",
        "newcomer",
        ('",".join(map(str, manifest.resolutions))', "str(manifest.resolutions[0])"),
        ("sides, labels=True)", "sides, labels=None)"),
        ('"filter", "fit", "encoding", "channels", "shard_images"', '"filter", "fit"'),
    ),
    *at(
        "commands/sbatch.py",
        "launch",
        ('["--data-changed"] if self.data_changed else []', "[]"),
        ('["--data-changed"] if self.data_changed else []', '["--data-changed"]'),
    ),
    *at(
        "view.py",
        "newcomer",
        ("    if done:\n", "    if not done:\n"),
    ),
    *at(
        "io/files.py",
        "newcomer",
        ("    if path.exists():\n        return None\n", ""),
    ),
]
