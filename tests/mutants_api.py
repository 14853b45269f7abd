"""Planted bugs of the way in from Python."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at("commands/replay.py", "api", ("if step >= (steps :=", "if step > (steps :=")),
    *at("commands/runs.py", "api", ("        torch.zeros(1, device=name)", "        pass")),
    *at(
        "cli.py",
        "cli",
        ("not word or re.fullmatch", "re.fullmatch"),
        ("or re.fullmatch(r\"--[\\w-]+=\", word)", ""),
        ("            raise BrokenPipeError from error", "            raise"),
    ),
    *at(
        "config/objects.py",
        "api",
        ('    if module == "__main__":', "    if False:"),
        ("    if found is not target:", "    if False:"),
        ("isinstance(value, functools.partial) and not value.args", "False"),
        (" and not value.args", ""),
        ('**({"_partial_": True} if partial else {})', "**{}"),
        ("if f.init}", "if not f.init}"),
    ),
    *at(
        "data/dataset.py",
        "api",
        ("len(shape) != 4 or shape[2] != shape[3] or 0 in shape", "False"),
        ("isinstance(store, Tensor) and store.dtype != torch.uint8", "False"),
        ("if names and len(names) != classes:", "if False:"),
        ("labels.shape != shape[:1] or labels.is_floating_point()", "False"),
        ("if low < 0 or (classes and high >= classes):", "if classes and high >= classes:"),
    ),
    *at(
        "diffusion/preconditioning.py",
        "api",
        ("if not fits or output", "if output"),
    ),
    *at(
        "training/module.py",
        "api",
        ('return {"loss": total}', 'return {"loss": 0 * total}'),
    ),
    *at(
        "api.py",
        "api",
        ("isinstance(each, Lazy | functools.partial) or inspect.isclass(each)", "False"),
        ('    if run == "":', "    if False:"),
        ('sorted(tops - {"diffusion_pl", "torch"})', "()"),
        ("raise KeyboardInterrupt if", "raise SystemExit(0) if"),
        ('if "\\n" in text else', "if False else"),
    ),
    *at(
        "run.py",
        "api",
        ("(given,) if isinstance(given, str)", "tuple(given) if isinstance(given, str)"),
        ("            if not isinstance(metric, str):", "            if False:"),
        ("        if sampler.arguments:", "        if False:"),
        ('{"weights", "allow", "set"} & {*options}', '{"weights", "set"} & {*options}'),
        ("range(first, first + count)", "range(count)"),
        ('_generator("sample", options, wanted)',
         '_generator("sample", options, ConditionOptions())'),
        ("consistent)[0])", "False)[0])"),
        ("images.dtype != torch.uint8 or", "False or"),
    ),
    *at(
        "config/reading.py",
        "api",
        ('        if isinstance(value, dict) and "_target_" in value:\n            _set',
         "        if False:\n            _set"),
        ("        used.pop(section, None)", "        pass"),
    ),
    *at(
        "commands/options.py",
        "api",
        ("        if name not in group_of:", "        if False:"),
        ("self.batch_size is not None and self.batch_size < 1", "False"),
        ("        if value is not None\n", ""),
    ),
    *at(
        "cli.py",
        "api",
        ("        if _is_user_code(error):\n            raise\n", ""),
        ("not any(map(file.is_relative_to, known))", "True"),
        ("not _INSTALLED.intersection(file.parts)", "True"),
    ),
    *at(
        "commands/train.py",
        "api",
        ('(*_listed(experiment, "callbacks"), *callbacks)', '(*_listed(experiment, "callbacks"),)'),
        ('(*_listed(experiment, "callbacks"), *callbacks)', "(*callbacks,)"),
        ('(*_listed(experiment, "loggers"), *loggers)', '(*_listed(experiment, "loggers"),)'),
        ('(*_listed(experiment, "loggers"), *loggers)', "(*loggers,)"),
    ),
    *at(
        "__init__.py",
        "api config_binding",
        ('return sorted([*__all__, "__version__"])', "return sorted(globals())"),
    ),
]  # fmt: skip
