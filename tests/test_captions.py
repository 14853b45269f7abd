"""`prepare` keeps captions: which it takes, what it makes of bad ones, where they lie, resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from prepared import cifar10, digests, file, fill, manifest, members, noise, prepare, tarred, zipped
from sharded import rewrite

from diffusion_pl.data import stored
from diffusion_pl.data.caption_files import open_captions
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.data.sources import captions as spoken
from diffusion_pl.data.sources.captions import NO_JSON, TOO_LARGE, cleaned
from diffusion_pl.errors import UserError

WORDS = ["a red star", "ein grüner Ring", "", "円", "a red star"]


def pictures(count: int = 5, ending: str = "png") -> dict[str, bytes]:
    return {f"{i}.{ending}": file(noise(i)) for i in range(count)}


def kept(dest: Path) -> list[tuple[str, ...]]:
    """The captions of each image of a prepared set."""
    said = Manifest.read(dest)
    assert said.captions is not None
    captions = open_captions(dest, said.captions, said.count)
    return [captions.of_image(image) for image in range(said.count)]


def of(words: list[str]) -> list[tuple[str, ...]]:
    return [(word,) if word else () for word in words]


def done(source: Path, *words: str) -> Path:
    dest = source.parent / f"{source.name}-out{len(list(source.parent.iterdir()))}"
    assert prepare(source, dest, *words, "--workers", "1", resolutions="4") == 0
    return dest


def refused(source: Path, capsys, *words: str) -> str:
    dest = source.parent / "refused"
    capsys.readouterr()
    assert prepare(source, dest, *words, "--workers", "1", resolutions="4") == 2
    return capsys.readouterr().err


# Where captions are found.


def texts(words=WORDS) -> dict[str, bytes]:
    return {f"{i}.txt": word.encode() for i, word in enumerate(words) if word}


def fields(name: str, values: list[object]) -> dict[str, bytes]:
    return {f"{i}.json": json.dumps({name: each}).encode() for i, each in enumerate(values)}


def rows(name: str, ending: str, words=WORDS) -> dict[str, bytes]:
    named = [(f"{i}.png", word) for i, word in enumerate(words)]
    if ending == "csv":
        lines = [f"file_name,{name}", *(f'{file},"{word}"' for file, word in named)]
    else:
        lines = [json.dumps({"file_name": each, name: word}) for each, word in named]
    return {f"metadata.{ending}": "\n".join(lines).encode()}


@pytest.mark.parametrize(
    ("more", "origin"),
    [
        (texts(), ".txt beside images"),
        (fields("caption", list(WORDS)), "field 'caption' of .json"),
        (rows("text", "csv"), "column 'text' of metadata.csv"),
        (rows("caption", "jsonl"), "column 'caption' of metadata.jsonl"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_captions_of_a_folder_are_found(tmp_path, capsys, kind, more, origin):
    contents = pictures() | more
    source = (fill if kind == "folder" else zipped)(tmp_path / f"x.{kind}", contents)
    dest = done(source)
    assert kept(dest) == of(WORDS)
    error = capsys.readouterr().err
    assert f"captions: 4 (3 different) by {origin}" in error
    assert "captions: 1 of 5 images have none" in error
    assert manifest(dest)["captions"]["origin"] == origin
    assert not manifest(dest).get("unread")
    # Left out if that is asked for, as in earlier versions.
    bare = done(source, "--no-captions")
    assert "captions" not in manifest(bare) and not (bare / "text").exists()


@pytest.mark.parametrize(
    ("more", "origin"),
    [(texts(), "members .txt"), (fields("caption", list(WORDS)), "field 'caption' of .json")],
)
def test_captions_of_tars_are_found(tmp_path, capsys, more, origin):
    dest = done(tarred(tmp_path / "x.tar", dict(sorted((pictures() | more).items()))))
    assert kept(dest) == of(WORDS)
    assert f"captions: 4 (3 different) by {origin}" in capsys.readouterr().err
    assert not manifest(dest).get("unread")


@pytest.mark.parametrize("several", [False, True])
def test_captions_of_tables_are_found(tmp_path, capsys, several):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    cells = [[word, "b"] if word else None for word in WORDS] if several else list(WORDS)
    images = [{"bytes": each, "path": None} for each in pictures().values()]
    table = {"image": images, "caption": cells, "note": [1] * 5}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet", row_group_size=2)
    dest = done(tmp_path / "x.parquet")
    assert kept(dest) == ([(w, "b") if w else () for w in WORDS] if several else of(WORDS))
    error = capsys.readouterr().err
    assert "by column 'caption'" in error and "not read: column note" in error
    assert "holds int64, no captions" in refused(
        tmp_path / "x.parquet", capsys, "--caption", "note"
    )
    assert "no column 'x'" in refused(tmp_path / "x.parquet", capsys, "--caption", "x")


def test_a_column_of_labels_is_not_taken_as_captions(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": each, "path": None} for each in pictures().values()]
    table = pyarrow.table({"image": images, "text": list("abcab"), "texts": ["x y"] * 5})
    parquet.write_table(table, tmp_path / "x.parquet")
    dest = done(tmp_path / "x.parquet", "--label", "text")
    assert kept(dest) == [("x y",)] * 5 and manifest(dest)["classes"] == 3


def test_several_captions_an_image_from_lines_lists_rows_columns_and_files(tmp_path):
    wanted = [("one", "two"), ("three",), ("four", "five")]
    lines = {f"{i}.txt": "\r\n".join(each).encode() + b"\n\n" for i, each in enumerate(wanted)}
    lists = fields("captions", [list(each) for each in wanted])
    for name, more in (("lines", lines), ("lists", lists)):
        assert kept(done(fill(tmp_path / name, pictures(3) | more))) == wanted
        assert kept(done(tarred(tmp_path / f"{name}.tar", pictures(3) | more))) == wanted
    named = [(f"{i}.png", each) for i, spoken in enumerate(wanted) for each in spoken]
    table = "\n".join(["file_name,text", *(f"{image},{each}" for image, each in named)])
    source = fill(tmp_path / "rows", pictures(3) | {"metadata.csv": table.encode()})
    assert kept(done(source)) == wanted
    first, second = [each[0] for each in wanted], ["two", "", "five"]
    table = "file_name,a,b\n" + "".join(f"{i}.png,{first[i]},{second[i]}\n" for i in range(3))
    source = fill(tmp_path / "columns", pictures(3) | {"metadata.csv": table.encode()})
    assert kept(done(source, "--caption", "a, b")) == wanted
    two = {f"{i}.a": each.encode() for i, each in enumerate(first)}
    two |= {f"{i}.b": each.encode() for i, each in enumerate(second)}
    assert kept(done(fill(tmp_path / "files", pictures(3) | two), "--caption", "a,b")) == wanted
    assert (
        kept(done(tarred(tmp_path / "files.tar", pictures(3) | two), "--caption", "a,b")) == wanted
    )


def coco(place: Path, start: str = "") -> Path:
    """Three images of which the second has two captions and the third none."""
    names = [f"{i:012}.jpg" for i in range(4)]
    images = [{"id": 10 + i, "file_name": start + each} for i, each in enumerate(names)]
    said = [(11, "second"), (10, "first"), (11, "again"), (13, "elsewhere"),
            (99, "of no image")]  # fmt: skip
    annotations = [{"image_id": i, "id": n, "caption": each} for n, (i, each) in enumerate(said)]
    content = json.dumps({"images": images, "annotations": annotations}).encode()
    pictures = {f"train2017/{each}": file(noise(i), "JPEG") for i, each in enumerate(names[:3])}
    return fill(place, pictures | {"annotations/captions_train2017.json": content})


def test_a_coco_file_is_read(tmp_path, capsys):
    wanted = [("first",), ("second", "again"), ()]
    assert kept(done(coco(tmp_path / "a"))) == wanted
    assert kept(done(coco(tmp_path / "b", "train2017/"))) == wanted
    # Outside of the folder of the images, as it is published.
    apart = coco(tmp_path / "c")
    named = str(apart / "annotations" / "captions_train2017.json")
    assert kept(done(apart / "train2017", "--caption", named)) == wanted
    wrong = fill(tmp_path / "d", pictures() | {"x.json": b"[1]", "y.json": b'{"images": [{}]}'})
    assert "x.json: no COCO file" in refused(wrong, capsys, "--caption", "x.json")
    assert "z.json: neither in" in refused(wrong, capsys, "--caption", "z.json")
    broken = b'{"images": [{"id": 1}], "annotations": []}'
    wrong = fill(tmp_path / "e", pictures() | {"captions.json": broken})
    assert "no 'file_name'" in refused(wrong, capsys, "--caption", "captions.json")
    assert "captions" not in manifest(done(wrong))  # and what is not named is passed over


def test_an_image_gets_the_captions_of_no_other_of_its_name(tmp_path, capsys):
    def content(*named: str) -> bytes:
        images = [{"id": i, "file_name": each} for i, each in enumerate(named)]
        said = [{"image_id": i, "caption": f"of {each}"} for i, each in enumerate(named)]
        return json.dumps({"images": images, "annotations": said}).encode()

    images = {f"{place}{i}.png": file(noise(n)) for n, (place, i) in enumerate(
        [("a/", 0), ("a/", 1), ("b/", 0), ("b/", 2)])}  # fmt: skip
    # Of two that may be meant, none.
    source = fill(tmp_path / "x", images | {"captions.json": content("0.png", "1.png")})
    capsys.readouterr()
    assert kept(done(source)) == [(), ("of 1.png",), (), ()]
    said = "captions.json: 2 images get no caption, as several end in the same name, such as 0.png"
    assert said in capsys.readouterr().err
    dest = done(source, "--caption", "captions.json")
    assert kept(dest) == [(), ("of 1.png",), (), ()] and said in capsys.readouterr().err
    # A name is first one below the folder of its file.
    files = {"a/captions.json": content("0.png"), "b/captions.json": content("0.png", "2.png")}
    source = fill(tmp_path / "y", images | files)
    assert kept(done(source)) == [("of 0.png",), (), ("of 0.png",), ("of 2.png",)]
    whole = content("a/0.png", "b/0.png")
    source = fill(tmp_path / "z", images | {"annotations/captions.json": whole})
    assert kept(done(source)) == [("of a/0.png",), (), ("of b/0.png",), ()]


@pytest.mark.parametrize("kind", ["folder", "tar", "jsonl"])
def test_the_first_image_may_be_without_a_caption(tmp_path, kind):
    more = {f"{i}.json": json.dumps({"caption": f"of {i}"}).encode() for i in range(2, 5)}
    more["1.json"] = b'{"other": 1}'
    if kind == "jsonl":
        lines = [{"file_name": f"{i}.png"} | ({"text": f"of {i}"} if i > 1 else {})
                 for i in range(5)]  # fmt: skip
        more = {"metadata.jsonl": "\n".join(map(json.dumps, lines)).encode()}
    make, name = (tarred, "x.tar") if kind == "tar" else (fill, "x")
    assert kept(done(make(tmp_path / name, pictures() | more))) == of(
        ["", "", "of 2", "of 3", "of 4"]
    )


def test_what_is_wanted_and_not_there_is_refused(tmp_path, capsys):
    source = fill(tmp_path / "x", pictures())
    said = "has no captions; leave out what asks for them: --captions, --caption or --encode"
    assert said in refused(source, capsys, "--captions")
    assert "--caption alt is no column" in refused(source, capsys, "--caption", "alt")
    tar = tarred(tmp_path / "x.tar", pictures())
    assert said in refused(tar, capsys, "--captions")
    assert "no member .alt beside" in refused(tar, capsys, "--caption", "alt")
    # A kind that never has any.
    assert said in refused(cifar10(tmp_path / "c.tar.gz"), capsys, "--captions")


def test_a_line_of_a_table_ends_at_newlines_alone(tmp_path):
    row = json.dumps({"file_name": "0.png", "text": "a\u2028b\x85c"}, ensure_ascii=False)
    source = fill(tmp_path / "x", pictures(1) | {"metadata.jsonl": row.encode()})
    assert kept(done(source)) == [("a b c",)]


def prompted(kind: str, place: Path) -> Path:
    """Images with words where none are looked for: json.prompt, a column; .alt and .cls, too."""
    more = {f"{i}.json": json.dumps({"width": 4, "prompt": w}).encode()
            for i, w in enumerate(WORDS)}  # fmt: skip
    more |= {f"{i}.alt": b"x" for i in range(5)} | {f"{i}.cls": b"0" for i in range(5)}
    if kind == "tar":
        return tarred(place / "x.tar", dict(sorted((pictures() | more).items())))
    if kind == "folder":
        return fill(place / "x", pictures() | more)
    if kind == "csv":
        return fill(place / "x", pictures() | rows("prompt", "csv"))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": each, "path": None} for each in pictures().values()]
    table = pyarrow.table({"image": images, "prompt": list(WORDS), "width": [4] * 5})
    parquet.write_table(table, place / "x.parquet")
    return place / "x.parquet"


@pytest.mark.parametrize("kind", ["tar", "folder", "csv", "parquet"])
def test_a_mistyped_caption_is_refused_with_what_is_there(tmp_path, capsys, kind):
    """Before anything is written; the same where captions are wanted and none has a usual name."""
    source = prompted(kind, tmp_path)
    start, there = ("json.", "alt, cls, json.width, json.prompt")
    if kind in ("csv", "parquet"):
        start, there = "", "prompt" if kind == "csv" else "image, prompt, width"
    error = refused(source, capsys, "--caption", f"{start}promt")
    assert f"there are: {there}; did you mean '{start}prompt'?" in error
    for option in (["--captions"], ["--encode", "minilm"]):
        error = refused(source, capsys, *option)
        assert (
            "has no captions by their usual names (caption, captions, text, texts, .txt)" in error
        )
        assert f"which of these they are: {there if kind != 'parquet' else 'prompt'};" in error
    assert not (tmp_path / "refused").exists()
    # One of two is enough to be wrong; and the right one is taken.
    assert "promt" in refused(source, capsys, "--caption", f"{start}prompt,{start}promt")
    assert kept(done(source, "--caption", f"{start}prompt")) == of(WORDS)


@pytest.mark.parametrize("kind", ["tar", "folder", "csv", "jsonl", "coco", "parquet"])
def test_named_captions_that_hold_no_words_are_refused(tmp_path, capsys, kind):
    """A field that is there and empty in every image; without being named it is a note."""
    more = fields("caption", [None, 1, "", [], " "])
    if kind in ("csv", "jsonl"):
        more = rows("caption", kind, [""] * 5)
    if kind == "coco":
        more = {"captions.json": json.dumps({"annotations": [], "images": [
            {"id": i, "file_name": f"{i}.png"} for i in range(5)]}).encode()}  # fmt: skip
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        images = [{"bytes": each, "path": None} for each in pictures().values()]
        table = pyarrow.table({"image": images, "caption": ["", None, " ", "", ""]})
        source = tmp_path / "x.parquet"
        parquet.write_table(table, source)
    else:
        make, name = (tarred, "x.tar") if kind == "tar" else (fill, "x")
        source = make(tmp_path / name, dict(sorted((pictures() | more).items())))
    named = {"tar": "json.caption", "folder": "json.caption", "coco": "captions.json"}
    wanted = [["--caption", named.get(kind, "caption")], ["--encode", "minilm"]]
    for option in wanted[: 1 if kind == "coco" else 2]:
        error = refused(source, capsys, *option)
        assert "no caption of any of the 5 images" in error or "names none of the 5" in error
        assert not (tmp_path / "refused").exists()
        if kind == "folder":
            assert "1 no words, left out; 2 empty, left out" in error
    assert prepare(source, tmp_path / "fine", "--workers", "1", resolutions="4") == 0


def test_a_coco_file_of_other_images_is_refused(tmp_path, capsys):
    source = fill(tmp_path / "x", pictures())
    apart = coco(tmp_path / "y") / "annotations" / "captions_train2017.json"
    error = refused(source, capsys, "--caption", str(apart))
    assert "names none of the 5 images" in error and "it has 000000000000.jpg" in error
    assert "there are 0.png, 1.png, 2.png, ..." in error


def test_mistyped_labels_and_images_are_refused_with_what_is_there(tmp_path, capsys):
    tar = prompted("tar", tmp_path)
    error = refused(tar, capsys, "--label", "json.widht")
    assert "there are: alt, cls, json.width, json.prompt; did you mean 'json.width'?" in error
    assert "did you mean 'cls'?" in refused(tar, capsys, "--label", "clss")
    error = refused(tar, capsys, "--image", "pngg")
    assert "there are: alt, cls, json, png; did you mean 'png'?" in error
    table = prompted("csv", tmp_path)
    error = refused(table, capsys, "--label", "promt")
    assert "there are: file_name, prompt; did you mean 'prompt'?" in error


def test_names_of_strangers_are_harmless_and_few(tmp_path, capsys):
    odd = {"a\x1b[2J": 1, "b" * 500: 2} | {f"f{i}": i for i in range(50)}
    tar = tarred(tmp_path / "x.tar", pictures(1) | {"0.json": json.dumps(odd).encode()})
    error = refused(tar, capsys, "--caption", "json.c")
    assert "\x1b" not in error and "json.a\\x1b[2J" in error and "f9, ..." in error
    assert len(error) < 500


def test_words_that_are_labels_are_no_captions(tmp_path):
    source = tarred(tmp_path / "x.tar", pictures() | texts(["cat", "dog", "cat", "dog", "eel"]))
    dest = done(source, "--label", "txt")
    assert manifest(dest)["classes"] == 3 and "captions" not in manifest(dest)


# What is kept of them.


@pytest.mark.parametrize(
    ("value", "wanted", "problem"),
    [
        ("  two \t words\n", ["two words"], None),
        (b"\xef\xbb\xbfone\n\n two\r\n", ["one", "two"], None),
        ("bell\x07 and \x1b[2J", ["bell and [2J"], "1 with control characters"),
        ("a\u2028b\x85c", ["a b c"], None),
        (b"caf\xe9\nfine", ["fine"], "1 not UTF-8"),
        ("a cat\na dog".encode("utf-16"), [], "1 not UTF-8"),
        ("half \ud83d", [], "1 not UTF-8"),
        (["one", 2, "three", ["four"]], ["one", "three"], "2 no words"),
        (7, [], "1 no words"),
        (" \t", [], "1 empty"),
        ("", [], "1 empty"),
        (b"", [], None),
        (None, [], None),
        (TOO_LARGE, [], "1 in files or cells of more than 1,048,576 bytes"),
        (NO_JSON, [], "1 in .json that is not JSON"),
        ("é" * 3000, ["é" * 2048], "1 of more than 4,096 bytes, cut"),
        ("x" + "é" * 3000, ["x" + "é" * 2047], "1 of more than 4,096 bytes, cut"),
        ([str(i) for i in range(103)], [str(i) for i in range(100)], "3 beyond the first 100"),
    ],
)
def test_a_caption_is_a_line_of_utf8_and_what_is_none_is_counted(value, wanted, problem):
    problems: Counter[str] = Counter()
    assert cleaned([value], problems) == wanted
    said = [f"{count} {kind}" for kind, count in problems.items()]
    assert [each.startswith(problem or "-") for each in said] == [True] * (problem is not None)


def test_large_and_broken_files_are_left_out_and_said(tmp_path, capsys):
    large = b"x" * (spoken.LARGEST + 1)
    about = {"0.json": b'{"caption": "good"}', "1.json": b"{", "2.json": large}
    for source in (
        fill(tmp_path / "x", pictures() | about),
        tarred(tmp_path / "x.tar", pictures() | about),
        zipped(tmp_path / "x.zip", pictures() | about),
    ):
        assert kept(done(source)) == [("good",), (), (), (), ()]
        error = capsys.readouterr().err
        assert "captions: 1 in .json that is not JSON, left out" in error
        assert "captions: 1 in files or cells of more than 1,048,576 bytes, left out" in error
        assert "captions: 4 of 5 images have none" in error


def test_a_large_cell_is_left_out(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": each, "path": None} for each in pictures(3).values()]
    large = "x " * spoken.LARGEST
    for number, cells in enumerate((["a", large, "b"], [["a"], ["c", large], ["b"]])):
        place = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"image": images, "text": cells}), place)
        assert kept(done(place)) == [("a",), (), ("b",)]
        assert "1 in files or cells of more than" in capsys.readouterr().err


# Where they lie.


def test_they_are_in_the_json_of_each_sample_and_come_back_from_there(tmp_path):
    dest = done(fill(tmp_path / "x", pictures() | texts()))
    found = members(dest)
    about = [json.loads(found[f"{i:09}.json"]) for i in range(5)]
    assert [tuple(each.get("captions", ())) for each in about] == of(WORDS)
    assert (dest / "text" / "captions.txt").read_text().splitlines() == [
        "a red star", "ein grüner Ring", "円",
    ]  # fmt: skip
    again = tmp_path / "again"
    assert prepare(dest / "shards", again, "--image", "4.png", resolutions="4") == 0
    assert kept(again) == of(WORDS)


def test_a_set_without_captions_is_what_it_was(tmp_path):
    dest = done(fill(tmp_path / "x", pictures()))
    said = manifest(dest)
    assert "captions" not in said and not {"captions", "caption"} & set(said["source"])
    assert not (dest / "text").exists()
    assert set(json.loads(members(dest)["000000000.json"])) == {"name", "size"}


def test_the_bytes_do_not_depend_on_processes_or_an_interruption(tmp_path):
    source = fill(tmp_path / "x", pictures(9) | {f"{i}.txt": b"n %d" % (i % 4) for i in range(9)})
    one, two = tmp_path / "one", tmp_path / "two"
    assert prepare(source, one, "--workers", 1, "--shard-images", 2) == 0
    broken = source / "5.png"
    good = broken.read_bytes()
    broken.write_bytes(bytes(len(good)))
    assert prepare(source, two, "--workers", 2, "--shard-images", 2) == 2
    assert (two / ".progress").is_dir() and not (two / "text").exists()
    broken.write_bytes(good)
    assert prepare(source, two, "--workers", 2, "--shard-images", 2) == 0
    assert digests(one) == digests(two)


def test_captions_of_images_left_out_are_left_out(tmp_path):
    source = fill(tmp_path / "x", pictures() | texts(["a", "b", "c", "d", "e"]))
    (source / "1.png").write_bytes(b"no image")
    assert kept(done(source, "--skip-broken", "1")) == of(["a", "c", "d", "e"])


def test_shards_begun_without_captions_are_written_again(tmp_path):
    """As by an earlier version, which noted none."""
    source = fill(tmp_path / "x", pictures() | texts())
    (source / "4.png").write_bytes(bytes(len(file(noise(4)))))
    dest = tmp_path / "dest"
    assert prepare(source, dest, "--shard-images", 2, "--workers", 1) == 2
    for noted in (dest / ".progress").glob("*.npz"):
        with np.load(noted) as opened:
            arrays = dict(opened)
        about = json.loads(arrays["about"].tobytes())
        del about["captions"]
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(noted, **arrays)
    (source / "4.png").write_bytes(file(noise(4)))
    assert prepare(source, dest, "--shard-images", 2, "--workers", 1) == 0
    assert kept(dest) == of(WORDS)


def test_captions_that_changed_since_are_named(tmp_path, capsys):
    source = fill(tmp_path / "x", pictures() | texts())
    dest = tmp_path / "dest"
    assert prepare(source, dest) == 0
    assert prepare(source, dest) == 0
    time.sleep(0.02)
    (source / "1.txt").write_text("another")
    capsys.readouterr()
    assert prepare(source, dest) == 2
    assert "the captions of 1 images are others" in capsys.readouterr().err
    (source / "1.txt").write_text(WORDS[1])
    assert prepare(source, dest) == 0
    (source / "2.txt").write_text("one more")
    assert prepare(source, dest) == 2


def test_other_words_or_fewer_files_of_captions_are_another_source(tmp_path):
    table = fill(tmp_path / "table", pictures() | rows("text", "csv"))
    beside = fill(tmp_path / "beside", pictures() | texts())
    for source in (table, beside):
        assert prepare(source, tmp_path / f"{source.name}-dest") == 0
    path = table / "metadata.csv"
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"a red star", b"a red moon"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy keeps them
    (beside / "1.txt").unlink()
    for source in (table, beside):
        assert prepare(source, tmp_path / f"{source.name}-dest") == 2


def test_a_set_without_captions_says_that_its_source_has_some(tmp_path, capsys):
    source = fill(tmp_path / "x", pictures())
    dest = tmp_path / "dest"
    assert prepare(source, dest) == 0
    fill(source, texts())
    assert prepare(source, dest) == 0
    assert "the source has captions (.txt beside images)" in capsys.readouterr().err


# Damaged and hostile sets.


@pytest.fixture
def dest(tmp_path) -> Path:
    return done(fill(tmp_path / "x", pictures() | texts()))


@pytest.mark.parametrize("name", stored.NAMES)
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_or_absent_file_is_named(dest, name, gone):
    path = dest / "text" / name
    if gone:
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: (changed since|cannot be read)"):
        kept(dest)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": "x"},
        {"unique": -1},
        {"total": True},
        {"origin": 3},
        {"more": 1},
    ],
)
def test_a_manifest_that_says_something_else_of_captions_is_refused(dest, change):
    said = manifest(dest)
    said["captions"] |= change
    rewrite_as(dest, said)
    with pytest.raises(UserError, match="dataset.json"):
        Manifest.read(dest)


@pytest.mark.parametrize("size", [True, 3.0, "3", -1, None])
def test_the_size_of_a_file_is_a_whole_number(dest, size):
    said = manifest(dest)
    said["captions"]["files"][0]["bytes"] = size
    rewrite_as(dest, said)
    with pytest.raises(UserError, match=r"bytes of text/captions.txt must be a whole number"):
        Manifest.read(dest)


def test_the_manifest_counts_captions_and_images_without(dest):
    said = manifest(dest)["captions"]
    assert (said["unique"], said["total"], said["bare"]) == (3, 4, 1)


@pytest.mark.parametrize("place", ["../../etc/passwd", "text/../x", "/etc/passwd"])
def test_a_manifest_that_leads_outside_is_refused(dest, place):
    said = manifest(dest)
    said["captions"]["files"][0]["file"] = place
    rewrite_as(dest, said)
    with pytest.raises(UserError, match="captions are other files"):
        Manifest.read(dest)


def rewrite_as(dest: Path, said: dict) -> None:
    """`dataset.json` with a fingerprint that fits."""
    from diffusion_pl.data.shard_format import _digest_of

    said = {key: value for key, value in said.items() if key != "fingerprint"}
    (dest / "dataset.json").write_text(json.dumps(said | {"fingerprint": _digest_of(said)}))


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("numbers.npy", np.array([0, 1, 2, 9], np.uint32), "captions that are not there"),
        ("numbers.npy", np.array([0, 1, 2, 0, 0], np.uint32), "another number of captions"),
        ("starts.npy", np.array([0, 1, 2, 2, 4]), "another number of images"),
        ("starts.npy", np.array([0, 3, 2, 2, 3, 4]), "no order"),
        ("starts.npy", np.array([0, 1, 2, 2, 3, 5]), "images that end elsewhere"),
        ("lines.npy", np.array([0, 11, 11, 32]), "lines that end elsewhere|no order"),
        ("lines.npy", np.array([0.0, 11, 11, 32]), "another kind of array"),
        ("lines.npy", np.array([[0, 11, 11, 32]]), "another kind of array"),
    ],
)
def test_arrays_that_do_not_fit_one_another_are_refused(dest, name, array, problem):
    np.save(dest / "text" / name, array)
    data = (dest / "text" / name).read_bytes()
    said = Manifest.read(dest).captions
    place = stored.NAMES.index(name)
    import hashlib

    entry = stored.StoredFile(f"text/{name}", len(data), hashlib.sha256(data).hexdigest())
    files = [*said.files[:place], entry, *said.files[place + 1 :]]
    rewrite(dest, captions=dataclasses.replace(said, files=files))
    with pytest.raises(UserError, match=problem):
        kept(dest)


def test_a_pipe_in_the_place_of_captions_is_refused(dest):
    path = dest / "text" / "lines.npy"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe"):
        kept(dest)
    shutil.rmtree(dest / "text")
    with pytest.raises(UserError, match="cannot be read"):
        kept(dest)
