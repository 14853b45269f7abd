"""Hostile checkpoints, runs and files of weights, numbers and images, as their readers see them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import Runs, announce, case, changed

from diffusion_pl import config
from diffusion_pl.commands import import_, parts
from diffusion_pl.config import Config
from diffusion_pl.interop import diffusers, edm, pesser, pickles, weights
from diffusion_pl.metrics import reference
from diffusion_pl.metrics.npz import arrays
from diffusion_pl.metrics.published import load_npz
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import power_ema
from diffusion_pl.training.history import History

FILE = "runs/tiny/checkpoints/000000000008.ckpt"
SAMPLE = ["sample", "runs/tiny", "--count", "1"]


def state_of(experiment: Config) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    objective: Any = config.build(experiment, "objective")
    return objective.denoiser(config.build(experiment, "network")).state_dict()


def run(
    place: Path,
    change: Callable[[dict[str, Any]], object] = lambda tree: None,
    overrides: tuple[str, ...] = (),
) -> list[str]:
    """A run whose checkpoint, rightly digested, has something changed; how to draw from it."""
    experiment = parts.read("tiny", overrides)
    state = state_of(experiment)
    path = import_.write(
        Path("runs/tiny"), experiment, state, 8, {"from": "x", "kind": "x", "sha256": ""}
    )
    tree = torch.load(path, weights_only=True)
    change(tree)
    checkpoints.save(tree, path)
    return SAMPLE


def signed(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """A zip archive that ends in the right digest of itself."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    sign(path, buffer.getvalue())


def sign(path: Path, whole: bytes) -> None:
    comment = b"sha256:" + hashlib.sha256(whole).hexdigest().encode()
    path.write_bytes(whole[:-2] + len(comment).to_bytes(2, "little") + comment)


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def programmed(place: Path, program: bytes) -> list[str]:
    """A run whose checkpoint is this pickle."""
    words = run(place)
    entries = entries_of(Path(FILE))
    [name] = (name for name in entries if name.endswith("data.pkl"))
    signed(Path(FILE), entries | {name: program})
    return words


