"""Planted bugs of what keeps a stranger's settings, names and addresses from doing anything."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "config/targets.py",
        "config_building registry trust",
        ("    if is_part(target) or target in packages:", "    if True:"),
        ('_inside(target, packages) and "._" not in str(target)', "True"),
        ("if packages is not None and (reason", "if packages and (reason"),
        ("not kind or not _inside(home, [OPTIMIZERS])", "not found"),
        (" and found is not Optimizer", ""),
        ("and not _inside(home, packages):", "and not home:"),
        ("        if _inside(package, [PACKAGE]):", "        if package == PACKAGE:"),
    ),
    *at(
        "config/registry.py",
        "registry config_building",
        (
            "return isinstance(target, str) and (target in PARTS or is_optimizer(target))",
            "return str(target).startswith(PACKAGE) or is_optimizer(target)",
        ),
        ('"._" not in target', "True"),
        ("        return None\n    fitting", "        pass\n    fitting"),
        ('remove `_partial_: true`" if partial else None', 'remove" if False else None'),
    ),
    *at(
        "config/binding.py",
        "registry config_building",
        ("if ours and place is not None:", "if False:"),
        ("str(name) if ours else None if is_node(value) else place", "str(name)"),
    ),
    *at(
        "config/strangers.py",
        "trust",
        ("real.is_relative_to(_home(beside.resolve()))", "real.parent == beside.resolve()"),
        ("if folder.name == CHECKPOINTS else folder", "if False else folder"),
        ("    real = file.resolve()", "    real = file.absolute()"),
        ("any(each.is_relative_to(RUNS.resolve()) for each in (real, file.absolute()))", "False"),
        ("return run or below_runs or named", "return run or below_runs"),
        ("return run or below_runs or named or", "return below_runs or named or"),
        ("each.name.lower() in", "each.name in"),
        ("if (folder / CHECKPOINTS).is_dir():", "if False:"),
        ("each.suffix.lower() in WEIGHTS", "each.suffix == WEIGHTS[0]"),
    ),
    *at(
        "config/reading.py",
        "trust config_building",
        ("theirs = any(", "theirs = all("),
        ("packages = (*allow, *_named(overrides)) if theirs else None", "packages = None"),
        ('isinstance(named, str) or "${" in named', "isinstance(named, str)"),
        ('named.partition(".")[0] not in sys.stdlib_module_names', "named"),
        ("(reason := untrusted(value, packages))", "(reason := None)"),
    ),
    *at(
        "commands/trust.py",
        "trust",
        ("experiment.origin(key) == OVERRIDE", "False"),
        ('"::" not in value and', "True and"),
        ("each.rstrip('/')}/\")", 'each}")'),
        ("not inside and value not in experiment.packages", "not inside"),
        ("plain = os.path.normpath(folder)", "plain = folder"),
        ("os.path.isabs(plain) or", "False or"),
        ("dataclasses.replace(source, made_of=None)", "source"),
        ('if "wandb" in', "if 0 in"),
        ('.startswith("clip-")', '.startswith("inception")'),
        ('for package in node.get("allow") or ():', "for package in ():"),
        ('is_part(node.get("_target_")) and is_remote(path)', "False"),
    ),
    *at(
        "commands/train.py",
        "trust",
        ("allow=options.allow, beside=options.start", "allow=options.allow"),
        ("    trust.check_training(experiment)", "    abs(1)"),
    ),
    *at(
        "commands/sbatch.py",
        "trust",
        ("(*self.words, *(f", "(*self.words, *() and (f"),
        ("tuple(allow))]", "())]"),
    ),
    *at(
        "commands/evaluate.py",
        "trust",
        ("trust.data_of(opened.model.config)", 'config.build(opened.model.config, "data")'),
        ("trust.extractor_of(experiment)", 'config.build(experiment, "features")'),
    ),
    *at(
        "commands/likelihood.py",
        "trust",
        ("trust.data_of(opened.model.config)", 'trust.config.build(opened.model.config, "data")'),
    ),
    *at(
        "commands/losses.py",
        "trust",
        ("trust.data_of(experiment)", 'config.build(experiment, "data")'),
    ),
]
