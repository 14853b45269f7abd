"""Reference statistics: right numbers, provenance, and a cache keyed by content."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffusion_pl.metrics import reference, shapes
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.metrics.shapes import Shapes


@pytest.fixture(scope="module")
def extractor() -> Shapes:
    return shapes.load()


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (24, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def computed(extractor: Shapes, images: Tensor) -> Reference:
    return reference.compute(images.split(10), "noise", "abc", 16, extractor)


def untouchable() -> Iterator[Tensor]:
    """Images that must not be asked for."""
    raise AssertionError("the cache had the answer")
    yield


def test_statistics_are_numpy_s_in_float64(
    extractor: Shapes, images: Tensor, computed: Reference
) -> None:
    pooled = extractor(images).pooled.double().numpy()
    np.testing.assert_allclose(computed.mean, pooled.mean(axis=0), rtol=1e-6)
    expected = np.cov(pooled, rowvar=False)
    np.testing.assert_allclose(computed.covariance, expected, rtol=0, atol=1e-6 * expected.max())
    assert computed.mean.dtype == computed.covariance.dtype == torch.float64
    assert computed.count == 24


def test_batch_size_does_not_matter(extractor: Shapes, images: Tensor, computed: Reference) -> None:
    other = reference.compute(images.split(7), "noise", "abc", 16, extractor)
    # The float32 network, not the sums, differs in its last digit with the batch size.
    torch.testing.assert_close(other.covariance, computed.covariance, rtol=1e-4, atol=1e-7)


def test_progress_counts_images(extractor: Shapes, images: Tensor) -> None:
    done: list[int] = []
    reference.compute(images.split(10), "noise", "abc", 16, extractor, progress=done.append)
    assert done == [10, 20, 24]


def test_a_saved_reference_comes_back_bit_for_bit(computed: Reference, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "reference.safetensors"
    computed.save(path)
    back = reference.load(path)
    for field in dataclasses.fields(Reference):
        mine, theirs = getattr(computed, field.name), getattr(back, field.name)
        assert type(mine) is type(theirs)
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
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
            "count": "24",
            "extractor": "shapes",
            "digest": extractor.digest,
            "resize": extractor.resize,
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
    extractor: Shapes, images: Tensor, computed: Reference, tmp_path: Path
) -> None:
    first = reference.cached(tmp_path, images.split(10), "noise", "abc", 16, 24, extractor)
    again = reference.cached(tmp_path, untouchable(), "other name", "abc", 16, 24, extractor)
    assert torch.equal(first.covariance, computed.covariance)
    assert torch.equal(first.covariance, again.covariance)
    assert again.name == "other name", "a name says nothing of the content"


def test_the_cache_is_keyed_by_everything_that_moves_the_number(
    extractor: Shapes, tmp_path: Path
) -> None:
    other = shapes.load()
    other.digest = "f" * 12
    base: dict[str, Any] = {
        "fingerprint": "abc",
        "resolution": 16,
        "count": 24,
        "extractor": extractor,
    }
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"fingerprint": "abd"},
        {"resolution": 8},
        {"count": 2},
        {"extractor": other},
    )
    paths = {reference.cache_path(tmp_path, **(base | change)) for change in changes}
    assert len(paths) == len(changes)


def test_another_number_of_images_is_not_cached(
    extractor: Shapes, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="25 images announced, 24 came"):
        reference.cached(tmp_path, images.split(10), "noise", "abc", 16, 25, extractor)
    assert list(tmp_path.iterdir()) == []


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
        (other(computed, mean=torch.zeros(3)), "dimension is 3, the evaluation has 128"),
    ):
        with pytest.raises(ValueError, match=expected):
            wrong.check(extractor, 16)


def test_images_that_cannot_be_measured_are_refused(extractor: Shapes, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"32 px square \(got 16 x 16\)"):
        reference.compute([images], "noise", "abc", 32, extractor)
    with pytest.raises(ValueError, match=r"at least 2 images \(got 1\)"):
        reference.compute([images[:1]], "noise", "abc", 16, extractor)
    broken = shapes.load()
    for parameter in broken.network.texture.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        reference.compute([images], "noise", "abc", 16, broken)
