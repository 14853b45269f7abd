"""A run, checkpoint or experiment of a stranger builds parts alone, whatever command opens it.

The planted parts are harmless: they would make the folder `ran`.
"""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from homes import SMALLEST, trained
from safetensors.torch import save_file

from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.commands import import_, parts, trust
from diffusion_pl.config import Config, ConfigError
from diffusion_pl.config.reading import OF_TRAINING
from diffusion_pl.config.renaming import DATA
from diffusion_pl.config.untrusted import is_untrusted
from diffusion_pl.training import checkpoint as checkpoints

TINY = (
    "# A tiny run for tests (no published number)\n"
    + SMALLEST
    + """\
data: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 20, resolution: 8, batch_size: 4}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler: {steps: 2}
features: {name: pixels}
evaluation:
  every: 8
  count: 8
  batch_size: 8
  grid: 4
  metrics: [{_target_: diffusion_pl.metrics.fid.Frechet}]
trainer: {total_images: 8, checkpoint_every: 4, accelerator: cpu, precision: fp32, loggers: []}
"""
)
MINE = '''"""A package of the user's own; that it was imported shows."""
from pathlib import Path

from diffusion_pl.networks.song_unet import SongUNet

Path("imported").mkdir(exist_ok=True)


class Net(SongUNet):
    """A network of the user's own."""


def plant(**anything):
    """Shows that it was called."""
    Path("ran").mkdir()
'''

