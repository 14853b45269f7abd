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
        "config/renaming.py",
        "former_data",
        ("if name not in _BATCHES", ""),
        ("if name in _BATCHES", ""),
        ('"data.shares": "data.resolution_weights"', '"data.shares": "data.num_workers"'),
        ('target_now(node["_target_"]) != target', "False"),
        ("bool(target) and", "bool(target) or"),
        ('"path", "resolution"', '"resolution"'),
        ("parts = key_now(key).split", "parts = key.split"),
        ("parts[0] in node and _is_set(", "node.get(parts[0]) and _is_set("),
        ("if not parts or not isinstance(node, dict):", "if not parts:"),
        ("        if not (below or {}).get(section):", "        if False:"),
        ("        if not (below or {}).get(section):", "        if True:"),
        ("LATER.keys() & (tree.keys() - given)", "LATER.keys() & tree.keys()"),
    ),
    *at(
        "config/reading.py",
        "former_data",
        ("    if replaces_data(own, tree):", "    if False:"),
        ('if key == "data._target_" and replaces_data(', "if False and replaces_data("),
        ("    if len(parts) == 1 and isinstance(value, dict):", "    if False:"),
        ("    refuse_twice(spelt, key, now, source)\n", ""),
        ("outer_first(pair[0])", "pair[0].count('.')"),
        ("sorted(changes, key=outer_first)", "changes"),
    ),
    *at(
        "commands/run_dir.py",
        "former_data",
        (
            "config.differences(*map(_with_batches, (before, experiment.tree)))",
            "config.differences(before, experiment.tree)",
        ),
    ),
    *at(
        "config/reading.py",
        "renaming",
        ("path if packages is None else None", "path"),
        (
            "with_later_sections(renamed(plain(tree, source)))",
            "with_later_sections(plain(tree, source))",
        ),
        ("parts = now.split", "now.split"),
    ),
    *at(
        "config/binding.py",
        "renaming",
        ("former=former_names(key, target)", "former={}"),
        ('former=former_names("")', "former={}"),
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
