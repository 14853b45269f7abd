"""Planted bugs of what is typed, measured, kept and found again."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "config/words.py",
        "config_words",
        ('re.compile(r"[-+]?0[0-7_]+")', 're.compile(r"[-+]?0[0-7_]*")'),
        ('        if text == "None":', "        if False:"),
        ("    elif node.style is None:", "    else:"),
        ("if node.flow_style and _empty(value)", "if node.flow_style and not _empty(value)"),
        ('node.tag == _INT and ":" in text', "False"),
        ('text.replace("_", ""), 8)', 'text.replace("_", ""), 10)'),
        ("    if found == text:", "    if False:"),
        ("            return _INFINITE[value]", "            pass"),
    ),
    *at(
        "config/reading.py",
        "config_words",
        ("(folder, packaged_experiments()):\n        if (file", "(folder,):\n        if (file"),
        ("(file.parent, folder, packaged_experiments())", "(folder, folder, folder)"),
        ("if not each.samefile(file)]", "if True]"),
        ("        raise ConfigError(\"\\n\".join(wrong))", "        raise ConfigError(wrong[0])"),
        ("    own = expand_values(own, where)\n", ""),
    ),
    *at(
        "config/binding.py",
        "config_words",
        ("        if value not in infinite:", "        if not infinite:"),
        ("    if found:\n        return nearest", "    if False:\n        return nearest"),
    ),
    *at(
        "commands/sample_folder.py",
        "found_again",
        ("wanted.start > there.stop or", "False and"),
        ("min(there.start, wanted.start)", "wanted.start"),
        ("self.path_of(i).name not in there", "True"),
        ("if old.get(key) != settings.get(key)", "if False"),
        ("*self.images.glob(\"*\")]", "]"),
        ("checkpoints.digest(opened.model.checkpoint)", '"0" * 64'),
    ),
    *at(
        "data/files.py",
        "found_again",
        ("FolderFiles(place if drawn is None else place / IMAGES)", "FolderFiles(place)"),
    ),
    *at(
        "commands/evaluate.py",
        "found_again",
        ('not said.get("complete")', "False"),
        ("(total := settings.count * blocks)", "(total := settings.count)"),
        ('parts = {**self.depends, "block": number}', 'parts = {"block": number}'),
        ('parts = {**self.depends, "block": number}', "parts = self.depends"),
        ("except (OSError, ValueError) as error:", "except KeyError as error:"),
    ),
    *at(
        "commands/metric_choice.py",
        "found_again",
        ("                if not self.everything:\n", "                if True:\n"),
        ("lambda metric: metric.check_count(settings.count)", "lambda metric: None"),
    ),
    *at(
        "commands/data_sets.py",
        "found_again",
        ("or wanted) < wanted and not resize", "or wanted) < wanted and resize"),
        ("return min(picture.size)", "return None"),
    ),
    *at(
        "evaluation/blocks.py",
        "found_again",
        ("            keep(block, rows)", "            pass"),
    ),
    *at(
        "metrics/features.py",
        "metrics_reference evaluation",
        ("if count < TILE else images)", "if False else images)"),
    ),
    *at(
        "training/best.py",
        "found_again",
        ("return value > before if self.higher else value < before", "return value < before"),
        ("return value > before if self.higher else value < before", "return True"),
        ("            return True  # the note", "            return False  # the note"),
    ),
    *at(
        "training/loggers.py",
        "found_again",
        ('(run / "wandb").is_dir()', "False"),
        ('each.experiment.add_image("samples", sheet, images)', "None"),
        ('each.experiment.add_text("config"', 'str("config"'),
        ("each.log_hyperparams(settings, numbers)", "each.log_hyperparams(settings)"),
        ("yield key, value\n    else", "yield key, str(value)\n    else"),
    ),
    *at(
        "training/evaluating.py",
        "found_again",
        ("            if self.best.number not in known:", "            if False:"),
        ("            trainer.save_checkpoint(self.best.path)", "            pass"),
    ),
]  # fmt: skip
