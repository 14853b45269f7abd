"""Mutants of small good files, read one by one in a process of their own; prints what became of
them. `python tests/mutations.py picture checkpoint ...` names the kinds, all without a word.

A mutant is the original with bits flipped, bytes overwritten, put in or cut out, a stretch zeroed,
blocks exchanged, or the end missing. Each is read under a limit of time while an audit hook watches
for what no reader has to do: to start a process, a connection or a program.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import random
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_pl.errors import UserError

# Mutants of each kind.
COUNTS = {
    "picture": 9_000, "member": 4_000, "config": 1_500, "archive": 2_000, "cifar10": 1_500,
    "arrays": 1_500, "shard": 2_000, "index": 1_000, "manifest": 1_000, "history": 1_000,
    "checkpoint": 4_000, "signed": 2_500, "weights": 2_000, "converted": 400, "edm": 600,
}  # fmt: skip
SECONDS = 5.0  # of computing, for one mutant; most take a thousandth of that

# What a reader has no need of.
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "subprocess.Popen", "pty.spawn", "socket.connect", "socket.bind", "ctypes.dlopen",
    "webbrowser.open", "shutil.rmtree",
)  # fmt: skip


class Hung(BaseException):
    """A mutant that took longer than the limit."""


class Ran(BaseException):
    """A mutant that made its reader do what a reader need not."""


def mutant(original: bytes, draw: random.Random) -> bytes:
    """The original with something done to it; never the original itself."""
    while True:
        data = bytearray(original)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            draw.choice(DAMAGES)(data, draw)
        if data != original:
            return bytes(data)


def _place(data: bytearray, draw: random.Random) -> int:
    # Headers decide more than contents do: half of the damage is done near an end.
    near = min(len(data), 200)
    where = draw.random()
    if where < 0.25:
        return draw.randrange(near + 1)
    if where < 0.5:
        return len(data) - draw.randrange(near + 1)
    return draw.randrange(len(data) + 1)


def _flip(data: bytearray, draw: random.Random) -> None:
    place = _place(data, draw)
    if place < len(data):
        data[place] ^= 1 << draw.randrange(8)


def _overwrite(data: bytearray, draw: random.Random) -> None:
    place = _place(data, draw)
    new = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80", draw.randbytes(3)))
    data[place : place + len(new)] = new


def _insert(data: bytearray, draw: random.Random) -> None:
    place = _place(data, draw)
    data[place:place] = draw.randbytes(draw.randrange(1, 20))


def _remove(data: bytearray, draw: random.Random) -> None:
    place = _place(data, draw)
    del data[place : place + draw.randrange(1, 40)]


def _zero(data: bytearray, draw: random.Random) -> None:
    place, length = _place(data, draw), draw.choice((16, 512, 4096))
    length = min(length, len(data) - place)
    data[place : place + length] = bytes(length)


def _exchange(data: bytearray, draw: random.Random) -> None:
    length = draw.choice((8, 64, 512))
    one, other = _place(data, draw), _place(data, draw)
    one, other = min(one, other), max(one, other)
    if other - one >= length and other + length <= len(data):
        first, second = data[one : one + length], data[other : other + length]
        data[one : one + length], data[other : other + length] = second, first


def _repeat(data: bytearray, draw: random.Random) -> None:
    place = _place(data, draw)
    data[place:place] = data[place : place + draw.choice((8, 64, 512))]


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[_place(data, draw) :]


DAMAGES = (_flip, _flip, _overwrite, _insert, _remove, _zero, _exchange, _repeat, _truncate)


@dataclass
class Kind:
    """A kind of file.

    Args:
        seeds: good files, by name.
        read: a file's content as something to compare; ValueError where it is refused.
        digested: endings of the seeds' names whose digest lies in or beside them: every change must
            be refused.
    """

    seeds: dict[str, bytes]
    read: Callable[[bytes, str], Any]
    digested: tuple[str, ...] = ()


def tried(name: str, kind: Kind, count: int, seed: int) -> dict[str, Any]:
    """Read the mutants of a kind; how many were refused, read the same, read as something else."""
    draw = random.Random(f"{name} {seed}")
    good = {each: kind.read(data, each) for each, data in kind.seeds.items()}
    names = sorted(kind.seeds)
    counts = dict.fromkeys(("tried", "refused", "same", "other"), 0)
    faults: list[str] = []
    began = time.process_time()
    for number in range(count):
        each = names[number % len(names)]
        data = mutant(kind.seeds[each], draw)
        outcome = _outcome(kind, data, each, good[each])
        counts["tried"] += 1
        if outcome in counts:
            counts[outcome] += 1
        if outcome not in counts or (outcome != "refused" and each.endswith(kind.digested)):
            faults.append(f"{name}/{each} mutant {number}: {outcome}")
    seconds = round(time.process_time() - began, 2)
    return {**counts, "seconds": seconds, "faults": faults}


def _outcome(kind: Kind, data: bytes, each: str, good: Any) -> str:
    try:
        with _watched():
            found = kind.read(data, each)
    except ValueError as error:
        if not isinstance(error, UserError):  # a library's, such as UnicodeDecodeError
            return f"raised {type(error).__name__}: {error}"
        # A configuration has a line for each problem, and each of them names its place.
        lines = str(error).splitlines()
        if not all(": " in line for line in lines) or (lines[1:] and "yaml" not in lines[0]):
            return f"complained: {error}"
        return "refused"
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"
    return "same" if found == good else "other"


_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in FORBIDDEN:
        raise Ran(f"{event} {arguments}")


def _late(number: int, frame: Any) -> None:
    raise Hung(f"more than {SECONDS} s")


@contextmanager
def _watched() -> Iterator[None]:
    global _watching
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)


# The kinds. Every one has small seeds, so that most mutants hit what decides.


def encoded(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _rgb(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def picture(folder: Path) -> Kind:
    from diffusion_pl.data.decode import decode

    exif = Image.Exif()
    exif[0x0112] = 6
    grey = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    palette = io.BytesIO()
    Image.fromarray(_rgb(8)).quantize(16).save(palette, "PNG", transparency=3)
    seeds = {
        "png": encoded(_rgb(8), "PNG", exif=exif),
        "png-16": encoded(grey, "PNG"),
        "png-palette": palette.getvalue(),
        "jpeg": encoded(_rgb(16), "JPEG", exif=exif),
        "jpeg-progressive": encoded(_rgb(16), "JPEG", progressive=True),
        "webp": encoded(_rgb(8), "WEBP", lossless=True),
        "webp-alpha": encoded(np.dstack([_rgb(8), _rgb(8, 1)[:, :, :1]]), "WEBP", exif=exif),
    }
    return Kind(seeds, lambda data, _: decode(data, where="x").tobytes())


def member(folder: Path) -> Kind:
    """Images of a shard as their reader decodes them, past check sums that agree."""
    from diffusion_pl.data.member_images import decode_into

    seeds = {
        "png": encoded(_rgb(8), "PNG"),
        "jpeg": encoded(_rgb(8), "JPEG", quality=95),
        "webp": encoded(_rgb(8), "WEBP", lossless=True),
    }

    def read(data: bytes, encoding: str) -> bytes:
        image = np.zeros((3, 8, 8), np.uint8)
        try:
            decode_into(image, data, encoding)
        except ValueError as error:  # whoever reads the shard names the place
            assert isinstance(error, UserError)
            raise UserError(f"x: {error}") from error
        return image.tobytes()

    return Kind(seeds, read)


def config(folder: Path) -> Kind:
    """Experiments read and bound, and the same text as a run's, which others may have written."""
    from diffusion_pl import config as configs

    path = folder / "mutant.yaml"
    text = """# A run
seed: 1
network:
  _target_: diffusion_pl.networks.song_unet.SongUNet
  resolution: ${data.side}
  channel_mult: [1, 2]
  dropout: 1.3e-1
data: {name: shapes, rate: 1e-4, side: 16, many: &many [1, 2], more: *many, b: {8: null}}
"""
    (folder / "base.yaml").write_text("seed: 0\ntrainer: {total_images: 10}\n")
    seeds = {"experiment": text.encode(), "child": b"defaults: base\n" + text.encode()}

    def read(data: bytes, _: str) -> Any:
        path.write_bytes(data)
        loaded = configs.load(str(path))
        known = dict.fromkeys(("seed", "network", "data", "lr_schedule", "trainer"), object)
        configs.check(loaded, known=known)
        configs.check(configs.load_resolved(loaded.tree, "x.ckpt"), known=known)
        return loaded.tree

    return Kind(seeds, read)


