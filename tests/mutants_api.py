"""Planted bugs of the way in from Python."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "api.py",
        "api",
        ('    if module == "__main__":', "    if False:"),
        ("    if found is not target:", "    if False:"),
        ("isinstance(value, functools.partial) and not value.args", "False"),
        (" and not value.args", ""),
        ('**({"_partial_": True} if partial else {})', "**{}"),
        ("if f.init}", "if not f.init}"),
        ('sorted(tops - {"diffusion_pl", "torch"})', "()"),
        ("raise KeyboardInterrupt if", "raise SystemExit(0) if"),
        ("range(first, first + count)", "range(count)"),
        ("options, label)\n        pieces", "options, None)\n        pieces"),
        ("consistent)[0])", "False)[0])"),
        ('if "\\n" in text else', "if False else"),
        ("images.dtype != torch.uint8 or", "False or"),
    ),
    *at(
        "config/reading.py",
        "api",
        ('        if isinstance(value, dict) and "_target_" in value:\n            _set',
         "        if False:\n            _set"),
        ("    if not changes:\n        return config\n", ""),
        ("        used.pop(section, None)", "        pass"),
    ),
    *at(
        "commands/options.py",
        "api",
        ("        if name not in group_of:", "        if False:"),
        ("        if value is not None\n", ""),
    ),
    *at(
        "cli.py",
        "api",
        ("        if _is_user_code(error):\n            raise\n", ""),
        ("not any(map(file.is_relative_to, known))", "True"),
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
