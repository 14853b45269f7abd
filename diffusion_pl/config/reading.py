"""Experiments read from YAML: files merged onto their defaults, overrides on top, all resolved."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffusion_pl.addresses import masked, refuse_credentials, without_credentials
from diffusion_pl.config.interpolation import interpolated
from diffusion_pl.config.renaming import (
    DATA,
    former_names,
    key_of,
    outer_first,
    refuse_twice,
    renamed,
    renamed_node,
    replaces_data,
    warn_once,
    with_later_sections,
)
from diffusion_pl.config.targets import check_allowed, why_untrusted
from diffusion_pl.config.tree import (
    OVERRIDE,
    Config,
    ConfigError,
    check_storable,
    is_near,
    join,
    leaves,
    names,
    nearest,
    plain,
    step,
)
from diffusion_pl.config.untrusted import is_untrusted
from diffusion_pl.config.words import expand_values, refuse_misread
from diffusion_pl.io.files import regular

BASE = "base"
EXPERIMENTS = Path("experiments")
# Sections that only training needs: left out when a run is opened.
OF_TRAINING = ("callbacks", "loggers")
OF_TRAINER = ("profiler", "strategy")  # of the section trainer
_PACKAGE = Path(__file__).parents[1]

_MAX_BYTES = 1_000_000
# The parser recurses in C and crashes at some 40,000 levels, so characters that may open a level
# are counted first.
_MAX_OPENINGS = 5_000
_OPENING = re.compile(r"[\[{]|[-?:]\s")


def packaged_experiments() -> Path:
    """The experiments that come with the package, installed with it or beside it in a checkout."""
    installed = _PACKAGE / "experiments"
    return installed if installed.is_dir() else _PACKAGE.parent / "experiments"


def all_experiments(folder: Path = EXPERIMENTS) -> dict[str, str]:
    """List the experiments that a name finds from here: those in the folder, then ours."""
    found: dict[str, str] = {}
    for place in (folder, packaged_experiments()):
        for name, line in (experiments(place) if place.is_dir() else {}).items():
            found.setdefault(name, line)
    return found


def experiments(folder: Path = EXPERIMENTS) -> dict[str, str]:
    """List the experiments of a folder without parsing, building or importing anything.

    Returns:
        Name to the first comment line of its file, which states the published number; the base
        file is none of them.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the one that holds the experiments")
    found = {}
    for file in sorted(folder.glob("*.yaml")):
        if file.stem != BASE:
            comments = (line for line in _text(file).splitlines() if line.startswith("#"))
            found[file.stem] = next(comments, "").lstrip("# ").rstrip()
    return found


def load(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    folder: Path = EXPERIMENTS,
    *,
    allow: Sequence[str] = (),
    beside: Path | None = None,
) -> Config:
    """Read an experiment: its defaults, its own keys over them, the overrides over both.

    A mapping merges into the one below it, unless both name a `_target_` and these differ, or its
    keys are numbers, as those of `data.resolution_weights`: then it replaces it. Everything else
    replaces.

    Args:
        name_or_path: a name in the folder or of one of ours, or the path of a YAML file, anywhere;
            the names in its `defaults` are looked for beside it, then in the folder, then among
            ours.
        overrides: `dotted.key=value`, the value written as in YAML. The outer keys are set before
            the inner ones and a `_target_` before its arguments, whatever their order.
        folder: where experiments are looked up by name.
        allow: packages and callables that an untrusted file may name; see `untrusted`.
        beside: the run or checkpoint that training starts from: files beside it are untrusted.

    Returns:
        The resolved configuration; nothing is imported or checked against signatures yet.

    Raises:
        ConfigError: one line on what is wrong in which file.
    """
    file = _file(str(name_or_path), folder)
    lineage = _lineage(file, (), folder)
    check_allowed(allow)
    theirs = any(is_untrusted(Path(path), folder, beside) for path in lineage)
    packages = (*allow, *_named_targets(overrides)) if theirs else None
    return _overridden(_merged(file.stem, file.as_posix(), lineage, packages), overrides)


