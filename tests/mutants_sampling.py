"""Bugs at the joints of drawing: options against the run, the likelihood's own grid and chain."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "commands/likelihood.py",
        "commands_likelihood",
        ('ImageNoise(seed, piece, "bins")', 'ImageNoise(seed, range(len(piece)), "bins")'),
        ("prior_std=_prior_std(opened)", "prior_std=None"),
        ("math.sqrt(1 + highest**2) if unit", "highest if unit"),
        ("variance=variance, clip=CLIP", 'variance="large", clip=CLIP'),
        ('("large" if chain is None', '("small" if chain is None'),
        ("draw, variance=variance, clip=CLIP", "draw, variance=variance, clip=False"),
        ("options.variance or (", "("),
        ('"sampler": None, "steps": None', '"sampler": None'),
        ("min(TOLERANCE, error)", "1.0"),
        ("measure(options.steps // 2), measure", "measure(options.steps), measure"),
        ("images.classes != drawing.classes:", "False:"),
        ("grid(trained_range(opened.model.objective), steps)", "opened.drawing.sampler.sigmas()"),
    ),
    *at(
        "diffusion/objective.py",
        "commands_likelihood",
        ("(low if low > 0 else lowest)", "lowest"),
        ("high if math.isfinite(high) else highest", "high"),
        ("TAIL = 1e-6", "TAIL = 1e-3"),
    ),
    *at(
        "objectives/likelihood.py",
        "commands_likelihood",
        ("return None if inner is None else chain_of(inner)", "return None"),
    ),
    *at(
        "samplers/flow_likelihood.py",
        "commands_likelihood",
        ("coarse, steps = value, 2 * steps", "coarse, steps = value, 4 * steps"),
        ("if change < allowed(value) or", "if"),
        ("levels(LogUniform(*sigma_range), steps + 1)", "levels(LogUniform(*sigma_range), steps)"),
    ),
    *at(
        "commands/sampling.py",
        "commands_sampling",
        ("dataclasses.replace(new, integrate=knowing(given, own.integrate))",
         "dataclasses.replace(new, integrate=knowing(given, own.integrate), clip=False)"),
        ("return partial(given, nearest=nearest)", "return given"),
        ('or "nearest" not in inspect.signature(given).parameters', ""),
        ("dataclasses.replace(new, steps=options.steps)", "new"),
        ("if value is not None and re.fullmatch(pattern, key):", "if False:"),
        ('inspect.signature(function).bind("denoise", "x", "sigmas", "randn_like")', "pass"),
    ),
    *at(
        "commands/sweep.py",
        "commands_sampling",
        ("**{key: drawn[key] for key in chosen},", ""),
        ("if point.guidance == 1 else {}", "if False else {}"),
    ),
    *at(
        "diffusion/guidance.py",
        "commands_sampling",
        ("    if not label_dropout:", "    if False:"),
        ("if weight == 1 or guide is not None:", "if weight == 1:"),
        ("    if not classes:", "    if False:"),
    ),
    *at(
        "commands/runs.py",
        "commands_sampling",
        ("own = config.load_resolved(tree, str(path), allow)", "own = experiment"),
        ("label_dropout=model.label_dropout,", "label_dropout=0.1,"),
        ("_check_interval(interval, weight, sampler.sigmas())", "pass"),
    ),
    *at(
        "commands/parts.py",
        "commands_sampling",
        ("    _check_guided(experiment)", "    abs(0)"),
        ('or evaluation.get("guide") is not None', ""),
    ),
    *at(
        "commands/import_.py",
        "commands_sampling",
        ('nodes.get("label_dropout", 0.0)', 'base.tree["trainer"].get("label_dropout", 0.0)'),
    ),
    *at(
        "interop/edm.py",
        "commands_sampling",
        ('float(config.get("label_dropout") or 0.0)', "0.0"),
    ),
    *at(
        "evaluation/provenance.py",
        "commands_sampling",
        ("if isinstance(part, torch.Tensor):", "if False:"),
    ),
]  # fmt: skip
