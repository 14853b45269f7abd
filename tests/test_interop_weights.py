"""A run's weights as one file: what is written is read, what others wrote is refused in a line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusion_pl.interop import weights
from diffusion_pl.interop.files import MOST_JSON


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"conv.weight": last, "turned": torch.randn(3, 5).T}
    weights.write(path, state, {"config": {"network": {"width": 8}}, "images": 7, "kind": "ema"})
    about, found = weights.read(path)
    assert about == {"config": {"network": {"width": 8}}, "images": 7, "kind": "ema"}
    assert set(found) == set(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_weights_without_a_count_of_images_have_seen_none(tmp_path):
    weights.write(tmp_path / "a", {"w": torch.ones(1)}, {"config": {}})
    assert weights.read(tmp_path / "a")[0] == {"config": {}, "images": 0}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "holds no config of diffusion_pl; import it by the layout that it has"),
        ({weights.KEY: "{}"}, "holds no config of diffusion_pl"),
        ({weights.KEY: "[1, 2]"}, "cannot be read as safetensors"),
        ({weights.KEY: "{"}, "cannot be read as safetensors"),
        ({weights.KEY: json.dumps({"config": [1]})}, "config or images are none"),
        ({weights.KEY: json.dumps({"config": {}, "images": -1})}, "config or images are none"),
        ({weights.KEY: json.dumps({"config": {}, "images": 1.5})}, "config or images are none"),
        ({weights.KEY: json.dumps({"config": {}, "images": True})}, "config or images are none"),
        ({weights.KEY: json.dumps({"config": {"a": "x" * MOST_JSON}})}, "config is larger than"),
    ],
)  # fmt: skip
def test_another_file_is_refused_in_one_line(tmp_path, words, says):
    path = tmp_path / "theirs.safetensors"
    save_file({"w": torch.ones(1)}, path, metadata=words)
    with pytest.raises(ValueError, match=str(path)) as error:
        weights.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message
