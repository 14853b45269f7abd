"""Token routing: the network against an explicit loop, its draws, and what a run makes of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_lr_schedule import TINY, state, train  # noqa: F401 - a fixture
from test_run_folder import assert_equal
from torch import nn

from diffusion_pl.cli import main
from diffusion_pl.errors import UserError
from diffusion_pl.networks.jit import JiT
from diffusion_pl.networks.prx import PRX
from diffusion_pl.networks.routing import PLACES, Router, Routing
from diffusion_pl.networks.text import Text
from diffusion_pl.networks.tokens import patch_table, rotary_table, unrotated
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training.counted import CountedRandomness
from diffusion_pl.training.ema import EMA as Average
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import TrainerConfig

MIDDLE = Routing(0.4, first=1, last=3)  # of 16 tokens 10 stay
CPU = torch.device("cpu")


def awake(network):
    """With weights under which every part has a say in the output."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def jit(routing=MIDDLE, **settings):
    usual = {"patch_size": 4, "width": 16, "depth": 5, "heads": 2, "bottleneck": 6}
    usual |= {"classes": 3, "class_tokens": 2, "class_tokens_from": 2}
    return awake(JiT(16, routing=routing, **(usual | settings)))


def uvit(routing=MIDDLE, **settings):
    usual = {"model_channels": 8, "channel_mult": (1, 2), "blocks": (1,), "transformers": 5}
    usual |= {"heads": 2, "embedding_channels": 16, "dropout": 0.0}
    return awake(UViT(8, routing=routing, **(usual | settings)))


def images(side=16, count=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


C_NOISE, LABEL = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1, -1, 2])


def given(network, places=(3, 50, PLACES - 2)):
    """Give a network a row and windows; the tokens that stay by the definition, a set an image.

    Of 16 tokens at rate 0.4, the 16 - floor(6.4) lowest of a window.
    """
    row = torch.randperm(PLACES, generator=torch.Generator().manual_seed(5)).int()
    network.router.begin(row.repeat(2), torch.tensor(places))
    windows = [[int(row[(place + n) % PLACES]) for n in range(16)] for place in places]
    return [sorted(sorted(range(16), key=window.__getitem__)[:10]) for window in windows]


# The definition.


