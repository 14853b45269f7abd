"""The synthetic data: a deterministic process whose scenes are the same at every resolution."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusion_pl.data.dataset import load
from diffusion_pl.data.scenes import GROUNDS, Latents, latents
from diffusion_pl.data.shapes import SHAPES
from diffusion_pl.data.synthetic import Synthetic, render


def _row(values: float | list[float]) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def _scene(shape: str, **changes: np.ndarray) -> Latents:
    """A white shape of radius 0.4 in the middle of a black image."""
    scene = latents(0, 0, 1)
    plain = {
        "label": np.array([list(SHAPES).index(shape)]),
        "centre": _row([0.5, 0.5]),
        "radius": _row(0.4),
        "colour": _row([1.0, 1.0, 1.0]),
        "rim": _row(0.0),
        "near": _row([0.0, 0.0, 0.0]),
        "far": _row([0.0, 0.0, 0.0]),
    }
    return dataclasses.replace(scene, **(plain | changes))


def test_an_image_depends_on_seed_and_index_alone() -> None:
    """A count is a prefix, a later start is a slice, and calls may group scenes in any way."""
    whole = render(latents(3, 0, 90), 24)
    assert np.array_equal(render(latents(3, 0, 20), 24), whole[:20])
    assert np.array_equal(render(latents(3, 57, 1), 24), whole[57:58])
    assert not np.array_equal(render(latents(4, 0, 20), 24), whole[:20])


@pytest.mark.parametrize(("resolution", "worst"), [(32, 5.0), (64, 12.0), (128, 24.0)])
def test_a_scene_is_the_same_picture_at_every_resolution(resolution: int, worst: float) -> None:
    """256 px averaged over blocks is the smaller image.

    Both approximate the integral over a pixel by a grid of points. The worst pixel is the tip of a
    star, where the points of a pixel are few; the mean is mostly rounding to 255 levels.
    """
    scenes = latents(0, 0, 80)
    block = 256 // resolution
    large = render(scenes, 256).reshape(80, 3, resolution, block, resolution, block)
    difference = np.abs(large.mean(axis=(3, 5)) - render(scenes, resolution))
    assert difference.max() <= worst
    assert difference.mean() <= 0.2


def _grown_crescent(outer: float, inner: float, apart: float, by: float) -> float:
    """Area of a disc without a second one's, then grown: Steiner's A + L t + pi t^2."""
    # Half the angles that the circles' common chord takes, seen from either centre.
    far = math.acos((apart**2 + outer**2 - inner**2) / (2 * apart * outer))
    near = math.acos((apart**2 + inner**2 - outer**2) / (2 * apart * inner))
    bitten = outer**2 * far + inner**2 * near - apart * outer * math.sin(far)
    outline = 2 * outer * (math.pi - far) + 2 * inner * near
    return math.pi * outer**2 - bitten + outline * by + math.pi * by**2


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", math.pi * 0.88**2),
        ("crescent", _grown_crescent(0.94, 0.77, 0.44, 0.02)),
        ("ring", math.pi * (0.92**2 - 0.48**2)),
        ("square", 1.4**2),
        ("triangle", 3 * math.sqrt(3) * 0.5**2),
        ("cross", 2 * 1.84 * 0.6 - 0.6**2),
        ("star", 10 * 0.5 * 0.48 * math.sin(math.pi / 5)),
        # Half a unit square with two half discs of radius sqrt(2) / 4, scaled by 1.55.
        ("heart", 1.55**2 * (0.5 + math.pi / 8)),
    ],
)
def test_a_shape_covers_its_analytic_area(shape: str, area: float) -> None:
    cover = render(_scene(shape), 128).mean() / 255
    assert cover == pytest.approx(area * 0.4**2, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distance_has_unit_slope(shape: str) -> None:
    """Else the covered part of an edge pixel would be wrong; creases and corners are few points."""
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 4000))
    step = 1e-5
    distance = SHAPES[shape]
    slope_x = (distance(x + step, y) - distance(x - step, y)) / (2 * step)
    slope_y = (distance(x, y + step) - distance(x, y - step)) / (2 * step)
    assert np.mean(np.abs(np.hypot(slope_x, slope_y) - 1) < 1e-3) > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_within_its_radius(shape: str) -> None:
    angle = np.linspace(0, 2 * np.pi, 720)
    outside = SHAPES[shape](1.005 * np.cos(angle), 1.005 * np.sin(angle))
    assert outside.min() > 0


@pytest.mark.parametrize("ground", range(len(GROUNDS)), ids=GROUNDS)
def test_the_process_is_symmetric_under_mirroring(ground: int) -> None:
    """The mirrored latents are as likely as the latents and draw the mirrored image."""
    scenes = dataclasses.replace(latents(5, 0, 40), ground=np.full(40, ground))
    flip = np.array([-1, 1], dtype=np.float32)
    one = np.array([1, 0], dtype=np.float32)
    mirrored = dataclasses.replace(
        scenes,
        centre=one + flip * scenes.centre,
        turn=-flip * scenes.turn,
        side=-scenes.side,
        heading=flip * scenes.heading,
        spots=one + flip * scenes.spots,
        phase=-flip * scenes.phase,
    )
    difference = render(scenes, 32).astype(int) - render(mirrored, 32)[..., ::-1]
    assert np.abs(difference).max() <= 1  # float32 rounding may move a value across a half


def test_shape_and_ground_differ_in_luma() -> None:
    scenes = latents(0, 0, 5000)
    luma = np.array([0.299, 0.587, 0.114])
    for ground in (scenes.near, scenes.far):
        assert np.abs(scenes.colour @ luma - ground @ luma).min() > 0.25
    for colour in (scenes.colour, scenes.near, scenes.far):
        assert colour.min() >= 0 and colour.max() <= 1


def test_colours_are_rounded_to_the_nearest_level() -> None:
    ground = _row([100.4 / 255, 100.6 / 255, 1.0])
    scene = _scene("disc", ground=np.array([0]), near=ground)
    assert render(scene, 16)[0, :, 0, 0].tolist() == [100, 101, 255]


def test_a_shape_lies_within_the_image_turned_and_mirrored_as_often_as_not() -> None:
    scenes = latents(0, 0, 20_000)
    assert (scenes.centre - scenes.radius[:, None]).min() > 0
    assert (scenes.centre + scenes.radius[:, None]).max() < 1
    assert scenes.radius.min() > 0.25 and scenes.radius.max() < 0.4
    for unit in (scenes.turn, scenes.heading):
        np.testing.assert_allclose((unit**2).sum(axis=1), 1, atol=1e-6)
        assert abs(unit[:, 1].mean()) < 0.05
    assert set(scenes.side.tolist()) == {-1.0, 1.0}
    assert abs(scenes.side.mean()) < 5 / math.sqrt(20_000)


def test_a_heart_stands_on_its_point() -> None:
    x, y = np.array([0.5, 0.5, 0.0]), np.array([-0.5, 0.7, 0.9])  # y goes down
    assert (SHAPES["heart"](x, y) < 0).tolist() == [True, False, True]


def test_what_is_asked_for_in_opening_is_what_comes() -> None:
    images = Synthetic(4, 32, shapes=("star", "disc")).open(16)
    assert images.shape == (4, 3, 16, 16)
    assert list(images.class_names) == ["star", "disc"]


def test_labels_and_grounds_are_uniform() -> None:
    """Each count is binomial: 5 standard deviations is one false alarm in millions."""
    scenes = latents(0, 0, 20_000)
    for drawn, kinds in ((scenes.label, len(SHAPES)), (scenes.ground, len(GROUNDS))):
        deviation = math.sqrt(20_000 / kinds * (1 - 1 / kinds))
        assert np.abs(np.bincount(drawn, minlength=kinds) - 20_000 / kinds).max() < 5 * deviation


def test_fewer_grounds_change_the_ground_alone() -> None:
    every, some = latents(3, 0, 600), latents(3, 0, 600, ["linear", "blobs"])
    names = np.array(GROUNDS)[some.ground]
    assert set(names) == {"linear", "blobs"}
    assert 0.45 < (names == "blobs").mean() < 0.55  # standard error 0.02
    for field in dataclasses.fields(Latents):
        if field.name != "ground":
            assert np.array_equal(getattr(every, field.name), getattr(some, field.name))
    source = Synthetic(count=2, resolution=8, grounds=["linear", "blobs"])
    assert source.open().name == "synthetic-8-linear-blobs"


def test_fewer_shapes_are_labelled_by_their_place_in_the_list() -> None:
    wanted = ["star", "disc"]
    some = latents(3, 0, 400, shapes=wanted)
    names = np.array(list(SHAPES))[some.label]
    assert set(names) == set(wanted)
    assert np.array_equal(some.radius, latents(3, 0, 400).radius)
    images = Synthetic(400, 8, seed=3, shapes=wanted).open()
    assert (images.name, images.classes) == ("synthetic-8-star-disc", 2)
    assert images.labels is not None
    assert [wanted[label] for label in images.labels.tolist()] == names.tolist()


def test_opening_gives_named_labelled_images() -> None:
    source = Synthetic(count=70, resolution=16, seed=1)
    source.prepare()
    images = source.open()
    assert (images.name, len(images), images.classes) == ("synthetic-16", 70, 8)
    assert (images.channels, images.resolution) == (source.channels, source.resolution)
    indices = torch.tensor([69, 0, 0])
    scenes = latents(1, 0, 70)
    expected = torch.from_numpy(render(scenes[indices.numpy()], 16))
    assert torch.equal(images.read(indices), expected)
    assert images.labels is not None
    assert images.labels.tolist() == scenes.label.tolist()


def test_the_fingerprint_names_the_content() -> None:
    """Equal content, equal fingerprint, in memory or not; any change of content changes it."""
    images = Synthetic(count=50, resolution=16).open()
    pixels, labels = images.read(torch.arange(50)), images.labels
    assert load("other name", pixels, labels, classes=8).fingerprint == images.fingerprint
    brighter = pixels.clone()
    brighter[7, 1, 2, 3] ^= 1
    others = [
        load("x", brighter, labels, classes=8),
        load("x", pixels, None, classes=0),
        load("x", pixels.flip(0), labels, classes=8),
        load("x", pixels.reshape(50, 12, 8, 8), labels, classes=8),
    ]
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize("threads", [1, 3])
def test_images_read_in_pieces_stand_where_they_belong(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    whole = Synthetic(count=50, resolution=16).open()
    monkeypatch.setattr("diffusion_pl.data.dataset.PIECE_BYTES", 7 * 3 * 16 * 16)
    monkeypatch.setattr("diffusion_pl.data.dataset.THREADS", threads)
    pieces = Synthetic(count=50, resolution=16).open()
    assert pieces.fingerprint == whole.fingerprint
    assert torch.equal(pieces.read(torch.arange(50)), whole.read(torch.arange(50)))


def test_images_beyond_memory_are_read_again_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Synthetic(count=30, resolution=16).open()
    store = images.store

    class Counted:
        """A store that counts its readings."""

        shape = (30, 3, 16, 16)
        readings = 0

        def read(self, indices: torch.Tensor) -> torch.Tensor:
            self.readings += 1
            return store[indices]

    monkeypatch.setattr("diffusion_pl.data.dataset.MEMORY_LIMIT", 1000)
    counted = Counted()
    on_demand = load("x", counted, images.labels, classes=8)
    after_opening = counted.readings
    assert torch.equal(on_demand.read(torch.tensor([3, 1])), images.read(torch.tensor([3, 1])))
    assert counted.readings == after_opening + 1
    assert on_demand.fingerprint == images.fingerprint


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (Synthetic(count=0), r"count must be at least 1 \(got 0\)"),
        (Synthetic(resolution=4), r"resolution must be at least 8 \(got 4\)"),
        (Synthetic(seed=-1), r"seed must be at least 0 \(got -1\)"),
        (Synthetic(grounds=["plain"]), r"grounds are of flat, linear.*'plain'"),
        (Synthetic(grounds=[]), r"grounds are of flat"),
        (Synthetic(shapes=["disc", "disc"]), r"shapes are of disc.*each once"),
    ],
)
def test_a_setting_out_of_range_is_one_clear_line(source: Synthetic, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        source.prepare()


def test_data_do_not_need_lightning() -> None:
    """Commands that answer at once import this package."""
    code = (
        "import sys, diffusion_pl.data.synthetic;"
        "assert not {'lightning', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
