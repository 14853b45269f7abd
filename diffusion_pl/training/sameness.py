"""Digests of config, code and data, compared between ranks and with the run; no lightning.

They determine a training's numbers. Ranks that differ in one of them, or a run resumed with other
data, would diverge silently, so they are compared before the first step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_pl import __version__, config, locks, ranks
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset
from diffusion_pl.io.files import sha256_of
from diffusion_pl.training.history import History

# Paths, which may differ between machines: their content is compared, or does not matter.
LOCAL = {"data.dataset.path", "data.dataset.cache_folder", "features.weights"}

CHANGES = "changes.jsonl"  # in a run's folder: one line for each change of the run

_TEXT = ("encoder", "digest", "length", "fingerprint")

_SHOWN = 3  # differences in an error message
_SHARED_WAIT = 30.0  # seconds until a network file system shows what another machine wrote


def data_of(opened: Mapping[int, ImageDataset]) -> dict[str, Any]:
    """Description of the training data, as plain containers for checkpoints.

    Args:
        opened: the images at each resolution of the run.

    Returns:
        Number of images; sha256 (hex) of images and labels at each resolution, and of the class
        names; of the shards' sizes if shards are shuffled in windows, since the order of the
        images then depends on them; and of captions and encoder where texts are read.
    """
    whole = opened[max(opened)]
    cut = json.dumps(whole.shards).encode() if whole.window and whole.shards else None
    said = {
        "count": len(whole),
        "fingerprints": {str(side): opened[side].fingerprint for side in sorted(opened)},
        "classes": hashlib.sha256(json.dumps(list(whole.class_names)).encode()).hexdigest(),
        "shards": None if cut is None else hashlib.sha256(cut).hexdigest(),
    }
    texts = whole.texts
    if texts is not None:
        said["text"] = {name: getattr(texts, name) for name in _TEXT}
    return said


def data_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How two results of `data_of` differ, in words; None if they do not."""
    if "classes" not in before:  # earlier versions did not record the names
        now = {key: value for key, value in now.items() if key != "classes"}
    if before == now:
        return None

    def named(data: Mapping[str, Any]) -> str:
        prints = data.get("fingerprints")
        digests = prints.values() if isinstance(prints, Mapping) else ()
        return f"{data.get('count')} images of {' '.join(str(each)[:12] for each in digests)}"

    was, is_ = named(before), named(now)
    texts = before.get("text"), now.get("text")
    if was == is_ and texts[0] != texts[1]:
        return f"{was}, {_text_named(texts[0])} -> {_text_named(texts[1])}"
    if was == is_ and before.get("classes") != now.get("classes"):
        return f"{was}, whose classes have other names"
    if was == is_:
        return f"{was}, in other shards"
    return f"{was} -> {is_}"


def _text_named(text: object) -> str:
    """What `data_of` says of texts, in words."""
    if not isinstance(text, Mapping):
        return "without texts"
    print_ = str(text.get("fingerprint"))[:12]
    return (
        f"texts {print_} of encoder {text.get('encoder')} (sha256 "
        f"{str(text.get('digest'))[:12]}, {text.get('length')} tokens)"
    )


def code_of(tree: Mapping[str, Any]) -> str:
    """Versions and digests of the code: this package, torch and the user's own parts.

    Of the user's parts the files of the config's targets are read, not what they import.

    Args:
        tree: the resolved config.
    """
    own = {
        node.rpartition(".")[0]
        for key, node in config.leaves(dict(tree))
        if key.rpartition(".")[2] == "_target_" and isinstance(node, str)
    }
    parts = [f"diffusion_pl {__version__} {_sources()[:12]}"]
    parts.append(f"torch {torch.__version__}")
    for name in sorted(own):
        file = getattr(sys.modules.get(name), "__file__", None)
        if name.split(".")[0] not in ("diffusion_pl", "torch") and file:
            parts.append(f"{name} {sha256_of(Path(file))[:12]}")
    return ", ".join(parts)