@pytest.mark.parametrize("enter", [0, 1, 2, 3, 4])
@torch.no_grad()
def test_jit_is_a_loop_in_which_patches_sit_blocks_out(enter):
    """One image at a time, its patches and class tokens each in a list of their own."""
    network = jit(class_tokens_from=enter)
    stay = given(network)
    found = network(images(), C_NOISE, label=LABEL)
    table = rotary_table(8, 4, 4, CPU)
    for image, kept in enumerate(stay):
        one = slice(image, image + 1)
        vector, own = network.embed(C_NOISE[one], LABEL[one]).chunk(2, dim=1)
        condition = F.silu(vector)
        patches = network.stem(network.patches(images()[one]))[0].flatten(1).T
        patches = list(patches + patch_table(16, 4, 4, CPU))
        front = []
        for number, block in enumerate(network.blocks):
            if number == enter:
                front = list(own + network.class_positions)
            at_work = kept if 1 <= number <= 3 else range(16)
            tokens = torch.stack([*front, *(patches[i] for i in at_work)])
            rotary = unrotated(len(front), table[:, list(at_work)])
            tokens = block(tokens[None], condition, rotary)[0]
            front = list(tokens[: len(front)])
            for i, token in zip(at_work, tokens[len(front) :], strict=True):
                patches[i] = token
        shift, scale = network.affine(condition).chunk(2, dim=1)
        output = network.head(network.norm(torch.stack(patches)) * (1 + scale) + shift)
        expected = output.reshape(4, 4, 4, 4, 3).permute(4, 0, 2, 1, 3).reshape(1, 3, 16, 16)
        torch.testing.assert_close(found[one], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prx_is_a_loop_in_which_patches_sit_blocks_out_and_the_text_none():
    """One image at a time; each patch is read and written in (channel, row, column)."""
    network = PRX(16, 6, 4, patch_size=4, width=16, depth=5, heads=2, bottleneck=6, routing=MIDDLE)
    awake(network)
    stay = given(network)
    text, mask = torch.randn(3, 4, 6), torch.arange(4) < torch.tensor([[4], [1], [2]])
    found = network(images(), C_NOISE, text=text, text_mask=mask)
    table = rotary_table(8, 4, 4, CPU)
    for image, kept in enumerate(stay):
        one = slice(image, image + 1)
        condition = F.silu(network.embed(C_NOISE[one]))
        shown = Text(network.text(text[one]), mask[one])
        cut = [
            images()[image, :, r : r + 4, c : c + 4] for r in (0, 4, 8, 12) for c in (0, 4, 8, 12)
        ]
        patches = [network.stem(network.patches(each.flatten())) for each in cut]
        for number, block in enumerate(network.blocks):
            at_work = kept if 1 <= number <= 3 else range(16)
            tokens = torch.stack([patches[i] for i in at_work])[None]
            tokens = block(tokens, condition, table[:, list(at_work)], shown)[0]
            for i, token in zip(at_work, tokens, strict=True):
                patches[i] = token
        shift, scale = network.affine(condition).chunk(2, dim=1)
        normed = F.layer_norm(torch.stack(patches), (16,), eps=1e-6)
        output = network.head(normed * (1 + scale) + shift).unflatten(1, (3, 4, 4))
        rows = [torch.cat(list(output[r : r + 4]), dim=2) for r in (0, 4, 8, 12)]
        expected = torch.cat(rows, dim=1)
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_u_vits_tokens_sit_transformers_out():
    network = uvit()
    stay = given(network)
    x, condition = torch.randn(3, 16, 4, 4), torch.randn(3, 16)
    found = network.transform(x, condition)
    for image, kept in enumerate(stay):
        tokens = [x[image, :, i // 4, i % 4] for i in range(16)]
        for number, layer in enumerate(network.middle):
            at_work = kept if 1 <= number <= 3 else range(16)
            whole = torch.stack([tokens[i] for i in at_work])[None]
            for i, token in zip(at_work, layer(whole, condition[image, None])[0], strict=True):
                tokens[i] = token
        expected = torch.stack(tokens, dim=1).unflatten(1, (4, 4))
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [jit, uvit])
@torch.no_grad()
def test_what_skips_the_blocks_comes_back_to_the_bit(make, precision):
    network = make(class_tokens_from=4) if make is jit else make()
    stay = given(network)
    blocks = network.blocks if make is jit else network.middle
    seen = {}
    for number in (0, 3, 4):
        blocks[number].register_forward_hook(
            lambda module, inputs, output, n=number: seen.update({n: (inputs[0], output)})
        )
    with torch.autocast("cpu", precision, enabled=precision is not None):
        network(images(8 if make is uvit else 16), C_NOISE)
    before, after = seen[0][1], seen[4][0][:, -16:]
    assert before.dtype == after.dtype
    for image, kept in enumerate(stay):
        skipped = [i for i in range(16) if i not in kept]
        assert len(skipped) == 6
        assert torch.equal(after[image, skipped], before[image, skipped])
        assert torch.equal(after[image, kept], seen[3][1][image])
        assert not torch.isclose(after[image, kept], before[image, kept]).all(dim=1).any()


@pytest.mark.parametrize(
    ("rate", "kept"), [(0.5, 8), (0.45, 9), (0.95, 1), (0.06, None), (0.0, None)]
)
def test_as_many_stay_as_the_rate_says(rate, kept):
    """N - floor(N rate) of 16."""
    router = Router(Routing(rate, 0, 0), 1)
    found = router.kept(torch.zeros(2, 16, 4))
    assert found is None if kept is None else found.shape == (2, kept)


@pytest.mark.parametrize("make", [jit, uvit])
@torch.no_grad()
def test_evaluation_is_that_of_a_network_without_routing(make):
    network, plain = make().eval(), make(routing=None).eval()
    given(network)
    assert network.state_dict().keys() == plain.state_dict().keys()
    x = images(16 if make is jit else 8)
    assert torch.equal(network(x, C_NOISE), plain(x, C_NOISE))
    network.train()
    assert not torch.allclose(network(x, C_NOISE), plain(x, C_NOISE))
    # At rate 0 nothing is routed in training either.
    assert torch.equal(make(routing=Routing(0.0, 1, 3))(x, C_NOISE), plain(x, C_NOISE))


# The draws.


def counted(positions, seed=0, tokens=8, rate=0.5):
    """The tokens that stay of images at these positions in a run."""
    router = Router(Routing(rate, 0, 0), 1)
    CountedRandomness(router, seed).begin(torch.as_tensor(positions), CPU)
    return router.kept(torch.zeros(len(positions), tokens, 1))


def test_every_subset_is_as_likely():
    """Of the 70 subsets of 4 of 8 tokens, by chi squared; images beside one another are free."""
    count = 14_000
    found = counted(range(count))
    assert bool((found.diff(dim=1) > 0).all())
    which = (2**found).sum(dim=1)
    _, times = which.unique(return_counts=True)
    assert len(times) == math.comb(8, 4)
    # 69 degrees of freedom: mean 69, deviation 11.7.
    assert float((times - count / 70).square().sum() / (count / 70)) < 69 + 4 * 11.7
    same = (which[1:] == which[:-1]).double().mean()
    assert float(same) == pytest.approx(1 / 70, abs=4 * (1 / 70 / count) ** 0.5)


def test_the_choice_is_the_images_and_the_seeds_own():
    whole = counted([5, 6, 7], tokens=64)
    assert torch.equal(counted([7, 5], tokens=64), whole[[2, 0]])
    for other in (counted([5], seed=1, tokens=64), counted([4], tokens=64)):
        assert not torch.equal(other, whole[:1])
    # The row and the windows are both the seed's.
    routers = [Router(MIDDLE, 5) for _ in range(2)]
    for seed, router in enumerate(routers):
        CountedRandomness(router, seed).begin(torch.tensor([5]), CPU)
    assert not torch.equal(routers[0].places, routers[1].places)
    assert not torch.equal(routers[0].ranks, routers[1].ranks)
    # A batch seen twice, as guidance sees one, has its choices twice; another one is refused.
    router = Router(MIDDLE, 5)
    router.begin(torch.randperm(PLACES).int().repeat(2), torch.tensor([0, 9]))
    once = router.kept(torch.zeros(2, 16, 1))
    assert torch.equal(router.kept(torch.zeros(4, 16, 1)), torch.cat([once, once]))
    with pytest.raises(UserError, match="masks for 2 images .got 3"):
        router.kept(torch.zeros(3, 16, 1))


def test_without_a_run_the_draws_are_torchs_own():
    router = Router(MIDDLE, 5)
    torch.manual_seed(3)
    drawn = torch.rand(2, 16)
    torch.manual_seed(3)
    found = router.kept(torch.zeros(2, 16, 1))
    for image in range(2):
        lowest = sorted(range(16), key=lambda i: float(drawn[image, i]))[:10]
        assert found[image].tolist() == sorted(lowest)


# Training.

IMAGE = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


def module(make=jit, *, seed=0, limit=None, **settings):
    made = DiffusionModule(
        make(**settings), EDM(), partial(torch.optim.Adam, lr=1e-3), Average(10),
        TrainerConfig(total_images=1, checkpoint_every=1, device_batch_size=limit),
        batch_size=8, resolution=16, seed=seed,
    )  # fmt: skip
    made.denoiser.train()
    return made


def losses(made, first=0, count=8):
    index = torch.arange(first, first + count)
    batch = {"image": IMAGE[index % 8], "index": index, "label": index % 3}
    return torch.cat(list(made.image_losses(batch)))


@pytest.mark.parametrize("make", [jit, uvit])
def test_neither_micro_batches_nor_devices_change_what_is_routed(make):
    with torch.no_grad():
        whole = losses(module(make))
        for limit in (1, 3):
            torch.manual_seed(limit)  # torch's own generator has no part in it
            torch.testing.assert_close(losses(module(make, limit=limit)), whole, rtol=2e-5, atol=0)
        made = module(make)
        shares = [losses(made, first, 4) for first in (0, 4)]
        torch.testing.assert_close(torch.cat(shares), whole, rtol=2e-5, atol=0)
        dense, other = losses(module(make, routing=None)), losses(module(make, seed=1))
        assert not torch.isclose(dense, whole, rtol=1e-4).any()
        assert not torch.isclose(other, whole, rtol=1e-4).any()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, as it compiles
@pytest.mark.parametrize("make", [jit, uvit])
def test_neither_checkpointing_nor_compile_changes_what_is_routed(make):
    gradients = []
    for way in ("plain", "checkpointed", "compiled"):
        made = module(make, dropout=0.2, activation_checkpointing=way == "checkpointed")
        if way == "compiled":  # a break of the graph raises
            network = made.denoiser.network
            for part in network.blocks if make is jit else [network]:
                part.compile(backend="eager", fullgraph=True)
        losses(made).sum().backward()
        gradients.append([parameter.grad for parameter in made.denoiser.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


ROUTED = TINY.replace(
    TINY[TINY.index("network:") : TINY.index("objective:")],
    """\
network:
  _target_: diffusion_pl.networks.jit.JiT
  resolution: 8
  classes: 8
  patch_size: 2
  width: 16
  depth: 4
  heads: 2
  bottleneck: 4
  class_tokens: 2
  class_tokens_from: 2
  dropout: 0.1
  routing: {_target_: diffusion_pl.networks.routing.Routing, rate: 0.5, first: 1, last: 2}
""",
)


@pytest.fixture
def routed(train, tmp_path):  # noqa: F811
    (tmp_path / "experiments" / "tiny.yaml").write_text(ROUTED)
    return train


def test_a_routed_run_resumes_to_the_same_bits(routed):
    for run, words in {"a": ["trainer.total_images=16"], "whole": [], "dense": []}.items():
        words += ["network.routing=null"] if run == "dense" else []
        assert routed(*words, run=run)[0] == 0
    assert routed()[0] == 0
    assert_equal(state("a"), state("whole"))
    with pytest.raises(AssertionError):
        assert_equal(state("dense"), state("whole"))
    code, err = routed("network.routing.rate=0.25")
    assert code == 2 and "network.routing.rate: 0.5 -> 0.25" in err
    # Routed weights are the network's own: it may go on without routing.
    code, err = routed("network.routing=null", "--from", "runs/whole", run="tuned")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["network.routing.rate=1"], "routing: rate must be in [0, 1) (got 1.0)"),
        (["network.routing.rate=-0.1"], "routing: rate must be in [0, 1) (got -0.1)"),
        (["network.routing.last=4"], "needs 0 <= first <= last <= 3, the network's last block (got "
         "first: 1, last: 4)"),
        (["network.routing.first=3"], "(got first: 3, last: 2)"),
        (["network.routing.first=-1"], "(got first: -1, last: 2)"),
        (["network.routing.last=null"], "(got first: 1, last: 0 (depth - 4))"),
        (["network.routing.rates=0.5"], "network.routing.rates: unknown argument"),
        (["network.routing=0.5"], "network.routing: must be"),
        (["network={_target_: diffusion_pl.networks.song_unet.SongUNet, resolution: 8, "
          "routing: {_target_: diffusion_pl.networks.routing.Routing}}"],
         "network.routing: SongUNet has no tokens to route; leave it out, or take a network that "
         "has: diffusion_pl.networks.jit.JiT, diffusion_pl.networks.prx.PRX, "
         "diffusion_pl.networks.uvit.UViT"),
    ],
)  # fmt: skip
def test_what_cannot_be_routed_is_a_line_before_training(words, says, routed, capsys):
    code, err = routed(*words)
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert main(["check", "tiny", *words]) == 2
    assert says in capsys.readouterr().err


def test_the_range_is_the_papers():
    """TREAD's DiT-B: blocks 2 to 8 of 12, both included."""
    assert Routing().blocks(12) == (2, 8)
    assert Routing().rate == 0.5
