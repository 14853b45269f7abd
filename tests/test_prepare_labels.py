"""No label is lost or invented: what a source says of classes arrives, or is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from pathlib import Path

import lmdb
import numpy as np
import pyarrow
import pytest
from PIL import Image
from prepared import file, fill, manifest, members, noise, pixels, prepare, tarred, zipped
from pyarrow import parquet

from diffusion_pl.data.folder import ImageFolder

EDM = [*range(20), *range(1000, 1020)]  # places in two of the packing tool's folders


def grey(level: int) -> bytes:
    """A picture that tells its class: the level of grey."""
    return file(Image.new("RGB", (4, 4), (level,) * 3))


def _levels(dest: Path) -> dict[str, set[int]]:
    """The levels of grey under each label, by the bytes of the label's member."""
    contents = members(dest)
    found: dict[str, set[int]] = {}
    for name, data in contents.items():
        if name.endswith(".cls"):
            image = contents[f"{name.partition('.')[0]}.4.png"]
            found.setdefault(data.decode(), set()).add(int(pixels(image)[0, 0, 0]))
    return found


def _prepared(source: Path, *words: object) -> Path:
    dest = source.parent / f"dest{len(list(source.parent.iterdir()))}"
    assert prepare(source, dest, "--workers", 1, *words, resolutions="4") == 0
    return dest


def _refused(source: Path, capsys, *words: object) -> str:
    capsys.readouterr()
    assert prepare(source, source.parent / "none", "--workers", 1, *words, resolutions="4") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (source.parent / "none").exists()
    return error


# dataset.json


def _edm(labels: object = "own") -> dict[str, bytes]:
    names = {f"{f'{i:08d}'[:5]}/img{i:08d}.png": i % 10 for i in EDM}
    pairs = [[name, label] for name, label in names.items()] if labels == "own" else labels
    contents = {name: grey(20 * label) for name, label in names.items()}
    return contents | {"dataset.json": json.dumps({"labels": pairs}).encode()}


@pytest.mark.parametrize("kind", ["zip", "folder", "wrapped"])
@pytest.mark.parametrize("words", [(), ("--labels",)])
def test_the_packing_tools_labels_are_read(kind, words, tmp_path, capsys):
    contents = _edm()
    if kind == "wrapped":
        contents = {f"cifar/{name}": data for name, data in contents.items()}
    source = tmp_path / "x.zip"
    source = fill(tmp_path / "x", contents) if kind == "folder" else zipped(source, contents)
    dest = _prepared(source, *words)
    assert _levels(dest) == {str(label): {20 * label} for label in range(10)}
    assert manifest(dest)["class_counts"] == [4] * 10
    assert "10 classes by" in capsys.readouterr().err
    images = ImageFolder(str(source), 4, labels=True).open()
    assert images.classes == 10 and images.labels.tolist()[:12] == [*range(10), 0, 1]


def test_null_labels_are_none_and_not_the_folders(tmp_path, capsys):
    source = zipped(tmp_path / "x.zip", _edm(None))
    assert manifest(_prepared(source))["classes"] == 0
    assert "says that there are no labels" in _refused(source, capsys, "--labels")
    with pytest.raises(ValueError, match="says that there are no labels"):
        ImageFolder(str(source), 4, labels=True).prepare()


def test_folders_that_number_images_are_no_classes(tmp_path, capsys):
    contents = _edm()
    del contents["dataset.json"]
    source = zipped(tmp_path / "x.zip", contents)
    assert "00000, 00001 number the images and are no classes" in _refused(
        source, capsys, "--labels"
    )
    capsys.readouterr()
    _prepared(source)
    assert "--labels takes them" not in capsys.readouterr().err  # a hint leads to nothing worse


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([["a/0.png", 1]], "no label for 1 of 2 images (a/1.png)"),
        ([["a/0.png", 1], ["a/1.png", [0.5, 0.5]]], "holds [0.5, 0.5], no label"),
        ([["a/0.png", 1], ["a/1.png", -1]], "labels are 0 to 999,999 (got -1, 1 such of 2)"),
        ([["a/0.png", 1], ["a/1.png", 0.5]], "holds 0.5, no label"),
        ([1, 2], "labels are no pairs"),
        ({"a": 1}, "labels are no pairs"),
    ],
)
def test_labels_that_are_none_are_named(labels, complaint, tmp_path, capsys):
    contents = {"a/0.png": grey(0), "a/1.png": grey(1)}
    source = fill(
        tmp_path / "x", contents | {"dataset.json": json.dumps({"labels": labels}).encode()}
    )
    assert complaint in _refused(source, capsys)
    assert manifest(_prepared(source, "--no-labels"))["classes"] == 0


