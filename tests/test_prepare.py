"""Prepared shards are what any reader of tars reads, the same bytes however they came to be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from prepared import cifar10, digests, file, files, fill, manifest, members, noise, pixels, prepare

from diffusion_pl import cli, locks
from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.reduce import FILTERS
from diffusion_pl.data.shard_format import Manifest, open_index
from diffusion_pl.data.synthetic import Synthetic

SYNTHETIC = ("--count", 90, "--shard-images", 10)


@pytest.fixture
def photographs(tmp_path):
    return fill(tmp_path / "photographs", files(7, 20, 16))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """An undisturbed run, for others to be held against."""
    dest = tmp_path_factory.mktemp("undisturbed") / "shapes"
    assert prepare("synthetic", dest, *SYNTHETIC, "--workers", 1) == 0
    return dest


def test_webdataset_reads_the_shards(photographs, tmp_path):
    """The tars' own reader, which knows nothing of ours, finds every image under its key."""
    dest = tmp_path / "dest"
    words = ("--labels", "--shard-images", 3, "--workers", 2)
    assert prepare(photographs, dest, *words, resolutions="8,16") == 0
    shards = sorted(map(str, (dest / "shards").iterdir()))
    assert [Path(shard).name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    samples = []
    for shard in shards:
        with open(shard, "rb") as stream:
            found = webdataset.tariterators.tar_file_expander([{"url": shard, "stream": stream}])
            samples += list(webdataset.tariterators.group_by_keys(found))
    originals = sorted(files(7, 20, 16).items())
    assert [sample["__key__"] for sample in samples] == [f"{i:09}" for i in range(7)]
    for sample, (name, data) in zip(samples, originals, strict=True):
        square = Image.open(io.BytesIO(data)).crop((2, 0, 18, 16))
        for side in (16, 8):
            expected = FILTERS["lanczos"](square, (side, side))
            assert np.array_equal(
                pixels(sample[f"{side}.png"]), np.asarray(expected).transpose(2, 0, 1)
            )
        assert sample["cls"] == (b"0" if name.startswith("a/") else b"1")
        assert json.loads(sample["json"]) == {"name": name, "size": [20, 16]}
    said = manifest(dest)
    assert (said["count"], said["classes"], said["class_names"]) == (7, 2, ["a", "b"])
    assert [shard["count"] for shard in said["shards"]] == [3, 3, 1]
    assert said["resolutions"] == [16, 8]
    assert not (dest / ".progress").exists()


def test_the_index_leads_to_every_image_by_its_bytes(photographs, tmp_path):
    dest = tmp_path / "dest"
    prepare(photographs, dest, "--labels", "--shard-images", 3, resolutions="16,8")
    said = Manifest.read(dest)
    index = open_index(dest, said)
    contents = members(dest)
    assert index["shard"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert index["label"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    for key, row in enumerate(index):
        tar = (dest / said.shards[row["shard"]].file).read_bytes()
        for side in (16, 8):
            start = int(row[f"offset_{side}"])
            data = tar[start : start + int(row[f"length_{side}"])]
            assert data == contents[f"{key:09}.{side}.png"]
            assert zlib.crc32(data) == row[f"crc_{side}"]
    for shard in said.shards:
        path = dest / shard.file
        assert path.stat().st_size == shard.bytes
        assert digests(dest)[shard.file] == shard.sha256
    assert digests(dest)["index.npy"] == said.index_sha256


def test_unlabelled_images_have_no_class_member(photographs, tmp_path):
    dest = tmp_path / "dest"
    prepare(photographs, dest)
    assert not [name for name in members(dest) if name.endswith(".cls")]
    assert open_index(dest, Manifest.read(dest))["label"].tolist() == [-1] * 7
    assert (manifest(dest)["classes"], manifest(dest)["class_names"]) == (0, None)


def test_fingerprints_are_those_of_the_same_images_as_a_source(photographs, shapes, tmp_path):
    synthetic = Synthetic(90, 8).open()
    assert manifest(shapes)["fingerprints"] == {"8": synthetic.fingerprint}
    assert manifest(shapes)["class_names"][0] == "disc"
    prepare(photographs, tmp_path / "dest", "--labels", resolutions="16,8")
    for side in (16, 8):
        folder = ImageFolder(str(photographs), side, labels=True).open()
        assert manifest(tmp_path / "dest")["fingerprints"][str(side)] == folder.fingerprint


def test_synthetic_scenes_are_drawn_at_each_resolution(tmp_path):
    """A reduction of 32 px would not be what `Synthetic` draws at 16."""
    prepare("synthetic", tmp_path / "x", "--count", 5, "--seed", 3, resolutions="32,16")
    for side in (32, 16):
        drawn = Synthetic(5, side, 3).open()
        assert manifest(tmp_path / "x")["fingerprints"][str(side)] == drawn.fingerprint
    assert manifest(tmp_path / "x")["filter"] == "drawn"


@pytest.mark.parametrize(("split", "count"), [("train", 15), ("test", 3)])
def test_cifar10_as_raw_bytes_is_cifar10(split, count, tmp_path):
    """At 32 px the pixels themselves; below, by the filter `area`, a source's own means."""
    archive, dest = cifar10(tmp_path / "cifar.tar.gz"), tmp_path / "dest"
    words = ("--split", split, "--encoding", "raw", "--filter", "area", "--shard-images", 4)
    assert prepare(archive, dest, *words, resolutions="32,16") == 0
    source = CIFAR10(str(archive), split)
    said = manifest(dest)
    assert (said["name"], said["count"]) == (f"cifar10-{split}-subset{count}", count)
    assert (said["classes"], said["class_names"][9]) == (10, "truck")
    assert said["fingerprints"]["32"] == source.open().fingerprint
    assert said["fingerprints"]["16"] == source.open(16).fingerprint
    data = members(dest)["000000002.32.npy"]
    assert len(data) == 128 + 3 * 32 * 32
    assert np.array_equal(pixels(data), source.open().read(torch.tensor([2]))[0])


@pytest.mark.parametrize("encoding", ["webp", "raw", "jpeg"])
def test_encodings_without_loss_hold_the_same_pixels(encoding, photographs, tmp_path):
    prepare(photographs, tmp_path / "png")
    prepare(photographs, tmp_path / "x", "--encoding", encoding)
    png, other = manifest(tmp_path / "png"), manifest(tmp_path / "x")
    assert (png["fingerprints"] == other["fingerprints"]) == (encoding != "jpeg")
    # Whatever was lost, the fingerprint is of what a reader gets out.
    ending = {"webp": "webp", "raw": "npy", "jpeg": "jpg"}[encoding]
    contents = members(tmp_path / "x")
    decoded = np.stack([pixels(contents[f"{key:09}.8.{ending}"]) for key in range(7)])
    loaded = fill(tmp_path / "again", {f"{i}.png": _png(each) for i, each in enumerate(decoded)})
    again = ImageFolder(str(loaded), 8, fit="exact").open()
    assert other["fingerprints"]["8"] == again.fingerprint


def _png(planes: np.ndarray) -> bytes:
    return file(Image.fromarray(planes.transpose(1, 2, 0)))


def test_padding_is_white_and_exact_keeps_every_pixel(tmp_path):
    fill(tmp_path / "wide", {"a.png": file(noise(0, 16, 8))})
    prepare(tmp_path / "wide", tmp_path / "pad", "--fit", "pad", resolutions="16")
    padded = pixels(members(tmp_path / "pad")["000000000.16.png"])
    assert (padded[:, :4] == 255).all() and (padded[:, 12:] == 255).all()
    assert np.array_equal(padded[:, 4:12], pixels(file(noise(0, 16, 8))))
    fill(tmp_path / "square", {"a.png": file(noise(0, 16, 16))})
    words = ("--fit", "exact", "--filter", "area")
    assert prepare(tmp_path / "square", tmp_path / "exact", *words, resolutions="16,8") == 0
    contents = members(tmp_path / "exact")
    assert np.array_equal(pixels(contents["000000000.16.png"]), pixels(file(noise(0, 16, 16))))
    assert prepare(tmp_path / "wide", tmp_path / "no", "--fit", "exact", resolutions="16") == 2


def test_the_number_of_workers_changes_no_byte(shapes, tmp_path):
    assert prepare("synthetic", tmp_path / "x", *SYNTHETIC, "--workers", 3) == 0
    assert digests(tmp_path / "x") == digests(shapes)


def _started(dest: Path, *words: object) -> int:
    """The command in a process of its own, which the test may kill."""
    child = os.fork()
    if not child:
        os.setsid()
        with contextlib.suppress(BaseException):
            prepare("synthetic", dest, *SYNTHETIC, "--workers", 2, *words)
        os._exit(0)
    return child


@pytest.mark.parametrize("shards", [0, 1, 4])
def test_killed_and_started_again_it_writes_the_same_bytes(shards, shapes, tmp_path, capsys):
    """kill -9 at any moment: what is whole stays, the rest is made again, bit for bit."""
    dest = tmp_path / "x"
    child = _started(dest)
    while len(list(dest.glob("shards/*.tar"))) < shards or not list(dest.glob("shards/.*.tmp")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "finished before it was killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (dest / "dataset.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in dest.glob(".progress/*.npz")}
    assert prepare("synthetic", dest, *SYNTHETIC) == 0
    assert digests(dest) == digests(shapes)
    assert len(kept) >= shards - 2  # a shard whose rows were not noted yet is made again
    # Started a third time it finds nothing to do.
    times = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    capsys.readouterr()
    assert prepare("synthetic", dest, *SYNTHETIC) == 0
    assert "is finished: 90 images, nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == times


def test_whole_shards_are_not_written_again(shapes, photographs, tmp_path):
    """Stopped by a broken image in its last shard, it goes on with that shard alone."""
    (photographs / "z.png").write_bytes(b"no image")
    dest = tmp_path / "x"
    assert prepare(photographs, dest, "--shard-images", 2, "--workers", 1) == 2
    tars = {path: path.stat().st_mtime_ns for path in dest.glob("shards/*.tar")}
    assert len(tars) == 3 and not list(dest.rglob(".*.tmp"))
    assert prepare(photographs, dest, "--shard-images", 2, "--skip-broken", 1) == 0
    assert {path: path.stat().st_mtime_ns for path in tars} == tars


def test_a_shard_that_was_cut_off_since_is_written_again(photographs, tmp_path):
    (photographs / "z.png").write_bytes(b"no image")
    words = ("--shard-images", 2, "--skip-broken", 1)
    prepare(photographs, tmp_path / "whole", *words)
    dest = tmp_path / "x"
    assert prepare(photographs, dest, "--shard-images", 2, "--workers", 1) == 2
    os.truncate(dest / "shards" / "000001.tar", 1000)
    (dest / "shards" / "000000.tar").unlink()
    assert prepare(photographs, dest, *words) == 0
    assert digests(dest) == digests(tmp_path / "whole")


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Orphans would write on in a folder that the next command takes at once."""
    dest = tmp_path / "x"
    child = _started(dest, "--count", 50_000)  # minutes of work
    while not list(dest.glob("shards/.*.tmp")):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with locks.hold(dest / ".progress" / "lock", "preparing"):  # at once
            before = {path: path.stat().st_mtime_ns for path in dest.glob("shards/*")}
            time.sleep(0.3)
            assert {path: path.stat().st_mtime_ns for path in dest.glob("shards/*")} == before
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def test_two_commands_do_not_write_one_folder(photographs, tmp_path, capsys):
    dest = tmp_path / "x"
    (dest / ".progress").mkdir(parents=True)
    with locks.hold(dest / ".progress" / "lock", "preparing") as lock:
        assert prepare(photographs, dest) == 2
    told = f"x: process {lock.holder.process} on {lock.holder.host} holds it (preparing); wait"
    assert told in capsys.readouterr().err
    assert prepare(photographs, dest) == 0


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_and_what_it_leads_to_stays(kind, tmp_path, capsys):
    begun = tmp_path / "x" / ".progress"
    begun.mkdir(parents=True)
    (tmp_path / "mine").write_text("kept")
    if kind == "link":
        (begun / "lock").symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(begun / "lock")
    words = ["prepare", "synthetic", str(tmp_path / "x"), "--resolutions", "8", "--count", "4"]
    assert cli.main(words) == 2
    assert "lock: is a link or not a regular file" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--filter", "area"), "filter is 'lanczos' there and 'area' now"),
        (("--fit", "pad"), "fit is 'crop' there and 'pad' now"),
        (("--encoding", "webp"), "encoding is 'png' there and 'webp' now"),
        (("--shard-images", 5), "shard_images is 1000 there and 5 now"),
        (("--labels",), "source.labels is None there and True now"),
        (("--name", "cats"), "name is 'folder-photographs' there and 'cats' now"),
    ],
)
def test_a_folder_of_another_data_set_is_refused_by_what_differs(
    words, complaint, photographs, tmp_path, capsys
):
    dest = tmp_path / "x"
    prepare(photographs, dest)
    before = digests(dest)
    assert prepare(f"{photographs}/./", dest) == 0  # the same folder in other words
    capsys.readouterr()
    assert prepare(photographs, dest, *words) == 2
    assert f"x: holds another data set: {complaint}; name another" in capsys.readouterr().err
    assert prepare(photographs, dest, resolutions="16,8") == 2
    assert "resolutions is [8] there and [16, 8] now" in capsys.readouterr().err
    assert digests(dest) == before


def test_a_source_that_has_changed_is_not_mixed_with_what_it_was(photographs, tmp_path, capsys):
    (photographs / "z.png").write_bytes(b"no image")
    dest = tmp_path / "x"
    assert prepare(photographs, dest, "--shard-images", 2, "--workers", 1) == 2
    (photographs / "z.png").unlink()
    assert prepare(photographs, dest, "--shard-images", 2) == 2
    assert "the source's images are others now" in capsys.readouterr().err
    # Before a first shard is whole nothing is mixed, so a mended source goes on.
    (photographs / "a" / "0.png").write_bytes(b"no image")
    assert prepare(photographs, tmp_path / "y") == 2
    (photographs / "a" / "0.png").unlink()
    assert prepare(photographs, tmp_path / "y", "--filter", "area") == 0


def test_a_set_that_an_earlier_version_began_is_finished(photographs, tmp_path):
    """Its notes know no sizes of the source's files."""
    (photographs / "z.png").write_bytes(b"no image")
    dest = tmp_path / "x"
    assert prepare(photographs, dest, "--shard-images", 2, "--workers", 1) == 2
    noted = dest / ".progress" / "settings.json"
    said = json.loads(noted.read_bytes())
    assert said["source"].pop("states")
    noted.write_text(json.dumps(said))
    assert prepare(photographs, dest, "--shard-images", 2, "--skip-broken", 1) == 0


def test_shards_of_an_earlier_box_bicubic_are_not_mixed_with_adms(photographs, tmp_path, capsys):
    """Begun when it was computed in another way, with a first shard whole."""
    (photographs / "z.png").write_bytes(b"no image")
    words = ("--filter", "box-bicubic", "--shard-images", 2, "--workers", 1)
    dest = tmp_path / "x"
    assert prepare(photographs, dest, *words) == 2
    noted = dest / ".progress" / "settings.json"
    said = json.loads(noted.read_bytes())
    assert said.pop("recipe")
    noted.write_text(json.dumps(said))
    capsys.readouterr()
    assert prepare(photographs, dest, *words, "--skip-broken", 1) == 2
    assert "recipe is None there and '2' now" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses the write alike."""
    dest = tmp_path / "x"
    message = tmp_path / "message"
    child = os.fork()
    if not child:
        with message.open("w") as stream, contextlib.redirect_stderr(stream):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            code = prepare("synthetic", dest, *SYNTHETIC, "--workers", 1)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    text = message.read_text()
    assert text.count("\n") == 1
    assert "000000.tar: cannot be written (File too large); free space or" in text
    assert not list(dest.rglob(".*.tmp"))
    assert prepare("synthetic", dest, *SYNTHETIC) == 0


def test_a_worker_that_is_killed_is_a_failure_and_not_a_wait(tmp_path, monkeypatch, capsys):
    def die(job, number, skip, advance):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("diffusion_pl.data.write_shards.write_shard", die)
    assert prepare("synthetic", tmp_path / "x", *SYNTHETIC) == 1
    assert "failed: a worker ended with code -9" in capsys.readouterr().err


def test_broken_images_are_named_unless_a_number_may_be_skipped(photographs, tmp_path, capsys):
    (photographs / "a" / "000.png").write_bytes(b"no image")
    (photographs / "b" / "001.png").write_bytes(file(noise(1, 40, 40))[:900])
    assert prepare(photographs, tmp_path / "x", "--workers", 1) == 2
    error = capsys.readouterr().err
    assert "photographs/a/000.png: not a PNG, JPEG or WebP image; pass over such images" in error
    assert prepare(photographs, tmp_path / "x", "--skip-broken", 1) == 2
    error = capsys.readouterr().err
    assert "b/001.png: broken image" in error and "broken image 2 of 1" in error
    assert prepare(photographs, tmp_path / "x", "--skip-broken", 2, "--shard-images", 2) == 0
    error = capsys.readouterr().err
    assert "skipped 2 images: 1 not a PNG, JPEG or WebP image, 1 broken image\n" in error
    assert "photographs/a/000.png: not a PNG" in error
    said = manifest(tmp_path / "x")
    assert said["count"] == 5 and set(said["skipped"]) == {"000000000", "000000004"}
    # Keys are places in the source, so the rest keep theirs.
    keys = sorted({name.partition(".")[0] for name in members(tmp_path / "x")})
    assert keys == [f"{key:09}" for key in (1, 2, 3, 5, 6)]
    assert [shard["count"] for shard in said["shards"]] == [1, 2, 1, 1]


def test_what_earlier_runs_skipped_counts(photographs, tmp_path, capsys):
    (photographs / "a" / "000.png").write_bytes(b"no image")
    (photographs / "z.png").write_bytes(b"no image")
    words = ("--shard-images", 2, "--workers", 1)
    for _ in range(2):  # as often as one likes
        assert prepare(photographs, tmp_path / "x", *words, "--skip-broken", 1) == 2
        assert "z.png" in capsys.readouterr().err
    assert prepare(photographs, tmp_path / "x", *words) == 2
    assert "a/000.png: not a PNG" in capsys.readouterr().err
    assert prepare(photographs, tmp_path / "x", *words, "--skip-broken", 2) == 0


def test_nothing_left_after_skipping_is_an_error(tmp_path, capsys):
    fill(tmp_path / "bad", {"a.png": b"", "b.png": b""})
    assert prepare(tmp_path / "bad", tmp_path / "x", "--skip-broken", 9) == 2
    assert "every image was skipped" in capsys.readouterr().err


def test_the_result_is_one_json_object_and_the_way_on(shapes, tmp_path, capsys):
    dest = tmp_path / "my shapes"
    assert prepare("synthetic", dest, *SYNTHETIC) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["images"], result["classes"], result["shards"]) == (90, 8, 9)
    assert result["fingerprint"] == manifest(dest)["fingerprint"]
    assert result["fingerprint"] == manifest(shapes)["fingerprint"]
    assert output.err.endswith(f"next:\n  {result['train']}\n")
    assert f"'data.dataset.path={dest}'" in result["train"]  # quoted for the shell


@pytest.mark.parametrize(
    ("words", "resolutions", "complaint"),
    [
        ((), "256,", "--resolutions: sides in pixels, such as 256,128,64"),
        ((), "8,8", "--resolutions: give each side once"),
        ((), "0", "--resolutions: 1 to 8192 pixels"),
        (("--filter", "bilinear"), "8", "--filter is lanczos, box-bicubic, area (got 'bilinear')"),
        (("--fit", "stretch"), "8", "--fit is crop, pad, exact (got 'stretch')"),
        (("--encoding", "gif"), "8", "--encoding is png, webp, raw, jpeg (got 'gif')"),
        (("--shard-images", 0), "8", "--shard-images must be positive"),
        (("--workers", -1), "8", "--workers must be positive"),
        (("--skip-broken", -1), "8", "--skip-broken at least 0"),
        (("--name", "../x"), "8", "--name: letters, digits and . _ - only"),
        (("--count", 5), "8", "--count does not apply to a source of kind folder"),
        (("--seed", 1), "8", "--seed does not apply to a source of kind folder"),
        (("--split", "test"), "8", "photographs: holds no splits such as train/ and test/"),
        (("--image", "png"), "8", "--image does not apply to a source of kind folder"),
    ],
)
def test_a_wrong_setting_is_one_line_and_writes_nothing(
    words, resolutions, complaint, photographs, tmp_path, capsys
):
    assert prepare(photographs, tmp_path / "x", *words, resolutions=resolutions) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_destination_that_is_something_else_is_refused(photographs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert prepare(photographs, tmp_path / "file") == 2
    assert "file: is a file" in capsys.readouterr().err
    assert prepare(photographs, photographs / "shards") == 2
    assert "lies in the source" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert prepare(photographs, tmp_path / "full") == 2
    assert "full: holds other files (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_changed_manifest_is_noticed(photographs, tmp_path):
    dest = tmp_path / "x"
    prepare(photographs, dest)
    said = manifest(dest)
    assert Manifest.read(dest).fingerprint == said["fingerprint"]
    for change in ({"count": 8}, {"format": 2}, {"name": "y"}, {"extra": 1}):
        (dest / "dataset.json").write_text(json.dumps(said | change))
        complaint = "format 2, this program reads 1" if "format" in change else "changed since"
        with pytest.raises(ValueError, match=rf"dataset\.json: {complaint}"):
            Manifest.read(dest)
    for text in ("", "[]", "{", "null"):
        (dest / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset\.json: not "):
            Manifest.read(dest)


def test_no_command_imports_torch_to_say_that_it_is_finished(photographs, tmp_path):
    """Answers at once: webdataset and torch are imported when a shard is to be written."""
    dest = tmp_path / "x"
    prepare(photographs, dest)
    code = (
        "import sys; from diffusion_pl import cli; "
        f"code = cli.main(['prepare', {str(photographs)!r}, {str(dest)!r}, '--resolutions', '8']); "
        "assert not {'torch', 'webdataset', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr


def test_prepare_works_where_there_are_no_experiments(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare("photographs", Path("x")) == 0
    assert (
        "data.dataset.path=x data.dataset.resolution=8 data.batch_size=4 "
        in capsys.readouterr().err
    )


def test_help_names_every_kind_of_source(capsys):
    assert cli.main(["prepare", "--help"]) == 0
    text = capsys.readouterr().out
    for kind in (".zip", "CIFAR-10", ".tar", "LSUN", ".parquet", "synthetic"):
        assert kind in text
