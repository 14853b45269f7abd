"""Planted bugs of what strange servers, addresses and files do to a command."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "io/download.py",
        "remote data_download",
        ("if self.total is not None and came < self.total:", "if False:"),
        ("pace, came = _Pace(self.patience), self.start", "pace, came = _Pace(self.patience), 0"),
    ),
    *at(
        "data/layout.py",
        "found_again",
        ("(folder / SAMPLE in files or numbered_below)", "folder / SAMPLE in files"),
    ),
    *at(
        "addresses.py",
        "credentials",
        ("(?:://|(?<=\\w\\w):/)", "://"),
        ("|(?<=\\w\\w:/)(?!/)", ""),
        ("(?::/{0,3}|//)", "://"),
        ("    if _BARE.match(text):", "    if False:"),
        ("@(?!sha\\d)[", "@["),
        (" or _USER.match(text) else", " else"),
        ('or re.findall(r"^[A-Za-z0-9]+(?=:)", text)', ""),
    ),
    *at(
        "cli.py",
        "arguments credentials",
        ("_ADDRESS.match(str(value)) and not value.exists():", "False:"),
        ("str(value)) and not value.exists():", "str(value)):"),
        ('r"[A-Za-z][A-Za-z0-9+.-]+:/"', 'r"[A-Za-z][A-Za-z0-9+.-]*:/"'),
        ('if equals and "/" not in key:', 'if equals and "://" not in key:'),
    ),
    *at(
        "data/relisting.py",
        "prepare_labels",
        ("if manifest.labels_from and originals.labels is not None:", "if False:"),
        ("if other or (originals.class_names or None) !=", "if None !="),
        ("if changed[i] > time]", "if changed[i] > time + 10**18]"),
        ("if not is_as_made(originals, recipe, i, rows[places[i]])]", "]"),
        (") == (len(data), zlib.crc32(data))", ")[:1] == (len(data),)"),
    ),
    *at(
        "data/prepare.py",
        "prepare_labels",
        ("        _check_written(job, before)", "        abs(1)"),
    ),
    *at(
        "data/sources/folder.py",
        "prepare_labels",
        ("changed=[max(map(files.changed, each)) for each in written],", ""),
    ),
    *at(
        "data/sources/tars.py",
        "prepare_labels",
        ("changed=times[[number for number, *_ in places]],", ""),
    ),
    *at(
        "data/sources/tables.py",
        "prepare_labels",
        ("changed=np.full(len(keys), last_change(path)),", ""),
        ("np.diff([*firsts, starts[-1]])", "np.diff([*firsts, starts[-1]]) * 0"),
    ),
    *at(
        "io/files.py",
        "prepare_labels",
        ("max(state.st_mtime_ns, state.st_ctime_ns)", "state.st_mtime_ns"),
    ),
    *at(
        "training/checkpoint.py",
        "run_folder",
        ("for place in (folder, folder.parent) for", "for place in (folder,) for"),
        ("kept = {_pointed(folder), *_linked(folder)}", "kept = {_pointed(folder)}"),
        ("old.name in kept or old.is_symlink() or", "old.name in kept or"),
    ),
]