def section(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["diffusion_pl"]


# Damage: reliability table D.


@case(FILE, "is damaged; its bytes are not those")
def checkpoint_cut_off(place):
    words = run(place)
    changed(Path(FILE), lambda data: data.__delitem__(slice(-500, None)))
    return words


@case(FILE, "is damaged")
def checkpoint_with_a_bit_flipped(place):
    words = run(place)
    changed(Path(FILE), lambda data: data.__setitem__(5000, data[5000] ^ 4))
    return words


@case(FILE, "is damaged")
def checkpoint_without_a_byte(place):
    words = run(place)
    Path(FILE).write_bytes(b"")
    return words


@case(FILE, "is damaged")
def checkpoint_with_a_page_of_zeros(place):
    words = run(place)
    changed(Path(FILE), lambda data: data.__setitem__(slice(4096, 8192), bytes(4096)))
    return words


@case("latest", "000000000008.ckpt', which is not there")
def checkpoint_that_is_gone(place):
    words = run(place)
    Path(FILE).unlink()
    return words


@case("every checkpoint is damaged; start in another folder")
def run_whose_checkpoints_are_all_damaged(place):
    run(place)
    Path(FILE).write_bytes(b"garbage")
    return ["train", "tiny"]


@case(FILE, "is damaged", "000000000016.ckpt")
def run_with_two_damaged_checkpoints_verified(place):
    run(place)
    Path(FILE).write_bytes(b"garbage")
    Path("runs/tiny/checkpoints/000000000016.ckpt").write_bytes(b"")
    return lambda: one_line(lambda: verified("runs/tiny"))


def verified(path: str) -> object:
    from diffusion_pl.commands.verify import kept

    return kept(Path(path))


def one_line(what: Callable[[], object]) -> None:
    """A line for each file is as good as one."""
    try:
        what()
    except ValueError as error:
        raise ValueError(str(error).replace("\n", " and ")) from error


@case(FILE, "its digest is missing")
def checkpoint_whose_digest_was_taken_off(place):
    words = run(place)
    entries = entries_of(Path(FILE))
    with zipfile.ZipFile(FILE, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return words


@case(FILE, "the check sum of", "is wrong")
def checkpoint_of_format_1_with_a_flipped_bit(place):
    words = run(place)
    tree = torch.load(FILE, weights_only=True)
    section(tree)["format"] = 1
    torch.save(tree, FILE)
    # In the first tensor, behind the entry's name and its padding.
    at = (
        Path(FILE)
        .read_bytes()
        .index(tree["state_dict"]["ema.network.stem.weight"].numpy().tobytes()[:16])
    )
    changed(Path(FILE), lambda data: data.__setitem__(at + 5, data[at + 5] ^ 1))
    return words


# Hostile: table F.


@case(FILE, "holds more than tensors and plain data; refused")
def checkpoint_that_is_a_program(place):
    words = run(place)
    torch.save({"diffusion_pl": {"format": 1}, "x": Runs()}, FILE)
    return words


@case(FILE, "refused (Unsupported global: GLOBAL eval was not an allowed global")
def checkpoint_that_evaluates_with_a_right_digest(place):
    return programmed(place, b"\x80\x02cbuiltins\neval\n(V__import__('os').mkdir('ran')\ntR.")


@case(FILE, "has compressed entries")
def checkpoint_that_is_a_zip_bomb(place):
    words = run(place)
    entries = entries_of(Path(FILE))
    bomb = {f"archive/data/{number}": bytes(2**22) for number in range(8)}
    signed(Path(FILE), entries | bomb, zipfile.ZIP_DEFLATED)
    return words


@case(FILE, "its entries are larger than the file")
def checkpoint_whose_entries_overlap(place):
    words = run(place)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/a", bytes(2**16))
        [first] = archive.filelist
        for number in range(64):
            archive.filelist.append(first)
            archive.NameToInfo[f"archive/{number}"] = first
    sign(Path(FILE), buffer.getvalue())
    return words


@case(FILE, "has an entry twice")
def checkpoint_with_an_entry_twice(place):
    words = run(place)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries_of(Path(FILE)).items():
            archive.writestr(name, content)
        archive.filelist.append(min(archive.filelist, key=lambda entry: entry.file_size))
    sign(Path(FILE), buffer.getvalue())
    return words


@case(FILE, "in less memory than it takes")
def checkpoint_of_a_number_a_billion_times(place):
    def change(tree):
        tree["state_dict"]["ema.more"] = torch.zeros(1).expand(10**9)

    return run(place, change)


@case(FILE, "is not plain numbers on the CPU")
def checkpoint_of_a_tensor_without_numbers(place):
    def change(tree):
        tree["state_dict"]["ema.network.stem.bias"] = torch.zeros(8, device="meta")

    return run(place, change)


@case(FILE, "cannot be read as a checkpoint")
def checkpoint_whose_storage_is_larger_than_its_entry(place):
    words = run(place)
    tree = torch.load(FILE, weights_only=True)
    buffer = io.BytesIO()
    torch.save(tree | {"x": torch.arange(77.0)}, buffer)
    entries = entries_of_bytes(buffer.getvalue())
    [name] = (name for name in entries if name.endswith("data.pkl"))
    entries[name] = entries[name].replace(b"K\x4dt", b"J\x00\x00\x00\x10t")
    signed(Path(FILE), entries)
    return words


def entries_of_bytes(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@case(FILE, "tuples more than 10,000 deep")
def checkpoint_whose_key_exhausts_the_stack(place):
    return programmed(place, b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")


@case(FILE, "holds a bytearray")
def checkpoint_that_makes_a_bytearray_of_any_length(place):
    return programmed(place, b"\x80\x02cbuiltins\nbytearray\n(J\x00\x00\x10\x00tR.")


@case(FILE, "refused (")
def checkpoint_whose_pickle_takes_from_an_empty_stack(place):
    return programmed(place, b"\x80\x020000.")


@case(FILE, "not a checkpoint of diffusion_pl's format 2 (format: 99)")
def checkpoint_of_a_format_to_come(place):
    return run(place, lambda tree: section(tree).update(format=99))


@case(FILE, "not a checkpoint of diffusion_pl's format")
def checkpoint_whose_format_is_a_tensor(place):
    return run(place, lambda tree: section(tree).update(format=torch.ones(3)))


@case(FILE, "does not say its config")
def checkpoint_without_a_config(place):
    return run(place, lambda tree: section(tree).pop("config"))


@case(FILE, "does not say its config and the images")
def checkpoint_of_fewer_images_than_none(place):
    return run(place, lambda tree: section(tree).update(images=-1))


@case(FILE, "has no state_dict")
def checkpoint_without_weights(place):
    return run(place, lambda tree: tree.pop("state_dict"))


@case(FILE, "has no state_dict, names to tensors")
def checkpoint_whose_weights_are_words(place):
    return run(place, lambda tree: tree["state_dict"].update({"ema.network.stem.bias": "x"}))


@case(FILE, "ema.network.stem.bias has shape")
def checkpoint_with_a_weight_of_another_shape(place):
    def change(tree):
        tree["state_dict"]["ema.network.stem.bias"] = torch.zeros(9)

    return run(place, change)


@case("network._target_", "outside the trusted packages", "os.system")
def checkpoint_whose_config_names_a_program(place):
    def change(tree):
        section(tree)["config"]["network"] = {"_target_": "os.system", "command": "touch ran"}

    return run(place, change)


@case("network._target_", "outside diffusion_pl")
def checkpoint_whose_config_reaches_a_program_through_us(place):
    def change(tree):
        target = {"_target_": "diffusion_pl.cli.os.system", "command": "touch ran"}
        section(tree)["config"]["network"] = target

    return run(place, change)


@case("interpolat", "${oc.env:SECRET}")
def checkpoint_whose_config_reads_the_environment(place):
    return run(place, lambda tree: section(tree)["config"].update(seed="${oc.env:SECRET}"))


@case("nested more than 32 deep")
def checkpoint_whose_config_is_nested_without_end(place):
    def change(tree):
        inner: Any = 1
        for _ in range(100):
            inner = [inner]
        section(tree)["config"]["seed"] = inner

    return run(place, change)


@case("network", "has more than the", "tensors that the checkpoint holds")
def checkpoint_whose_network_has_modules_without_end(place):
    return run(place, lambda tree: section(tree)["config"]["network"].update(blocks=2000))


@case(FILE, "has shape (32, 8), the network (400000000")
def checkpoint_whose_network_takes_all_memory(place):
    def change(tree):
        section(tree)["config"]["network"].update(model_channels=10**8)

    return run(place, change)


@case("network", "cannot be built from these values (RuntimeError")
def checkpoint_whose_network_cannot_be_built(place):
    return run(place, lambda tree: section(tree)["config"]["network"].update(model_channels=-8))


@case("latest", "which is not there")
def pointer_that_leads_out_of_the_run(place):
    words = run(place)
    (place / "other.ckpt").write_bytes(Path(FILE).read_bytes())
    Path("runs/tiny/checkpoints/latest").write_text("../../../other.ckpt")
    return words


@case("latest", "which is not there")
def pointer_to_an_absolute_path(place):
    words = run(place)
    (place / "9.ckpt").write_bytes(Path(FILE).read_bytes())
    Path("runs/tiny/checkpoints/latest").write_text(str(place / "9.ckpt"))
    return words


@case("latest", "names 'best.ckpt'; a checkpoint here is named by its images")
def pointer_to_a_checkpoint_that_does_not_say_its_images(place):
    words = run(place)
    Path(FILE).rename("runs/tiny/checkpoints/best.ckpt")
    Path("runs/tiny/checkpoints/latest").write_text("best.ckpt")
    return words


@case("latest", "names no checkpoint")
def pointer_that_is_no_text(place):
    words = run(place)
    Path("runs/tiny/checkpoints/latest").write_bytes(bytes(range(256)))
    return words


@case("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD: is set")
def environment_that_has_torch_run_pickles(place):
    words = run(place)
    Path("environment").write_text("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1")
    return words


@case("metrics.jsonl", "line 1 is no row of measurements")
def history_with_a_damaged_line_in_its_middle(place):
    Path("metrics.jsonl").write_text('{"images": 8, "lo\n{"images": 16}\n')
    return History(Path("metrics.jsonl")).rows


# safetensors.


def tensors(place: Path, header: dict[str, Any] | bytes, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = place / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@case("a.safetensors", "cannot be read as safetensors")
def safetensors_whose_header_has_no_end(place):
    path = place / "a.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    return ["import", "safetensors", str(path), "runs/x"]


@case("a.safetensors", "cannot be read as safetensors")
def safetensors_that_reach_beyond_the_file(place):
    entry = {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}
    tensors(place, {"w": entry})
    return lambda: weights.read(place / "a.safetensors")


@case("a.safetensors", "cannot be read as safetensors")
def safetensors_that_overlap(place):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    tensors(place, {"w": entry, "v": entry})
    return lambda: weights.read(place / "a.safetensors")


@case("a.safetensors", "cannot be read as safetensors")
def safetensors_of_an_unknown_type(place):
    tensors(place, {"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}})
    return lambda: weights.read(place / "a.safetensors")


@case("a.safetensors", "cannot be read as safetensors")
def safetensors_cut_off(place):
    weights.write(place / "a.safetensors", {"w": torch.zeros(9)}, {"config": {"seed": 1}})
    changed(place / "a.safetensors", lambda data: data.__delitem__(slice(-9, None)))
    return ["import", "safetensors", "a.safetensors", "runs/x"]


@case("a.safetensors", "holds no config of diffusion_pl")
def safetensors_of_others(place):
    tensors(place, {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    return ["import", "safetensors", "a.safetensors", "runs/x"]


@case("a.safetensors", "outside the trusted packages")
def safetensors_whose_config_names_a_program(place):
    tree = {"network": {"_target_": "os.system", "command": "touch ran"}}
    weights.write(place / "a.safetensors", {"w": torch.zeros(1)}, {"config": tree})
    return ["import", "safetensors", "a.safetensors", "runs/x"]


@case("a.safetensors", "cannot be read as safetensors")
def safetensors_whose_config_is_none(place):
    weights.write(place / "a.safetensors", {"w": torch.zeros(1)}, {"config": [1], "images": "x"})
    return ["import", "safetensors", "a.safetensors", "runs/x"]


@case("a.safetensors", "not reference statistics")
def statistics_that_are_weights(place):
    weights.write(place / "a.safetensors", {"w": torch.zeros(1)}, {"config": {"seed": 1}})
    return lambda: reference.load(place / "a.safetensors")


@case("000000000008.safetensors", "not a snapshot of averages")
def snapshot_that_is_damaged(place):
    path = place / "000000000008.safetensors"
    path.write_bytes(bytes(100))
    return lambda: power_ema.reconstruct(place, 8, 0.1)


# .npz files.


def npz(place: Path, **content: Any) -> Callable[[], object]:
    np.savez_compressed(place / "a.npz", **content)
    return lambda: arrays(place / "a.npz")


@case("a.npz", "not an archive of images")
def images_that_are_pickled(place):
    attack = np.empty(1, dtype=object)
    attack[0] = Runs()
    return npz(place, images=attack)


@case("a.npz", "not an archive of images (unpacks to 1,073,741,824 bytes")
def images_that_are_a_bomb(place):
    read = npz(place, images=np.zeros((1, 8, 8, 3), np.uint8))
    announce(place / "a.npz", 2**30)
    return read


@case("a.npz", "images must be uint8")
def images_of_float(place):
    return npz(place, images=np.zeros((1, 8, 8, 3)))


@case("a.npz", "not an archive of images")
def images_in_a_single_array(place):
    with (place / "a.npz").open("wb") as file:
        np.save(file, np.zeros((1, 8, 8, 3), np.uint8))
    return lambda: arrays(place / "a.npz")


@case("a.npz", "images must be uint8 (N, R, R, 3) (got |S5 ())")
def images_whose_entry_is_no_array(place):
    with zipfile.ZipFile(place / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"hello")
    return lambda: arrays(place / "a.npz")


@case("a.npz", "not an archive of images")
def images_of_a_shape_beyond_all_memory(place):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1000, 3)}"
    text = header + b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(place / "a.npz", "w") as archive:
        archive.writestr(
            "images.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        )
    return lambda: arrays(place / "a.npz")


@case("a.npz", "not published statistics (unpacks to")
def published_statistics_that_are_a_bomb(place):
    np.savez_compressed(place / "a.npz", mu=np.zeros(2048), sigma=np.zeros(1))
    announce(place / "a.npz", 2**30)
    return lambda: load_npz(place / "a.npz")


# Pickles of EDM's networks, and converted weights.


def pickled(place: Path, content: bytes) -> Callable[[], object]:
    (place / "a.pkl").write_bytes(content)
    return lambda: edm.read(place / "a.pkl")


@case("a.pkl", "asks for posix.system, which is refused")
def network_that_is_a_program(place):
    (place / "a.pkl").write_bytes(pickle.dumps({"ema": Runs()}))
    return ["import", "edm", "a.pkl", "runs/x"]


@case("a.pkl", "remembers a value as number 16,777,216")
def network_whose_memory_takes_a_table_without_end(place):
    return pickled(place, b"\x80\x02K\x01r\0\0\0\x01.")


@case("a.pkl", "tuples more than 10,000 deep")
def network_whose_key_exhausts_the_stack(place):
    return pickled(place, b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")


@case("modules more than 100 deep")
def network_that_is_a_module_of_itself(place):
    module = pickles.Standin()
    module.state = {"_modules": {"again": module}}
    return lambda: pickles.tensors(module)


@case("more than 100,000 modules")
def network_of_a_billion_modules_in_thirty(place):
    module = pickles.Standin()
    module.state = {"_modules": {}}
    for _ in range(30):
        above = pickles.Standin()
        above.state = {"_modules": {"a": module, "b": module}}
        module = above
    return lambda: pickles.tensors(module)


@case("model.ckpt", "holds more than tensors; refused")
def converted_weights_that_are_a_program(place):
    torch.save({"w": Runs()}, place / "model.ckpt")
    return ["import", "pesser", "model.ckpt", "runs/x"]


@case("model.ckpt", "must be a state dict")
def converted_weights_that_are_words(place):
    torch.save(OrderedDict(w="x"), place / "model.ckpt")
    return lambda: pesser.read(place / "model.ckpt")


@case("unet", "holds more than tensors; refused")
def library_weights_that_are_a_program(place):
    (place / "unet").mkdir()
    (place / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    torch.save({"w": Runs()}, place / "unet" / "diffusion_pytorch_model.bin")
    return ["import", "diffusers", "unet", "runs/x"]


@case("unet/config.json", "cannot be read as JSON")
def library_config_nested_without_end(place):
    (place / "unet").mkdir()
    (place / "unet" / "config.json").write_text("[" * 100_000)
    return ["import", "diffusers", "unet", "runs/x"]


def weights_of(place: Path, program: bytes, storages: dict[str, bytes] | None = None) -> list[str]:
    """Weights of others as an archive of torch's, whose pickle is this; how to import them."""
    with zipfile.ZipFile(place / "model.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return ["import", "pesser", "model.ckpt", "runs/x"]


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


@case("model.ckpt", "more than 2,000,000 values")
def converted_weights_of_values_without_end(place):
    return weights_of(place, b"\x80\x02(" + b"}" * 2_000_100 + b"l.")


@case("model.ckpt", "tuples more than 10,000 deep")
def converted_weights_whose_key_exhausts_the_stack(place):
    return weights_of(place, b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")


@case("model.ckpt", "holds a bytearray")
def converted_weights_that_make_a_bytearray(place):
    return weights_of(place, b"\x80\x02cbuiltins\nbytearray\n(J\x00\x00\x10\x00tR.")


@case("model.ckpt", "an ordered dictionary made of another")
def converted_weights_that_copy_what_they_name(place):
    made = b"ccollections\nOrderedDict\n"
    return weights_of(place, b"\x80\x02" + made + b"(](K\x01K\x02etR.")


@case("model.ckpt", "attributes of a function")
def converted_weights_that_change_our_functions(place):
    return weights_of(place, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.")


@case("model.ckpt", "a storage of 1,048,576 numbers in 8 bytes")
def converted_weights_whose_storage_is_larger_than_its_entry(place):
    program = b"\x80\x02" + STORAGE + b"J\x00\x00\x10\x00tQ."
    return weights_of(place, program, {"0": bytes(8)})


@case("model.ckpt", "has compressed entries")
def converted_weights_that_are_a_zip_bomb(place):
    words = weights_of(place, b"\x80\x02}.")
    with zipfile.ZipFile(place / "model.ckpt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**22))
    return words


@case("model.ckpt", "its tensors take")
def converted_weights_of_many_views(place):
    flat = torch.ones(2**10)
    state = {f"w{number}": flat.view(2**10) for number in range(64)}
    torch.save(state, place / "model.ckpt")
    return ["import", "pesser", "model.ckpt", "runs/x"]


@case("model.ckpt", "that the file does not hold")
def converted_weights_of_an_old_format_cut_off(place):
    torch.save({"w": torch.ones(64)}, place / "model.ckpt", _use_new_zipfile_serialization=False)
    changed(place / "model.ckpt", lambda data: data.__delitem__(slice(-8, None)))
    return ["import", "guided", "model.ckpt", "runs/x"]


@case("model-7.pt", "milestone of denoising_diffusion_pytorch", "ema, model, opt")
def weights_within_a_training_of_others(place):
    content = {"step": 1, "model": {"w": torch.ones(1)}, "opt": {}, "ema": {}, "scaler": None}
    torch.save(content, place / "model-7.pt")
    return ["import", "guided", "model-7.pt", "runs/x"]


@case("T must be at most 1,000,000")
def checkpoint_whose_table_takes_all_memory(place):
    objective = {"_target_": "diffusion_pl.objectives.ddpm.DDPM", "T": 10**10}
    return run(place, lambda tree: section(tree)["config"].update(objective=objective))


@case("at most 1,000,000 steps")
def checkpoint_whose_sampler_takes_all_memory(place):
    return run(place, lambda tree: section(tree)["config"]["sampler"].update(steps=10**10))


@case("model.ckpt", "it is no regular file")
def converted_weights_that_are_a_pipe(place):
    os.mkfifo(place / "model.ckpt")
    return ["import", "guided", "model.ckpt", "runs/x"]


@case("unet/config.json", "it is no regular file")
def library_config_that_is_a_pipe(place):
    (place / "unet").mkdir()
    os.mkfifo(place / "unet" / "config.json")
    return lambda: diffusers.read(place / "unet")


@case("unet", "block_out_channels")
def library_config_of_levels_without_end(place):
    return library(place, {"block_out_channels": [1] * 100_000})


@case("unet", "num_train_timesteps")
def library_config_of_timesteps_without_end(place):
    return library(place, {"num_train_timesteps": 10**15})


def library(place: Path, config: dict[str, Any]) -> list[str]:
    (place / "unet").mkdir()
    usual = {"_class_name": "UNet2DModel", "sample_size": 8}
    (place / "unet" / "config.json").write_text(json.dumps(usual | config))
    scheduler = {"_class_name": "DDPMScheduler"} | {
        key: value for key, value in config.items() if key == "num_train_timesteps"
    }
    (place / "unet" / "scheduler_config.json").write_text(json.dumps(scheduler))
    torch.save({"w": torch.ones(1)}, place / "unet" / "diffusion_pytorch_model.bin")
    return ["import", "diffusers", "unet", "runs/x"]
