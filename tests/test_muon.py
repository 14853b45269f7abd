"""Muon: what the iteration does to singular values, torch's own class as a peer, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusion_pl.errors import UserError
from diffusion_pl.training.muon import Muon, orthogonal, orthogonal_by_gram


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_iteration_is_its_polynomial_on_each_singular_value():
    """X -> aX + b(XX^T)X + c(XX^T)^2 X is s -> as + bs^3 + cs^5 (Jordan 2024), five times."""
    matrices = draw(3, 5, 9)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (matrices.flatten(1).norm(dim=1)[:, None] + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonal(matrices), u @ torch.diag_embed(s) @ v)
    assert torch.equal(orthogonal(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e12])
def test_the_iteration_on_the_gram_matrix_is_that_on_the_matrix(size, dtype, most):
    """Of full and of low rank; and of a matrix so small that its length is that of the 1e-7."""
    matrices = [draw(6, columns) for columns in (6, 9, 54)]
    matrices += [draw(6, 2, seed=1) @ draw(2, 12, seed=2), draw(6, 1, seed=3) @ draw(1, 7, seed=4)]
    matrices = [size * each for each in matrices]
    found = orthogonal_by_gram([each.to(dtype) for each in matrices])
    for each, mine in zip(matrices, found, strict=True):
        truth = orthogonal(each[None])[0]
        assert (mine - truth).norm() <= most * truth.norm()
    zero = torch.zeros(3, 5, dtype=dtype)
    assert torch.equal(orthogonal_by_gram([zero])[0], zero)


def test_a_step_within_autocast_is_the_step():
    start = [draw(6, 10, dtype=torch.float32), draw(12, 6, seed=1, dtype=torch.float32)]
    plain = stepped(Muon, start)
    with torch.autocast("cpu", torch.bfloat16):
        cast = stepped(Muon, start)
    assert all(map(torch.equal, plain, cast))


def stepped(make, parameters, steps=4):
    parameters = [nn.Parameter(each.clone()) for each in parameters]
    optimizer = make(parameters)
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = draw(*parameter.shape, seed=100 * step + number, dtype=parameter.dtype)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [("shape", "original"), ("adam", "match_rms_adamw")])
def test_steps_are_those_of_torch(ours, theirs, nesterov):
    """torch's class iterates in bfloat16, so a step may differ by its rounding, 2^-8."""
    shapes = [(6, 10), (10, 6), (6, 10), (40, 4), (8, 8)]
    start = [draw(*shape, seed=number, dtype=torch.float32) for number, shape in enumerate(shapes)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    mine = stepped(lambda p: Muon(p, scale=ours, **options), start)
    peer = stepped(lambda p: torch.optim.Muon(p, adjust_lr_fn=theirs, **options), start)
    for a, b, first in zip(mine, peer, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - first).norm()
        assert (a - first).norm() > 0.5 * (b - first).norm()


def test_kernels_are_taken_as_matrices_of_their_first_dimension_by_the_rest():
    start = [draw(6, 4, 3, 3), draw(40, 2, 3, 3, seed=1), draw(6, 36, seed=2)]
    options = {"lr": 0.1, "weight_decay": 0.3}
    mine = stepped(lambda p: Muon(p, flatten=True, **options), start)
    parameters = [nn.Parameter(each.flatten(1).clone()) for each in start]
    optimizer = Muon(parameters, **options)
    for step in range(4):
        for number, (parameter, each) in enumerate(zip(parameters, start, strict=True)):
            grad = draw(*each.shape, seed=100 * step + number, dtype=each.dtype)
            parameter.grad = grad.flatten(1)
        optimizer.step()
    for kernel, matrix in zip(mine, parameters, strict=True):
        torch.testing.assert_close(kernel.flatten(1), matrix)


def test_matrices_of_one_shape_do_not_know_of_each_other():
    start = [draw(4, 7), draw(7, 4, seed=1), draw(4, 7, seed=2)]
    together = stepped(Muon, start)
    for number, each in enumerate(start):
        parameter = nn.Parameter(each.clone())
        optimizer = Muon([parameter])
        for step in range(4):
            parameter.grad = draw(*each.shape, seed=100 * step + number)
            optimizer.step()
        torch.testing.assert_close(parameter, together[number], rtol=0, atol=1e-12)


def test_a_parameter_without_a_gradient_stays_and_a_state_comes_back():
    idle, moved = nn.Parameter(draw(3, 3)), nn.Parameter(draw(3, 4))
    optimizer = Muon([idle, moved])
    moved.grad = draw(3, 4, seed=5)
    before = moved.detach().clone()
    optimizer.step()
    assert torch.equal(idle, draw(3, 3))
    assert not torch.equal(moved, before)
    other = nn.Parameter(moved.detach().clone())
    resumed = Muon([nn.Parameter(idle.detach().clone()), other])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, each in ((moved, optimizer), (other, resumed)):
        parameter.grad = draw(3, 4, seed=6)
        each.step()
    assert torch.equal(moved, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Muon needs lr"),
        ({"momentum": 1.0}, "momentum in"),
        ({"momentum": -0.1}, "momentum in"),
        ({"weight_decay": -1.0}, "weight_decay of at least 0"),
        ({"scale": "width"}, "shape or adam"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


def test_only_matrices():
    with pytest.raises(UserError, match=r"only supports 2D parameters \(got shape \(3,\)\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_kernels_are_matrices_only_where_that_is_asked_for():
    kernel = nn.Parameter(torch.zeros(2, 3, 3, 3))
    Muon([kernel], flatten=True)
    with pytest.raises(UserError, match="flatten takes those of more"):
        Muon([kernel])
    for flatten in (False, True):
        with pytest.raises(UserError, match="only supports 2D parameters"):
            Muon([nn.Parameter(torch.zeros(2))], flatten=flatten)