def load_text(
    text: str,
    name: str = "experiment",
    overrides: Sequence[str] = (),
    folder: Path = EXPERIMENTS,
) -> Config:
    """Read an experiment from YAML text of the user's own, as `load` does from a file.

    Args:
        text: the YAML; its `defaults` are looked for in the folder, then among ours.
        name: of the experiment, for messages.
        overrides: as for `load`.
        folder: where experiments are looked up by name.

    Raises:
        ConfigError: one line on what is wrong.
    """
    own, listed = _parse_experiment(text, name)
    lineage: dict[str, dict[str, Any]] = {}
    for each in listed:
        for path, tree in _lineage(_file(str(each), folder), (), folder).items():
            lineage.setdefault(path, tree)
    return _overridden(_merged(name, name, {**lineage, name: own}, None), overrides)


def replaced(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """A configuration with other values, given as Python's and not as text.

    Args:
        config: of the user's own.
        changes: dotted key to a plain value; a node with a `_target_` takes the place of what was
            there, another mapping is merged into it.
        source: what messages call the origin of these values.

    Raises:
        ConfigError: a key that is not there or comes by two names, or a value that YAML cannot
            hold.
    """
    copy = replace(config, tree=plain(config.tree, config.file), origins=dict(config.origins))
    changes = renamed(dict(changes), config.tree, source)
    spelt: dict[str, str] = {}
    for key in sorted(changes, key=outer_first):
        value = changes[key]
        if isinstance(value, dict) and "_target_" in value:
            _set(copy, key, None, source, spelt)
        _set(copy, key, value, source, spelt)
    return check_storable(replace(copy, tree=plain(copy.tree, config.file)))


def _merged(
    name: str, file: str, lineage: Mapping[str, dict[str, Any]], packages: tuple[str, ...] | None
) -> Config:
    """Merge trees, the lowest first."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, own in lineage.items():
        _lay_over(tree, own, path, origins, path if packages is None else None)
    return Config(name, file, with_later_sections(tree), origins, packages)


def load_resolved(
    tree: Mapping[str, Any], source: str, allow: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Config:
    """Take the untrusted configuration of a run folder or a checkpoint.

    Args:
        tree: plain containers; nothing is interpolated, and callbacks, loggers, profiler and
            strategy, which only training needs, are left out.
        source: their file, for messages.
        allow: packages and callables trusted by name, besides the parts of this package.
        overrides: as for `load`; the user's own, so they may name anything.

    Raises:
        ConfigError: a `_target_` that is not trusted, or a tree that `load` cannot make.
    """
    check_allowed(allow)
    packages = (*allow, *_named_targets(overrides))
    used = with_later_sections(renamed(plain(tree, source)))
    for section in OF_TRAINING:
        used.pop(section, None)
    for key in OF_TRAINER if isinstance(used.get("trainer"), dict) else ():
        used["trainer"].pop(key, None)
    kept = without_credentials(used)  # none is written again
    config = check_storable(Config(Path(source).stem, source, kept, packages=packages))
    config = _overridden(config, overrides)
    for key, value in leaves(config.tree):
        if "_target_" in key.split(".") and (reason := why_untrusted(value, packages)):
            raise config.error(key, reason)
    return config


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse one `key=value`, the value as in YAML.

    Raises:
        ConfigError: not of this form.
    """
    parts, value = _pair(text)
    return ".".join(parts), value


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{file.as_posix()}: larger than {_MAX_BYTES:,} bytes; keep data out")
        return regular(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file.as_posix()}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.as_posix()}: is not UTF-8 text ({error.reason})") from error


def _parsed(text: str, parse: Callable[[str], Any], where: str) -> Any:
    """Parse untrusted YAML by OmegaConf, every failure being one line.

    Raises:
        ConfigError: with `where` in front.
    """
    if len(_OPENING.findall(text)) > _MAX_OPENINGS:
        raise ConfigError(f"{where}: more than {_MAX_OPENINGS:,} keys and brackets; keep data out")
    try:
        return OmegaConf.to_container(parse(text), resolve=False)
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply; flatten it") from error
    except Exception as error:  # the YAML library's exceptions have no base of OmegaConf's
        # A marked error names the place on lines of its own; a grammar error adds its full key.
        message = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{where}: not valid YAML ({message}); correct it") from error


