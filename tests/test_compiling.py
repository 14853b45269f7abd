"""`trainer.compile`: what is compiled, that nothing else changes, and what has no blocks."""

from __future__ import annotations

import sys

import pytest
import torch
from test_lr_schedule import state, train  # noqa: F401 - a fixture
from test_routing import routed  # noqa: F401 - a fixture
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusion_pl.networks.jit import Block
from diffusion_pl.training.compiling import compile_network

# Torch reads the gradient of what is no leaf, and hides the warning that it gives itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")


@pytest.fixture
def compiled(monkeypatch):
    """Compile without generating code; gives the modules that are compiled, and a counter."""
    modules, counter, compile_module = [], CompileCounter(), nn.Module.compile

    def compile_eagerly(module):
        modules.append(module)
        compile_module(module, backend=counter)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    torch._dynamo.reset()
    # Not by monkeypatch, which afterwards leaves torch's setting deleted.
    with torch._dynamo.config.patch(recompile_limit=8):
        yield modules, counter
    torch._dynamo.reset()


def test_a_run_may_go_on_with_or_without_compiled_blocks(routed, compiled):  # noqa: F811
    modules, counter = compiled
    assert routed("trainer.total_images=16", run="whole")[0] == 0
    assert not modules
    assert routed("trainer.compile=blocks", "trainer.total_images=16")[0] == 0
    # Of the network and of its average; between them nothing is.
    assert [type(module) for module in modules] == [Block] * 8 and counter.frame_count
    one, other = state("a"), state("whole")
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert one["state_dict"]["denoiser.network.head.weight"].any()
    for name, value in other["state_dict"].items():
        torch.testing.assert_close(one["state_dict"][name], value, rtol=1e-3, atol=1e-4)
    before = counter.frame_count
    assert routed()[0] == 0  # resumed without
    assert counter.frame_count == before
    assert state("a")["global_step"] == 8
    assert routed("trainer.compile=blocks", "trainer.total_images=48")[0] == 0


class Each(nn.Module):
    """Blocks that are compiled to as many codes of one function."""

    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 2), *[nn.SiLU()] * number) for number in range(count)
        )
        self.tails = nn.ModuleList([nn.Linear(2, 1)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.tails[0](x)


def test_no_block_is_left_out_however_many_there_are(compiled):
    """Torch alone goes back to eager, and says so in a log, after 8 codes of a function."""
    modules, counter = compiled
    network = Each(12)
    x = torch.randn(3, 2)
    expected = network(x)
    compile_network(network, "blocks")
    assert modules == list(network.blocks)
    torch.testing.assert_close(network(x), expected)
    assert counter.frame_count == 12
    compile_network(network, False)
    assert len(modules) == 12
    compile_network(network, True)
    assert modules[12:] == [network]


BARE = """
from torch import nn

class Net(nn.Module):
    classes, channels = 0, 3
    def __init__(self, resolution):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
    def check_resolution(self, height, width):
        pass
    def forward(self, x, c_noise):
        return self.conv(x)
"""


def test_a_network_without_blocks_and_another_word_are_refused(train, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "mybare.py").write_text(BARE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mybare", None)
    node = "network={_target_: mybare.Net, resolution: 8}"
    code, err = train("trainer.compile=blocks", node)
    assert code == 2 and err.count("\n") == 1
    assert "trainer.compile: blocks needs a network with blocks in an nn.ModuleList; Net has" in err
    code, err = train("trainer.compile=block")
    assert code == 2 and "trainer.compile: must be" in err