def checkpoint_bytes() -> bytes:
    import torch

    from diffusion_pl.training import checkpoint

    whole = {
        "state_dict": {"ema.w": torch.arange(60.0), "ema.b": torch.ones(2, dtype=torch.int64)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "diffusion_pl": {"format": 2, "images": 8, "config": {"seed": 1, "a": {"b": [1, 2.5]}}},
    }
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.ckpt"
        checkpoint.save(whole, path)
        return path.read_bytes()


def checkpoint(folder: Path) -> Kind:
    from diffusion_pl.training import checkpoint as checkpoints

    path = folder / "000000000008.ckpt"

    def read(data: bytes, _: str) -> Any:
        path.write_bytes(data)
        return repr(checkpoints.load(path))

    return Kind({"checkpoint": checkpoint_bytes()}, read, digested=("checkpoint",))


def signed(folder: Path) -> Kind:
    """Checkpoints whose maker has put the right digest behind a spoilt content."""
    from diffusion_pl.training import checkpoint as checkpoints

    path = folder / "000000000008.ckpt"
    with zipfile.ZipFile(io.BytesIO(checkpoint_bytes())) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    [program] = (name for name in entries if name.endswith("data.pkl"))

    def read(data: bytes, _: str) -> Any:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in {**entries, program: data}.items():
                archive.writestr(name, content)
        whole = buffer.getvalue()
        comment = b"sha256:" + hashlib.sha256(whole).hexdigest().encode()
        path.write_bytes(whole[:-2] + len(comment).to_bytes(2, "little") + comment)
        return repr(checkpoints.load(path))

    return Kind({"program": entries[program]}, read)


def shard(folder: Path) -> Kind:
    """Prepared sets with one file changed, verified as a whole."""
    # Other spaces in dataset.json, and other versions of what decoded, are no damage.
    return _prepared(folder, digested=(".tar", ".npy"), resigned=False)


def index(folder: Path) -> Kind:
    """Prepared sets whose maker has put the right digests to a spoilt index."""
    return _prepared(folder, digested=(), resigned=True)


def _prepared(folder: Path, *, digested: tuple[str, ...], resigned: bool) -> Kind:
    import torch
    from sharded import rewrite, source, write

    from diffusion_pl.data.verify import verify

    place = write(folder / "set", count=6, sides=(8, 4), shard_images=3)
    names = ["index.npy"] if resigned else sorted(
        str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()
    )  # fmt: skip
    seeds = {name: (place / name).read_bytes() for name in names}
    described = (place / "dataset.json").read_bytes()

    def read(data: bytes, name: str) -> Any:
        (place / name).write_bytes(data)
        try:
            if resigned:
                rewrite(place, index_sha256=hashlib.sha256(data).hexdigest())
            else:
                verify(place)
            return [
                source(place, 8).open(side).read(torch.arange(6)).numpy().tobytes()
                for side in (8, 4)
            ]
        finally:
            (place / name).write_bytes(seeds[name])
            (place / "dataset.json").write_bytes(described)

    return Kind(seeds, read, digested)


def manifest(folder: Path) -> Kind:
    """Prepared sets whose maker has put the right digest to a spoilt `dataset.json`."""
    import torch
    from sharded import source, write

    place = write(folder / "set", count=6, sides=(8, 4), shard_images=3)
    path = place / "dataset.json"
    content = json.loads(path.read_bytes())
    del content["fingerprint"]

    whole = json.dumps(content).encode()

    def read(data: bytes, _: str) -> Any:
        spoilt = json.loads(whole)
        if data != whole:  # the mutant decides what is put where
            _misplace(spoilt, random.Random(data))
        signed = {key: value for key, value in spoilt.items() if key != "versions"}
        text = json.dumps(signed, sort_keys=True).encode()
        digest = hashlib.sha256(text).hexdigest()
        path.write_text(json.dumps(spoilt | {"fingerprint": digest}))
        return source(place, 8).open().read(torch.arange(6)).numpy().tobytes()

    return Kind({"dataset.json": whole}, read)


_ODD = (
    None,
    True,
    -1,
    0,
    1,
    10**6,
    2**40,
    2**70,
    1.5,
    1e400,
    "",
    "x",
    "../x",
    "0" * 64,
    [],
    {},
    [[]],
)


def _misplace(tree: Any, draw: random.Random) -> None:
    """Put something odd in the place of any value, or leave a value out or in twice."""
    node, key = None, None
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        node, key = tree, draw.choice(list(keys))
        tree = node[key]
        if not isinstance(tree, dict | list) or not tree or draw.random() < 0.2:
            break
    what = draw.random()
    if what < 0.1:
        del node[key]
    elif what < 0.2 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = draw.choice(_ODD)


def history(folder: Path) -> Kind:
    """A run's metrics.jsonl: what is no row is refused, but for a last line that was cut off."""
    from diffusion_pl.training.history import History

    kept = History(folder / "metrics.jsonl")
    for images in (8, 16, 24):
        kept.append({"images": images, "loss": 0.5, "name": "fd", "value": 1e-3})
    content = kept.path.read_bytes()

    def read(data: bytes, _: str) -> Any:
        kept.path.write_bytes(data)
        kept.rewind(16)
        return kept.rows()

    return Kind({"metrics.jsonl": content}, read)


def archive(folder: Path) -> Kind:
    """Archives as `prepare` looks through them, every image read."""
    from diffusion_pl.data.decode import decode
    from diffusion_pl.data.sources.base import SourceSpec
    from diffusion_pl.data.sources.open import open_originals

    images = {f"{number:02}.png": encoded(_rgb(4, number), "PNG") for number in range(2)}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in images.items():
            opened.writestr(f"a/{name}", data)
    # Members of a key lie together.
    seeds = {"zip": zipped.getvalue(), "tar": _tar({
        "00.png": images["00.png"], "00.cls": b"1", "01.png": images["01.png"], "01.cls": b"0",
    })}  # fmt: skip

    def read(data: bytes, ending: str) -> Any:
        path = folder / f"mutant.{ending}"
        path.write_bytes(data)
        _, originals = open_originals(SourceSpec(str(path)), [4])
        read = [originals.reader.read(number) for number in range(originals.count)]
        labels = None if originals.labels is None else originals.labels.tolist()
        return labels, [(o.name, decode(o.image, where="x").tobytes()) for o in read]

    return Kind(seeds, read)


def _tar(contents: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def cifar10(folder: Path) -> Kind:
    """The archive, and a batch of it."""
    from diffusion_pl.data.cifar10 import CIFAR10
    from diffusion_pl.io.unpickle import read_plain

    pixels = np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, 3072)
    batch = pickle.dumps({b"data": pixels, b"labels": [3, 4], b"batch_label": b"one"}, 2)
    whole = _tar({"cifar-10-batches-py/test_batch": batch}, "w:gz")

    def read(data: bytes, which: str) -> Any:
        if which == "batch":
            return repr(read_plain(data, where="x"))
        path = folder / "mutant.tar.gz"
        path.write_bytes(data)
        found = CIFAR10(str(path), "test").open()
        return found.fingerprint

    return Kind({"batch": batch, "archive": whole}, read)


def weights(folder: Path) -> Kind:
    """safetensors files of weights, of statistics, and of averages."""
    import torch

    from diffusion_pl.interop import weights as exported
    from diffusion_pl.metrics import reference
    from diffusion_pl.training import power_ema

    path = folder / "a.safetensors"
    exported.write(path, {"w": torch.arange(6.0)}, {"config": {"seed": 1}, "images": 8})
    ours = path.read_bytes()
    about = dict.fromkeys(("name", "fingerprint", "extractor", "digest", "resize"), "x")
    known = reference.Reference(
        **about, resolution=8, count=4, mean=torch.zeros(2), covariance=torch.eye(2)
    )
    known.save(path)
    statistics = path.read_bytes()
    snapshots = folder / "snapshots"
    power_ema.save_snapshot(snapshots, 8, [torch.nn.Linear(2, 1).state_dict() for _ in "12"])
    [snapshot] = snapshots.iterdir()

    def read(data: bytes, which: str) -> Any:
        if which == "snapshot":
            snapshot.write_bytes(data)
            return repr(power_ema.reconstruct(snapshots, 8, 0.1))
        path.write_bytes(data)
        if which == "weights":
            return repr(exported.read(path))
        return repr(vars(reference.load(path)))

    seeds = {"weights": ours, "statistics": statistics, "snapshot": snapshot.read_bytes()}
    return Kind(seeds, read)


def arrays(folder: Path) -> Kind:
    """.npz files of images."""
    import torch

    from diffusion_pl.metrics.npz import arrays as opened

    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=_rgb(4)[None])
    plain = io.BytesIO()
    np.savez(plain, arr_0=_rgb(4)[None])
    path = folder / "a.npz"

    def read(data: bytes, _: str) -> Any:
        path.write_bytes(data)
        images = opened(path)
        return images.read(torch.arange(images.shape[0])).numpy().tobytes()

    return Kind({"compressed": buffer.getvalue(), "stored": plain.getvalue()}, read)