def _file(name: str, folder: Path) -> Path:
    """Find the file of an experiment by name or path."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such file")
        return Path(name)
    for place in (folder, packaged_experiments()):
        if (file := place / f"{name}.yaml").is_file():
            return file
    near = nearest(name, all_experiments(folder), count=3)
    if Path(f"{name}.yaml").is_file():
        near = f"; the file {name}.yaml is in this folder: name it {name}.yaml"
    where = (folder / f"{name}.yaml").as_posix()
    raise ConfigError(f"{where}: no such experiment (got {name!r}){near}")


def _lineage(file: Path, children: tuple[Path, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """Read a file and its defaults, the lowest first.

    A file reached twice counts where it is reached first: merged again it would undo what the
    defaults named before it changed.
    """
    where = file.as_posix()
    own, listed = _parse_experiment(_text(file), where)
    lineage: dict[str, dict[str, Any]] = {}
    for name in listed:
        parent = _parent(name, file, folder)
        if parent == file or parent in children:
            raise ConfigError(f"{where}: defaults: {name!r} has this file among its own defaults")
        for path, tree in _lineage(parent, (*children, file), folder).items():
            lineage.setdefault(path, tree)
    return {**lineage, where: own}


def _parse_experiment(text: str, where: str) -> tuple[dict[str, Any], list[Any]]:
    """Parse one text of YAML: its own sections, and the names of its defaults.

    Raises:
        ConfigError: not a mapping of sections.
    """
    container = _parsed(text, OmegaConf.create, where)
    if isinstance(container, dict) and len(container) == 1 and list(container.values()) == [None]:
        # OmegaConf reads a lone word so.
        raise ConfigError(f"{where}: must be a mapping of sections (got {next(iter(container))!r})")
    own = plain(container, where)
    refuse_misread(text, where)
    own = expand_values(own, where)
    listed = own.pop("defaults", [])
    return own, listed if isinstance(listed, list) else [listed]


def _parent(name: object, file: Path, folder: Path) -> Path:
    """The file that a name among a file's defaults means: beside it, in the folder, or ours.

    A file that is named like one of ours may have that one below it.

    Raises:
        ConfigError: there is none.
    """
    places = (file.parent, folder, packaged_experiments())
    if isinstance(name, str) and Path(name).name == name:
        found = [at for p in places if (at := p / f"{name.removesuffix('.yaml')}.yaml").is_file()]
        others = [each for each in found if not each.samefile(file)]
        if found:
            return others[0] if others else file
    known = [each.stem for place in places for each in place.glob("*.yaml")]
    raise ConfigError(
        f"{file.as_posix()}: defaults: must name YAML files beside this one, or of the package "
        f"(got {name!r}){nearest(name, [each for each in known if each != file.stem])}"
    )


def _merge(
    low: dict[Any, Any], high: dict[Any, Any], key: str, source: str, origins: dict[str, str]
) -> None:
    """Merge `high` into `low` in place and note where each key now comes from."""
    for name, value in high.items():
        path = join(key, name)
        below = low.get(name)
        if isinstance(below, dict) and isinstance(value, dict) and not _replaces(below, value):
            _merge(below, value, path, source, origins)
            continue
        low[name] = value
        _mark(origins, path, source)


def _lay_over(
    tree: dict[str, Any],
    own: dict[str, Any],
    source: str,
    origins: dict[str, str],
    warned: str | None,
) -> None:
    """Merge sections as somebody wrote them, in whatever names, into a tree in place."""
    if replaces_data(own, tree):
        tree["data"] = {}
    _merge(tree, renamed(own, tree, warned), "", source, origins)


def _mark(origins: dict[str, str], key: str, source: str) -> None:
    """Note that a key and everything below it comes from a file."""
    for stale in [each for each in origins if each.startswith(f"{key}.")]:
        del origins[stale]
    origins[key] = source


def _replaces(below: dict[Any, Any], above: dict[Any, Any]) -> bool:
    """Tell whether a node names another callable, whose arguments are not those below."""
    both = "_target_" in below and "_target_" in above
    numbered = any(isinstance(name, int) for name in above)  # a table is one value
    return numbered or (both and below["_target_"] != above["_target_"])


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Set the overrides in place, then resolve the references.

    Raises:
        ConfigError: every override that is wrong, a line each.
    """
    pairs, wrong = [], []
    for text in overrides:
        try:
            key, value = parse_assignment(text)
            pairs.append((key, value, text))
        except ConfigError as error:
            wrong.append(str(error))
    spelt: dict[str, str] = {}
    for key, value, _ in sorted(pairs, key=lambda pair: outer_first(pair[0])):
        try:
            _set(config, key, value, OVERRIDE, spelt)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    texts = {key: text for key, _, text in pairs}
    config = replace(config, typed={now: texts[key] for now, key in spelt.items()})
    return check_storable(replace(config, tree=plain(interpolated(config), config.file)))


