"""Guidance by routed tokens: its formula, its draws, and the runs that it is refused for."""

from __future__ import annotations

import json

import pytest
import torch
from test_lr_schedule import train  # noqa: F401 - a fixture
from test_routing import C_NOISE, LABEL, images, jit, routed, uvit  # noqa: F401 - a fixture

from diffusion_pl.cli import main
from diffusion_pl.diffusion.guidance import Routed, by_image
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.networks.routing import PLACES, Routing
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler

SIGMA = torch.tensor(0.7)


def generator(make=jit, rate=0.75, **options):
    denoiser = Denoiser(make(Routing(0.4, 1, 3)).eval(), Karras(0.5))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter *= 0.3  # images that are not all clipped
    side = 16 if make is jit else 8
    usual = {"sources": [Labels(3)] if make is jit else [], "guidance": 3.0}
    usual["guide"] = Routed(rate).guide(denoiser) if rate else None
    sampler = Sampler(heun, Rho(), 3)
    return ImageGenerator(denoiser, sampler, (3, side, side), **(usual | options))


@torch.no_grad()
def test_the_weak_network_is_the_network_with_more_tokens_routed():
    """In evaluation as in training; afterwards the network is as it was."""
    network = jit()
    row, places = torch.randperm(PLACES).int().repeat(2), torch.tensor([1, 2, 3])
    other = jit(Routing(0.75, 1, 3))
    other.router.begin(row, places)
    expected = other(images(), C_NOISE, label=LABEL)
    plain = network.eval()(images(), C_NOISE, label=LABEL)
    with network.router.evaluated(0.75, row, places):
        assert torch.equal(network(images(), C_NOISE, label=LABEL), expected)
    assert torch.equal(network(images(), C_NOISE, label=LABEL), plain)
    torch.manual_seed(0)
    before = network.train()(images(), C_NOISE)
    with network.router.evaluated(0.75, row, places):
        pass
    torch.manual_seed(0)
    assert torch.equal(network(images(), C_NOISE), before)


@pytest.mark.parametrize("make", [jit, uvit])
@torch.no_grad()
def test_guidance_extrapolates_from_the_routed_network_with_the_same_label(make):
    made = generator(make)
    known = {"label": LABEL} if make is jit else {}
    x = images(made.shape[1])
    network = made.denoiser.network
    widths, places = [], []

    def look(module, inputs, output):
        widths.append(output.shape[1])
        places.append(network.router.places)

    (network.blocks if make is jit else network.middle)[2].register_forward_hook(look)
    found = made.guided(known, indices=[4, 5, 6])(x, SIGMA)
    front = 2 if make is jit else 0
    assert sorted(widths) == [front + 4, front + 16]  # of 16 patches 16 - 12 stay
    [drawn] = [each for each in places if each is not None]
    strong = made.denoiser(x, SIGMA, **known)
    with network.router.evaluated(0.75, made.guide.denoiser.network.row, drawn):
        weak = made.denoiser(x, SIGMA, **known)
    assert not torch.isclose(weak, strong, atol=1e-4).all(dim=(1, 2, 3)).any()
    torch.testing.assert_close(found, 3 * strong - 2 * weak)


@torch.no_grad()
def test_the_draws_are_the_seeds_the_images_and_the_levels_own():
    guide = Routed(0.5).guide(generator().denoiser).denoiser
    x = images()[:1].expand(3, -1, -1, -1)

    def weak(indices, seed=0, sigma=SIGMA):
        return by_image(guide, seed, indices)(x[: len(indices or x)], sigma)

    whole = weak([4, 5, 6])
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(weak([6, 4]), whole[[2, 0]], **close)
    assert torch.equal(weak(None), weak([0, 1, 2]))
    for other in (whole[1:2], weak([4], seed=1), weak([7])):
        assert not torch.allclose(other, whole[:1], **close)
    known = {"label": LABEL}
    ours, others = (
        generator(seed=seed).guided(known, indices=[4, 5, 6])(images(), SIGMA) for seed in (0, 1)
    )
    assert not torch.isclose(ours, others, **close).all(dim=(1, 2, 3)).any()
    # Another level draws anew: at once the same tokens would be a coincidence of 1 in 12,870.
    near = weak([4], sigma=SIGMA * (1 + 1e-5))
    assert not torch.allclose(near, whole[:1], **close)


def test_sampled_images_are_their_indices_own_and_cost_two_evaluations():
    made = generator()
    whole, evaluations = made.images([0, 1, 2])
    assert evaluations == 2 * 5  # Heun's 2 x 3 - 1, each of both
    assert made.calls() == {16: 10}
    alone, _ = made.images([2])
    assert (whole[2:].int() - alone.int()).abs().max() <= 1
    assert torch.equal(generator().images([0, 1, 2])[0], whole)
    for other in (generator(rate=0.95), generator(guidance=1.0, rate=None), generator(seed=1)):
        assert (other.images([0, 1, 2])[0].int() - whole.int()).abs().max() > 1
    assert made.about()["guide"] == "routed:0.75"


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5])
def test_a_guide_routes_some_tokens_but_not_all(rate):
    with pytest.raises(UserError, match=r"must be in \(0, 1\)"):
        Routed(rate)


def test_a_network_that_was_not_trained_so_is_refused():
    for network in (jit(None), jit(Routing(0.0, 1, 3))):
        with pytest.raises(UserError, match="needs a network that was trained with them"):
            Routed().guide(Denoiser(network, Karras(0.5)))


GUIDE = "evaluation.guide={_target_: diffusion_pl.diffusion.guidance.Routed, rate: 0.75}"


def test_a_run_is_guided_by_itself(routed, capsys):  # noqa: F811
    code, err = routed("evaluation.guidance=2", GUIDE)
    assert code == 0, err

    def sample(*words):
        code = main(["sample", "runs/a", "--count", "2", "--json", *words])
        said = capsys.readouterr()
        return code, json.loads(said.out) if code == 0 else said.err

    code, own = sample("--out", "own")
    assert (code, own["guide"], own["guidance"], own["evaluations"]) == (0, "routed:0.75", 2.0, 6)
    code, more = sample("--guide", "routed:0.9", "--out", "more")
    assert (code, more["guide"]) == (0, "routed:0.9")
    assert sample("--guide", "routed", "--out", "again")[1]["guide"] == "routed:0.75"
    code, err = sample("--guide", "routed:0.8", "--out", "more")
    assert code == 2 and "guide routed:0.9 -> routed:0.8" in err
    for word in ("routed:1", "routed:x", "routed:"):
        code, err = sample("--guide", word)
        assert code == 2 and f"--guide {word}: RATE must be a number in (0, 1)" in err
    code, err = sample("--guide", "routed", "--guidance", "1")
    assert code == 2 and "a guide does nothing at guidance 1" in err


def test_a_run_without_routing_is_refused(routed, capsys):  # noqa: F811
    says = "guidance by routed tokens needs a network that was trained with them"
    for words in (["network.routing=null"], ["network.routing.rate=0"]):
        code, err = routed("evaluation.guidance=2", GUIDE, *words)
        assert code == 2 and "evaluation.guide: " + says in err and err.count("\n") == 1
    code, err = routed(GUIDE)
    assert code == 2 and "evaluation.guide: a guide does nothing at guidance 1" in err
    assert routed("network.routing=null")[0] == 0
    node = "network.routing={_target_: diffusion_pl.networks.routing.Routing, first: 1, last: 2}"
    for words in ([], ["--set", node]):
        code = main(["sample", "runs/a", "--guidance", "2", "--guide", "routed", *words])
        assert code == 2 and says in capsys.readouterr().err