def converted(folder: Path) -> Kind:
    """Ho's weights as converted for PyTorch: what torch reads, without a digest."""
    import torch

    from diffusion_pl.interop import pesser
    from diffusion_pl.interop.layouts import PESSER
    from diffusion_pl.networks.ddpm_unet import DDPMUNet

    network = DDPMUNet(8, model_channels=4, channel_mult=(1, 2), blocks=1, attention=(4,), groups=4)
    buffer = io.BytesIO()
    torch.save(dict(PESSER.write(network)), buffer)
    path = folder / "model.ckpt"

    def read(data: bytes, _: str) -> Any:
        path.write_bytes(data)
        return {name: value.numpy().tobytes() for name, value in pesser.read(path)[1].items()}

    return Kind({"weights": buffer.getvalue()}, read)


def edm(folder: Path) -> Kind:
    """Pickles of EDM's networks, as far as to weights that fit."""
    import types

    import test_interop_edm as official
    import torch

    from diffusion_pl.interop import edm, pickles

    for module, thing in (
        ("torch_utils.persistence", official._reconstruct_persistent_obj),
        ("dnnlib.util", official.EasyDict),
    ):
        thing.__module__ = module
        sys.modules[module.split(".")[0]] = types.ModuleType(module.split(".")[0])
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], thing.__name__, thing)
    path = folder / "network.pkl"
    config = official.CONFIG | {"model_channels": 4}
    official.network_pickle(path, config, official.made(config)[1])
    values = [torch.arange(4.0), np.float64(0.5), np.arange(3.0), OrderedDict(a=1), {1, 2}]

    def read(data: bytes, which: str) -> Any:
        path.write_bytes(data)
        if which == "values":
            found = pickles.read_pickle(path)
            return repr(found[0]) if isinstance(found, list) and found else None
        config, state = edm.read(path)
        return {name: value.numpy().tobytes() for name, value in edm.weights(config, state).items()}

    return Kind({"network": path.read_bytes(), "values": pickle.dumps(values)}, read)


def main(names: Sequence[str], seed: int = 0, share: float = 1) -> dict[str, Any]:
    """Try the kinds of these names, with a share of their mutants."""
    signal.signal(signal.SIGPROF, _late)
    sys.addaudithook(_hook)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            kind = globals()[name](Path(folder))
            found[name] = tried(name, kind, int(share * COUNTS[name]), seed)
    # Not ru_maxrss, which begins at what the process had that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"kinds": found, "peak": peak}


if __name__ == "__main__":
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("names", nargs="*", default=list(COUNTS))
    wanted.add_argument("--share", type=float, default=1.0, help="of each kind's mutants (1)")
    options = wanted.parse_args()
    print(json.dumps(main(options.names, share=options.share)))
