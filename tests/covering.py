"""Which tests run which lines of the package, so that a planted bug is tried by those first."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import coverage
import pytest
from mutant import PACKAGE, Mutant

NOTHING: dict[str, Any] = {"tests": [], "lines": {}}  # known of what a test file runs
FAILED = "failed without doubt: "  # before the id of a test in what is printed


class Failing:
    """A pytest plugin that prints the ids of tests that fail, each on a line of its own."""

    def __init__(self) -> None:
        self.ids: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a failure of the test, or of what it asks for."""
        if report.failed:
            self.ids[report.nodeid] = None

    def pytest_unconfigure(self) -> None:
        """Print them, after all that pytest prints."""
        print(*(f"\n{FAILED}{name}" for name in self.ids), sep="", flush=True)


class Covering:
    """A pytest plugin that keeps, for each test, its time and the lines of the package it ran.

    Args:
        root: of the project.
        file: where it is written when the tests are done.
    """

    def __init__(self, root: Path, file: Path) -> None:
        self.root, self.file = root, file
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{root / PACKAGE}/*"], messages=False
        )
        self.coverage.set_option("run:core", "ctrace")
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Let what runs now be this test's."""
        self.coverage.switch_context(item.nodeid)
        begin = time.monotonic()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.monotonic() - begin
            self.coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        """Write what is known."""
        self.coverage.stop()
        data = self.coverage.get_data()
        names = list(self.seconds)
        number = {name: index for index, name in enumerate(names)}
        lines = {
            str(Path(file).relative_to(self.root)): {
                line: [number[name] for name in contexts if name in number]
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        tests = [(name, self.seconds[name]) for name in names]
        self.file.write_text(json.dumps({"tests": tests, "lines": lines}))


def tests_through(mutant: Mutant, text: str, covered: Mapping[str, dict[str, Any]]) -> list[str]:
    """The tests that run the code a bug replaces, the quickest first.

    Args:
        mutant: the bug.
        text: of its file, without it.
        covered: what `Covering` wrote, by test file.

    Returns:
        Ids of tests; none of code that runs on import alone, or in processes that tests start.
    """
    begin = text.index(mutant.right)
    first = text.count("\n", 0, begin) + 1
    lines = _whole_statements(text, first, first + mutant.right.count("\n"))
    found: dict[str, float] = {}
    for file in mutant.tests:
        if file in covered:
            ran = covered[file]["lines"].get(mutant.file, {})
            numbers = {each for line in lines for each in ran.get(str(line), ())}
            found.update(covered[file]["tests"][number] for number in numbers)
    return sorted(found, key=lambda name: found[name])


def _whole_statements(text: str, first: int, last: int) -> set[int]:
    """Lines, with the rest of the statements that they are in, without what these hold inside."""
    lines = set(range(first, last + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            inner = getattr(node, "body", None)
            end = inner[0].lineno - 1 if inner else node.end_lineno
            own = range(node.lineno, max(end, node.lineno) + 1)
            if lines & set(own) and first <= own[-1] and own[0] <= last:
                lines |= set(own)
    return lines
