"""Planted bugs of what strange servers, addresses and files do to a command."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "download.py",
        "remote data_download",
        ("if self.total is not None and came < self.total:", "if False:"),
        ("pace, came = Pace(self.patience), self.start", "pace, came = Pace(self.patience), 0"),
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
]
