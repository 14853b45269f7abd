"""Bugs in what a data set and a short training say of the settings that suit them."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "evaluation/evidence.py",
        "evidence",
        ("if not (std := clean.double().std().item()) > 0:", "if (std := clean.std().item()) < 0:"),
        ("std=std,", "std=std / 2,"),
        ("fine = total[radius > side / 4]", "fine = total[radius > side / 8]"),
        ("slope = -(centred * y[there]).sum()", "slope = (centred * y[there]).sum()"),
        ("piece - piece.mean(dim=(-2, -1), keepdim=True)", "piece"),
        ("(along[:, None].square() + along.square()).sqrt()", "(along[:, None] + along).abs()"),
        ("for number in known.values() if number > 1)", "for number in known.values()) - 0"),
        ("sum(number for number", "sum(1 for number"),
        ("(plain.ratios < MEMORISED) & (first > 0)", "(plain.ratios < MEMORISED)"),
        ("nearest(seen[own].flip(-1), store, every, own=own)", "plain"),
        (
            "counted[label] for label in range(images.classes)",
            "counted[label] for label in counted",
        ),
        ("if fall > FLAT else 0.0", "if True else 0.0"),
        (
            'min(one["loss"], 1.0) - min(two["loss"], 1.0)',
            'min(two["loss"], 1.0) - min(one["loss"], 1.0)',
        ),
        ('min(one["loss"], 1.0)', 'one["loss"]'),
        ("math.fsum(w * at for w, at", "math.fsum(at for w, at"),
        ("math.sqrt(variance / total)", "variance / total"),
        ("if not sum(weights) > 0:", "if False:"),
    ),
    *at(
        "commands/recipe.py",
        "recipe",
        ("if not (data / MANIFEST).is_file():", "if False:"),
        ("if not 0 < hours < 10_000 or", "if"),
        ("or not 1000 <= probe <= 10**9:", "or False:"),
        ("    if out.exists():\n", "    if False:\n"),
        ("first = min(held, key=", "first = max(held, key="),
        ("learned(held[first], held[max(held)])", "learned(held[max(held)], held[first])"),
        ("rate * hours * 3600, recommend", "rate * hours * 60, recommend"),
        ("recommend.EPOCHS * manifest.count))", "10**9))"),
        (
            'settings["data.hflip"] = seen.mirrored <= SAME_MIRRORED',
            'settings["data.hflip"] = True',
        ),
        ('float(f"{seen.std:.3g}")', "0.5"),
        ("max(found.P_std, NARROWEST)", "found.P_std"),
        ('.get("objective._target_") == EDM:', '.get("objective._target_"):'),
        ('lines = [f"# {each}".rstrip() for each in head]', "lines = [*head]"),
        ("{shown(name)}: settings", "{name}: settings"),
        ('why = f"  # {reasons[path]}" if path in reasons else ""', 'why = ""'),
        ("lines += _node(name, inner", "lines = _node(name, inner"),
    ),
]
