"""Tables of others: a damaged lmdb ends no command, and no cell takes the memory."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import lmdb
import pyarrow
import pytest
from pyarrow import parquet

from diffusion_pl.cli import main
from diffusion_pl.data.lmdb_reading import Child
from diffusion_pl.data.sources import tables
from diffusion_pl.data.sources.base import SourceSpec
from diffusion_pl.data.sources.open import open_originals


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An lmdb of more than one level of pages, and what it holds."""
    folder = tmp_path_factory.mktemp("base") / "church_lmdb"
    source = random.Random(1)
    content = {b"%040x" % (7919 * n): source.randbytes(n * 11 % 900 + 100) for n in range(400)}
    with lmdb.open(str(folder), map_size=2**22) as opened, opened.begin(write=True) as transaction:
        for key, data in content.items():
            transaction.put(key, data)
    return (folder / "data.mdb").read_bytes(), content


def put(tmp_path, data):
    folder = tmp_path / "church_lmdb"
    folder.mkdir(exist_ok=True)
    (folder / "data.mdb").write_bytes(data)
    return str(folder)


def test_a_whole_lmdb_is_read_in_a_child_as_it_is(base, tmp_path):
    data, content = base
    _, originals = open_originals(SourceSpec(put(tmp_path, data)), [8])
    found = [originals.reader.read(number) for number in range(originals.count)]
    assert {each.name.encode(): each.image for each in found} == content


LEAF = 2  # of lmdb's flags of a page, at byte 10 of its head
HEAD = 16  # bytes; then where each node begins, 2 bytes each


def changed_page(data, source, number):
    """Two bytes of a leaf page become others: its flags, or the size of one of its values."""
    leaves = [
        place
        for place in range(2 * 4096, len(data), 4096)
        if struct.unpack_from("<H", data, place + 10)[0] == LEAF
    ]
    changed, leaf = bytearray(data), source.choice(leaves)
    if number % 2:
        struct.pack_into("<H", changed, leaf + 10, source.randrange(65536))
    else:
        [node] = struct.unpack_from("<H", data, leaf + HEAD + 2 * source.randrange(3))
        struct.pack_into("<H", changed, leaf + node + 2, source.randrange(1, 4000))
    return bytes(changed)


def test_mutants_that_would_end_the_process_are_one_line(base, tmp_path):
    data, _ = base
    source, told = random.Random(0), []
    for turn in range(16):
        path = put(tmp_path, changed_page(data, source, turn))
        try:
            _, originals = open_originals(SourceSpec(path), [8])
            for number in range(originals.count):
                found = originals.reader.read(number)
                assert isinstance(found.image, bytes)
        except ValueError as error:
            told.append(str(error))
            assert "data.mdb: " in told[-1] and "\n" not in told[-1]
    assert any("reading it ended the process" in line for line in told), told


def test_a_command_ends_in_one_line_with_a_mutant(base, tmp_path, capsys):
    data, _ = base
    source = random.Random(0)
    words = ["--resolutions", "8", "--workers", "1"]
    for number in range(3):
        path = put(tmp_path, changed_page(data, source, number))
        assert main(["prepare", path, str(tmp_path / f"to{number}"), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines if not line.startswith("prepar"))


def test_a_fork_leaves_the_child_of_its_parent_alone(base, tmp_path):
    data, content = base
    key, value = next(iter(content.items()))
    child = Child(Path(put(tmp_path, data)) / "data.mdb", 10_000)
    process = os.fork()
    if process == 0:
        child.__del__()
        os._exit(0)
    os.waitpid(process, 0)
    assert child.value(key) == value
    with pytest.raises(ValueError, match="gone or too large"):
        child.value(b"absent")
    with pytest.raises(ValueError, match="gone or too large"):
        Child(child.path, 50).value(key)
    child.end()
    child.end()


def table(tmp_path, **columns):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
    return path


def opened(path, **asked):
    return open_originals(SourceSpec(str(path), **asked), [8])[1]


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_a_cell_of_more_than_an_image_is_refused_by_its_row(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tables, "LARGEST_FILE", 10_000)
    cells = [b"a" * 10_000, b"b" * 10_001, b"c"]
    originals = opened(table(tmp_path, image=pyarrow.array(cells, kind)))
    assert originals.reader.read(0).image == cells[0]
    with pytest.raises(ValueError, match=r"x.parquet:1 is too large for an image"):
        originals.reader.read(1)
    assert originals.reader.read(2).image == cells[2]


def test_a_path_as_long_as_a_book_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST_FILE", 10_000)
    cells = [{"bytes": b"a", "path": "p" * 10_001}] * 2
    with pytest.raises(ValueError, match=r"x.parquet:0 is too large"):
        opened(table(tmp_path, image=cells)).reader.read(0)


def test_a_group_of_more_than_all_its_images_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST_FILE", 10_000)
    originals = opened(table(tmp_path, image=[os.urandom(100_000), b"b"]))
    with pytest.raises(ValueError, match=r"2 rows of column 'image' have 1\d\d,\d{3} bytes, more"):
        originals.reader.read(1)


def test_rows_are_read_one_at_a_time(tmp_path):
    """A dictionary has a repeated cell once in the file; a row group of it may take gigabytes."""
    cell = bytes(2**20)
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"image": [cell] * 100}), path)
    assert path.stat().st_size < 2**21
    originals = opened(path)
    before = pyarrow.total_allocated_bytes()
    for number in (0, 90, 3):
        assert originals.reader.read(number).image == cell
    assert pyarrow.total_allocated_bytes() - before < 2**25


def test_rows_in_any_order_are_those_of_the_table(tmp_path):
    cells = [b"%03d" % number for number in range(30)]
    originals = opened(table(tmp_path, image=cells))
    order = [*range(30), *random.Random(0).sample(range(30), 30)]
    assert [originals.reader.read(number).image for number in order] == [
        cells[number] for number in order
    ]


def test_a_label_as_long_as_a_book_is_refused(tmp_path):
    path = table(tmp_path, image=[b"a", b"b"], label=["cat", "d" * 1001])
    with pytest.raises(ValueError, match=r"column 'label' has a label of more than 1,000 bytes"):
        opened(path)
    assert opened(path, labels=False).count == 2
