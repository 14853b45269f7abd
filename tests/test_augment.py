"""Non-leaky augmentation: the published images, the maps, and the law of what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion_pl.data.augment import SYM6, NonLeaky, label_of

# Entries of the 9-number label that each published operation sets.
OPERATIONS = {
    "xflip": [0],
    "yflip": [1],
    "scale": [2],
    "rotate_frac": [3, 4],
    "aniso": [5, 6],
    "translate_frac": [7, 8],
    "edm_cifar10_pipe": list(range(9)),
}
# Turned, stretched and moved each in some way, none twice in the same way.
MAPS = torch.tensor(
    [
        [0, 0, 0.6, 0.3, 0.0, 0.0, 0.2, -0.3],
        [1, 0, -0.7, 2.0, 0.5, 0.9, 0.0, 0.4],
        [0, 1, 0.0, -1.2, -2.0, -1.1, -0.5, 0.0],
        [1, 1, 0.4, 0.0, 1.4, 1.3, 0.3, 0.2],
    ],
    dtype=torch.float64,
)


def uniform(count, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return torch.rand(count, NonLeaky.draws, generator=source, dtype=dtype)


def pictures(count, height=16, width=16, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=source) * 2 - 1


def one(index, value):
    """Parameters of one image with a single operation."""
    parameters = torch.zeros(1, 8, dtype=torch.float64)
    parameters[0, index] = value
    return parameters


def published(parity, operation):
    """Images, what the operation made of them, and its entries of the label."""
    fixture = np.load(parity / "edm_augment.npz")
    keys = ("images", f"{operation}/images", f"{operation}/labels")
    return (torch.from_numpy(fixture[key]) for key in keys)


def read_back(label, half_turn):
    """The parameters behind labels, and the other choice of the axis where it is tilted."""
    label = label.double()
    tilted = (label[:, 6] != 0) & half_turn
    stretch = torch.where(label[:, 6] == 0, label[:, 5], torch.hypot(label[:, 5], label[:, 6]))
    axis = torch.atan2(label[:, 6], label[:, 5]) * (label[:, 6] != 0)
    stretch, axis = torch.where(tilted, -stretch, stretch), axis + math.pi * tilted
    turn = torch.atan2(label[:, 4], label[:, 3] + 1)
    return torch.stack([*label[:, :3].T, turn, axis, stretch, *label[:, 7:].T], dim=1)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_the_published_images(parity, operation):
    """The label leaves open which way a tilted stretch goes, so either may be the published one."""
    image, expected, entries = published(parity, operation)
    label = torch.zeros(len(image), NonLeaky.labels)
    label[:, OPERATIONS[operation]] = entries
    errors = []
    for half_turn in (False, True):
        parameters = read_back(label, torch.full((len(image),), half_turn))
        # The published labels are float32.
        assert torch.allclose(label_of(parameters), label, rtol=0, atol=1e-6)
        difference = NonLeaky().transform(image, parameters) - expected
        errors.append(difference.abs().amax(dim=(1, 2, 3)))
    # Coordinates are float32 of some 40 pixels: 4e-6 pixels, times a slope of 2 a sample.
    assert torch.minimum(*errors).max() < 1e-5


def test_a_translation_by_whole_pixels_is_the_published_one_of_pixels(parity):
    """The wavelet returns the pixels; the published whole ones count up, the fractions down."""
    image, expected, label = published(parity, "translate_int")
    parameters = torch.zeros(len(image), 8, dtype=torch.float64)
    parameters[:, 6], parameters[:, 7] = label[:, 0], -label[:, 1]
    assert torch.allclose(NonLeaky().transform(image, parameters), expected, rtol=0, atol=1e-5)


def test_the_filter_is_the_orthonormal_one_with_six_vanishing_moments():
    taps = np.array(SYM6)
    assert len(taps) == 12
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-15)
    for shift in range(6):
        product = taps[2 * shift :] @ taps[: 12 - 2 * shift]
        assert product == pytest.approx(float(shift == 0), abs=1e-15)
    index = np.arange(12.0)
    for power in range(6):
        # Rounding of the taps, 1e-16, times the largest power.
        moment = ((-1) ** index * index**power * taps).sum()
        assert moment == pytest.approx(0.0, abs=1e-15 * 11**power)


def forward_map(parameters, width, height):
    """The operations on (x right, y up), as a matrix and a shift, one after the other."""
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters.tolist()

    def turn(angle):
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    matrix = np.diag([1 - 2 * a0, 1 - 2 * a1])
    matrix = turn(a3) @ (2 ** (0.2 * a2) * matrix)
    stretch = np.diag([2 ** (0.2 * a5), 2 ** (-0.2 * a5)])
    matrix = turn(a4) @ stretch @ turn(-a4) @ matrix
    return matrix, np.array([0.125 * width * a6, -0.125 * height * a7])


@pytest.mark.parametrize(("width", "height"), [(32, 32), (40, 24)])
def test_the_map_is_the_operations_in_their_order(width, height):
    """A smooth picture, evaluated where the forward map, inverted, says.

    Compared in the middle, which no map brings in from the reflected border. The filter's mass is
    centred 0.05 pixels off its largest tap, so a turned image is off by up to 0.14 pixels, at a
    slope of 0.3 a pixel; a bilinear sample errs by less than 0.01.
    """

    def picture(x, y):
        return 0.6 * np.cos(0.45 * x - 0.2 * y + 0.5) + 0.4 * np.sin(0.3 * y + 0.15 * x)

    x = np.arange(width) - (width - 1) / 2
    y = (height - 1) / 2 - np.arange(height)[:, None]
    image = torch.from_numpy(picture(x, y)).float().expand(len(MAPS), 1, -1, -1)
    got = NonLeaky().transform(image, MAPS)[:, 0].numpy()
    inside = np.hypot(*np.broadcast_arrays(x, y)) < 5
    for row, parameters in zip(got, MAPS, strict=True):
        matrix, shift = forward_map(parameters, width, height)
        points = np.stack(np.broadcast_arrays(x - shift[0], y - shift[1]), axis=-1)
        source = points @ np.linalg.inv(matrix).T
        expected = picture(source[..., 0], source[..., 1])
        assert np.abs(row - expected)[inside].max() < 0.05


@pytest.mark.parametrize(("width", "height"), [(16, 16), (40, 24)])
def test_a_translation_by_whole_pixels_moves_them_over_a_reflected_border(width, height):
    """Right and up; positions are rounded to 1e-5 pixels, next to slopes of 2."""
    image = pictures(1, height, width)
    parameters = one(6, 7 / width) + one(7, -5 / height)
    got = NonLeaky(translation=1.0).transform(image, parameters)
    wide = torch.nn.functional.pad(image, (7, 0, 0, 5), mode="reflect")
    assert torch.allclose(got, wide[:, :, 5:, :width], rtol=0, atol=3e-5)


def test_beyond_the_reflected_border_is_nothing():
    """The last 3 of its 15 pixels lack a part of their filter."""
    image = pictures(1)
    augment = NonLeaky(translation=1 / 16)
    right = augment.transform(image, one(6, 12.0))
    assert torch.allclose(right[..., :12], image[..., 1:13].flip(3), rtol=0, atol=1e-5)
    assert not augment.transform(image, one(7, 15.0 + 16 + 3)).any()
    assert augment.transform(image, one(7, 15.0 + 15)).any()


def test_half_a_turn_of_the_stretched_axis_is_the_same_stretch():
    image = pictures(4)
    other = MAPS.clone()
    other[:, 4] += math.pi
    expected = NonLeaky().transform(image, MAPS)
    assert torch.allclose(NonLeaky().transform(image, other), expected, rtol=0, atol=1e-6)


def test_an_image_that_is_not_moved_stays_bit_for_bit_among_others():
    image = pictures(4)
    parameters = MAPS.clone()
    parameters[0] = 0
    parameters[3, 2:] = 0
    got = NonLeaky().transform(image, parameters)
    assert torch.equal(got[0], image[0])
    assert torch.equal(got[3], image[3].flip(1, 2))
    assert not torch.isclose(got[1:3], image[1:3], atol=0.1).all()


def test_probability_zero_only_mirrors_left_and_right():
    image = pictures(64)
    got, label = NonLeaky(probability=0.0)(image, uniform(64))
    mirrored = label[:, 0] == 1
    assert 0 < mirrored.sum() < 64
    assert not label[:, 1:].any()
    assert torch.equal(got, torch.where(mirrored[:, None, None, None], image.flip(3), image))


@pytest.mark.parametrize("probability", [0.12, 1.0])
def test_each_operation_is_used_with_its_probability_and_alone_of_the_others(probability):
    count = 50_000
    label = label_of(NonLeaky(probability=probability).parameters(uniform(count)))
    used = label[:, [0, 1, 2, 3, 5, 7]] != 0
    expected = torch.tensor([0.5, probability / 2, *[probability] * 4])
    # 4.5 standard deviations of a frequency, 0 where the operation is always used.
    tolerance = 4.5 * (expected * (1 - expected) / count).sqrt()
    assert ((used.float().mean(dim=0) - expected).abs() <= tolerance + 1e-6).all()
    varied = used[:, expected < 1].T.double()
    correlation = torch.corrcoef(varied) - torch.eye(len(varied))
    assert correlation.abs().max() < 4.5 / math.sqrt(count)
    assert torch.equal(label[:, 7] != 0, label[:, 8] != 0)
    assert set(label[:, :2].unique().tolist()) == {0.0, 1.0}


def test_parameters_have_the_published_distributions():
    """Kolmogorov-Smirnov on what is in use; the seed is fixed, so the level is no flake."""
    a = NonLeaky(probability=0.5).parameters(uniform(40_000, seed=1)).numpy()
    for index in (2, 5, 6, 7):
        drawn = a[a[:, index] != 0, index]
        assert stats.kstest(drawn, "norm").pvalue > 0.01
    angle = stats.uniform(-math.pi, 2 * math.pi)
    turn, tilt = a[a[:, 3] != 0, 3], a[a[:, 4] != 0, 4]
    assert stats.kstest(turn, angle.cdf).pvalue > 0.01
    assert stats.kstest(tilt, angle.cdf).pvalue > 0.01
    stretched = a[:, 5] != 0
    assert not a[~stretched, 4].any()
    # 4.5 standard deviations of a coin tossed 20,000 times.
    assert abs((a[stretched, 4] == 0).mean() - 0.5) < 4.5 * 0.5 / math.sqrt(stretched.sum())
    in_use = a[(a[:, 2:] != 0).all(axis=1), 2:]
    # All six at once are used by 1 in 64 images.
    assert np.abs(np.corrcoef(in_use.T) - np.eye(6)).max() < 4.5 / math.sqrt(len(in_use))


def test_the_strengths_are_those_of_the_appendix():
    """2^0.2 for one standard deviation of the scales, an eighth of the side for the translation."""
    augment = NonLeaky()
    grown, _ = augment.inverse(one(2, 1.0), 32, 16)
    stretched, offset = augment.inverse(one(5, 1.0) + one(6, 1.0) + one(7, 1.0), 32, 16)
    factor = 2**0.2
    assert torch.allclose(grown[0], torch.eye(2, dtype=torch.float64) / factor)
    assert torch.allclose(stretched[0].diag(), torch.tensor([1 / factor, factor]).double())
    assert offset.tolist() == [[4.0, 2.0]]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_image_depends_on_its_own_numbers_whatever_its_batch(size):
    image, numbers = pictures(12), uniform(12)
    augment = NonLeaky(probability=0.8)
    state = torch.get_rng_state()
    whole, label = augment(image, numbers)
    pieces = map(augment, image.split(size), numbers.split(size))
    images, labels = zip(*pieces, strict=True)
    assert torch.equal(torch.cat(images), whole)
    assert torch.equal(torch.cat(labels), label)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_number_changes_something():
    augment = NonLeaky(probability=0.5)
    base = torch.full((NonLeaky.draws, NonLeaky.draws), 0.2, dtype=torch.float64)
    changed = base + 0.5 * torch.eye(NonLeaky.draws)
    assert (augment.parameters(changed) != augment.parameters(base)).any(dim=1).all()


def test_mixed_precision_does_not_touch_the_images():
    image, numbers = pictures(4), uniform(4)
    augment = NonLeaky(probability=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = augment(image, numbers)
    assert torch.equal(mixed, augment(image, numbers)[0])


def test_images_and_labels_are_float32_without_a_graph():
    image = pictures(4).requires_grad_()
    got, label = NonLeaky(probability=1.0)(image, uniform(4))
    assert got.shape == image.shape and label.shape == (4, NonLeaky.labels)
    assert got.dtype == label.dtype == torch.float32
    assert not got.requires_grad and not label.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_numbers_at_the_ends_of_their_range_give_finite_images(dtype, value):
    """1 is what the largest float64 becomes when it is rounded to float32."""
    numbers = torch.full((2, NonLeaky.draws), value, dtype=dtype)
    for probability in (0.0, 1.0):
        got, label = NonLeaky(probability=probability)(pictures(2), numbers)
        assert got.isfinite().all() and label.isfinite().all()


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_probability_outside_the_unit_interval_is_refused(probability):
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\]"):
        NonLeaky(probability=probability)


def test_bytes_and_too_few_numbers_are_refused():
    with pytest.raises(ValueError, match="must be floating point .got torch.uint8"):
        NonLeaky()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), uniform(2))
    with pytest.raises(ValueError, match=r"13 numbers for each of 2 images \(got shape \(3, 13\)"):
        NonLeaky()(pictures(2), uniform(3))
