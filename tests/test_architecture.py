"""The floors of the building, read from the imports, and the size of its rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusion_pl"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import the parts on lower floors; parts of one floor do not know each other.
FLOORS = [
    {"errors"},
    {"addresses", "names", "processes"},
    {"io"},
    {"locks", "view"},
    {
        "config",
        "images",
        "page",
        "positions",
        "progress",
        "ranks",
        "scene_words",
        "seeds",
        "signals",
        "text",
        "texts",
    },
    {"diffusion", "networks", "metrics", "data"},
    {"objectives", "samplers"},
    {"evaluation", "interop"},
    {"training"},
    {"api", "cli", "commands", "run", "__main__"},
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

# What works in a notebook with torch alone.
ONLY_TORCH = {"diffusion", "objectives", "samplers", "networks"}
STANDARD = {
    "__future__", "collections", "contextlib", "copy", "dataclasses", "functools", "hashlib",
    "itertools", "math", "typing",
}  # fmt: skip

LIGHTNING = {
    "adapter.py",
    "beginning.py",
    "callbacks.py",
    "evaluating.py",
    "held_out.py",
    "loggers.py",
    "module.py",
    "replay.py",
    "run.py",
    "run_data.py",
    "strategy.py",
}  # the only files that may import it


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            # `from package import part` names a module too.
            found += [f"{node.module}.{name.name}" for name in node.names]
    return found


def ours(file: Path) -> set[str]:
    names = [name.split(".") for name in imports(file)]
    return {parts[1] for parts in names if parts[0] == "diffusion_pl" and parts[1] in FLOOR}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    part = part_of(file)
    if part == "__init__":
        assert ours(file) <= {"api", "errors"}  # for editors; see test_api for what it loads
        return
    for other in ours(file) - {part}:
        same_top = {part, other} <= FLOORS[-1]
        assert FLOOR[other] < FLOOR[part] or same_top, f"{part} imports {other}"


def test_training_imports_no_objective_network_or_sampler():
    for file in (PACKAGE / "training").glob("*.py"):
        assert not ours(file) & {"objectives", "networks", "samplers"}, file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_lightning_is_imported_by_training_alone(file):
    uses = any(name.split(".")[0] == "lightning" for name in imports(file))
    if part_of(file) == "api":  # its types, for editors; test_api sees that none is loaded
        return
    assert not uses or (part_of(file) == "training" and file.name in LIGHTNING)


@pytest.mark.parametrize("part", sorted(ONLY_TORCH))
def test_the_mathematics_imports_only_torch(part):
    for file in (PACKAGE / part).glob("*.py"):
        tops = {name.split(".")[0] for name in imports(file)}
        assert tops <= STANDARD | {"torch", "diffusion_pl"}, file


def test_files_are_under_500_lines():
    long = {str(file): len(file.read_text().splitlines()) for file in FILES}
    assert not {file: lines for file, lines in long.items() if lines > 500}


def test_functions_are_under_60_lines():
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body
                documented = ast.get_docstring(node) is not None
                # The docstring is not the function's length.
                first = body[1] if documented and len(body) > 1 else body[0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                if lines > 60:
                    long.append(f"{file.name}:{node.name} {lines}")
    assert not long


def test_every_public_thing_is_documented():
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        if not ast.get_docstring(tree):
            bare.append(file.name)
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{file.name}:{node.name}")
    assert not bare


def test_checkpoints_are_never_unpickled_freely():
    for file in FILES:
        text = file.read_text()
        assert "weights_only=False" not in text, file
        assert "pickle.load" not in text.replace("pickle.loads_restricted", ""), file


def _is_written_out(node: ast.expr) -> bool:
    """Whether a terminal can take what is printed: text of ours, numbers, JSON, or `shown`."""
    if isinstance(node, ast.JoinedStr):
        return all(_is_written_out(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        spec = ast.unparse(node.format_spec)[2:-1] if node.format_spec else ""
        return spec[-1:] in tuple(",fg%d") or _is_written_out(node.value)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("shown", "json.dumps") or "map(shown," in ast.unparse(
            node
        )
    return isinstance(node, ast.Constant)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_names_are_written_out_where_they_are_printed(file):
    """A name can hold what a terminal acts on: print(f"{shown(name)}: ..."), of `names`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and node.args:
            assert all(map(_is_written_out, node.args)), f"line {node.lineno}: use names.shown"