# What starts something: another package, this package's command line, what it reaches.
PLANTED = {
    "another package": {"_target_": "mine.plant"},
    "the command line": {
        "_target_": "diffusion_pl.cli.main",
        "arguments": ["prepare", "synthetic", "ran", "--resolutions", "8", "--count", "4"],
    },
    "a function reached through a module": {
        "_target_": "diffusion_pl.data.shards.os.mkdir",
        "path": "ran",
    },
}
OPENING = {
    "sample": ["sample", "stranger", "--count", "1"],
    "evaluate": ["evaluate", "stranger"],
    "sweep": ["sweep", "stranger", "--steps", "1,2"],
    "losses": ["losses", "stranger"],
    "progressive": ["progressive", "stranger"],
    "interpolate": ["interpolate", "stranger", "a.png", "a.png"],
    "enlarge": ["enlarge", "stranger", "a.png"],
    "inpaint": ["inpaint", "stranger", "a.png", "a.png"],
    "invert": ["invert", "stranger", "a.png"],
    "likelihood": ["likelihood", "stranger"],
    "export": ["export", "stranger", "out.safetensors"],
    "replay": ["replay", "stranger", "--step", "0"],
    "a guide": ["sample", "runs/tiny", "--guide", "stranger"],
    "import": ["import", "safetensors", "stranger/model.safetensors", "runs/imported"],
    "train": ["train", "stranger/config.yaml", "--run", "runs/new"],
    "train --from": ["train", "stranger/config.yaml", "--from", "stranger", "--run", "runs/new"],
    "launch": ["launch", "stranger/config.yaml", "--tasks", "1", "--dry-run", "--run", "runs/new"],
    "check": ["check", "stranger/config.yaml"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of parts, runs/tiny, and one of the user's own network, runs/own."""
    folder = tmp_path_factory.mktemp("trust")
    (folder / "mine.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        own = ["network._target_=mine.Net", "network.resolution=8", "network.model_channels=8",
               "network.channel_mult=[1]", "network.blocks=1", "network.attention=[]",
               "--run", "runs/own"]  # fmt: skip
        yield trained(folder, TINY, own)


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A copy of it, where commands run."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "imported")
    monkeypatch.delitem(sys.modules, "mine")  # so that each test sees whether it is imported
    torch.manual_seed(0)
    from diffusion_pl.images import save_png

    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def handed_on(change, source="runs/tiny", folder="stranger"):
    """A stranger's copy of a run, with something changed in every config that it holds."""
    shutil.copytree(source, folder)
    tree = config.load(f"{folder}/config.yaml").tree
    change(tree)
    Path(folder, "config.yaml").write_text(config.dump(Config("x", "x", tree)))
    for path in Path(folder, "checkpoints").glob("*.ckpt"):
        loaded = torch.load(path, weights_only=True)
        change(loaded["diffusion_pl"]["config"])
        checkpoints.save(loaded, path)
        state = {key[4:]: v for key, v in loaded["state_dict"].items() if key.startswith("ema.")}
        about = {"config": loaded["diffusion_pl"]["config"], "images": 8}
        save_file(
            {key: value.contiguous() for key, value in state.items()},
            Path(folder, "model.safetensors"),
            metadata={"format": "pt", "diffusion_pl": json.dumps(about)},
        )


def refused(words, capsys):
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert main(words) == 2, words
    captured = capsys.readouterr()
    assert captured.out == ""
    # Every problem is a line.
    assert all(line.startswith(("error: ", "stranger")) for line in captured.err.splitlines())
    assert not Path("ran").exists()
    assert not Path("imported").exists()
    return captured.err


def test_the_planted_parts_would_show(place):
    """In a user's own settings they are built, and do what they do."""
    for node in list(PLANTED.values())[1:]:
        config.build(Config("x", "x.yaml", {"objective": node}), "objective")
        assert Path("ran").is_dir()
        shutil.rmtree("ran")


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("command", OPENING)
def test_a_strangers_run_starts_nothing(command, planted, place, capsys):
    handed_on(lambda tree: tree.__setitem__("objective", PLANTED[planted]))
    said = refused(OPENING[command], capsys)
    assert "objective._target_" in said
    assert PLANTED[planted]["_target_"] in said


@pytest.mark.parametrize("section", sorted(parts.SECTIONS))
def test_no_section_of_a_strangers_run_starts_anything(section, place, capsys):
    handed_on(lambda tree: tree.__setitem__(section, dict(PLANTED["the command line"])))
    assert section in refused(OPENING["train --from"], capsys)
    if section in OF_TRAINING:  # left out by who only opens the run
        assert main(OPENING["evaluate"]) == 0
        assert not Path("ran").exists()
    else:
        assert section in refused(OPENING["evaluate"], capsys)


@pytest.mark.parametrize(
    "where",
    [
        ("sampler", "integrate"),
        ("sampler", "spacing"),
        ("sampler", "schedule", "_target_"),
        ("evaluation", "metrics"),
        ("evaluation", "guide"),
        ("data", "crop"),
        ("data", "dataset", "shapes"),
        ("objective", "reduce"),
        ("network", "channel_mult"),
    ],
)
def test_nothing_starts_from_within_a_part(where, place, capsys):
    def change(tree):
        node = tree
        for name in where[:-1]:
            node = node[name]
        partial = {**PLANTED["the command line"], "_partial_": True}
        node[where[-1]] = {"metrics": [partial], "channel_mult": [partial]}.get(where[-1], partial)

    handed_on(change)
    assert "_target_" in refused(OPENING["evaluate"], capsys)
    assert "_target_" in refused(OPENING["train --from"], capsys)


@pytest.mark.parametrize(
    "reaching",
    [
        # TorchScript runs when it is read.
        {"_target_": "diffusion_pl.metrics.extractors.load", "name": "clip-vit-b-32",
         "weights": "weights.pt"},
        {"_target_": "diffusion_pl.commands.runs.guide", "run": "runs/own", "allow": ["mine"]},
    ],
)  # fmt: skip
def test_a_part_that_reaches_out_stands_in_no_argument_of_torchs(reaching, place, capsys):
    """What its own place is asked for is asked for nowhere else, and torch says no types."""
    node = {"_target_": "torch.optim.LBFGS", "_partial_": True, "line_search_fn": reaching}
    handed_on(lambda tree: tree.__setitem__("optimizer", node))
    for command in ("check", "train --from"):
        assert "optimizer.line_search_fn" in refused(OPENING[command], capsys)


def test_verify_and_convert_read_and_build_nothing(place, capsys):
    handed_on(lambda tree: tree.__setitem__("objective", PLANTED["the command line"]))
    for command in ("verify", "convert"):
        assert main([command, "stranger"]) == 0
    assert not Path("ran").exists()


def imported(nodes, like=None):
    """The experiment of an imported model."""
    own = {name: config.load("tiny").tree[name] for name in ("network", "objective", "sampler")}
    return import_.experiment_of(
        {**own, **nodes}, Path("model.pkl"), [], name="x", like=like, allow=[]
    )


def test_the_data_of_an_imported_model_come_from_a_strangers_file(place):
    handed_on(lambda tree: tree.__setitem__("data", PLANTED["the command line"]))
    with pytest.raises(ConfigError, match=r"data\.dataset\._target_: is outside"):
        imported({}, "stranger/config.yaml")
    assert not Path("ran").exists()


@pytest.mark.parametrize("planted", PLANTED)
def test_what_an_imported_file_says_of_its_network_is_a_strangers(planted, place):
    """The settings of a published checkpoint are values of any kind, among them such nodes."""
    network = config.load("tiny").tree["network"] | {"channel_mult": PLANTED[planted]}
    for like in (None, "tiny"):
        with pytest.raises(ConfigError, match=r"network\.channel_mult\._target_: is outside"):
            imported({"network": network}, like)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["base", "other"])
def test_what_a_strangers_file_takes_as_defaults_is_a_strangers(name, place, capsys):
    handed_on(lambda tree: None)
    planted = config.dump(Config("x", "x", {"objective": dict(PLANTED["the command line"])}))
    Path("stranger", f"{name}.yaml").write_text(planted)
    text = Path("stranger/config.yaml").read_text().replace("objective:", "unused: &x")
    tree = config.load("stranger/config.yaml").tree
    del tree["objective"]
    text = f"defaults: {name}\n" + config.dump(Config("x", "x", tree))
    Path("stranger/config.yaml").write_text(text)
    assert "objective._target_" in refused(OPENING["train --from"], capsys)
    assert "objective._target_" in refused(OPENING["check"], capsys)


def test_a_strangers_file_over_the_users_own_is_a_strangers(place, capsys):
    handed_on(lambda tree: None)
    node = config.dump(Config("x", "x", {"objective": dict(PLANTED["the command line"])}))
    Path("stranger/config.yaml").write_text("defaults: tiny\n" + node)
    assert "objective._target_" in refused(OPENING["train"], capsys)


# Whose a file is.


def make(path, text="a: 1\n"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path)


def test_files_of_the_users_own_and_of_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiments = Path("experiments")
    own = ["experiments/a.yaml", "experiments/b.yaml", "mine/a.yaml", "a.yaml", "deep/er/x.yaml"]
    theirs = [
        "runs/a/config.yaml",  # of a run that has saved nothing yet
        "runs/a/other.yaml",
        "got/config.yaml",
        "shown/Config.YML",
        "weights/x.yaml",
        "exported/x.yaml",
        "saved/x.yaml",
        "run/checkpoints/x.yaml",
        "run/settings/x.yaml",
    ]
    for path in own + theirs:
        make(path)
    make("weights/a.ckpt")
    make("exported/a.safetensors")
    make("run/config.yaml")
    make("saved/checkpoints/1.txt")
    for path in own:
        assert not is_untrusted(Path(path), experiments), path
        assert not is_untrusted(tmp_path / path, experiments), path
    for path in theirs:
        assert is_untrusted(Path(path), experiments), path
        assert is_untrusted(tmp_path / path, experiments), path
    Path("experiments/link.yaml").symlink_to(tmp_path / "got/config.yaml")
    assert is_untrusted(Path("experiments/link.yaml"), experiments)
    Path("linked").symlink_to(tmp_path / "run")
    assert is_untrusted(Path("linked/settings/x.yaml"), experiments)


@pytest.mark.parametrize("start", ["given", "given/checkpoints", "given/checkpoints/1.ckpt"])
def test_what_lies_with_the_weights_that_training_starts_from_is_of_others(
    start, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make("given/checkpoints/1.ckpt")
    for path in ("given/experiments/a.yaml", "given/deep/er/a.yaml"):
        file = make(path)
        assert not is_untrusted(file, file.parent)
        assert is_untrusted(file, file.parent, Path(start))
    assert not is_untrusted(make("experiments/a.yaml"), Path("experiments"), Path(start))


def test_a_yaml_that_lies_with_the_weights_is_of_others(place, capsys):
    """Nothing but `--from` tells that this file came with them."""
    handed_on(lambda tree: None)
    Path("stranger/config.yaml").unlink()
    tree = config.load("tiny").tree | {"objective": dict(PLANTED["the command line"])}
    text = config.dump(Config("x", "x", tree))
    file = make("stranger/experiments/x.yaml", text)
    assert not is_untrusted(file, Path("experiments"))
    words = ["train", str(file), "--from", "stranger", "--run", "runs/new"]
    assert "objective._target_: is outside" in refused(words, capsys)


# What is the user's own goes on.


def test_a_users_own_package_works_by_name_and_in_a_run_with_allow(place, capsys, monkeypatch):
    assert main(["train", "tiny", *map(str, OWN), "--run", "runs/own"]) == 0  # is finished
    forget(monkeypatch)
    said = refused_run(["sample", "runs/own", "--count", "1"], capsys)
    assert "--allow mine" in said
    assert main(["sample", "runs/own", "--count", "1", "--allow", "mine"]) == 0
    tune = ["train", "runs/own/config.yaml", "--from", "runs/own", "--run", "runs/tuned"]
    forget(monkeypatch)
    assert "--allow mine" in refused_run(tune, capsys)
    assert main([*tune, "--allow", "mine"]) == 0
    assert main(["check", "runs/own/config.yaml", "--allow", "mine"]) == 0
    forget(monkeypatch)
    words = ["launch", "runs/own/config.yaml", "--tasks", "1", "--run", "runs/job", "--dry-run"]
    assert "--allow mine" in refused_run(words, capsys)
    assert main([*words, "--allow", "mine"]) == 0
    script = Path("runs/job/job.sbatch").read_text()
    line = next(line for line in script.splitlines() if "WORDS=(" in line)
    assert "--allow=mine" in line  # for the check in the job and for the training
    assert "--allow=mine" in script.split("# Made by: ")[1].splitlines()[0]


def forget(monkeypatch):
    """As if the package had not been imported yet."""
    monkeypatch.delitem(sys.modules, "mine")
    shutil.rmtree("imported")


OWN = ("network._target_=mine.Net", "network.resolution=8", "network.model_channels=8",
       "network.channel_mult=[1]", "network.blocks=1", "network.attention=[]")  # fmt: skip


def refused_run(words, capsys):
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert not Path("imported").exists()
    return captured.err


def test_a_yaml_of_ones_own_lies_anywhere(place):
    tree = config.load("runs/own/config.yaml").tree
    make("elsewhere/mine.yaml", config.dump(Config("x", "x", tree)))
    assert main(["check", "elsewhere/mine.yaml"]) == 0


def test_the_fine_tuning_line_of_the_readme(place):
    words = ["train", "runs/tiny/config.yaml", "--from", "runs/tiny", "--run", "runs/tuned"]
    assert main([*words, "optimizer.lr=1e-4"]) == 0
    assert main([*words, "optimizer.lr=1e-4"]) == 0  # again: is finished
    assert main(["sample", "runs/tuned", "--count", "1"]) == 0


# What parts do by their values.


class Asked(http.server.BaseHTTPRequestHandler):
    """Counts what it is asked for, and has nothing."""

    paths: list[str] = []  # noqa: RUF012 - emptied by the fixture

    def do_GET(self):
        self.paths.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    Asked.paths.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/set"
    server.shutdown()
    thread.join()
    server.server_close()


def shards(path, **more):
    node = {"_target_": "diffusion_pl.data.shards.Shards", "path": path, "resolution": 8, **more}
    data = {"_target_": DATA, "dataset": node, "batch_size": 4}
    return lambda tree: tree.__setitem__("data", data)


def test_nothing_is_fetched_at_a_strangers_word(place, address, capsys):
    handed_on(shards(address))
    assert main(["sample", "stranger", "--count", "1"]) == 0  # needs no data
    for command in (
        "evaluate",
        "likelihood",
        "losses",
        "replay",
        "train",
        "train --from",
        "launch",
    ):
        said = refused(OPENING[command], capsys)
        assert "data.dataset.path: is an address, and nothing is fetched" in said
        assert f"--allow {address}" in said
    assert not Asked.paths
    for words in (
        ["--allow", address.removesuffix("/set")],
        ["--set", f"data.dataset.path={address}"],
    ):
        Asked.paths.clear()
        assert main([*OPENING["evaluate"], *words]) == 2
        assert Asked.paths
    capsys.readouterr()


def data_of(path, *allow, **more):
    tree: dict = {}
    shards(path, **more)(tree)
    return trust.data_of(Config("x", "x", tree, packages=allow))


def test_an_address_is_allowed_as_far_as_it_is_named():
    for path in ("s3://a/b", "s3://a"):
        assert data_of(path, "s3://a").dataset.path == path
    for path in ("s3://ab", "s3://b/a", "http://s3://a", "s3://a/b::http://c/d", "zip://x::s3://a"):
        with pytest.raises(ConfigError, match=r"x: data\.dataset\.path: is an address"):
            data_of(path, "s3://a", "mine")
    assert data_of("zip://x::s3://a", "zip://x::s3://a")


@pytest.mark.parametrize("folder", ["/etc", "../x", "a/../../x", ".."])
def test_what_is_fetched_is_kept_in_the_present_folder(folder):
    with pytest.raises(ConfigError, match=r"x: data\.dataset\.cache_folder: is written to"):
        data_of("s3://a", "s3://a", cache_folder=folder)
    assert data_of("s3://a", "s3://a", cache_folder="data/other")
    assert data_of("s3://a", "s3://a", "/scratch", cache_folder="/scratch/x")


def test_no_data_is_made_at_a_strangers_word(place, capsys):
    made_of = {
        "_target_": "diffusion_pl.data.prepare.Request",
        "source": {
            "_target_": "diffusion_pl.data.sources.base.SourceSpec",
            "path": "synthetic",
            "count": 8,
        },
        "recipe": {"_target_": "diffusion_pl.data.recipe.Recipe", "resolutions": [8]},
    }
    handed_on(shards("ran", made_of=made_of))
    for command in ("evaluate", "train --from", "replay"):
        assert "ran: not prepared" in refused(OPENING[command], capsys)


def test_weights_that_run_when_they_are_read_are_not_read(place, capsys):
    make("evil.pt")
    change = {"name": "clip-vit-b-32", "weights": "evil.pt"}
    handed_on(lambda tree: tree["features"].update(change))
    for command in ("evaluate", "train --from"):
        assert "features.weights: is TorchScript" in refused(OPENING[command], capsys)


def test_code_that_an_extractor_would_fetch_is_not_fetched(place, capsys):
    handed_on(lambda tree: tree["features"].update(name="dinov2-vit-s-14"))
    for command in ("evaluate", "train --from", "launch"):
        assert "features.name: runs what it fetches" in refused(OPENING[command], capsys)
    assert main(["sample", "stranger", "--count", "1"]) == 0
    assert main([*OPENING["evaluate"], "--features", "pixels"]) == 0


def test_a_stranger_logs_to_no_account(place, capsys):
    handed_on(lambda tree: tree["trainer"].__setitem__("loggers", ["wandb"]))
    for command in ("train", "train --from", "launch"):
        assert "trainer.loggers: sends what is logged" in refused(OPENING[command], capsys)
    assert main(["sample", "stranger", "--count", "1"]) == 0


def test_a_users_own_logger_sends_nothing_to_a_strangers_account(place, capsys):
    handed_on(lambda tree: tree["trainer"].__setitem__("wandb_entity", "stranger"))
    for words in (["trainer.loggers=[wandb]"], ["trainer.loggers=[wandb]", "--allow", "wandb"]):
        said = refused([*OPENING["train --from"], *words], capsys)
        assert "trainer.wandb_entity: is whom the log is sent to" in said


def test_a_guide_is_trusted_no_further_than_its_run(place, capsys):
    guide = {"_target_": "diffusion_pl.commands.runs.guide", "run": "runs/own", "allow": ["mine"]}
    handed_on(lambda tree: tree["evaluation"].update(guide=guide, guidance=2.0))
    for command in ("sample", "evaluate", "train --from"):
        said = refused(OPENING[command], capsys)
        assert "evaluation.guide.allow: is trusted by no one here" in said
    assert main([*OPENING["sample"], "--allow", "mine"]) == 0
