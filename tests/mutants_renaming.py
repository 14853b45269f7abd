"""Planted bugs of how names that were given up are read, and of the runs of earlier builds."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "config/renaming.py",
        "renaming",
        ("return target_now(", "return str("),
        ("return key_now(", "return str("),
        ("return argument_now(node, new) if new else name", "return new or name"),
        ("tree = _moved(tree, old, source)", "abs(1)"),
        ("raise _twice(source, old, new)", "abs(1)"),
        ("raise _twice(source, join(key, name), new)", "abs(1)"),
        ("{**lower, **value}", "value"),
        ("{**lower, **value}", "{**value, **lower}"),
        ("@functools.cache", "@functools.wraps(len)"),
        ("found[name] = argument_now(", "argument_now("),
        ("removeprefix(f", "strip("),
    ),
    *at(
        "config/reading.py",
        "renaming",
        ("path if packages is None else None", "path"),
        ("completed(renamed(plain(tree, source)))", "completed(plain(tree, source))"),
        ("parts = now.split", "now.split"),
    ),
    *at(
        "config/binding.py",
        "renaming",
        ("former=former(key, target)", "former={}"),
        ('former=former("")', "former={}"),
    ),
    *at(
        "config/interpolation.py",
        "renaming",
        ("in key_in(self.config.tree, name).split", "in name.split"),
    ),
    *at(
        "training/checkpoint.py",
        "renaming",
        ("return renamed(plain(config, str(path))), images", "return config, images"),
    ),
    *at(
        "commands/convert.py",
        "renaming",
        ('"config": renamed(kept["config"])', '"config": kept["config"]'),
        ("(_mask(settings) | _rename(settings))", "_mask(settings)"),
        ("    if renamed(before) == before:", "    if False:"),
    ),
]
