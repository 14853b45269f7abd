"""Credentials in addresses are refused, and nothing of them is kept or shown."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from pathlib import Path

import fsspec.config
import pytest
import torch
from homes import trained
from safetensors import safe_open
from test_trust import TINY

from diffusion_pl import config
from diffusion_pl.addresses import credential_in, masked
from diffusion_pl.cli import main
from diffusion_pl.config import Config, ConfigError
from diffusion_pl.io import cache as remote
from diffusion_pl.training import checkpoint as checkpoints

# hunter2 is the secret; what must be named instead of it.
SECRET = {
    "https://me:hunter2@host/set": "netrc",
    "https://hunter2@host/set": "netrc",
    "https://hunter2:@host/set": "netrc",
    "https://me%3Ahunter2@host/set": "netrc",
    "s3://me:hunter2@bucket/set": "AWS_PROFILE",
    "s3://me:hun/ter2+hunter2@bucket/set": "AWS_PROFILE",
    "s3://me:h@hunter2'x@bucket/set": "AWS_PROFILE",
    "zip://a.tar::https://hunter2@host/set": "netrc",
    "ftp://me:hunter2@host/set": "FSSPEC_FTP_PASSWORD",
    "abfs://me:hunter2@container@host/set": "AZURE_STORAGE_SAS_TOKEN",
    "simplecache::https://me:hunter2@host/set": "netrc",
    "zip://a.tar::s3://me:hunter2@bucket/set": "AWS_PROFILE",
    "https://host/set?token=hunter2": "netrc",
    "https://host/set?page=1&access_token=hunter2": "netrc",
    "https://host/set?Private-Token=hunter2": "netrc",
    "https://host/set?%74oken=hunter2": "netrc",
    "https://host/set?api_key=hunter2": "netrc",
    "webhdfs://host:50070/set?user.name=me&delegation=hunter2": "FSSPEC_WEBHDFS",
    "https://host/set?bearer=hunter2": "netrc",
    "https://host/set?PHPSESSID=hunter2": "netrc",
    "https://host/set?Policy=hunter2": "netrc",
    "https://host/set#access_token=hunter2": "netrc",
    "https://host/set;jsessionid=1;token=hunter2": "netrc",
    "https://bucket.s3.amazonaws.com/set?X-Amz-Expires=9&X-Amz-Signature=hunter2": "netrc",
    "https://storage.googleapis.com/set?X-Goog-Credential=hunter2": "netrc",
    "https://account.blob.core.windows.net/set?sv=2024&sig=hunter2": "netrc",
    "az://container/set?sig=hunter2": "AZURE_STORAGE_SAS_TOKEN",
    "gs://bucket/set?key=hunter2": "GOOGLE_APPLICATION_CREDENTIALS",
    "HTTPS://me:hunter2@host/set": "netrc",
    "https:/me:hunter2@host/set": "netrc",
    "//me:hunter2@host/set": "set ",
    "me:hunter2@host:/set": "set ",
    "me:hunter2@host.org/set": "set ",
    "https:///me:hunter2@host/set": "netrc",
    "https:me:hunter2@host/set": "netrc",
    "https//hunter2@host/set": "netrc",
    "https:/hunter2@host/set": "netrc",
    "s3:/me:hun/ter2+hunter2@bucket/set": "AWS_PROFILE",
    "ftp:/me:hunter2@host/set": "FSSPEC_FTP_PASSWORD",
    "https:/host/set?token=hunter2": "netrc",
    "https://host/hf_hunter2abcdefghijklmnopqrst/set": "netrc",
}
PLAIN = [
    "s3://bucket/key=value/set",
    "https://host:8080/set@v1?versionId=3&page=2",
    "http://[::1]:80/a@b",
    "abfs://container@account.dfs.core.windows.net/set",
    "sftp://me@host/set",
    "hf://datasets/user/set@main/data",
    "memory://token/secret/password",
    "data/password=x/token",
    "C:/me@home",
    "image:tag@sha256:0123",
    "me@host:/set",
    "16:9@x y",
    "C:/me:too@home",
    "runs/a:/b",
    "https:/host:8080/set@v1",
    "docker:/image:80/tag@sha256",
]


@pytest.mark.parametrize("address", SECRET)
def test_a_credential_is_found_and_masked(address):
    assert credential_in(address)
    if SECRET[address] != "set ":  # without a scheme it is refused, and never comes so far
        assert "hunter2" not in masked(f"cannot open {address} (or '{address}')")
        assert credential_in(masked(address)) is None


@pytest.mark.parametrize("address", PLAIN)
def test_addresses_without_one_stay_as_they_are(address):
    assert credential_in(address) is None
    assert masked(f"see {address}, or not") == f"see {address}, or not"


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, "a" * 10**6 + " b://x", "a://" * 250_000, "eyJ-" * 250_000, "b://" + ":" * 10**6,
     "https://h/?" + "a&" * 500_000, "Bearer " * 140_000],
    ids=range(7),
)  # fmt: skip
def test_a_text_that_others_made_long_takes_no_time(text):
    began = time.process_time()
    credential_in(text)
    masked(text)
    assert time.process_time() - began < 2


def test_a_header_in_an_error_is_masked():
    assert "hunter2" not in masked("401 for Authorization: Bearer hunter2hunter2")
    assert "hunter2" not in masked("Basic bWU6hunter2aHVudGVyMg==")


def test_a_complaint_of_the_parser_hides_a_header(capsys):
    assert main(["sample", "runs/tiny", "Authorization: Bearer hunter2hunter2"]) == 2
    said = capsys.readouterr().err
    assert "Unused Tokens" in said and "hunter2" not in said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("credentials"), TINY)


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A folder with experiments/, where commands run."""
    (tmp_path / "experiments").symlink_to(home / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words, capsys):
    """The line that refuses; nothing of the secret is shown or kept anywhere."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hunter2" not in captured.err
    for path in Path().rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    return captured.err


@pytest.mark.parametrize("address", SECRET)
def test_no_training_begins_with_one(address, place, capsys):
    said = refused(["train", "tiny", f"data.dataset.path={address}"], capsys)
    assert said.startswith("error: SET: data.dataset.path: holds ")
    assert SECRET[address] in said
    assert not Path("runs").exists()


@pytest.mark.parametrize("slashes", ["//", "/", "///"])
def test_an_address_with_an_equals_sign_is_no_key(slashes, place, capsys):
    word = f"https:{slashes}me:hunter2@host/set?page=1"
    for words in (["train", word], ["train", "tiny", word], ["check", word]):
        assert "command line: holds a password" in refused(words, capsys)


A = "https://me:hunter2@host/set"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (
            ["launch", "tiny", f"data.dataset.path={A}", "--dry-run"],
            "SET: data.dataset.path: holds",
        ),
        (
            ["launch", "tiny", "--sweep", f"data.dataset.path={A},x", "--dry-run"],
            "SET: data.dataset.path: holds",
        ),
        (["check", "tiny", f"data.dataset.path={A}"], "SET: data.dataset.path: holds"),
        (["check", A], "command line: holds"),
        (["prepare", A, "data/x", "--resolutions", "8"], "command line: holds"),
        (["prepare", "photos", "s3://a:hunter2@b", "--resolutions", "8"], "command line: holds"),
        (["evaluate", "runs/tiny", "--reference", A], "--reference: holds"),
        (["evaluate", "runs/tiny", f"--reference={A}"], "--reference: holds"),
        (
            ["evaluate", "runs/tiny", "--set", f"data.dataset.path={A}"],
            "SET: data.dataset.path: holds",
        ),
        (["sample", "runs/tiny", "--allow", A], "--allow: holds"),
        (["import", "safetensors", A, "runs/x"], "command line: holds"),
        (["train", "tiny", "--from", A], "--from: holds"),
        (["sample", "runs/tiny", "--no-such-thing", A], "--no-such-thing: holds"),
        (["train", "tiny", f"data={{path: '{A}'}}"], "SET: data: holds"),
    ],
)
def test_no_command_takes_one(words, where, place, capsys):
    assert refused(words, capsys).startswith(f"error: {where}")


@pytest.mark.parametrize(
    "text",
    [
        f"data: {{path: '{A}'}}",
        "s: hunter2\ndata: {path: 'https://me:${s}@host/set'}",
        f"evaluation: {{reference: '{A}'}}",
        f"data: {{shapes: [circle, '{A}']}}",
    ],
)
@pytest.mark.parametrize("command", ["check", "train", "launch"])
def test_no_experiment_holds_one(text, command, place, capsys):
    Path("mine").mkdir()
    for name in ("base", "tiny"):
        Path(f"mine/{name}.yaml").write_text(Path(f"experiments/{name}.yaml").read_text())
    file = Path("mine/x.yaml")
    file.write_text("defaults: tiny\n" + text)
    capsys.readouterr()
    assert main([command, str(file)]) == 2
    captured = capsys.readouterr()
    assert "holds a password before the host" in captured.err
    assert "netrc" in captured.err
    assert "hunter2" not in captured.err + captured.out
    assert not Path("runs").exists()


def test_a_malformed_setting_is_not_shown(place):
    for text in (f"data.dataset.path {A}", f"={A}", f"a..b={A}"):
        with pytest.raises(ConfigError) as error:
            config.load("tiny", [text])
        assert "hunter2" not in str(error.value)


class Gate(http.server.BaseHTTPRequestHandler):
    """Sends on to a signed address that fails; gives `set` to who has the header."""

    def do_GET(self):
        if self.headers.get("Authorization") == "Bearer hunter2":
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        elif "X-Amz-Signature" in self.path:
            self.send_error(503)
        else:
            self.send_response(302)
            self.send_header("Location", "/elsewhere?X-Amz-Signature=hunter2")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def gate():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/set"
        server.shutdown()
        thread.join()


def test_an_address_that_a_server_sends_on_to_is_shown_without_its_signature(gate):
    with pytest.raises(ValueError, match="cannot be fetched") as error:
        remote.read(gate, attempts=1)
    assert "X-Amz-Signature=***" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_what_the_message_says_to_set_is_what_the_library_reads(gate, monkeypatch):
    said = remote.instead(gate)
    assert "FSSPEC_HTTPS=" in said
    text = said.split("FSSPEC_HTTPS='")[1].split("'")[0].replace("...", "Bearer hunter2")
    settings: dict[str, object] = {}
    fsspec.config.set_conf_env(settings, {"FSSPEC_HTTPS": text})
    monkeypatch.setattr(fsspec.config, "conf", settings)
    monkeypatch.setitem(fsspec.config.apply_config.__globals__, "conf", settings)
    assert remote.read(gate, attempts=1) == b"{}"


def test_a_library_call_is_refused_before_anything_is_asked():
    with pytest.raises(ValueError, match=r"^data\.dataset\.path: holds a password") as error:
        remote.read(A)
    assert "hunter2" not in str(error.value)


def test_a_run_of_before_opens_without_its_credential_and_hands_none_on(
    home, place, capsys, monkeypatch
):
    monkeypatch.chdir(home)
    [newest] = Path("runs/tiny/checkpoints").glob("*8.ckpt")
    loaded = torch.load(newest, weights_only=True)
    data = {
        "_target_": "diffusion_pl.data.shards.Shards",
        "path": A,
        "resolution": 8,
        "batch_size": 4,
    }
    loaded["diffusion_pl"]["config"]["data"] = data
    checkpoints.save(loaded, place / "old.ckpt")
    monkeypatch.chdir(place)
    assert main(["sample", "old.ckpt", "--count", "1", "--out", "images"]) == 0
    assert main(["export", "old.ckpt", "old.safetensors"]) == 0
    with safe_open("old.safetensors", framework="pt") as file:
        kept = json.loads(file.metadata()["diffusion_pl"])["config"]["data"]["dataset"]["path"]
    assert kept == "https://***@host/set"
    assert main(["import", "safetensors", "old.safetensors", "runs/again"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "old.ckpt", "--allow", kept]) == 2
    captured = capsys.readouterr()
    assert (
        "its credentials were not kept; give the address again, and set FSSPEC_HTTPS"
        in captured.err
    )
    for path in Path().rglob("*"):
        if path.is_file() and path.name != "old.ckpt":
            assert b"hunter2" not in path.read_bytes(), path


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_converted_holds_none(number, home, place, capsys):
    """A run of before, of either format, in its checkpoints and beside them."""
    shutil.copytree(home / "runs/tiny", "runs/old")
    for path in Path("runs/old/checkpoints").glob("*.ckpt"):
        loaded = torch.load(path, weights_only=True)
        loaded["diffusion_pl"] |= {"format": number}
        loaded["diffusion_pl"]["config"]["data"]["dataset"]["path"] = A
        torch.save(loaded, path) if number == 1 else checkpoints.save(loaded, path)
    settings = Path("runs/old/config.yaml")
    settings.write_text(f"# from {A}\n{settings.read_text()}")
    assert main(["convert", "runs/old"]) == 0
    assert len(json.loads(capsys.readouterr().out)["converted"]) == 3
    for path in Path("runs/old").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    assert main(["verify", "runs/old"]) == 0
    capsys.readouterr()
    assert main(["convert", "runs/old"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"] == []


def test_a_config_of_ones_own_masks_nothing():
    """It refuses: a silent *** would be another address."""
    with pytest.raises(ConfigError):
        config.load_resolved({"a": 1}, "x", overrides=[f"a={A}"])
    assert config.load_resolved({"a": A}, "x").tree == {"a": "https://***@host/set"}
    assert Config("x", "x", {"a": "s3://b"}).tree == {"a": "s3://b"}
