"""Published statistics: the layouts of ADM and of EDM, and files that are neither."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_pl.metrics import published
from diffusion_pl.metrics.inception import PUBLISHED, Inception
from diffusion_pl.metrics.reference import Reference

WIDE, PLACES = 2048, 2023


def statistics(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A mean and a covariance that compress well."""
    random = np.random.RandomState(seed)
    return random.randn(size), np.diag(random.rand(size))


@pytest.fixture(scope="module")
def pooled() -> tuple[np.ndarray, np.ndarray]:
    return statistics(WIDE, 0)


@pytest.fixture(scope="module")
def spatial() -> tuple[np.ndarray, np.ndarray]:
    return statistics(PLACES, 1)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(path: Path) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as error:
        published.load_npz(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_layout_of_edm_is_read_back_equal(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    mean, covariance = pooled
    path = write(tmp_path / "cifar10-32x32.npz", mu=mean, sigma=covariance)
    known = published.open_reference(path)
    assert known.mean.dtype == known.covariance.dtype == torch.float64
    np.testing.assert_array_equal(known.mean, mean)
    np.testing.assert_array_equal(known.covariance, covariance)
    assert (known.name, known.spatial, known.features) == ("cifar10-32x32", None, None)
    assert (known.resolution, known.count) == (0, 0), "the file does not say"
    assert known.pooled.rank == WIDE


def test_the_layout_of_adm_has_spatial_moments_too(
    pooled: tuple[np.ndarray, np.ndarray], spatial: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    # ADM's activations are averaged in single precision.
    arrays = {"mu": pooled[0], "sigma": pooled[1], "mu_s": spatial[0], "sigma_s": spatial[1]}
    arrays = {key: value.astype(np.float32) for key, value in arrays.items()}
    known = published.open_reference(write(tmp_path / "r.npz", **arrays, arr_0=np.zeros(3)))
    np.testing.assert_array_equal(known.mean, arrays["mu"])
    np.testing.assert_array_equal(known.covariance, arrays["sigma"])
    assert known.spatial is not None
    np.testing.assert_array_equal(known.spatial.mean, arrays["mu_s"])
    np.testing.assert_array_equal(known.spatial.covariance, arrays["sigma_s"])
    assert known.spatial.mean.dtype == torch.float64
    assert known.spatial.rank == PLACES, "the file does not say of how many images"


def test_it_is_compared_with_the_published_inception_alone_at_any_resolution(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    known = published.load_npz(write(tmp_path / "r.npz", mu=pooled[0], sigma=pooled[1]))

    class Named:
        name, digest, resize = "inception", PUBLISHED[:12], Inception.resize
        dimension, precision = WIDE, "fp32"

    extractor: Any = Named()
    for resolution in (32, 64, 256):
        known.check(extractor, resolution)
    extractor.name, extractor.digest = "inception-01234567", "0" * 12
    with pytest.raises(ValueError, match="extractor is inception, the evaluation has"):
        known.check(extractor, 32)


def test_other_contents_have_other_fingerprints(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    mean, covariance = pooled
    paths = [
        write(tmp_path / name, mu=mean + shift, sigma=covariance)
        for name, shift in (("a.npz", 0), ("b.npz", 0), ("c.npz", 1))
    ]
    one, same, other = (published.load_npz(path).fingerprint for path in paths)
    assert one == same != other
    assert len(one) == 64


def test_our_own_files_are_opened_by_the_same_name(tmp_path: Path) -> None:
    mean, covariance = torch.zeros(2).double(), torch.eye(2).double()
    Reference("r", "f", 8, 5, "shapes", "0", "n", mean, covariance).save(tmp_path / "r.safetensors")
    assert published.open_reference(tmp_path / "r.safetensors").count == 5


def test_arrays_that_are_missing_or_of_another_shape_are_named(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    mean, covariance = pooled
    small = np.zeros(3)
    for arrays, expected in (
        ({"sigma": covariance}, "no array 'mu'"),
        ({"mu": mean}, "no array 'sigma'"),
        ({"mu": mean, "sigma": covariance, "mu_s": np.zeros(PLACES)}, "no array 'sigma_s'"),
        ({"mu": small, "sigma": covariance}, "mu must be (2048,) (got (3,))"),
        ({"mu": mean, "sigma": small}, "sigma must be (2048, 2048) (got (3,))"),
        (
            {"mu": mean, "sigma": covariance, "mu_s": mean},
            "mu_s must be (2023,) (got (2048,))",
        ),
    ):
        assert expected in refusal(write(tmp_path / "r.npz", **arrays))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path, bad: float
) -> None:
    mean, covariance = (values.copy() for values in pooled)
    mean[7] = bad
    path = write(tmp_path / "r.npz", mu=mean, sigma=covariance)
    assert "mu has values that are not finite" in refusal(path)
    mean[7], covariance[3, 4] = 0, bad
    path = write(tmp_path / "r.npz", mu=mean, sigma=covariance)
    assert "sigma has values that are not finite" in refusal(path)


class _Attack:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_unpickled(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    attack = np.array([_Attack(victim)], dtype=object)
    np.savez(tmp_path / "r.npz", mu=attack, sigma=pooled[1])
    np.load(tmp_path / "r.npz", allow_pickle=True)["mu"]
    assert victim.exists(), "the attack is none"
    victim.unlink()
    assert "not published statistics" in refusal(tmp_path / "r.npz")
    (tmp_path / "p.npz").write_bytes(pickle.dumps(_Attack(victim)))
    assert "not published statistics" in refusal(tmp_path / "p.npz")
    assert not victim.exists()


def one_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def spoilt(at: int) -> bytes:
    """An archive whose compressed bytes are damaged."""
    file = io.BytesIO()
    np.savez_compressed(file, mu=np.arange(2048.0), sigma=np.zeros(3))
    content = bytearray(file.getvalue())
    content[at : at + 40] = b"\xff" * 40
    return bytes(content)


def no_arrays() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mu", "text")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [None, b"", b"text", b"PK\x03\x04", one_array(), spoilt(60), spoilt(400), no_arrays()],
    ids=["absent", "empty", "text", "cut", "one array", "damaged", "damaged later", "no arrays"],
)
def test_what_is_no_archive_of_numbers_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.npz"
    if content is not None:
        path.write_bytes(content)
    assert "not published statistics" in refusal(path)


def test_words_for_numbers_are_refused(tmp_path: Path) -> None:
    words = write(tmp_path / "r.npz", mu=np.array(["one", "two"]), sigma=np.zeros(3))
    assert "not published statistics" in refusal(words)
    write(tmp_path / "r.npz", mu=np.zeros(3, dtype=[("a", "f8"), ("b", "f8")]))
    assert "not published statistics" in refusal(tmp_path / "r.npz")
