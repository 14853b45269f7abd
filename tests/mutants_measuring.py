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
        ("(folder, ours()):\n        if (file", "(folder,):\n        if (file"),
        ("places = (file.parent, folder, ours())", "places = (folder, ours(), file.parent)"),
        ("if not each.samefile(file)]", "if True]"),
        ("        raise ConfigError(\"\\n\".join(wrong))", "        raise ConfigError(wrong[0])"),
        ("    own = meant(own, where)\n", ""),
    ),
    *at(
        "config/binding.py",
        "config_words",
        ("        if value not in infinite:", "        if not infinite:"),
        ("isinstance(each, float) and math.isinf(each)", "isinstance(each, float)"),
        (" if found else nearest(name, known)", " if False else nearest(name, known)"),
    ),
]  # fmt: skip
