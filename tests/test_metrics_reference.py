"""Reference statistics: right numbers, provenance, and a cache keyed by content."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.metrics import real_images, reference, shapes
from diffusion_pl.metrics.features import TILE, Features
from diffusion_pl.metrics.moments import Moments
from diffusion_pl.metrics.reference import Reference, real_features
from diffusion_pl.metrics.shapes import Shapes


@dataclass(frozen=True)
class ImageFiles:
    """Images at hand."""

    images: Tensor
    name: str = "noise"
    fingerprint: str = "abc"

    @property
    def resolution(self) -> int:
        return self.images.shape[2]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


class Untouchable(ImageFiles):
    """Images that must not be asked for."""

    def read(self, indices: Tensor) -> Tensor:
        raise AssertionError("the cache had the answer")


class Corners(nn.Module):
    """An extractor with spatial features that says how many images it saw at a time."""

    name, digest, resize, precision = "corners", "0" * 12, "none", "fp32"
    dimension, classes, spatial = 3, 0, 12
    error: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Features:
        self.sizes.append(len(images))
        values = images.float() / 255
        return Features(values.mean(dim=(2, 3)), None, values[:, :, :2, :2].flatten(1))


def draw(count: int, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def extractor() -> Shapes:
    return shapes.load()


@pytest.fixture(scope="module")
def images() -> ImageFiles:
    return ImageFiles(draw(2 * TILE + 6))


@pytest.fixture(scope="module")
def computed(extractor: Shapes, images: ImageFiles) -> Reference:
    return real_images.compute(images, extractor)


@pytest.fixture(scope="module")
def full(images: ImageFiles) -> Reference:
    """With all that a reference may have."""
    return real_images.compute(images, Corners(), keep=True)


def test_statistics_are_numpy_s_in_float64(
    extractor: Shapes, images: ImageFiles, computed: Reference
) -> None:
    pooled = extractor(images.images).pooled.double().numpy()
    np.testing.assert_allclose(computed.mean, pooled.mean(axis=0), rtol=1e-6)
    expected = np.cov(pooled, rowvar=False)
    np.testing.assert_allclose(computed.covariance, expected, rtol=0, atol=1e-6 * expected.max())
    assert computed.mean.dtype == computed.covariance.dtype == torch.float64
    assert (computed.count, computed.resolution) == (2 * TILE + 6, 16)
    assert (computed.name, computed.fingerprint) == ("noise", "abc")
    assert (computed.spatial, computed.features) == (None, None)


def test_spatial_moments_are_numpy_s_too(images: ImageFiles, full: Reference) -> None:
    values = images.images[:, :, :2, :2].flatten(1).double().numpy() / 255
    assert full.spatial is not None
    np.testing.assert_allclose(full.spatial.mean, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        full.spatial.covariance, np.cov(values, rowvar=False), rtol=0, atol=1e-7
    )
    assert (full.spatial.count, full.pooled.count) == (len(images), len(images))


def test_an_extractor_always_sees_tiles_of_one_size(images: ImageFiles) -> None:
    extractor = Corners()
    real_images.compute(images, extractor)
    # The first tile gives the point that moments are summed about.
    assert extractor.sizes == [TILE, TILE, TILE, TILE]


def test_a_source_of_data_can_be_measured(extractor: Shapes) -> None:
    data = Synthetic(20, 16, 5).open()
    known = real_images.compute(data, extractor, keep=True)
    assert (known.name, known.resolution, known.count) == ("synthetic-16", 16, 20)
    assert known.fingerprint == data.fingerprint
    expected = extractor(data.read(torch.arange(20))).pooled
    assert known.features is not None
    assert torch.equal(known.features, expected)


def test_progress_counts_images(extractor: Shapes, images: ImageFiles) -> None:
    done: list[tuple[int, int]] = []
    real_images.compute(images, extractor, progress=lambda *counts: done.append(counts))
    assert done == [(TILE, 70), (2 * TILE, 70), (70, 70)]


def test_few_images_are_all_kept_in_order(images: ImageFiles, full: Reference) -> None:
    assert full.features is not None
    assert full.features.dtype == torch.float32
    assert torch.equal(full.features, Corners()(images.images).pooled)


@pytest.mark.parametrize("kept", [1, 7, 33, 69, 70])
def test_of_many_images_as_many_as_wanted_are_kept_evenly(
    monkeypatch: pytest.MonkeyPatch, images: ImageFiles, full: Reference, kept: int
) -> None:
    monkeypatch.setattr(real_images, "KEPT", kept)
    known = real_images.compute(images, Corners(), keep=True)
    everything, some = full.features, known.features
    assert everything is not None and some is not None
    places = [int((everything == row).all(dim=1).nonzero()) for row in some]
    assert len(places) == kept
    gaps = np.diff([-1, *places])
    assert set(gaps) <= {70 // kept, -(-70 // kept)}, places
    # What is kept has no part in the moments.
    assert torch.equal(known.covariance, full.covariance)


def test_no_more_images_than_wanted_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_images, "KEPT", 100)
    for count in (2, 3, 51, 99, 100):
        assert real_images.evenly_kept(torch.arange(count), count).all()


@pytest.mark.parametrize("count", [100, 101, 137, 10_000])
def test_exactly_so_many_are_kept(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(real_images, "KEPT", 100)
    indices = torch.arange(count)
    whole = real_images.evenly_kept(indices, count)
    assert whole.sum() == 100
    # Whatever the pieces that they are asked for in.
    pieces = [real_images.evenly_kept(part, count) for part in indices.split(7)]
    assert torch.equal(torch.cat(pieces), whole)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Moments):
        pairs = ((mine.mean, theirs.mean), (mine.covariance, theirs.covariance))
        return mine.count == theirs.count and all(same(*pair) for pair in pairs)
    if isinstance(mine, Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return type(mine) is type(theirs) and mine == theirs


@pytest.mark.parametrize("which", ["computed", "full"])
def test_a_saved_reference_comes_back_bit_for_bit(
    request: pytest.FixtureRequest, which: str, tmp_path: Path
) -> None:
    known = dataclasses.replace(request.getfixturevalue(which), precision="bf16")
    path = tmp_path / "folder" / "reference.safetensors"
    known.save(path)
    back = reference.load(path)
    for field in dataclasses.fields(Reference):
        assert same(getattr(known, field.name), getattr(back, field.name)), field.name
    assert list(path.parent.iterdir()) == [path], "the file written aside is left over"


def test_provenance_is_plain_text_in_the_file(
    computed: Reference, extractor: Shapes, tmp_path: Path
) -> None:
    computed.save(tmp_path / "r.safetensors")
    with safe_open(tmp_path / "r.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "name": "noise",
            "fingerprint": "abc",
            "resolution": "16",
            "count": "70",
            "extractor": "shapes",
            "digest": extractor.digest,
            "resize": extractor.resize,
            "precision": "fp32",
        }


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x80\x04pickle"])
def test_what_is_no_reference_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="not reference statistics") as error:
        reference.load(path)
    assert "\n" not in str(error.value)


def test_weights_are_no_reference() -> None:
    with pytest.raises(ValueError, match="not reference statistics"):
        reference.load(shapes.WEIGHTS)


def test_the_cache_answers_without_reading_the_images_again(
    extractor: Shapes, images: ImageFiles, computed: Reference, tmp_path: Path
) -> None:
    first = real_images.cached(tmp_path, images, extractor)
    again = real_images.cached(tmp_path, Untouchable(images.images, "other name"), extractor)
    assert torch.equal(first.covariance, computed.covariance)
    assert torch.equal(first.covariance, again.covariance)
    assert again.name == "other name", "a name says nothing of the content"
    assert len(list(tmp_path.iterdir())) == 1


def test_features_are_cached_beside_moments_alone(
    extractor: Shapes, images: ImageFiles, tmp_path: Path
) -> None:
    real_images.cached(tmp_path, images, extractor)
    with_features = real_images.cached(tmp_path, images, extractor, keep=True)
    assert with_features.features is not None
    again = real_images.cached(tmp_path, Untouchable(images.images), extractor, keep=True)
    assert again.features is not None
    assert torch.equal(again.features, with_features.features)
    assert real_images.cached(tmp_path, Untouchable(images.images), extractor).features is None


def test_the_cache_is_keyed_by_everything_that_moves_the_number(
    extractor: Shapes, tmp_path: Path
) -> None:
    def changed(**attributes: Any) -> Shapes:
        other = shapes.load()
        for name, value in attributes.items():
            setattr(other, name, value)
        return other

    base: dict[str, Any] = {
        "fingerprint": "abc",
        "resolution": 16,
        "images": range(24),
        "extractor": extractor,
        "keep": False,
    }
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"fingerprint": "abd"},
        {"resolution": 8},
        {"images": range(2)},
        {"keep": True},
        {"extractor": changed(name="other")},
        {"extractor": changed(digest="f" * 12)},
        {"extractor": changed(resize="bicubic")},
        {"extractor": changed(precision="bf16")},
        {"extractor": changed(spatial=7)},
    )

    def path_of(known: dict[str, Any]) -> Path:
        class Known:
            fingerprint, resolution = known["fingerprint"], known["resolution"]

            def __len__(self) -> int:
                return len(known["images"])

        images: Any = Known()
        return real_images.path_of(tmp_path, images, known["extractor"], keep=known["keep"])

    paths = {path_of(base | change) for change in changes}
    assert len(paths) == len(changes)
    assert path_of(base) in paths


def test_images_that_cannot_be_measured_leave_nothing_in_the_cache(
    extractor: Shapes, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"reference noise: needs at least 2 images \(got 1\)"):
        real_images.cached(tmp_path, ImageFiles(draw(1)), extractor)
    broken = shapes.load()
    for parameter in broken.network.texture.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="extractor shapes gave non-finite values"):
        real_images.cached(tmp_path, ImageFiles(draw(4)), broken)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_an_error_that_names_it(
    extractor: Shapes, images: ImageFiles, tmp_path: Path
) -> None:
    real_images.cached(tmp_path, images, extractor)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path.name}: not reference statistics"):
        real_images.cached(tmp_path, images, extractor)


def test_a_mismatch_is_an_error_that_names_both_sides(
    computed: Reference, extractor: Shapes
) -> None:
    computed.check(extractor, 16)
    other = dataclasses.replace
    for wrong, expected in (
        (other(computed, resolution=32), "resolution is 32, the evaluation has 16"),
        (other(computed, extractor="inception"), "extractor is inception, .* has shapes"),
        (other(computed, digest="0" * 12), "digest is 000000000000, the evaluation has "),
        (other(computed, resize="bicubic"), "resize is bicubic, the evaluation has area"),
        (other(computed, precision="bf16"), "precision is bf16, the evaluation has fp32"),
        (other(computed, mean=torch.zeros(3)), "dimension is 3, the evaluation has 128"),
    ):
        with pytest.raises(ValueError, match=expected):
            wrong.check(extractor, 16)
    # A published file says nothing of the resolution, so nothing can be held against it.
    other(computed, resolution=0).check(extractor, 16)


def test_single_images_are_given_only_where_they_were_kept(
    computed: Reference, full: Reference, extractor: Shapes
) -> None:
    assert full.features is not None
    assert real_features(full, Corners(), "metric") is full.features
    with pytest.raises(ValueError, match="metric: reference noise has moments only"):
        real_features(computed, extractor, "metric")
    with pytest.raises(ValueError, match="extractor is corners, the evaluation has shapes"):
        real_features(full, extractor, "metric")


def test_moments_are_right_whatever_the_rows_that_wait(
    monkeypatch: pytest.MonkeyPatch, images: ImageFiles, full: Reference
) -> None:
    monkeypatch.setattr("diffusion_pl.metrics.moments.ROWS", 40)
    known = real_images.compute(images, Corners())
    torch.testing.assert_close(known.covariance, full.covariance, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(known.mean, full.mean, rtol=1e-12, atol=0)
    assert known.spatial is not None and full.spatial is not None
    torch.testing.assert_close(
        known.spatial.covariance, full.spatial.covariance, rtol=1e-12, atol=1e-15
    )
