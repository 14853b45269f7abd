"""Bugs in captions: reading, keeping, encoding and handing them over."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "data/sources/captions.py",
        "captions",
        ("if len(found) == MOST:", "if False:"),
        ('" ".join(CONTROL.sub(" ", text).split())', '" ".join(text.split())'),
        ('caption = data[:LONGEST].decode(errors="ignore").rstrip()', "pass"),
        ('    if b"\\0" in data:', "    if False:"),
        ('data.removeprefix(b"\\xef\\xbb\\xbf")', "data"),
        ("            large = self.files.size(name) > LARGEST", "            large = False"),
        ("return NO_JSON if fields is None else", "return None if fields is None else"),
        ("digest_of(map(repr, self.values))", "digest_of([])"),
        ("return digest_of(self.places)", "return digest_of([])"),
        ("    if bare:\n", "    if False:\n"),
        ("if not sign.isspace()", ""),
    ),
    *at(
        "data/sources/folder_captions.py",
        "captions",
        ("each for each in LIKE_CAPTIONS if each in table.columns", "each for each in ()"),
        ("found[self.start + name] +=", "found[self.start + name] ="),
        ("if name in there else None for name in names]", "for name in names]"),
        ("range(1, len(parts))", "range(0)"),
        ("            if any(own):", "            if True:"),
        ('each["image_id"] in names', "True"),
    ),
    *at(
        "data/sources/tars.py",
        "captions",
        ("TOO_LARGE if size > LARGEST else content(", "content("),
        ('if label != "txt" and any(', "if any("),
        ("read.add((number, sample.key, member))", "pass"),
    ),
    *at(
        "data/sources/tables.py",
        "captions",
        ("TOO_LARGE if _bytes_of(cell) > LARGEST else cell", "cell"),
        ("each in schema.names and each != label]", "each in schema.names]"),
        ("        if bare:\n", "        if False:\n"),
    ),
    *at(
        "data/sources/open.py",
        "captions",
        ("if spec.captions and originals.captions is None:", "if False:"),
    ),
    *at("data/metadata.py", "captions", ('text.split("\\n")', "text.splitlines()")),
    *at(
        "data/stored.py",
        "captions",
        ("if [each.file for each in self.files] != [", "if False and ["),
        ("type(self.bytes) is not int or not 0 <", "not 0 <"),
    ),
    *at(
        "data/caption_files.py",
        "captions",
        ("    if found != stored.sha256:", "    if False:"),
        ("(starts.shape != (images + 1,) and", "(False and"),
        ("(numbers >= stored.unique).any()", "(numbers < 0).any()"),
        ("(np.diff(lines) < 1).any() | (np.diff(starts) < 0).any()", "(np.diff(lines) < 1).any()"),
        ("bare = sum(not each for each in captions)", "bare = 0"),
    ),
    *at(
        "data/write_shards.py",
        "captions",
        ("self.captions.append(cleaned(", "self.captions.insert(0, cleaned("),
        ('if ("captions" in about) != (', "if False and ("),
    ),
    *at(
        "data/relisting.py",
        "captions",
        ("sum(tuple(now[i]) != captions", "sum(False and now[i] != captions"),
        (
            "    if originals.captions and not manifest.captions and manifest.count:",
            "    if False:",
        ),
    ),
    *at(
        "data/loader.py",
        "texts",
        (
            'choice = uniforms(self.seed, "caption", positions)',
            'choice = uniforms(self.seed, "caption", indices)',
        ),
        ("images.texts.read(shown, choice)", "images.texts.read(positions % len(images), choice)"),
        ("whole.texts.length * (2 * whole.texts.width + 1)", "0"),
    ),
    *at(
        "data/encoding.py",
        "texts",
        ('else "" for number in around]', 'else "a" for number in around]'),
        ("range(len(captions) + 1)", "range(len(captions))"),
        (
            "compact(encoded.tokens[place], encoded.mask[place], caption)",
            "compact(encoded.tokens[place], encoded.mask[place - 1], caption)",
        ),
    ),
    *at(
        "texts.py",
        "texts",
        ("np.floor(choice * counts)", "np.round(choice * (counts - 1))"),
        ("there = counts > 0", "there = counts >= 0"),
        ("array[row, tokens:] = 0", "pass"),
        ("< counts[:, None]", "<= counts[:, None]"),
        ("kept = tokens[mask]", "kept = tokens[: int(mask.sum())]"),
        ("known.setdefault(each, len(known))", "known.setdefault(each, len(numbers))"),
        ("json.dumps([digest, width, length, captions])", "json.dumps([width, length, captions])"),
        ("json.dumps([digest, width, length, captions])", "json.dumps([digest, width, length])"),
        ("self._padded([len(self.captions)])", "self._padded([0])"),
        ("not bool(kept.isfinite().all())", "False"),
    ),
    *at(
        "training/sameness.py",
        "texts",
        ("if was == is_ and texts[0] != texts[1]:", "if False:"),
        ('("encoder", "digest", "length", "fingerprint")', '("encoder", "length")'),
    ),
]