@functools.cache
def _sources() -> str:
    """sha256 (hex) of this package's sources."""
    whole, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        whole.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def facts_of(tree: Mapping[str, Any], **more: Any) -> dict[str, str]:
    """What must be equal on all ranks: the config, key by key, and more, as JSON."""
    facts = {
        key: json.dumps(value)
        for key, value in config.leaves(dict(tree))
        if key not in LOCAL and not key.startswith("data.dataset.made_of.source.")
    }
    for name, value in more.items():
        facts |= {key: json.dumps(leaf) for key, leaf in config.leaves(value, name)}
    return facts


def agree(facts: Mapping[str, str], device: torch.device) -> None:
    """Check that all ranks have the same facts; every rank calls it.

    Args:
        facts: of this rank, see `facts_of`.
        device: for communication.

    Raises:
        UserError: on every rank; names the first rank that differs from rank 0, and in what.
    """
    if ranks.world_size() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    digests = _gathered(hashlib.sha256(text).digest(), device)
    if len(set(digests)) == 1:
        return
    whole = json.dumps({"host": socket.gethostname(), "facts": facts}).encode()
    told = [json.loads(each) for each in _gathered(whole, device)]
    number = next(at for at, each in enumerate(digests) if each != digests[0])
    ours, theirs = told[0]["facts"], told[number]["facts"]
    differ = [
        f"{key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} on rank 0"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]
    more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise UserError(
        f"rank {number} on {told[number]['host']} would train another run than rank 0 on "
        f"{told[0]['host']}: {'; '.join(differ[:_SHOWN])}{more}; start all ranks by one command on "
        "the same files"
    )


def share_folder(run: Path, token: str | None, device: torch.device) -> None:
    """Check that all ranks see the folder that rank 0 has locked; every rank calls it.

    Args:
        run: the run's folder.
        token: of the lock, on rank 0; None on others, or without a lock.
        device: for communication.

    Raises:
        UserError: on every rank; names the first rank that does not see it.
    """
    if ranks.world_size() == 1:
        return
    wanted = _gathered((token or "").encode(), device)[0].decode()
    seen = not wanted or ranks.rank() == 0 or any(_looks(run, wanted))
    told = json.dumps([seen, socket.gethostname(), str(run.absolute())]).encode()
    answers = [json.loads(each) for each in _gathered(told, device)]
    for number, (sees, host, folder) in enumerate(answers):
        if not sees:
            raise UserError(
                f"{folder}: rank {number} on {host} does not see what rank 0 on {answers[0][1]} "
                f"writes to {answers[0][2]}; name a folder that all of them share with --run"
            )


def _looks(run: Path, wanted: str) -> Iterator[bool]:
    """Poll for a lock until it is there or the time is up."""
    until = time.monotonic() + _SHARED_WAIT
    while True:
        holder = locks.read(run / locks.NAME)
        yield holder is not None and holder.token == wanted
        if time.monotonic() > until:
            return
        time.sleep(0.5)


def from_first(text: str, device: torch.device) -> str:
    """Rank 0's text, on every rank; every rank calls it."""
    return _gathered(text.encode(), device)[0].decode()


def _gathered(content: bytes, device: torch.device) -> list[bytes]:
    """The bytes of all ranks, on every rank."""
    if ranks.world_size() == 1:
        return [content]
    rows = torch.tensor([*content, 0], dtype=torch.uint8, device=device)  # none is empty
    ends = ranks.gather(torch.tensor([len(rows)], device=device)).cumsum(0).tolist()
    whole = bytes(ranks.gather(rows).tolist())
    return [whole[first : end - 1] for first, end in zip([0, *ends], ends, strict=False)]


def note(run: Path, images: int, changes: Sequence[str]) -> None:
    """Append changes of a run, with the images seen, to its file."""
    if changes:
        rows = [{"images": images, "change": change} for change in changes]
        History(run / CHANGES, images=int, change=str).append(*rows)
