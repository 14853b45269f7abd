"""Encoders of transformers: the states of its own models, from tiny random ones, offline."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from diffusion_pl import text
from diffusion_pl.errors import UserError
from diffusion_pl.text import hugging_face

MODELS = {"t5": tiny_models.t5, "clip": tiny_models.clip, "qwen": tiny_models.qwen}
ASKED = ["a red heart", "", "a picture of a dark green star", "one heart", "a red star"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a cache of one's own."""

    def refused(*address: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request, tmp_path_factory):
    """A kind, the folder, and the network's text part."""
    folder = tmp_path_factory.mktemp(request.param)
    network = MODELS[request.param](folder)
    return request.param, folder, getattr(network, "text_model", network)


def test_states_are_those_of_transformers(made) -> None:
    kind, folder, network = made
    tokenizer = hugging_face.library().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "right"
    encoder = text.encoder(f"hf:{folder}", 16)
    tokens, mask, cut = encoder.encode(ASKED)
    assert (tokens.shape, tokens.dtype) == ((5, 16, encoder.width), torch.float16)
    assert not tokens[~mask].any()
    assert cut == ()
    # In a padded batch, with the attention mask of a tokenizer that pads on the right.
    told = tokenizer(ASKED, padding="max_length", max_length=16, return_tensors="pt")
    there = told["attention_mask"].bool()
    if kind == "qwen":  # adds nothing to an empty caption, of which one padding token is made
        assert not there[1].any()
        there[1, 0] = told["attention_mask"][1, 0] = 1
    assert torch.equal(mask, there)
    with torch.no_grad():
        known = network(
            input_ids=told["input_ids"], attention_mask=told["attention_mask"]
        ).last_hidden_state
    torch.testing.assert_close(tokens[mask].float(), known[mask], rtol=5e-4, atol=1e-5)
    assert known[mask].std(dim=0).min() > 1e-3, "the captions are not told apart"


def test_long_captions_are_cut_on_the_right(made) -> None:
    kind, folder, _ = made
    whole, short = (text.encoder(f"hf:{folder}", length) for length in (20, 6))
    caption = "a red heart on a blue ground"
    ids = whole.ids(caption, None)
    assert len(ids) > 6
    assert short.encode([caption, "a"]).cut == (0,)
    assert short.encode([caption]).mask.sum() == 6
    body = ids if kind == "qwen" else ids[:-1]
    end = [] if kind == "qwen" else ids[-1:]
    assert short.ids(caption, 6) == [*body[: 6 - len(end)], *end]
    assert caption.startswith(short.kept(caption)) and len(short.kept(caption)) < len(caption)


def test_lengths_are_the_models_usual_ones(made, tmp_path) -> None:
    kind, folder, _ = made
    usual = {"t5": 128, "clip": 20, "qwen": 128}[kind]
    assert text.encoder(f"hf:{folder}").length == usual
    if kind == "clip":
        with pytest.raises(UserError, match=r"length must be from 2 to 20 tokens \(got 21\)$"):
            text.encoder(f"hf:{folder}", 21)
        tiny_models.clip(tmp_path / "long", positions=90)
        assert text.encoder(f"hf:{tmp_path / 'long'}").length == 77


def test_the_digest_is_of_the_weight_files(made, tmp_path) -> None:
    _, folder, _ = made
    known = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert text.encoder(f"hf:{folder}").digest == known
    pieces = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for piece in pieces:
        piece.write_bytes(piece.name.encode())
    index = {"weight_map": {"x": pieces[1].name, "y": pieces[0].name, "z": pieces[1].name}}
    (tmp_path / hugging_face.INDEX).write_text(json.dumps(index))
    assert hugging_face.weight_files(tmp_path, "hf:x") == pieces
    both = hashlib.sha256(b"a.safetensorsb.safetensors").hexdigest()
    assert hugging_face.digest(pieces) == both


def test_an_index_that_names_other_files_is_refused(tmp_path) -> None:
    (tmp_path / "w.bin").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for content in (
        {"weight_map": {"x": "../model.safetensors"}},
        {"weight_map": {"x": "absent.safetensors"}},
        {"weight_map": {"x": "../w.bin"}},
        {"weight_map": ["x"]},
        {"weight_map": {"x": 3}},
        [],
        {},
    ):
        (tmp_path / "in" / hugging_face.INDEX).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"^hf:x: model.safetensors.index.json "):
            hugging_face.weight_files(tmp_path / "in", "hf:x")


def refusal(name: str) -> str:
    """The one line that an encoder is refused with."""
    with pytest.raises(UserError) as error:
        text.encoder(name)
    assert "\n" not in str(error.value) and str(error.value).startswith(name)
    return str(error.value)


def test_weights_that_are_missing_are_not_drawn(tmp_path) -> None:
    tiny_models.t5(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    key = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file({k: v for k, v in weights.items() if k != key}, file, {"format": "pt"})
    assert f"its weights do not have {key}" in refusal(f"hf:{tmp_path}")
    save_file({**weights, key: torch.zeros(3, 3)}, file, {"format": "pt"})
    refusal(f"hf:{tmp_path}")


def test_weights_in_pickles_are_not_read(tmp_path) -> None:
    network = tiny_models.t5(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    assert refusal(f"hf:{tmp_path}").endswith("has no model.safetensors; only safetensors are read")


def test_code_of_a_repository_is_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny_models.qwen(tmp_path)
    victim = tmp_path / "victim"
    (tmp_path / "own.py").write_text(
        f"from pathlib import Path\nPath({str(victim)!r}).touch()\n"
        "from transformers import Qwen2Config\nclass Config(Qwen2Config): pass\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded (" in refusal(f"hf:{tmp_path}")
    assert not victim.exists()
    hugging_face.library().AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert victim.exists(), "the attack is none"


def test_models_that_are_not_there_are_refused(tmp_path) -> None:
    assert refusal(f"hf:{tmp_path}/no").endswith("there is no such folder")
    assert refusal("hf:./no").endswith("there is no such folder")
    message = refusal("hf:someone/some-model")
    assert "cannot be had from the hub" in message and message.endswith("name the folder")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded (" in refusal(f"hf:{tmp_path}")


def test_without_transformers_the_line_that_installs_it_is_said(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError) as error:
        text.encoder(f"hf:{tmp_path}")
    line = "pip install 'diffusion_pl[hf]'"
    assert str(error.value) == f"transformers is not installed; {line}"


def test_loading_leaves_transformers_as_it_was(made) -> None:
    logging = hugging_face.library().utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    text.encoder(f"hf:{made[1]}")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_states_have_the_weights_precision(tmp_path) -> None:
    network = tiny_models.qwen(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    encoder = text.encoder(f"hf:{tmp_path}")
    assert encoder.states(torch.tensor([[66, 302]])).dtype == torch.bfloat16
    exact = network(input_ids=torch.tensor([encoder.ids("a red", None)])).last_hidden_state
    found = encoder.encode(["a red"])
    torch.testing.assert_close(found.tokens[found.mask].float(), exact[0], rtol=0.05, atol=0.05)
