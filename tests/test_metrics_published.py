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

from diffusion_pl.evaluation import Evaluation, reference_of
from diffusion_pl.interop import statistics as interop_statistics
from diffusion_pl.metrics import npz, published
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.inception import PUBLISHED, Inception
from diffusion_pl.metrics.reference import Reference, real_features

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


# Images beside moments, or alone


class Seen(torch.nn.Module):
    """Shows what is measured: the means of the channels, and copies of them up to D."""

    classes, spatial, precision, error = 0, 0, "fp32", None

    def __init__(self, name: str, digest: str, dimension: int, resize: str) -> None:
        super().__init__()
        self.name, self.digest, self.dimension, self.resize = name, digest, dimension, resize

    def forward(self, images: torch.Tensor) -> Features:
        means = images.float().mean(dim=(2, 3)) / 255
        return Features(torch.cat([means, means[:, :1].expand(-1, self.dimension - 3)], dim=1))


def inception_like() -> Any:
    return Seen("inception", PUBLISHED[:12], WIDE, Inception.resize)


def pictures(count: int, side: int = 4) -> np.ndarray:
    return np.random.RandomState(count).randint(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def adm(pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> Path:
    mean, covariance = pooled
    return write(tmp_path / "adm.npz", arr_0=pictures(40), mu=mean, sigma=covariance)


def test_images_beside_moments_are_what_single_images_are_compared_with(
    adm: Path, pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    measuring = published.Measuring(inception_like(), tmp_path / "kept", keep=True)
    known = published.open_reference(adm, measuring)
    np.testing.assert_array_equal(known.mean, pooled[0])  # of all images, which the file has not
    assert known.resolution == 4
    expected = pictures(40).mean(axis=(1, 2)) / 255
    features = real_features(known, measuring.extractor, "precision and recall")
    np.testing.assert_allclose(features[:, :3], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="resolution is 4, the evaluation has 8"):
        known.check(measuring.extractor, 8)
    without = published.open_reference(adm, published.Measuring(inception_like(), tmp_path))
    assert (without.features, without.resolution) == (None, 4)


def test_another_extractor_measures_the_images_and_not_the_moments(
    adm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measuring = published.Measuring(Seen("means", "1", 5, "none"), tmp_path / "kept", keep=True)
    known = published.open_reference(adm, measuring)
    assert (known.extractor, known.count, known.resolution) == ("means", 40, 4)
    assert "its moments are of Inception's features; for means its 40 images" in caplog.text


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_images_alone_are_a_reference(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "mine.npz", **{key: pictures(30)}, arr_1=np.arange(30))
    for extractor in (inception_like(), Seen("means", "1", 5, "none")):
        known = published.open_reference(path, published.Measuring(extractor, tmp_path / "kept"))
        assert (known.name, known.count, known.resolution) == ("mine", 30, 4)
        expected = pictures(30).mean(axis=(1, 2)) / 255
        np.testing.assert_allclose(known.mean[:3], expected.mean(axis=0), rtol=1e-5)
    assert published.only_images(path) and not published.only_images(tmp_path / "none.npz")
    assert "no array 'mu'" in refusal(path)  # without an extractor nothing is measured


def test_of_a_large_file_only_what_is_wanted_is_read(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of ADM's from 128 px up: more images than fit, and moments of a few MiB.
    mean, covariance = pooled
    path = write(tmp_path / "a.npz", arr_0=pictures(600, 8), mu=mean, sigma=covariance, extra=mean)
    monkeypatch.setattr(npz, "SMALL", 1000)
    held = npz.arrays(path)
    assert isinstance(held.store.array, np.memmap)
    indices = torch.tensor([5, 599, 0])
    expected = pictures(600, 8)[indices].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(held.read(indices), expected)
    np.testing.assert_array_equal(published.load_npz(path).mean, mean)
    # A header that promises more than is there.
    content = path.read_bytes()
    at = content.index(b"(600, 8, 8, 3)")
    path.write_bytes(content[:at] + b"(900, 8, 8, 3)" + content[at + 14 :])
    with pytest.raises(ValueError, match="not an archive of images"):
        npz.arrays(path)


def test_what_unpacks_to_far_more_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "SMALL", 1000)
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((5000, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="times its size"):
        npz.arrays(tmp_path / "bomb.npz")
    np.savez_compressed(tmp_path / "fine.npz", arr_0=pictures(50))
    np.testing.assert_array_equal(npz.arrays(tmp_path / "fine.npz").store.array, pictures(50))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (pictures(5).transpose(0, 3, 1, 2), r"channels stand last: x.transpose\(0, 2, 3, 1\)"),
        ((pictures(5) / 255).astype(np.float32), "save bytes, 0 to 255"),
        (pictures(5).astype(np.int64), "save bytes, 0 to 255"),
        (pictures(5)[..., 0], r"add the channel: x\[..., None\]"),
        (np.concatenate([pictures(5)] * 2, axis=3)[..., :4], "leave the fourth channel out"),
        (pictures(5)[:, :, :3], "images must be square"),
        (pictures(5)[:0], "must be uint8"),
        (np.asfortranarray(pictures(5)), "stored by columns"),
        (np.array([_Attack(Path("x"))], dtype=object), "objects, which are not unpickled"),
    ],
)
def test_images_of_another_kind_are_named(tmp_path: Path, array: np.ndarray, says: str) -> None:
    path = write(tmp_path / "x.npz", images=array)
    with pytest.raises(ValueError, match=says) as error:
        npz.arrays(path)
    assert "\n" not in str(error.value)


def test_grey_images_of_one_channel_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", arr_0=pictures(5)[..., :1])
    assert npz.arrays(path).read(torch.arange(5)).shape == (5, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("cifar10_legacy_tensorflow_train_32", True),
        ("cifar10_clean_train_32", False),
        ("mine_clean_custom_na", False),
        ("ffhq_legacy_pytorch_trainval70k_1024", False),
        ("a_clean_house", True),
    ],
)
def test_clean_fids_files_say_by_their_names_how_images_were_resized(
    pooled: tuple[np.ndarray, np.ndarray], tmp_path: Path, name: str, compared: bool
) -> None:
    path = write(tmp_path / f"{name}.npz", mu=pooled[0], sigma=pooled[1])
    known = published.load_npz(path)
    if compared:
        known.check(inception_like(), 32)
    else:
        with pytest.raises(ValueError, match=r"resize is .*clean-fid.*, the evaluation has Tensor"):
            known.check(inception_like(), 32)


def test_clean_fids_features_are_read(tmp_path: Path) -> None:
    features = np.random.RandomState(0).randn(9, WIDE).astype(np.float32)
    path = write(tmp_path / "x_legacy_tensorflow_train_32_kid.npz", feats=features)
    known = published.load_npz(path)
    np.testing.assert_allclose(known.mean, features.mean(axis=0, dtype=np.float64), atol=1e-7)
    np.testing.assert_allclose(known.covariance[:5, :5], np.cov(features[:, :5].T), rtol=1e-5)
    assert known.features is not None and known.count == 9
    np.testing.assert_array_equal(known.features, features)


def test_edm2s_pickles_are_read_without_running_them(tmp_path: Path) -> None:
    # As training/calculate_metrics.py of EDM2 writes them: one dictionary a metric.
    mean, covariance = statistics(WIDE, 3)
    small, square = statistics(8, 4)
    content = {
        "fid": {"mu": mean, "sigma": covariance},
        "fd_dinov2": {"mu": small, "sigma": square},
    }
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(content))
    known = interop_statistics.open_reference(path, inception_like())
    known.check(inception_like(), 512)
    np.testing.assert_array_equal(known.mean, mean)
    np.testing.assert_array_equal(known.covariance, covariance)
    # As an experiment's evaluation.reference names it.
    named = Evaluation(every=1, count=9, metrics=[Frechet()], reference=str(path))
    opened = reference_of(
        None, named, inception_like(), tmp_path, torch.device("cpu"),
        open_file=interop_statistics.open_any,
    )  # fmt: skip
    np.testing.assert_array_equal(opened.mean, mean)
    measuring = published.Measuring(inception_like(), tmp_path)
    with pytest.raises(ValueError, match=r"none\.npz: no such file of reference statistics"):
        interop_statistics.open_any(tmp_path / "none.npz", measuring)
    dino = Seen("dinov2-vit-l-14", "2", 8, "TensorFlow 1 bilinear to 224 px")
    known = interop_statistics.open_reference(path, dino)
    np.testing.assert_array_equal(known.mean, small)
    with pytest.raises(ValueError, match=r"resize is torch's .*EDM2.*, the evaluation has Tensor"):
        known.check(dino, 512)
    with pytest.raises(ValueError, match="has statistics for fd_dinov2, fid, none for .* shapes"):
        interop_statistics.open_reference(path, Seen("shapes", "1", 5, "none"))
    victim = tmp_path / "victim"
    for bad, says in (
        (pickle.dumps({"fid": _Attack(victim)}), "not a pickle"),
        (pickle.dumps({"fid": {"mu": mean[:5], "sigma": covariance}}), "mu must be"),
        (pickle.dumps({"fid": {"mu": mean * np.nan, "sigma": covariance}}), "not finite"),
        (pickle.dumps([1, 2]), "no statistics of EDM2's layout"),
        (pickle.dumps({"mu": mean}), "no statistics of EDM2's layout"),
        (b"nothing", "not a pickle"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=says) as error:
            interop_statistics.open_reference(path, inception_like())
        assert "\n" not in str(error.value)
    assert not victim.exists()


class _Short:
    """Pickles as an array of WIDE numbers that holds a single one."""

    def __reduce__(self) -> tuple[Any, ...]:
        make, words, _ = np.zeros(1).__reduce__()
        return make, words, (1, (WIDE,), np.dtype("<f8"), False, bytes(8))


def test_edm2s_pickles_are_of_the_published_inception_and_as_large_as_they_say(
    tmp_path: Path,
) -> None:
    mean, covariance = statistics(WIDE, 3)
    path = tmp_path / "img64.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": mean, "sigma": covariance}}))
    other = Seen("inception", "0123456789ab", WIDE, Inception.resize)
    known = interop_statistics.open_reference(path, other)
    with pytest.raises(ValueError, match=f"extractor digest is {PUBLISHED[:12]}, the evaluation"):
        known.check(other, 64)
    path.write_bytes(pickle.dumps({"fid": {"mu": _Short(), "sigma": covariance}}))
    with pytest.raises(ValueError, match=r"img64.pkl: mu has 8 bytes for \(2048,\)"):
        interop_statistics.open_reference(path, other)
    with path.open("ab") as file:  # a hole: no byte of it is written
        file.truncate(interop_statistics.LARGEST + 1)
    with pytest.raises(ValueError, match=r"is no file of statistics \(134,217,729 bytes\)"):
        interop_statistics.open_reference(path, other)
