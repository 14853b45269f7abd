"""Bugs in reports: what is escaped, what shares an axis, what is a copy."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "page/html.py",
        "page",
        ("html.escape(shown(str(value))))", "shown(str(value)))"),
        ("return Html(html.escape(shown(str(value))))", "return Html(html.escape(str(value)))"),
        ('="{html.escape(shown(str(value)))}"', '="{shown(str(value))}"'),
        ("hidden=None if place == last else True", "hidden=None"),
        ("min=0, max=last, value=last", "min=0, max=last, value=0"),
        ("default-src 'none'; img-src data:", "default-src *; img-src data:"),
        ("script-src '{_digest(SCRIPT)}'", "script-src 'unsafe-inline'"),
        ("base-uri 'none'; form-action 'none'", "base-uri 'none'"),
        ("move if last else", "move if True else"),
    ),
    *at(
        "page/plots.py",
        "page",
        ("low, high, at = math.log(low), math.log(high), math.log(value)", "pass"),
        ("log = high > 10 * low", "log = True"),
        ("BOTTOM - (BOTTOM - TOP) * up", "TOP + (BOTTOM - TOP) * up"),
        ("abs(x) < LARGEST and abs(y) < LARGEST", "abs(x) < LARGEST"),
        ("every = -(-len(points) // MOST)", "every = 1"),
        ("if not p % every]", "if p % every]"),
        ("_place(across, up, (across.low, value))", "_place(across, up, (across.low, up.low))"),
    ),
    *at(
        "metrics/memorised.py",
        "memorised",
        ("torch.where(first > 0, first / second", "torch.where(first >= 0, first / second"),
        ("self.ratios < MEMORISED", "self.ratios <= MEMORISED"),
        ("squared = torch.minimum(squared,", "squared = torch.maximum(squared,"),
        ("squared[own[:, None] == rows] = torch.inf", "pass"),
        ("best.sqrt() / scale", "best / scale"),
        ("scale = 255 * wanted.shape[1] ** 0.5", "scale = 255"),
        ('mode="area"', 'mode="nearest"'),
        ("places = indices.gather(1, chosen)", "places = chosen"),
        ("len(among) < 2 + (own is not None)", "len(among) < 2"),
    ),
    *at(
        "commands/report_read.py",
        "report",
        ("return [row for row in (*found, last) if row is not None]", "return []"),
        ("if bad:", "if False:"),
        ("len(path.stem) < 19", "True"),
        ('isinstance(row["name"], str) and _is_number', "_is_number"),
        ("return _is_number(value) and 0 < value < math.inf", "return True"),
        ("json.dumps(value) if key in SAME and", "json.dumps(value) if False and"),
        ("abs(value) < 10**300", "True"),
    ),
    *at(
        "commands/report_numbers.py",
        "report",
        ('{"ema": "averaged", "denoiser": "raw"}\n    averaged', "{}\n    averaged"),
        ("lines = plots.setdefault(key_of(row), {})", "lines = plots.setdefault((1,) * 5, {})"),
        ('said = [setting(each.run.tree, "objective"), data]', "said = [data]"),
        ("known = [member for member in held if member[2]]", "known = held"),
        ("each.run.seconds(images) / 3600", "each.run.seconds(images) / 60"),
        ('found[key]["images"] <= row["images"]', 'found[key]["images"] > row["images"]'),
    ),
    *at(
        "commands/report_settings.py",
        "report",
        ('"differs" if len(set(values)) > 1 else None', "None"),
        ("ours.get(k) != theirs.get(k)]", "False]"),
        ('SAME_RECIPE = ("network", "objective",', "SAME_RECIPE = ("),
        ("seconds * devices / 3600", "seconds / 3600"),
    ),
]
