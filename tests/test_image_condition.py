"""Images as conditions: what is given of them, the null, networks, training, and the sources."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_conditions import IMAGES as EIGHT
from test_text_networks import MAKERS, E, L, stirred
from test_training import BATCH, experiment, go, same  # noqa: F401
from test_training import network as song
from torch import nn

from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.conditions import received, without
from diffusion_pl.diffusion.degradations import Blurred, Boxes, Downsampled, Grey
from diffusion_pl.diffusion.measurements import GaussianBlur
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.sources import (
    DataImages,
    GivenImages,
    Labels,
    own_condition,
    sources_of,
)
from diffusion_pl.networks.linear_unet import LinearUNet
from diffusion_pl.networks.prx import PRX
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.opening import check_images, open_for
from diffusion_pl.training.settings import TrainerConfig

TAKES = {"label": 0, "text": 0, "image": 3}


def bytes_of(count=4, side=16, channels=3, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=source).byte()


def scaled(images):
    return images / 127.5 - 1


def none(count=4):
    return torch.zeros(count, 0)


def draws(count, seed=0):
    return torch.rand(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- what is given --------------------------------------------------------------------------------


def test_a_low_resolution_image_is_the_mean_of_blocks_in_8_bits():
    images = bytes_of()
    source, mask = Downsampled(4)(scaled(images), none())
    assert source.shape == images.shape and mask.shape == (4, 1, 16, 16) and mask.all()
    levels = (source + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    for row in range(0, 16, 4):
        for column in range(0, 16, 4):
            block = images[:, :, row : row + 4, column : column + 4].double().mean(dim=(2, 3))
            given = levels[:, :, row : row + 4, column : column + 4].double()
            assert (given - block[:, :, None, None]).abs().max() <= 0.5 + 1e-4
            assert (given == given[:, :, :1, :1]).all()
    assert torch.equal(Downsampled(4)(source, none())[0], source)


def test_a_grey_image_is_pillows_and_a_blurred_one_the_measurements():
    images = bytes_of(1)
    grey, mask = Grey()(scaled(images), none(1))
    pillow = Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L")
    expected = torch.from_numpy(np.array(pillow)).float()
    assert ((grey + 1) * 127.5 - expected).abs().max() <= 1 + 1e-3
    assert (grey == grey[:, :1]).all() and mask.all() and mask.shape == (1, 1, 16, 16)
    blurred, mask = Blurred(1.5)(scaled(images), none(1))
    exact = GaussianBlur(1.5).forward(scaled(images))
    assert (blurred - exact).abs().max() <= 0.5 / 127.5 + 1e-6 and mask.all()


def test_a_box_hides_what_lies_in_it_and_nothing_else():
    image = scaled(bytes_of(500, side=12))
    source, mask = Boxes(0.25, 0.75)(image, draws(500))
    sides, places = set(), set()
    for one, known in zip(source, mask[:, 0], strict=True):
        rows, columns = torch.nonzero(~known, as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
        assert (~known).sum() == height * width  # a full rectangle
        assert (one[:, ~known] == 0).all()
        sides |= {("rows", height), ("columns", width)}
        places |= {("top", top + height == 12), ("left", left == 0), ("right", left + width == 12)}
    assert torch.equal(source[mask.expand_as(source)], image[mask.expand_as(image)])
    assert sides == {(axis, side) for axis in ("rows", "columns") for side in range(3, 10)}
    assert {("top", True), ("left", True), ("right", True)} <= places
    # Sides and places are uniform: 7 sides of 500 images, a standard deviation is 8.
    counts = torch.bincount((~mask).any(dim=3).sum(dim=2)[:, 0])
    assert counts[3:10].min() > 40
    alone = Boxes(0.25, 0.75)(image[7:8], draws(500)[7:8])[1]
    assert torch.equal(alone, mask[7:8])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Downsampled(1), "times must be at least 2"),
        (lambda: Downsampled(5)(torch.zeros(1, 3, 16, 16), none(1)), "blocks of 5 x 5 pixels do"),
        (lambda: Blurred(0.0), "std of a blur must be positive"),
        (lambda: Grey()(torch.zeros(1, 1, 8, 8), none(1)), "made of 3 channels"),
        (lambda: Boxes(0.0, 0.5), r"rise within \(0, 1\]"),
        (lambda: Boxes(0.5, 0.4), r"rise within \(0, 1\]"),
        (lambda: Boxes(0.5, 1.1), r"rise within \(0, 1\]"),
    ],
)
def test_what_cannot_be_given_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- the null -------------------------------------------------------------------------------------


def test_the_null_of_an_image_knows_no_pixel():
    mask = torch.ones(4, 1, 2, 2, dtype=torch.bool)
    mask[1, :, 0] = False
    given = {"source": torch.randn(4, 3, 2, 2), "source_mask": mask, "label": torch.arange(4)}
    rows = torch.tensor([True, False, False, True])
    hidden = without(given, ["image"], rows)
    assert torch.equal(hidden["source_mask"][1:3], mask[1:3])
    assert not hidden["source_mask"][[0, 3]].any()
    assert torch.equal(hidden["source"], given["source"])
    assert torch.equal(hidden["label"], given["label"])
    assert not without(given, ["image"])["source_mask"].any()
    assert without(given, ["label"])["source_mask"].equal(mask)
    taking, other = nn.Identity(), nn.Identity()
    taking.image_channels = 3
    assert set(received(taking, given)) == {"source", "source_mask"}
    assert set(received(other, given)) == set()


# --- networks -------------------------------------------------------------------------------------


def linear(**more):
    return LinearUNet(16, model_channels=16, channel_mult=(1, 2), heads=2, **more)


def prx(**more):
    made = PRX(16, E, L, patch_size=4, width=32, depth=2, heads=2, bottleneck=16, **more)
    made.set_null_text(torch.ones(L, E), torch.ones(L, dtype=torch.bool))
    return made


TAKING = {name: partial(make, text=0) for name, make in MAKERS.items()}
TAKING |= {"linear": linear, "prx": prx, "plain prx": partial(prx, sized=True)}


@pytest.fixture(params=list(TAKING))
def make(request):
    return TAKING[request.param]


@pytest.fixture
def seen():
    torch.manual_seed(4)
    return torch.randn(3, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9])


@pytest.fixture
def given():
    torch.manual_seed(5)
    mask = torch.rand(3, 1, 16, 16) < 0.7
    return {"source": torch.randn(3, 3, 16, 16), "source_mask": mask}


def changed(after, before):
    """Which rows differ by more than rounding."""
    difference = (after - before).abs().amax(dim=(1, 2, 3))
    return (difference > 1e-5 * before.abs().amax()).tolist()


@torch.no_grad()
def test_the_image_reaches_the_output_and_each_its_own(make, seen, given):
    network = stirred(make(image_channels=3))
    before = network(*seen, **given)
    assert before.shape == seen[0].shape
    other = given["source"].clone()
    other[1] = other[1].flip(-1)
    assert changed(network(*seen, **given | {"source": other}), before) == [False, True, False]
    mask = given["source_mask"].clone()
    mask[2] = ~mask[2]
    found = network(*seen, **given | {"source_mask": mask})
    assert changed(found, before) == [False, False, True]


@torch.no_grad()
def test_no_image_is_a_mask_of_nothing_and_hidden_numbers_never_matter(make, seen, given):
    network = stirred(make(image_channels=3))
    nothing = torch.zeros_like(given["source_mask"])
    bare = network(*seen)
    assert torch.equal(network(*seen, **given | {"source_mask": nothing}), bare)
    assert torch.equal(network(*seen, source=None, source_mask=None), bare)
    before = network(*seen, **given)
    spoilt = given["source"].masked_fill(~given["source_mask"], float("nan"))
    assert torch.equal(network(*seen, **given | {"source": spoilt}), before)
    # A known grey is not the unknown.
    zeros = {"source": torch.zeros_like(given["source"]), "source_mask": ~nothing}
    assert changed(network(*seen, **zeros), bare) == [True] * 3


def test_without_images_a_network_is_what_it_was(make, seen, given):
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    same_ = make(image_channels=0)
    assert plain.state_dict().keys() == same_.state_dict().keys()
    assert all(
        torch.equal(value, same_.state_dict()[key]) for key, value in plain.state_dict().items()
    )
    taking = make(image_channels=3).state_dict()
    grown = [key for key, value in plain.state_dict().items() if taking[key].shape != value.shape]
    assert taking.keys() == plain.state_dict().keys() and grown
    with pytest.raises(UserError, match="without them, image_channels: 0"):
        plain(*seen, **given)
    with pytest.raises(UserError, match="image_channels must be at least 0"):
        make(image_channels=-1)


def test_what_enters_is_the_noisy_image_the_known_pixels_and_the_mask(seen, given):
    network = song(0.0, image_channels=3).eval()
    entered = []
    network.stem.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    network(*seen, **given)
    mask = given["source_mask"].float()
    assert torch.equal(entered[0], torch.cat([seen[0], given["source"] * mask, mask], dim=1))
    network(*seen)
    assert torch.equal(entered[1], torch.cat([seen[0], torch.zeros(3, 4, 16, 16)], dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "given together"),
        ({"source_mask": None}, "given together"),
        ({"source": torch.zeros(3, 1, 16, 16)}, "as large as the noisy one"),
        ({"source": torch.zeros(3, 3, 8, 8)}, "as large as the noisy one"),
        ({"source": torch.zeros(1, 3, 16, 16)}, "as large as the noisy one"),
        ({"source_mask": torch.ones(3, 3, 16, 16, dtype=torch.bool)}, r"bool \(3, 1, 16, 16\)"),
        ({"source_mask": torch.ones(3, 1, 16, 16)}, "got .* and torch.float32"),
    ],
)
def test_an_image_of_another_shape_is_refused(seen, given, change, message):
    with pytest.raises(UserError, match=message):
        song(image_channels=3)(*seen, **given | change)


# --- training -------------------------------------------------------------------------------------


def module(degradation, count=64, seed=0, augment=None, net=None, **dropout):
    return DiffusionModule(
        net or song(0.0, image_channels=3), EDM(), partial(torch.optim.Adam, lr=2e-3), EMA(10),
        TrainerConfig(total_images=1, checkpoint_every=1, dropout=dropout),
        batch_size=count, resolution=16, augment=augment, degradation=degradation, seed=seed,
    )  # fmt: skip


def drawn(made, first=0, count=64, side=16):
    """The clean images of a step, and the conditions that they are trained with."""
    image = scaled(bytes_of(count, side))
    found, _, _, condition = made.draw(image, torch.arange(first, first + count), {})
    return found, condition


class Mirrored:
    draws = 1

    def __call__(self, image, uniform):
        return image.flip(-1), uniform


@pytest.mark.parametrize("augment", [None, Mirrored()])
def test_an_image_is_trained_with_what_is_left_of_it(augment):
    image, condition = drawn(module(Downsampled(4), augment=augment))
    expected, mask = Downsampled(4)(image, none())
    assert torch.equal(condition["source"], expected)
    assert torch.equal(condition["source_mask"], mask)
    # Other networks are given nothing.
    assert "source" not in drawn(module(Downsampled(4), net=song(0.0)))[1]
    assert "source" not in drawn(module(None))[1]


def test_boxes_are_drawn_by_seed_and_place_in_the_run_alone():
    made = module(Boxes())
    whole = drawn(made, 128)[1]["source_mask"]
    part = drawn(made, 160, 32)[1]["source_mask"]  # of another device
    assert torch.equal(whole[32:], part)
    assert not torch.equal(whole, drawn(made, 192)[1]["source_mask"])
    assert not torch.equal(whole, drawn(module(Boxes(), seed=1), 128)[1]["source_mask"])
    # The four numbers of a box are four: the places do not follow from the sides.
    hidden = ~drawn(module(Boxes(), 4096), count=4096)[1]["source_mask"][:, 0]
    numbers = [
        each.double() for axis in (1, 2)
        for each in (hidden.any(axis).sum(1), hidden.any(axis).double().argmax(1) / (
            17 - hidden.any(axis).sum(1)))
    ]  # fmt: skip
    correlation = torch.corrcoef(torch.stack(numbers)) - torch.eye(4)
    assert correlation.abs().max() < 5 / 4096**0.5 + 0.02


def test_images_are_dropped_at_their_rate_and_whole():
    made = module(Downsampled(2), 4096, image=0.3, label=0.3)
    image = torch.zeros(4096, 3, 2, 2)
    label = {"label": torch.zeros(4096, dtype=torch.long)}
    condition = made.draw(image, torch.arange(4096), label)[3]
    mask = condition["source_mask"].flatten(1)
    assert torch.equal(mask.any(dim=1), mask.all(dim=1))
    hidden = ~mask.any(dim=1)
    # A standard deviation of the share is 0.007.
    assert hidden.double().mean() == pytest.approx(0.3, abs=0.035)
    both = torch.stack([hidden, condition["label"] < 0]).double()
    assert torch.corrcoef(both)[0, 1].abs() < 5 / 4096**0.5


def test_a_run_with_images_goes_on_to_the_same_bits(go):  # noqa: F811
    def made(images, degradation, channels=3):
        data = DataConfig(Synthetic(40, 16), batch_size=BATCH, hflip=True, image=degradation)
        settings = {"dropout": {"image": 0.3}, "device_batch_size": 3}
        net = song(classes=8, image_channels=channels)
        return experiment(images, data=data, network=net, settings=settings)

    _, whole = go(made(48, Boxes()), "whole")
    go(made(32, Boxes()), "part")
    _, resumed = go(made(48, Boxes()), "part")
    same(whole, resumed)
    key = "denoiser.network.out_conv.weight"
    for name, other in {"grey": made(48, Grey()), "none": made(48, None, 0)}.items():
        _, saved = go(other, name)
        assert not torch.equal(saved["state_dict"][key], whole["state_dict"][key])


@pytest.mark.slow
def test_a_network_learns_to_go_by_the_image():
    """At a level that drowns the noisy image, what it is given of it decides the error."""
    torch.manual_seed(0)
    net = song(0.0, image_channels=3)
    made = module(Downsampled(4), 32, net=net, image=0.2)
    images = Synthetic(128, 16).open().read(torch.arange(128))
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for step in range(80):
        rows = torch.arange(step * 32, step * 32 + 32)
        loss = sum(made.losses({"image": images[rows % 128], "index": rows}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean = scaled(images[:64])
    noisy = clean + 5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    source, mask = Downsampled(4)(clean, none())

    @torch.no_grad()
    def error(**condition):
        return (made.denoiser.eval()(noisy, torch.tensor(5.0), **condition) - clean).square().mean()

    own = error(source=source, source_mask=mask)
    assert own < 0.5 * error()
    assert own < 0.5 * error(source=source.roll(1, 0), source_mask=mask)


@pytest.mark.parametrize(
    ("network", "more", "message"),
    [
        ({}, {"image": Grey()}, "image_channels is 0; set network.image_channels=3"),
        ({"image_channels": 1}, {"image": Grey()}, "is 1; set network.image_channels=3"),
        ({"image_channels": 3}, {}, "is 3, and data.image does not say"),
        ({"image_channels": 3}, {"image": Downsampled(5)}, "data.image: blocks of 5 x 5"),
        ({"image_channels": 3}, {"image": Grey(), "resolution_weights": {8: 1, 16: 1}},
         "given at one resolution"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_the_network_are_refused(network, more, message):
    data = DataConfig(Synthetic(40, 16), batch_size=BATCH, **more)
    for check in (check_images, open_for):
        with pytest.raises(UserError, match=message):
            check(song(**network), data)


# --- sources --------------------------------------------------------------------------------------


IMAGES = dataclasses.replace(EIGHT, store=bytes_of(8, 8))


def test_images_of_the_data_are_drawn_from_seed_and_index():
    source = DataImages(IMAGES, Downsampled(2))
    found = source.condition(0, range(400))
    own = Downsampled(2)(scaled(IMAGES.store), none(8))[0]
    which = [[torch.equal(each, one) for one in own].index(True) for each in found["source"]]
    # 8 images that are equally likely: 50 each, a standard deviation is 6.6.
    assert min(map(which.count, range(8))) > 20
    again = source.condition(0, [7, 3])
    assert torch.equal(again["source"], found["source"][[7, 3]])
    assert not torch.equal(source.condition(1, range(400))["source"], found["source"])
    boxes = DataImages(IMAGES, Boxes())
    masks = boxes.condition(0, range(400))["source_mask"]
    assert torch.equal(boxes.condition(0, [7, 3])["source_mask"], masks[[7, 3]])
    rows = [number for number, image in enumerate(which) if image == which[0]]
    assert len({masks[row].numpy().tobytes() for row in rows}) > 5  # not of the image alone
    assert source.about() == {"source": f"eight {IMAGES.fingerprint[:12]}"}
    assert source.captions(0, range(3)) is None


def test_an_image_of_the_data_comes_with_its_class_and_its_caption():
    taken = {"label": 3, "text": 6, "image": 3}
    given = {"images": IMAGES, "degradation": Downsampled(2)}
    joined = {}
    for each in sources_of(taken, **given):
        joined |= each.condition(0, range(50))
    own = Downsampled(2)(scaled(IMAGES.store), none(8))[0]
    which = torch.tensor([[torch.equal(a, b) for b in own].index(True) for a in joined["source"]])
    assert torch.equal(joined["label"], IMAGES.labels[which])
    texts = [IMAGES.texts.read(which, torch.full((50,), c).double()) for c in (0.0, 0.9)]
    fits = torch.stack([(joined["text"] == text).flatten(1).all(1) for text, _ in texts])
    assert fits.any(dim=0).all()
    for size in ({"text": 0}, {"text": 0, "label": 0}):
        found = sources_of(taken | size, **given)
        joined = {}
        for each in found:
            joined |= each.condition(0, range(50))
        assert ("label" in joined) == bool((taken | size)["label"])
        assert torch.equal(joined.get("label", IMAGES.labels[which]), IMAGES.labels[which])
    # No class is drawn beside those of the images.
    assert not any(isinstance(each, Labels) for each in sources_of(taken, **given))
    named = sources_of(taken | {"text": 0}, label=2, **given)
    assert [each.condition(0, [0, 1]).get("label", torch.ones(1)).tolist() for each in named] == [
        [2, 2], [1],
    ]  # fmt: skip
    assert sources_of({"label": 0, "text": 0, "image": 0}, None) == ()


def test_given_images_are_taken_in_turn_and_measured_ones_as_they_are():
    large = bytes_of(3, 16)
    made = GivenImages(list(large), Downsampled(4), 16)
    found = made.condition(0, [0, 4, 5])
    expected = Downsampled(4)(scaled(large), none(3))[0]
    assert torch.equal(found["source"], expected[[0, 1, 2]])
    small = ((expected[:, :, ::4, ::4] + 1) * 127.5).round().byte()
    as_it_is = GivenImages(list(small), Downsampled(4), 16).condition(0, [0, 4, 5])
    assert all(torch.equal(value, found[key]) for key, value in as_it_is.items())
    boxes = GivenImages([large[0]], Boxes(), 16)
    masks = boxes.condition(0, range(9))["source_mask"]
    assert torch.equal(boxes.condition(0, [5])["source_mask"], masks[5:6])
    assert len({mask.numpy().tobytes() for mask in masks}) > 5
    assert made.about() == GivenImages(list(large.clone()), Downsampled(4), 16).about()
    assert made.about() != GivenImages(list(large.flip(0)), Downsampled(4), 16).about()
    assert made.about()["source"].startswith("3 ")
    given = sources_of(TAKES, None, given=made, degradation=Downsampled(4))
    assert given == (made,)


def test_images_that_are_measured_go_by_what_is_left_of_them():
    found = own_condition(IMAGES, torch.tensor([5, 2]), TAKES, Downsampled(2))
    expected, _ = Downsampled(2)(scaled(IMAGES.store[[5, 2]]), none(2))
    assert torch.equal(found["source"], expected) and found["source_mask"].all()
    assert "source" not in own_condition(IMAGES, torch.tensor([5, 2]), TAKES)
