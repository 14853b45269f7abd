"""Commands that compile nothing do not import torch's compiler, which works for whoever does."""

import subprocess
import sys


def run(code):
    """What a new process prints."""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return made.stdout.splitlines()


def test_check_does_not_import_the_compiler():
    said = run(
        "import sys\nfrom diffusion_pl.cli import main\n"
        "code = main(['check', 'cifar10_jit_small'])\n"
        "print(code, any(name.startswith('torch._dynamo') for name in sys.modules))"
    )
    assert said[-1] == "0 False"


def test_afterwards_torch_compiles_and_traces_no_optimizer():
    said = run(
        """
import sys
import torch
from diffusion_pl.training.uncompiled import without_compiler

def step():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    optimizer.step()
    return weight.tolist()

with without_compiler():
    import torch._dynamo as kept
    print(step(), torch.zeros(2, device="meta").normal_().shape[0], kept.__spec__)
print("torch._dynamo" in sys.modules)
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
print(torch.equal(compiled(torch.ones(3)), torch.ones(3).sin() + 1), len(graphs), step())
print(kept.disable is torch._dynamo.disable, torch._dynamo.__spec__ is not None)
function = torch.optim.Optimizer.add_param_group.__wrapped__
print(function.__dict__["__dynamo_disable"] is not function)
"""
    )
    assert said == ["[0.5, 0.5] 2 None", "False", "True 1 [0.5, 0.5]", "True True", "True"]


def test_whoever_uses_more_of_the_compiler_gets_it():
    said = run(
        """
import torch
from diffusion_pl.training.uncompiled import without_compiler
with without_compiler():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    from torch._dynamo import OptimizedModule
    compiled = torch.compile(torch.sin, backend="eager")
    print(OptimizedModule.__name__, compiled(torch.zeros(1)).item())
print(torch._dynamo.OptimizedModule is OptimizedModule)
"""
    )
    assert said == ["OptimizedModule 0.0", "True"]