def _pair(text: str) -> tuple[list[str], Any]:
    """Split and parse one override."""
    key, equals, written = text.partition("=")
    try:
        refuse_credentials(text, f"{OVERRIDE}: {masked(key.strip())}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    parts = key.strip().split(".")
    if not equals or not written.strip() or not all(parts):
        raise ConfigError(
            f"{OVERRIDE}: {key.strip()}: must be dotted.key=value (got {text!r}); "
            "write null for no value"
        )
    if parts == ["defaults"]:
        raise ConfigError(f"{OVERRIDE}: defaults: can only be named in a file; override its keys")
    where = f"{OVERRIDE}: {key.strip()}"
    parsed = plain(_parsed(written, _from_override, where), where)
    refuse_misread(written, where)
    return parts, expand_values(parsed["value"], where)


def _named_targets(overrides: Sequence[str]) -> Iterator[str]:
    """The targets that overrides name literally, except those of Python's standard library.

    An experiment needs nothing of the standard library, but a pasted malicious line would.
    """
    for text in overrides:
        try:
            parts, value = _pair(text)
        except ConfigError:  # reported with the other errors
            continue
        for key, named in leaves({parts[-1]: value}):
            if "_target_" not in key.split(".") or not isinstance(named, str):
                continue
            if named.partition(".")[0] not in sys.stdlib_module_names:
                yield named


def _from_override(written: str) -> Any:
    return OmegaConf.from_dotlist([f"value={written}"])


def _set(config: Config, key: str, value: Any, source: str, spelt: dict[str, str]) -> None:
    """Set one value in place, and note in `spelt` by which name its key came.

    Raises:
        ConfigError: the key came by another name too, or the node it goes into does not exist, or
            is no mapping or list.
    """
    node: Any
    where = f"{source}: {key}"
    now = key_of(config.tree, key, value)
    refuse_twice(spelt, key, now, source)
    if now != key:
        warn_once(source, key, now)
    if key == "data._target_" and replaces_data({"data": {"_target_": value}}, config.tree):
        config.tree["data"] = {"_target_": DATA, "dataset": {}}
        _mark(config.origins, "data", source)
    parts = now.split(".")
    if len(parts) == 1 and isinstance(value, dict):
        _lay_over(config.tree, {now: value}, source, config.origins, source)
        return
    node = config.tree
    done = ""
    for index, part in enumerate(parts[:-1]):
        name = step(node, part)
        missing = join(done, part)
        if name is None and "_target_" in names(node) and not is_near(part, names(node)):
            # An argument that no file gives, such as trainer.dropout; its name is checked later.
            node[part] = {}
            _mark(config.origins, missing, source)
            name = part
        if name is None:
            known = [join(done, each) for each in names(node)]
            former = {join(done, old): join(done, new) for old, new in former_names(done).items()}
            near = nearest(missing, known, former=former)
            raise ConfigError(f"{where}: there is no {missing!r} in {config.file}{near}")
        if node[name] is None and parts[index + 1 :] == ["_target_"]:
            node[name] = {}
        node = node[name]
        done = join(done, part)
    value = renamed_node({parts[-1]: value}, node, done, source)[parts[-1]]
    last: Any = step(node, parts[-1])
    if isinstance(node, list) and last is not None:
        node[last] = value
        _mark(config.origins, join(done, last), source)
    elif isinstance(node, dict):
        if parts[-1] == "_target_" and _replaces(node, {"_target_": value}):
            node.clear()
            _mark(config.origins, done, source)
        if last is None:  # as YAML reads a bare key
            last = int(parts[-1]) if parts[-1].isdecimal() else parts[-1]
        _merge(node, {last: value}, done, source, config.origins)
    else:
        raise ConfigError(
            f"{where}: {done!r} in {config.file} has no {parts[-1]!r} (it is {node!r}); "
            f"set {done} itself, or {done}._target_ too"
        )
