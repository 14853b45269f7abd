"""docs/keys.md: every key of an experiment's YAML, from signatures and docstrings; `make keys`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from diffusion_pl import config
from diffusion_pl.commands.parts import OPTIONAL, SECTIONS
from diffusion_pl.config.annotations import PATHS, origin, signature
from diffusion_pl.config.registry import HANDED_ON, MADE, PARTS, PLACES
from diffusion_pl.config.targets import locate
from diffusion_pl.samplers.sampler import Integrator
from website.source import ROOT

PAGE = ROOT / "docs" / "keys.md"

HEAD = """# Every key

Made from the signatures and docstrings by `make keys`; a test holds that it is current. A section
of an experiment, or an argument that takes a part, names one by `_target_` and gives the part's
arguments beside it. `_partial_: true` belongs to those that are called later, as samplers'
algorithms are; what the run hands to them is not listed. Parts of your own may stand wherever
these do ([how](python.md#parts-of-your-own)). Beside a default, *base* is what
`experiments/base.yaml` says instead.

`python -m diffusion_pl check EXP --resolved` prints all keys of an experiment with their values.
"""

# What stands in a section without a part.
PLAIN = {
    "seed": "int; of all that is random in training: initial weights, order, noise.",
    "callbacks": "list of `_target_` of Lightning's callbacks or your own, beside the run's.",
    "loggers": "list of `_target_` of Lightning's loggers, beside `trainer.loggers`.",
}
# What a run hands to a part that is called later.
HANDED = frozenset(inspect.signature(Integrator.__call__).parameters)
# Parts of torch, with arguments of its own.
OPTIMIZER = "Any of `torch.optim` with `_partial_: true`, and torch's arguments; or:"
SCHEDULER = "Any of `torch.optim.lr_scheduler` with `_partial_: true`, stepped by steps; or:"
OTHERS = {"optimizer": OPTIMIZER, "rest": OPTIMIZER, "lr_schedule": SCHEDULER}


@functools.cache
def described(part: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph of a part's docstring, and what it says of each argument."""
    text = inspect.getdoc(part) or ""
    made = inspect.getdoc(part.__init__) if inspect.isclass(part) else ""
    arguments: dict[str, str] = {}
    for doc in (text, made or ""):
        section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
        for entry in re.split(r"\n {4}(?=\S)", "\n" + section[1] if section else ""):
            names, colon, said = entry.partition(": ")
            if colon:
                arguments |= {name.strip(): " ".join(said.split()) for name in names.split(",")}
    return " ".join(text.split("\n\n")[0].split()), arguments


def fields(part: Callable[..., Any], handed_on: bool) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of the arguments that an experiment gives."""
    made = {each.name: each for each in dataclasses.fields(part)} if _is_data(part) else {}
    for name, each in inspect.signature(part).parameters.items():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD, each.POSITIONAL_ONLY):
            continue
        default = each.default
        if handed_on and (default is each.empty or name in HANDED):
            continue
        if name in made and made[name].default_factory is not dataclasses.MISSING:
            default = made[name].default_factory()
        kind = each.annotation
        text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        yield name, text, "required" if default is each.empty else f"`{written(default)}`"


def _is_data(part: Callable[..., Any]) -> bool:
    return inspect.isclass(part) and dataclasses.is_dataclass(part)


def written(value: Any) -> str:
    """A value as in YAML; a part by its name."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if value == math.inf:
        return ".inf"
    if inspect.isroutine(value):
        return value.__name__
    return str(value) if isinstance(value, str | float) else repr(value)


def typed(annotation: str, part: Callable[..., Any]) -> str:
    """A type as a reader of YAML knows it: its choices, or its name.

    Args:
        annotation: as written in the signature.
        part: whose module may have a shorter name for it.
    """
    found = []
    for each in _alternatives(annotation.replace("None", "null").replace("collections.abc.", "")):
        named = getattr(inspect.getmodule(part), each, None)
        choices = get_args(named) if get_origin(named) is Literal else ()
        if each.startswith("Literal["):
            choices = ast.literal_eval(each.removeprefix("Literal"))
        found += [f"`{written(choice)}`" for choice in choices] or [f"`{each}`"]
    return " or ".join(found)


def _alternatives(text: str) -> list[str]:
    """A union's members; those within brackets stay whole."""
    found, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "|" and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [each.strip().replace("|", "or") for each in found]


def table(part: Callable[..., Any], key: str, handed_on: bool, base: dict[str, Any]) -> str:
    """The arguments of a part; empty where it has none."""
    first, said = described(part)
    rows = []
    for name, kind, default in fields(part, handed_on):
        dotted = f"{key}.{name}" if key else name
        value = base.get(dotted) if key else None
        if value is not None and f"`{written(value)}`" != default:
            default += f"; base `{written(value)}`"
        meaning = followed(part, name, said.get(name) or _elsewhere(part, name) or first)
        if re.match(r"[a-z]{2}", meaning):
            meaning = meaning[0].upper() + meaning[1:]
        meaning = re.sub(r"\bNone\b", "null", meaning)
        rows.append(f"| `{dotted}` | {typed(kind, part)} | {default} | {escaped(meaning)} |")
    if not rows:
        return ""
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def followed(part: Callable[..., Any], name: str, said: str) -> str:
    """What is said of an argument, where the docstring says only whose it is."""
    match = re.search(r"as for (?:every )?`(\w+)`", said, re.IGNORECASE)
    if match is None:
        return said
    names = {**vars(inspect.getmodule(part)), **{each.__name__: each for each in _bases(part)}}
    other = names.get(match[1])
    found = described(other)[1].get(name, "") if other is not None else ""
    return followed(other, name, found) if found else said


def _bases(part: Callable[..., Any]) -> tuple[type, ...]:
    return inspect.getmro(part) if inspect.isclass(part) else ()


def _elsewhere(part: Callable[..., Any], name: str) -> str:
    """What a part of the same module says of an argument of this name."""
    module = inspect.getmodule(part)
    for other in vars(module).values():
        if getattr(other, "__module__", None) == getattr(module, "__name__", ""):
            found = described(other)[1].get(name)
            if found:
                return found
    return ""


def escaped(text: str) -> str:
    """Prose of a docstring in a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def section(place: str, base: dict[str, Any]) -> str:
    """A place with all parts that may stand there."""
    lines = [f"## {place}\n"]
    if place in PLAIN:
        return "\n".join([*lines, f"`{place}`: {PLAIN[place]}\n"])
    if place not in SECTIONS:
        lines.append(f"Argument of {', '.join(_takers(place))}.\n")
    elif place in OPTIONAL:
        lines.append("May be left out, or null.\n")
    if place in OTHERS:
        lines.append(OTHERS[place] + "\n")
    seen: list[Any] = []
    for table_of, handed_on in ((MADE, False), (HANDED_ON, True)):
        for target in table_of.get(place, ()):
            part = locate(target) if target.startswith("diffusion_pl.") else None
            if part is None or part in seen:
                continue
            seen.append(part)
            source = Path(inspect.getsourcefile(inspect.unwrap(part)) or "").resolve()
            first = escaped(described(part)[0].partition(" Arguments as for")[0])
            link = f"[`{part.__name__}`](../{source.relative_to(ROOT)})"
            partial = ", `_partial_: true`" if handed_on else ""
            lines.append(f"### {place}: {part.__name__}\n\n{link}, `{target}`{partial}. {first}\n")
            key = place if place in SECTIONS else ""
            lines.append(table(part, key, handed_on, base))
    others = [each for each in MADE.get(place, ()) if not each.startswith("diffusion_pl.")]
    if others:
        lines.append(f"Of Lightning: {', '.join(f'`{each}`' for each in others)}.\n")
    return "\n".join(line for line in lines if line)


def _takers(place: str) -> list[str]:
    """The parts with an argument of this name."""
    return [name for name, places in _open_places().items() if place in places] or [
        "every objective"
    ]


@functools.cache
def _open_places() -> dict[str, set[str]]:
    """Of each part, its arguments that take more than numbers, words and paths."""
    found: dict[str, set[str]] = {}
    later = {each for parts in HANDED_ON.values() for each in parts}
    for target in sorted(each for each in PARTS if each.startswith("diffusion_pl.")):
        bound = signature(locate(target))
        for name, parameter in bound.parameters.items() if bound else ():
            handed = target in later and parameter.default is parameter.empty
            if not handed and not _is_plain(parameter.annotation):
                found.setdefault(f"`{target.rpartition('.')[2]}`", set()).add(name)
    return found


def _is_plain(annotation: Any) -> bool:
    """Whether values of a type are numbers, words and paths alone."""
    plain = (int, float, str, bool, type(None), *PATHS)
    return all(origin(each) in plain for each in get_args(annotation) or (annotation,))


def page() -> str:
    """All of docs/keys.md."""
    base = dict(config.leaves(config.load("base").tree))
    places = [*SECTIONS, *(place for place in PLACES if place not in SECTIONS)]
    return "\n".join([HEAD, *(section(place, base) for place in places)])


if __name__ == "__main__":
    PAGE.write_text(page())
