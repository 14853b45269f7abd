"""EDM's published checkpoints: key names in and out, refusals, and pickles that are never run."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from published import Fixture, edm_denoiser
from torch import nn

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.interop import edm
from diffusion_pl.interop.denoisers import denoiser_from
from diffusion_pl.interop.edm_layout import config_of_weights, published

CONFIG = {
    "precond": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 8, "img_channels": 3,
    "label_dim": 4, "augment_dim": 9, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "dropout": 0.2,
}  # fmt: skip
NCSNPP = {
    "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}  # fmt: skip
ADM = {"model_type": "DhariwalUNet", "model_channels": 32}
LAYOUTS = {
    "ddpm++": CONFIG,
    "ncsn++": CONFIG | NCSNPP | {"precond": "VEPrecond"},
    "adm": CONFIG | ADM,
    "iddpm": CONFIG | ADM | {"precond": "iDDPMPrecond", "label_dim": 0, "augment_dim": 0},
    "vp": CONFIG | {"precond": "VPPrecond"},
}


def made(config):
    """A network of random weights, and these under the published names."""
    torch.manual_seed(0)
    network = configs.build(Config("", "", edm.nodes(config)), "network")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network, published(config, network)


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_names_lead_there_and_back(name):
    config = LAYOUTS[name]
    network, state = made(config)
    again = denoiser_from(edm, config, state).network
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert not again.training


@pytest.mark.parametrize("name", LAYOUTS)
def test_shapes_tell_the_config_but_for_what_no_shape_shows(name):
    config = LAYOUTS[name]
    shown = {key: config[key] for key in config if key not in ("precond", "dropout")}
    found = config_of_weights(made(config)[1])
    assert {key: found[key] for key in shown} == shown


@pytest.mark.parametrize(
    "name", ["edm_ddpmpp", "vp_ddpmpp_cond", "ve_ncsnpp", "iddpm_adm", "edm_adm_cond"]
)
def test_our_weights_are_written_under_exactly_the_published_keys(parity, name):
    fixture = Fixture(parity / f"{name}.npz")
    written = published(fixture.config, edm_denoiser(fixture).network)
    assert written.keys() == fixture.weights.keys() - {"u"}
    for key, value in written.items():
        assert torch.equal(value, fixture.weights[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_dim": 0}, r"model.map_label.weight: is not .* a config with label_dim: 4$"),
        ({"augment_dim": 0}, r"model.map_augment.weight: is not .* with augment_dim: 9$"),
        ({"channel_mult": [2, 2]}, r"has shape \(8,.*\), not \(16,.* channel_mult: \[1, 2\]$"),
        ({"num_blocks": 2}, r"is missing; .* with num_blocks: 1$"),
        ({"attn_resolutions": []}, r"enc.4x4_block0.norm2.* with attn_resolutions: \[4\]$"),
        ({"embedding_type": "fourier"}, r"freqs: is missing; .* embedding_type: positional$"),
        ({"resample_filter": [1, 3, 3, 1]}, r"not the filter.* resample_filter: \[1, 1\]$"),
        ({"model_type": "DhariwalUNet"}, "with model_type: SongUNet"),
    ],
)
def test_a_misfit_names_its_key_and_the_config_that_fits(change, message):
    _, state = made(CONFIG)
    with pytest.raises(ValueError, match=message) as caught:
        denoiser_from(edm, CONFIG | change, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precond": "VDMPrecond"}, "precond: has no published layout"),
        ({"model_type": "UViT"}, "model_type: has no published layout"),
        ({"decoder_type": "skip"}, "decoder_type: 'skip' is not followed"),
        ({"encoder_type": "skip"}, "encoder_type: 'skip' is not followed"),
        (
            {"position_frequencies": 2},
            "position_frequencies: is no argument of EDMPrecond and SongUNet",
        ),
        ({"beta_d": 19.9}, "beta_d: is no argument of EDMPrecond"),
    ],
)
def test_a_config_without_a_published_layout_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        edm.nodes(CONFIG | change)


def test_a_filter_of_other_values_is_refused():
    _, state = made(CONFIG)
    key = next(key for key in state if key.endswith(".resample_filter"))
    with pytest.raises(ValueError, match="is not the filter that the config says"):
        denoiser_from(edm, CONFIG, state | {key: 2 * state[key]})


def test_weights_of_others_are_refused():
    with pytest.raises(ValueError, match=r"map_label.weight: is missing|not in EDM's layout"):
        denoiser_from(edm, CONFIG, {"conv_in.weight": torch.zeros(8, 3, 3, 3)})


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_nodes_bind_as_an_experiments(name):
    nodes = edm.nodes(LAYOUTS[name])
    tree = Config("", "", nodes)
    objective, sampler = configs.build(tree, "objective"), configs.build(tree, "sampler")
    low, high = objective.preconditioning.sigma_range
    visited = sampler.sigmas()[:-1]
    assert low <= visited.min() * (1 + 1e-6) and visited.max() <= high * (1 + 1e-6)


# What EDM's persistence module writes: the class's source beside its name and the attributes.


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the reader calls nothing of the file's")


class EasyDict(dict):
    """A class of the file's own package."""


@pytest.fixture
def packages(monkeypatch):
    """The modules by whose names EDM's pickles call, there while one is written."""
    for module, thing in (
        ("torch_utils.persistence", _reconstruct_persistent_obj),
        ("dnnlib.util", EasyDict),
    ):
        parent = types.ModuleType(module.split(".")[0])
        child = types.ModuleType(module)
        setattr(child, thing.__name__, thing)
        monkeypatch.setattr(thing, "__module__", module)
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
        monkeypatch.setitem(sys.modules, module, child)