def test_a_dataset_json_of_something_else_is_only_not_read(tmp_path, capsys):
    source = fill(tmp_path / "x", {"0.png": grey(0), "dataset.json": b'{"title": "x"}'})
    assert manifest(_prepared(source))["unread"] == {".json": 1}
    assert "not read: 1 .json (dataset.json)" in capsys.readouterr().err


# metadata.csv, metadata.jsonl


def test_metadata_of_a_folder_is_read(tmp_path, capsys):
    """As Hugging Face's imagefolder takes it: words, numbers as text, lines of JSON."""
    images = {f"{i}.png": grey(10 * i) for i in range(4)}
    table = "file_name,label,note\n" + "".join(f"{i}.png,{'ba'[i % 2]},hello\n" for i in range(4))
    dest = _prepared(fill(tmp_path / "csv", images | {"metadata.csv": table.encode()}))
    assert _levels(dest) == {"0": {10, 30}, "1": {0, 20}}
    assert manifest(dest)["class_names"] == ["a", "b"]
    assert "not read of metadata.csv: column note" in capsys.readouterr().err
    lines = "\n".join(json.dumps({"file_name": f"{i}.png", "kind": i // 2}) for i in range(4))
    source = fill(tmp_path / "jsonl", images | {"metadata.jsonl": lines.encode()})
    assert manifest(_prepared(source))["classes"] == 0
    assert _levels(_prepared(source, "--label", "kind")) == {"0": {0, 10}, "1": {20, 30}}
    assert "no column 'sort'; there are: file_name, kind" in _refused(
        source, capsys, "--label", "sort"
    )
    numbers = "\n".join(["file_name,label", "0.png,2", "1.png,10", "2.png,0", "3.png,2.0"])
    dest = _prepared(fill(tmp_path / "numbers", images | {"metadata.csv": numbers.encode()}))
    assert _levels(dest) == {"0": {20}, "2": {0, 30}, "10": {10}}
    missing = "file_name,label\n0.png,2\n1.png,\n2.png,0\n3.png,2\n"
    source = fill(tmp_path / "missing", images | {"metadata.csv": missing.encode()})
    assert "holds '', no label, for 1 of 4 images" in _refused(source, capsys)


# Splits


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test"), ("Train", "VAL"), ("training", "validation"), ("valid", "testing"),
        ("data/train", "data/val"), ("images/train", "images/test"),
        ("training_set", "test_set"), ("train2017", "val2017"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_are_never_classes(folders, kind, tmp_path, capsys):
    """Refused, or one is taken, with the classes inside of it."""
    contents = {
        f"{folder}/{name}/{i}.png": grey(100 * number + 10 * place)
        for number, folder in enumerate(folders)
        for place, name in enumerate(("cat", "dog"))
        for i in range(2)
    }
    source = (
        fill(tmp_path / "x", contents) if kind == "folder" else zipped(tmp_path / "x.zip", contents)
    )
    first, second = (folder.rpartition("/")[2] for folder in folders)
    for words in ((), ("--labels",), ("--no-labels",)):
        error = _refused(source, capsys, *words)
        assert "holds the splits" in error and f"{first}" in error and second in error
    for number, split in enumerate((first, second)):
        dest = _prepared(source, "--labels", "--split", split)
        assert _levels(dest) == {"0": {100 * number}, "1": {100 * number + 10}}
        assert manifest(dest)["class_names"] == ["cat", "dog"]
        assert f"split {split}: 4 of 8 images" in manifest(dest)["notes"]
        folder = ImageFolder(str(source), 4, labels=True, split=split).open()
        assert (len(folder), folder.class_names) == (4, ("cat", "dog"))
    assert _levels(_prepared(source, "--labels", "--split", "all")) == {
        "0": {0, 100},
        "1": {10, 110},
    }
    assert manifest(_prepared(source, "--split", "all"))["count"] == 8
    assert "no 'extra'" in _refused(source, capsys, "--split", "extra")
    with pytest.raises(ValueError, match="holds the splits"):
        ImageFolder(str(source), 4).prepare()


def test_splits_below_classes_are_seen(tmp_path, capsys):
    contents = {f"{name}/{split}/0.png": grey(10 * i + j) for i, name in enumerate(("a", "b"))
                for j, split in enumerate(("test", "train"))}  # fmt: skip
    source = fill(tmp_path / "x", contents)
    assert "holds the splits test, train" in _refused(source, capsys, "--labels")
    assert _levels(_prepared(source, "--labels", "--split", "train")) == {"0": {1}, "1": {11}}


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    contents = {f"{name}/0.png": grey(i) for i, name in enumerate(("boat", "plane", "train"))}
    dest = _prepared(fill(tmp_path / "x", contents), "--labels")
    assert manifest(dest)["class_names"] == ["boat", "plane", "train"]


def test_one_split_alone_is_the_set(tmp_path):
    contents = {f"train/{name}/0.png": grey(i) for i, name in enumerate(("a", "b"))}
    dest = _prepared(fill(tmp_path / "x", contents), "--labels")
    assert manifest(dest)["class_names"] == ["a", "b"]


# Folders of classes


def test_folders_named_by_numbers_are_ordered_as_numbers(tmp_path):
    contents = {f"{number}/0.png": grey(number) for number in (10, 2, 1, 33)}
    source = fill(tmp_path / "x", contents)
    dest = _prepared(source, "--labels")
    assert manifest(dest)["class_names"] == ["1", "2", "10", "33"]
    assert _levels(dest) == {"0": {1}, "1": {2}, "2": {10}, "3": {33}}
    assert ImageFolder(str(source), 4, labels=True).open().class_names[2] == "10"
    words = {f"{word}/0.png": grey(i) for i, word in enumerate(("10", "2", "ten"))}
    assert manifest(_prepared(fill(tmp_path / "y", words), "--labels"))["class_names"] == [
        "10", "2", "ten",
    ]  # fmt: skip


def test_class_folders_are_taken_or_it_is_said_that_they_are_not(tmp_path, capsys):
    contents = {f"{name}/deep/{i}.png": grey(i) for name in ("cat", "dog") for i in range(2)}
    source = fill(tmp_path / "x", contents | {"cat/deep/0.txt": b"a cat", "cat/deep/1.txt": b"b"})
    assert manifest(_prepared(source, "--no-captions"))["classes"] == 0
    said = capsys.readouterr()
    assert "the images lie in 2 folders (cat, dog), which are not taken as classes" in said.err
    assert (
        "--labels takes them" in said.err
        and "not read: 2 .txt beside images (captions?)" in said.err
    )
    assert json.loads(said.out)["not_read"] == {".txt": 2}
    dest = _prepared(source, "--labels")
    said = capsys.readouterr()
    assert "2 classes by folders (index, images, name):\n" in said.err
    assert "       0          2  cat\n       1          2  dog\n" in said.err
    assert json.loads(said.out)["class_counts"] == [2, 2]
    assert manifest(dest)["class_counts"] == [2, 2]
    assert "not taken" not in manifest(dest)["notes"][0]


def test_what_the_names_of_folders_hide_is_said(tmp_path, capsys):
    contents = {f"{name}/0.png": grey(i) for i, name in enumerate(("Cat", "cat", "dog"))}
    source = fill(tmp_path / "x", contents | {"eel/notes.txt": b"", "cat/.DS_Store": b""})
    (source / "fox").mkdir()
    (source / "@eaDir").mkdir()
    _prepared(source, "--labels")
    error = capsys.readouterr().err
    assert "folders without an image are no classes: eel, fox" in error
    assert "names differ by case or spaces alone: Cat, cat" in error


# Tars


def test_keys_that_hold_points_keep_their_labels(tmp_path):
    contents: dict[str, bytes] = {}
    for i in range(4):
        contents |= {f"photo_{i}.jpg.png": grey(10 * i), f"photo_{i}.jpg.cls": b"%d" % (i % 2)}
    dest = _prepared(tarred(tmp_path / "x.tar", contents))
    assert _levels(dest) == {"0": {0, 20}, "1": {10, 30}}


def test_keys_alike_up_to_a_point_are_images_of_their_own_where_each_has_a_label(tmp_path):
    contents: dict[str, bytes] = {}
    for i in range(4):
        contents |= {f"photo.{i}.png": grey(10 * i), f"photo.{i}.cls": b"%d" % (i % 2)}
    assert _levels(_prepared(tarred(tmp_path / "x.tar", contents))) == {"0": {0, 20}, "1": {10, 30}}


def test_labels_that_lie_apart_from_their_images_are_found(tmp_path):
    contents = {f"{i}.png": grey(10 * i) for i in range(3)} | {
        f"{i}.cls": b"%d" % i for i in range(3)
    }
    dest = _prepared(tarred(tmp_path / "x.tar", contents))
    assert _levels(dest) == {"0": {0}, "1": {10}, "2": {20}}


def test_a_hint_says_how_many_images_it_leads_to(tmp_path, capsys):
    """Twelve images of one key: the advice must not make one of them."""
    source = tarred(tmp_path / "x.tar", {f"photo.{i}.png": grey(i) for i in range(12)})
    error = _refused(source, capsys)
    assert "--image 0.png takes one a key, 1 of all 12, and --image all takes every one" in error
    assert manifest(_prepared(source, "--image", "all"))["count"] == 12
    views = {f"{key}.{view}.png": grey(view) for key in "ab" for view in range(2)}
    source = tarred(tmp_path / "y.tar", views | {"a.cls": b"1", "b.cls": b"0"})
    assert "--image 0.png takes one a key, 2 of all 4" in _refused(source, capsys)
    assert manifest(_prepared(source, "--image", "1.png"))["class_counts"] == [1, 1]
    assert manifest(_prepared(source, "--image", "all"))["class_counts"] == [2, 2]


def test_labels_inside_json_are_found_or_named(tmp_path, capsys):
    def source(name: str, about: list[dict[str, object]]) -> Path:
        contents: dict[str, bytes] = {}
        for i, each in enumerate(about):
            contents |= {f"{i}.png": grey(10 * i), f"{i}.json": json.dumps(each).encode()}
        return tarred(tmp_path / name, contents)

    dest = _prepared(source("a.tar", [{"label": i % 2} for i in range(4)]))
    assert _levels(dest) == {"0": {0, 20}, "1": {10, 30}}
    assert manifest(dest)["labels_from"] == "field 'label' of .json"
    dest = _prepared(source("b.tar", [{"label": "ba"[i % 2]} for i in range(4)]))
    assert manifest(dest)["class_names"] == ["a", "b"]
    capsys.readouterr()
    other = source("c.tar", [{"category_id": i, "note": "x"} for i in range(3)])
    assert manifest(_prepared(other))["classes"] == 0
    error = capsys.readouterr().err
    assert "hold category_id; --label json.category_id takes them" in error
    assert "not read: 3 .json" in error
    assert _levels(_prepared(other, "--label", "json.category_id")) == {
        "0": {0},
        "1": {10},
        "2": {20},
    }
    some = source("d.tar", [{"label": 1}, {"caption": "x"}])
    assert "holds None, no label, for 1 of 2 images" in _refused(some, capsys)
    assert manifest(_prepared(some, "--no-labels"))["classes"] == 0


def test_words_in_cls_are_classes_and_captions_are_counted(tmp_path, capsys):
    contents: dict[str, bytes] = {}
    for i in range(4):
        contents |= {f"{i}.png": grey(i), f"{i}.cls": [b"dog", b"cat\n"][i % 2], f"{i}.txt": b"x"}
    dest = _prepared(tarred(tmp_path / "x.tar", contents), "--no-captions")
    assert manifest(dest)["class_names"] == ["cat", "dog"]
    assert _levels(dest) == {"0": {1, 3}, "1": {0, 2}}
    assert "not read: 4 .txt (captions?)" in capsys.readouterr().err
    assert manifest(dest)["unread"] == {".txt": 4}


# Tables


def _table(
    path: Path, columns: dict[str, object], features: dict[str, object] | None = None
) -> Path:
    images = [{"bytes": grey(10 * i), "path": None} for i in range(6)]
    table = pyarrow.table({"image": images} | columns)
    if features is not None:
        noted = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(noted)
    parquet.write_table(table, path)
    return path


def test_two_columns_of_labels_are_named_and_chosen(tmp_path, capsys):
    """As CIFAR-100's table has them."""
    fine, coarse = [5, 4, 3, 2, 1, 0], [1, 1, 1, 0, 0, 0]
    names = {"coarse_label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    columns = {"fine_label": fine, "coarse_label": coarse, "note": ["x"] * 6}
    source = _table(tmp_path / "x.parquet", columns, names)
    error = _refused(source, capsys)
    assert "several columns may be the labels (fine_label, coarse_label of 2 classes)" in error
    assert "--label fine_label" in error and "--no-labels" in error
    dest = _prepared(source, "--label", "fine_label")
    assert _levels(dest) == {str(5 - i): {10 * i} for i in range(6)}
    assert manifest(dest)["unread"] == {"column coarse_label": 6, "column note": 6}
    dest = _prepared(source, "--label", "coarse_label")
    assert manifest(dest)["class_names"] == ["x", "y"]
    assert _levels(dest) == {"0": {30, 40, 50}, "1": {0, 10, 20}}
    assert manifest(_prepared(source, "--no-labels"))["classes"] == 0


def test_the_one_column_that_can_only_be_the_labels_is_taken_and_said(tmp_path, capsys):
    names = {"animal": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    source = _table(tmp_path / "x.parquet", {"animal": [0, 1] * 3, "note": ["a"] * 6}, names)
    dest = _prepared(source)
    assert manifest(dest)["class_names"] == ["cat", "dog", "eel"]
    assert manifest(dest)["class_counts"] == [3, 3, 0]
    error = capsys.readouterr().err
    assert "3 classes by column 'animal'" in error and "not read: column note" in error


@pytest.mark.parametrize(
    ("values", "classes"),
    [([0.0, 1.0] * 3, 2), (["2", "10"] * 3, 11), (["a", "b"] * 3, 2), ([0, 7] * 3, 8)],
)
def test_labels_come_as_floats_words_or_with_gaps(values, classes, tmp_path, capsys):
    dest = _prepared(_table(tmp_path / "x.parquet", {"label": pyarrow.array(values)}))
    assert manifest(dest)["classes"] == classes
    used = {0: values[0], 1: values[1]} if classes > 2 else {0: 0, 1: 1}
    assert _levels(dest) == {str(used[0]): {0, 20, 40}, str(used[1]): {10, 30, 50}}
    gap = "numbers 0 to" in capsys.readouterr().err
    assert gap == (classes > 2)


@pytest.mark.parametrize("value", [None, float("nan"), -1])
def test_missing_labels_are_counted(value, tmp_path, capsys):
    source = _table(tmp_path / "x.parquet", {"label": pyarrow.array([0, 1, 1, 0, value, value])})
    error = _refused(source, capsys)
    assert "2 of 6" in error or "2 such of 6" in error
    assert "--no-labels" in error


def test_splits_of_tables_are_chosen(tmp_path, capsys):
    folder = tmp_path / "x"
    folder.mkdir()
    for name, label in (("train", 0), ("validation", 1)):
        _table(folder / f"{name}-00000-of-00001.parquet", {"label": [label] * 5 + [3]})
    assert "holds several splits (train, validation); choose one by --split" in _refused(
        folder, capsys
    )
    assert manifest(_prepared(folder, "--split", "val"))["class_counts"] == [0, 5, 0, 1]


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train-0", "val-0"), ("set_train_00", "set_valid_00")]
)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_splits_in_the_names_of_files_are_not_joined(names, kind, tmp_path, capsys):
    folder = tmp_path / "x"
    folder.mkdir()
    for number, name in enumerate(names):
        if kind == "tar":
            tarred(folder / f"{name}.tar", {"0.png": grey(number), "0.cls": b"%d" % number})
        else:
            _table(folder / f"{name}.parquet", {"label": [number] * 5 + [1]})
    error = _refused(folder, capsys)
    assert "holds several splits (" in error and "--split train" in error
    count = 1 if kind == "tar" else 6
    assert manifest(_prepared(folder, "--split", "train"))["count"] == count
    assert manifest(_prepared(folder, "--split", "all"))["count"] == 2 * count
    assert "no split 'extra'" in _refused(folder, capsys, "--split", "extra")


def test_files_of_one_split_or_of_none_are_one_set(tmp_path):
    for name in ("train-0", "train-1", "part_2"):
        tarred(tmp_path / f"{name}.tar", {f"{name}.png": grey(1)})
    assert manifest(_prepared(tmp_path / "*.tar"))["count"] == 3


def test_tables_that_number_their_classes_otherwise_are_not_joined(tmp_path, capsys):
    folder = tmp_path / "x"
    folder.mkdir()
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        _table(folder / f"{number}.parquet", {"label": [0, 1] * 3}, features)
    error = _refused(folder, capsys)
    assert "1.parquet: its column 'label' names other classes than that of 0.parquet" in error


def test_folders_in_tars_are_taken_or_named(tmp_path, capsys):
    contents = {f"pets/{n}/{i}.png": grey(10 * n + i) for n in (10, 2) for i in range(2)}
    source = tarred(tmp_path / "x.tar", contents)
    assert manifest(_prepared(source))["classes"] == 0
    assert "in 2 folders (2, 10), which are not taken as classes" in capsys.readouterr().err
    dest = _prepared(source, "--labels")
    assert manifest(dest)["class_names"] == ["2", "10"]
    assert _levels(dest) == {"0": {20, 21}, "1": {100, 101}}
    source = tarred(tmp_path / "y.tar", contents | {"pets/9.png": grey(1)})
    assert "pets/9.png has no label beside it" in _refused(source, capsys, "--labels")


@pytest.mark.parametrize("inside", ["", "sub/"])
def test_the_overview_beside_drawn_images_is_no_image(inside, tmp_path, capsys):
    """As `sample` of earlier versions left it; it may even have the images' size."""
    contents = {f"{inside}{i:06d}.png": grey(i) for i in range(3)} | {f"{inside}grid.png": grey(9)}
    source = fill(tmp_path / "x", contents)
    assert manifest(_prepared(source))["count"] == 3
    assert "not read: 1 .png" in capsys.readouterr().err
    assert len(ImageFolder(str(source), 4, fit="exact").open()) == 3


def test_the_overview_in_a_zip_of_todays_samples_is_no_image(tmp_path):
    contents = {f"images/{i:06d}.png": grey(i) for i in range(3)}
    source = zipped(tmp_path / "x.zip", contents | {"sample.json": b"{}", "grid.png": grey(9)})
    assert manifest(_prepared(source))["count"] == 3


@pytest.mark.parametrize("other", ["lattice.png", "photo.jpg"])
def test_a_picture_of_the_users_called_grid_is_one(other, tmp_path):
    source = fill(tmp_path / "x", {"grid.png": grey(1), other: grey(2)})
    assert manifest(_prepared(source))["count"] == 2


# What lies about


LEFT = {
    ".DS_Store": b"", "Thumbs.db": b"", "b/desktop.ini": b"", "__MACOSX/b/._0.png": b"",
    "b/._0.png": b"", ".ipynb_checkpoints/0.png": b"", "@eaDir/0.png": b"", "lost+found/0.png": b"",
    "b/.ipynb_checkpoints/0-checkpoint.png": b"", "$RECYCLE.BIN/0.png": b"", "b/Icon\r": b"",
    "System Volume Information/0.png": b"", "#recycle/x.gif": b"", "ehthumbs.db": b"",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_what_systems_leave_is_passed_over(kind, tmp_path, capsys):
    contents = {f"{name}/{i}.png": grey(i) for name in "ab" for i in range(2)}
    words = () if kind == "tar" else ("--labels",)
    fingerprints = []
    for number, each in enumerate((contents, contents | LEFT, LEFT | contents)):
        place = tmp_path / f"{number}"
        source = {
            "folder": lambda: fill(place, each),  # noqa: B023
            "zip": lambda: zipped(place.with_suffix(".zip"), each),  # noqa: B023
            "tar": lambda: tarred(place.with_suffix(".tar"), each),  # noqa: B023
        }[kind]()
        dest = _prepared(source, *words)
        fingerprints.append(manifest(dest)["fingerprints"])
        assert "unread" not in manifest(dest)
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


def test_a_destination_with_leftovers_is_empty(tmp_path):
    source = fill(tmp_path / "x", {"0.png": grey(0)})
    dest = fill(tmp_path / "dest", {".DS_Store": b"", "Thumbs.db": b"", "desktop.ini": b""})
    assert prepare(source, dest, resolutions="4") == 0


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_images_under_any_name_are_found(kind, tmp_path, capsys):
    jpeg, webp = file(noise(0), "JPEG"), file(noise(1), "WEBP")
    contents = {
        "a.jfif": jpeg, "b.JPEG": jpeg, "c.JPE": jpeg, "d": jpeg, "e.0001": grey(1), "7": webp,
        "f.jpg_large": jpeg, "g.PNG": grey(2), "LICENSE": b"free", "h.dat": b"no image", "i": b"",
    }  # fmt: skip
    source = {
        "folder": lambda: fill(tmp_path / "x", contents),
        "zip": lambda: zipped(tmp_path / "x.zip", contents),
        "tar": lambda: tarred(tmp_path / "x.tar", contents),
    }[kind]()
    dest = _prepared(source)
    assert manifest(dest)["count"] == 8
    assert manifest(dest)["unread"] == {"no ending": 2, ".dat": 1}
    contents["z.TIF"] = b""
    other = (
        fill(tmp_path / "y", contents) if kind != "tar" else tarred(tmp_path / "y.tar", contents)
    )
    assert "z.tif" in _refused(other, capsys).lower()


def test_backslashes_in_a_zip_are_folders(tmp_path, capsys):
    contents = {f"data\\{name}\\{i}.png": grey(10 * k) for k, name in enumerate(("cat", "dog"))
                for i in range(3)}  # fmt: skip
    more = {"data\\cat\\": b"", "data\\cat\\._0.png": b"\0\5\x16\7", "data\\cat\\Thumbs.db": b""}
    dest = _prepared(zipped(tmp_path / "x.zip", contents | more), "--labels")
    assert manifest(dest)["class_names"] == ["cat", "dog"]
    assert _levels(dest) == {"0": {0}, "1": {10}}
    for name in ("..\\a.png", "C:\\a.png", "\\a.png"):
        assert "odd path" in _refused(zipped(tmp_path / "y.zip", {name: grey(0)}), capsys)
    both = {"a\\0.png": grey(0), "a/0.png": grey(1)}
    assert "a/0.png is there twice" in _refused(zipped(tmp_path / "z.zip", both), capsys)


def test_a_source_without_images_says_what_it_holds(tmp_path, capsys):
    inner = zipped(tmp_path / "a.zip", {"0.png": grey(0)}).read_bytes()
    source = fill(tmp_path / "x", {"a.zip": inner, "b.zip": inner, "images.txt": b"0.png\n"})
    assert "there are 2 .zip, 1 .txt: unpack archives" in _refused(source, capsys)
    dest = _prepared(fill(tmp_path / "y", {"0.png": grey(0)}))
    assert "is prepared data already; train on it" in _refused(dest, capsys)


# A source that changes


def test_a_source_that_has_grown_is_told(tmp_path, capsys):
    source = fill(tmp_path / "src", {f"{i}.png": grey(i) for i in range(6)})
    dest = tmp_path / "dest"
    assert prepare(source, dest, resolutions="4") == 0
    assert prepare(source, dest, resolutions="4") == 0
    assert "nothing to do" in capsys.readouterr().err
    fill(source, {f"{i:02}.png": grey(i) for i in range(6, 20)})
    (source / "0.png").unlink()
    before = (dest / "dataset.json").read_bytes()
    assert prepare(source, dest, resolutions="4") == 2
    error = capsys.readouterr().err
    assert f"{dest}: prepared from 6 images of {source}, which holds 19 now: " in error
    assert "14 new (06.png, 07.png, 08.png, ...), 1 gone (0.png)" in error
    assert error.count("\n") == 1 and (dest / "dataset.json").read_bytes() == before
    fill(source, {"0.png": file(noise(3))})
    for path in source.glob("??.png"):
        path.unlink()
    assert prepare(source, dest, resolutions="4") == 2
    assert "files of the same names are others now" in capsys.readouterr().err


def shade(value: int, side: int = 8) -> bytes:
    """A PNG that is not packed: images of other shades, files of one size."""
    stored = io.BytesIO()
    Image.new("L", (side, side), value).save(stored, "PNG", compress_level=0)
    return stored.getvalue()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet", "lmdb"])
def test_an_image_that_another_of_the_same_size_has_replaced_is_told(kind, tmp_path, capsys):
    def write(values: tuple[int, ...]) -> Path:
        contents = {f"{i}.png": shade(value) for i, value in enumerate(values)}
        if kind == "folder":
            return fill(tmp_path / "src", contents)
        if kind == "zip":
            return zipped(tmp_path / "x.zip", contents)
        if kind == "tar":
            return tarred(tmp_path / "x.tar", contents)
        if kind == "lmdb":
            with (
                lmdb.open(str(tmp_path / "x"), map_size=1 << 20) as base,
                base.begin(write=True) as writing,
            ):
                for name, data in contents.items():
                    writing.put(name.encode(), data)
            return tmp_path / "x"
        images = [{"bytes": data, "path": name} for name, data in contents.items()]
        table = pyarrow.table({"image": images})
        parquet.write_table(table, tmp_path / "x.parquet", compression="none")
        return tmp_path / "x.parquet"

    dest = tmp_path / "dest"
    assert prepare(write((1, 2, 3)), dest, resolutions="4") == 0
    capsys.readouterr()
    # The same images in a file that was written anew are the same.
    assert prepare(write((1, 2, 3)), dest, resolutions="4") == 0
    assert "nothing to do" in capsys.readouterr().err
    before = os.stat(write((1, 2, 3)))
    source = write((1, 9, 3))
    if kind == "folder":  # whoever copies keeps the time of the original, not that of the change
        os.utime(source / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(source, dest, resolutions="4") == 2
    error = capsys.readouterr().err
    # A zip file's own list has the check sums, so that none of its images is read again.
    said = "same names are others now" if kind == "zip" else "same name and size are other images"
    assert said in error and error.count("\n") == 1


def test_other_labels_of_the_same_images_are_told(tmp_path, capsys):
    def write(labels: str) -> Path:
        text = "file_name,label\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(labels))
        contents = {f"{i}.png": shade(i) for i in range(3)}
        return fill(tmp_path / "src", contents | {"metadata.csv": text.encode()})

    dest = tmp_path / "dest"
    assert prepare(write("aba"), dest, resolutions="4") == 0
    assert prepare(write("aba"), dest, resolutions="4") == 0
    for labels, count in (("abb", 1), ("aca", 0)):
        capsys.readouterr()
        assert prepare(write(labels), dest, resolutions="4") == 2
        assert f"labels of {count} images, or the classes' names" in capsys.readouterr().err


def test_a_set_that_is_gone_on_with_holds_no_image_of_before(tmp_path, capsys, monkeypatch):
    source = fill(tmp_path / "src", {f"{i}.png": shade(i) for i in range(4)})
    dest, words = tmp_path / "dest", ("--shard-images", 2)
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_pl.data.write_shards.finish", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            prepare(source, dest, *words, resolutions="4")
    (dest / "shards" / "000001.tar").unlink()
    fill(source, {"3.png": shade(9), "1.png": shade(1)})  # of what is not made yet, and no other
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_pl.data.write_shards.finish", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            prepare(source, dest, *words, resolutions="4")
    fill(source, {"1.png": shade(9)})
    capsys.readouterr()
    assert prepare(source, dest, *words, resolutions="4") == 2
    assert (
        "image 1 of the source, which is prepared already, is another now"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_archives_and_tables_that_have_grown_are_told(kind, tmp_path, capsys):
    def write(count: int) -> Path:
        contents = {f"{i}.png": grey(i) for i in range(count)}
        if kind == "zip":
            return zipped(tmp_path / "x.zip", contents)
        if kind == "tar":
            return tarred(tmp_path / "x.tar", contents)
        images = [{"bytes": data, "path": name} for name, data in contents.items()]
        parquet.write_table(pyarrow.table({"image": images}), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    dest = tmp_path / "dest"
    assert prepare(write(3), dest, resolutions="4") == 0
    capsys.readouterr()
    assert prepare(write(5), dest, resolutions="4") == 2
    error = capsys.readouterr().err
    assert "prepared from 3 images" in error and "holds 5 now" in error


def test_a_source_that_is_gone_is_no_difference(tmp_path, capsys):
    source = fill(tmp_path / "src", {"0.png": grey(0)})
    assert prepare(source, tmp_path / "dest", resolutions="4") == 0
    (source / "0.png").unlink()
    source.rmdir()
    assert prepare(source, tmp_path / "dest", resolutions="4") == 0
    error = capsys.readouterr().err
    assert "is not there any more, so it was not compared" in error and "nothing to do" in error


def test_broken_images_that_were_left_out_are_no_difference(tmp_path, capsys):
    source = fill(tmp_path / "src", {"0.png": grey(0), "1.png": b"no image"})
    for _ in range(2):
        assert prepare(source, tmp_path / "dest", "--skip-broken", 1, resolutions="4") == 0
    fill(source, {"2.png": grey(2)})
    assert prepare(source, tmp_path / "dest", "--skip-broken", 1, resolutions="4") == 2
    assert "1 new (2.png)" in capsys.readouterr().err


def test_data_sets_of_earlier_versions_are_still_finished(tmp_path, capsys):
    """Their description lacks what is new; its digest is over what it has."""
    source = fill(tmp_path / "src", {f"{name}/0.png": grey(1) for name in "ab"})
    dest = tmp_path / "dest"
    assert prepare(source, dest, "--labels", resolutions="4") == 0
    said = manifest(dest)
    for key in ("class_counts", "labels_from", "notes", "unread", "fingerprint"):
        said.pop(key, None)
    del said["source"]["states"]
    kept = {key: value for key, value in said.items() if key != "versions"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    (dest / "dataset.json").write_text(json.dumps(said | {"fingerprint": digest}))
    capsys.readouterr()
    assert prepare(source, dest, "--labels", resolutions="4") == 0
    output = capsys.readouterr()
    assert "nothing to do" in output.err
    assert json.loads(output.out)["fingerprint"] == digest
    assert np.load(io.BytesIO((dest / "index.npy").read_bytes()))["label"].tolist() == [0, 1]
