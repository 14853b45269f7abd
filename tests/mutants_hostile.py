"""Planted bugs of what keeps hostile and damaged files out."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "io/unpickle.py",
        "hostile_corpus",
        ("if place > max(number, 255):", "if False:"),
        ("if depth > DEEPEST:", "if False:"),
        ('rpartition("WeightsUnpickler error: ")[2]', 'rpartition("\\0")[2]'),
    ),
    *at(
        "io/unpickle.py",
        "hostile_corpus",
        ("        look_through(data)", "        abs(1)"),
        ('" ".join(str(error).split())', '"\\n"'),
    ),
    *at(
        "interop/pickles.py",
        "hostile_corpus",
        ("    look_through(whole)", "    abs(1)"),
        ("if depth > DEEPEST:", "if False:"),
    ),
    *at(
        "data/verify.py",
        "hostile_corpus upkeep",
        ("found != shard.sha256", "False"),
        ("if found != manifest.index_sha256:", "if False:"),
        ('if f"{SHARDS}/{path.name}" not in known:', "if False:"),
        ('raise UserError("\\n".join(problems))', "raise UserError(problems[0])"),
    ),
    *at(
        "io/unpickle.py",
        "hostile_corpus",
        ("entry.compress_type != zipfile.ZIP_STORED", "False"),
        ("if sum(entry.file_size for entry in entries) > size:", "if False:"),
        ("if len(names) < len(entries):", "if False:"),
        ("if not digested and (damaged", "if digested and (damaged"),
        ("                look_through(program)", "                abs(1)"),
        ('and value.device.type == "cpu"', "and True"),
        ("if value.numel() * value.element_size() > value", "if 0 > value"),
    ),
    *at(
        "training/checkpoint.py",
        "hostile_corpus",
        ("type(number) is not int or ", ""),
        ("or images < 0:", "or False:"),
        ("if not _NAME.fullmatch(path.name):", "if False:"),
        ('read_small(pointer).decode(errors="replace")', "pointer.read_text()"),
        ("path.parent != folder or ", ""),
        ('if not isinstance(checkpoint.get("state_dict"), Mapping):', "if False:"),
        (
            "or not all(isinstance(v, Tensor) for v in given.values()):",
            "or not all(v is not None for v in given.values()):",
        ),
    ),
    *at(
        "training/history.py",
        "hostile_corpus upkeep",
        ("if self._row(content[end:]) is None else", "if False else"),
        ("                raise UserError(", "                ValueError("),
    ),
    *at(
        "commands/parts.py",
        "hostile_corpus",
        ("with at_most(most), without", "with without"),
        ("if type(value) is int and value < least:", "if False:"),
        ('"num_workers": 0}', '"num_workers": -9}'),
        ('raise experiment.error("optimizer", str(error)) from error', "optimizer = None"),
    ),
    *at(
        "commands/runs.py",
        "hostile_corpus",
        ("objective.denoiser(parts.meta_network(experiment, most))",
         "objective.denoiser(parts.meta_network(experiment))"),
    ),
    *at(
        "commands/convert.py",
        "upkeep credentials renaming",
        ('if section["format"] == checkpoints.FORMAT and kept == section:', "if False:"),
        (" and kept == section:", ":"),
        ('{**kept, "format": checkpoints.FORMAT}', "kept"),
    ),
    *at(
        "commands/verify.py",
        "upkeep hostile_corpus",
        ("formats.count(1)", "formats.count(2)"),
        ("            problems.append(str(error))", "            abs(1)"),
    ),
    *at(
        "commands/safety.py",
        "hostile_corpus",
        ('not in ("", "0", "false", "no", "n")', "in ()"),
    ),
    *at(
        "cli.py",
        "hostile_corpus",
        ("        refuse_unsafe(os.environ)", "        abs(1)"),
    ),
    *at(
        "config/building.py",
        "hostile_corpus",
        ("RuntimeError, TypeError,", "TypeError,"),
    ),
    *at(
        "data/files.py",
        "hostile_corpus",
        ("    if CONTROL.search(name):", "    if False:"),
    ),
    *at(
        "data/tars.py",
        "hostile_corpus",
        ("if offset > self.manifest.shards[number].bytes:", "if False:"),
    ),
    *at(
        "data/shard_format.py",
        "hostile_corpus",
        ('np.lib.format.open_memmap(regular(path), mode="r")', 'np.load(path, mmap_mode="r")'),
        ("if type(number) is not int or not", "if not"),
    ),
    *at(
        "data/write_shards.py",
        "upkeep",
        ("webdataset.utils.enforce_security = True", "webdataset.utils.enforce_security = False"),
    ),
    *at(
        "metrics/npz.py",
        "hostile_corpus metrics_published",
        ("if unpacked > max(LARGEST_FACTOR * size, SMALL):", "if False:"),
    ),
]  # fmt: skip