class Persistent:
    """An object that is pickled as EDM's persistent classes are."""

    def __init__(self, name, state, source="raise SystemExit('the source was run')"):
        self.meta = {
            "type": "class", "version": 6, "module_src": source, "class_name": name, "state": state,
        }  # fmt: skip

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def attributes(state, prefix, kwargs=None):
    """A module's __dict__, its children by the keys of a state dict."""
    own, children = OrderedDict(), {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    filters = ("resample_filter", "freqs")
    return {
        "training": False,
        "_parameters": OrderedDict(
            {key: nn.Parameter(value) for key, value in own.items() if key not in filters}
        ),
        "_buffers": OrderedDict({key: value for key, value in own.items() if key in filters}),
        "_non_persistent_buffers_set": set(),
        "_modules": OrderedDict(
            (key, _child(key, value, prefix)) for key, value in children.items()
        ),
        "skip_scale": np.float64(0.5),
        "_init_args": (),
        "_init_kwargs": EasyDict(kwargs or {}),
    }


def _child(name, state, prefix):
    if name in ("enc", "dec"):
        container = nn.ModuleDict()
        container.__dict__.update(attributes(state, f"{prefix}{name}."))
        return container
    return Persistent("UNetBlock", attributes(state, f"{prefix}{name}."))


def network_pickle(path, config, state, write=None):
    """Write weights as EDM's training loop does."""
    kwargs = {key: value for key, value in config.items() if key not in ("precond", "model_type")}
    own = {key.removeprefix("model."): value for key, value in state.items()}
    model = Persistent(
        config["model_type"],
        attributes(own, "", kwargs | {"in_channels": 3, "out_channels": 3}),
    )
    top = attributes({}, "", kwargs | {"model_type": config["model_type"], "use_fp16": False})
    top["_modules"]["model"] = model
    content = {"ema": Persistent(config["precond"], top), "dataset_kwargs": {"path": "a.zip"}}
    write = write or (lambda content: path.write_bytes(pickle.dumps(content)))
    write(content)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("name", ["ddpm++", "ncsn++", "adm"])
def test_an_official_pickle_is_read_and_its_source_is_not_run(tmp_path, packages, name):
    config = LAYOUTS[name]
    _, state = made(config)
    network_pickle(tmp_path / "network.pkl", config, state)
    found, read = edm.read(tmp_path / "network.pkl")
    assert {key: found[key] for key in config} == config
    assert read.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(read[key], value), key
    denoiser_from(edm, found, read)


class Calls:
    """A pickle that calls what it names."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("1 / 0",)),
        (os.system, ("exit 1",)),
        (getattr, ("text", "upper")),
        (torch.load, ("weights.pt",)),
        (nn.Module.load_state_dict, (None, {})),
    ],
)
def test_a_pickle_that_calls_anything_else_is_refused_by_name(tmp_path, function, arguments):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"ema": Calls(function, *arguments)}))
    with pytest.raises(ValueError, match=rf"evil.pkl: .*asks for .*\.{function.__name__}, which"):
        edm.read(path)


def test_a_storage_that_hides_a_program_is_refused(tmp_path):
    witness = tmp_path / "it-ran"
    inner = pickle.dumps(Calls(os.mkdir, str(witness)))
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"ema": Calls(torch.storage._load_from_bytes, inner)}))
    with pytest.raises(ValueError, match="not a pickle of a network"):
        edm.read(path)
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1))]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, offset, size, stride):
    storage = torch.zeros(4).storage()
    path = tmp_path / "evil.pkl"
    rebuilt = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)
    path.write_bytes(pickle.dumps({"ema": rebuilt}))
    with pytest.raises(ValueError, match="in a storage of 4 elements"):
        edm.read(path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("new", [True, False])
def test_a_training_state_gives_its_raw_weights(tmp_path, packages, new):
    config = LAYOUTS["adm"]
    _, state = made(config)
    path = tmp_path / "network.pkl"
    network_pickle(path, config, state, lambda content: torch.save(
        {"net": content["ema"], "optimizer_state": stepped()}, path,
        _use_new_zipfile_serialization=new,
    ))  # fmt: skip
    found, read = edm.read(path)
    assert {key: found[key] for key in config} == config
    assert "raw weights" in edm.notes(found)[0]
    for key, value in state.items():
        assert torch.equal(read[key], value), key
    denoiser_from(edm, found, read)


def stepped():
    """The state of an optimizer that has made a step."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "change",
    [{"num_blocks": 10**9}, {"channel_mult": [1] * 10**5}, {"model_channels": 10**9},
     {"resample_filter": [1] * 10**5}, {"label_dim": 10**12}, {"img_resolution": "32"}],
)  # fmt: skip
def test_a_config_without_bounds_is_refused_by_its_key(change):
    name = "ncsn++" if "resample_filter" in change else "adm"
    with pytest.raises(ValueError, match=next(iter(change))) as caught:
        denoiser_from(edm, LAYOUTS[name] | change, made(LAYOUTS[name])[1])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["EDM2Precond", "VPPrecond2"])
def test_a_network_of_another_class_is_refused_by_its_name(tmp_path, packages, name):
    network_pickle(tmp_path / "n.pkl", LAYOUTS["adm"] | {"precond": name}, {})
    with pytest.raises(ValueError, match=rf"got {name}\) or Precond"):
        edm.read(tmp_path / "n.pkl")


def test_what_is_no_network_is_refused(tmp_path):
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"G_ema": {"weights": 1}}))
    with pytest.raises(ValueError, match=r"'ema' must be one of EDMPrecond.* \(got NoneType\)"):
        edm.read(path)
    path.write_bytes(pickle.dumps({"ema": 1})[:-3])
    with pytest.raises(ValueError, match="not a pickle of a network"):
        edm.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        edm.read(tmp_path / "absent.pkl")
