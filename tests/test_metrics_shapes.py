"""The embedded extractor: it knows the shapes, and its distance grows with what spoils images."""

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_metrics_reference import ImageFiles
from torch import Tensor
from torch.nn import functional

from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.images import from_bytes, to_bytes
from diffusion_pl.metrics import extractors, real_images, shapes
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.metrics.shapes import SIDE, Shapes, ShapesNetwork

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar-10-subset-python.tar.gz"

# Another seed than those that the extractor was trained and selected on.
HELD_OUT = 100


@pytest.fixture(scope="module")
def extractor() -> Shapes:
    return shapes.load()


@pytest.fixture(scope="module")
def synthetic() -> Tensor:
    return Synthetic(1000, 32, HELD_OUT).open().read(torch.arange(1000))


@pytest.fixture(scope="module")
def real(extractor: Shapes, synthetic: Tensor) -> Reference:
    return real_images.compute(ImageFiles(synthetic[:500]), extractor)


def noised(images: Tensor, levels: float) -> Tensor:
    """Gaussian noise of a standard deviation in levels of 255."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(images.shape, generator=generator) * (levels / 127.5)
    return to_bytes(from_bytes(images) + noise)


def blurred(images: Tensor, times: int) -> Tensor:
    """Averages over 3 x 3 pixels, several times."""
    x = from_bytes(images)
    for _ in range(times):
        x = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return to_bytes(x)


def distance(extractor: Shapes, real: Reference, images: Tensor) -> float:
    metric = Frechet().build(extractor, real, len(images))
    for batch in images.split(250):
        metric.update(extractor(batch))
    return metric.compute()["fd"]


def grows(values: list[float]) -> bool:
    return all(1.2 * one < two for one, two in pairwise(values))


def test_held_out_shapes_are_recognised(extractor: Shapes) -> None:
    for resolution in (16, 32, 64):
        data = Synthetic(400, resolution, HELD_OUT).open()
        logits = extractor(data.read(torch.arange(400))).logits
        assert data.labels is not None and logits is not None
        assert logits.shape == (400, data.classes)
        assert (logits.argmax(dim=1) == data.labels).float().mean() > 0.95, resolution


def test_other_images_of_the_same_process_are_near(
    extractor: Shapes, real: Reference, synthetic: Tensor
) -> None:
    spread = torch.trace(real.covariance)
    # About what 2 x 500 images leave in 128 dimensions.
    assert distance(extractor, real, synthetic[500:]) < 0.03 * spread


def test_more_noise_is_farther(extractor: Shapes, real: Reference, synthetic: Tensor) -> None:
    values = [distance(extractor, real, noised(synthetic[500:], n)) for n in (0, 4, 8, 16, 32, 64)]
    assert grows(values), values


def test_more_blur_is_farther(extractor: Shapes, real: Reference, synthetic: Tensor) -> None:
    values = [distance(extractor, real, blurred(synthetic[500:], n)) for n in (0, 1, 2, 4)]
    assert grows(values), values


def test_more_spoilt_images_among_good_ones_are_farther(
    extractor: Shapes, real: Reference, synthetic: Tensor
) -> None:
    good, bad = synthetic[500:], noised(synthetic[500:], 32)
    mixtures = [torch.cat([bad[:n], good[n:]]) for n in (0, 50, 100, 200, 400)]
    values = [distance(extractor, real, mixture) for mixture in mixtures]
    assert grows(values), values


@pytest.mark.skipif(not CIFAR.exists(), reason="the CIFAR-10 subset is not here")
def test_real_photographs_order_the_same_way(extractor: Shapes) -> None:
    photographs = CIFAR10(str(CIFAR), "train").open().read(torch.arange(1000))
    real = real_images.compute(ImageFiles(photographs[:500]), extractor)
    other = photographs[500:]
    near = distance(extractor, real, other)
    assert near < 0.1 * torch.trace(real.covariance)
    noise = [near] + [distance(extractor, real, noised(other, n)) for n in (8, 16, 32)]
    assert grows(noise), noise
    blur = [near] + [distance(extractor, real, blurred(other, n)) for n in (1, 2, 4)]
    assert grows(blur), blur


def test_a_missing_shape_is_farther(extractor: Shapes, real: Reference, synthetic: Tensor) -> None:
    other = synthetic[500:]
    logits = extractor(other).logits
    assert logits is not None
    label = logits.argmax(dim=1)
    whole = distance(extractor, real, other)
    assert distance(extractor, real, other[label != 0]) > 1.5 * whole


def test_a_grey_image_is_its_channel_three_times(extractor: Shapes, synthetic: Tensor) -> None:
    grey = synthetic[:4, :1]
    assert torch.equal(extractor(grey).pooled, extractor(grey.repeat(1, 3, 1, 1)).pooled)


def test_any_resolution_is_averaged_to_the_network_s(extractor: Shapes, synthetic: Tensor) -> None:
    images = synthetic[:4]
    repeated = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    one, three = extractor(images), extractor(repeated)
    torch.testing.assert_close(three.pooled, one.pooled, rtol=1e-5, atol=1e-5)
    assert shapes.resize(images[:, :, :16, :16]).shape == (4, 3, SIDE, SIDE)


def test_the_input_is_the_mean_over_areas_channel_by_channel() -> None:
    images = torch.randint(256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(3))
    means = images.double().reshape(2, 3, SIDE, 2, SIDE, 3).mean(dim=(3, 5))
    expected = (means / 127.5 - 1).float()
    torch.testing.assert_close(shapes.resize(images.to(torch.uint8)), expected)


def test_features_do_not_depend_on_the_rest_of_the_batch(
    extractor: Shapes, synthetic: Tensor
) -> None:
    whole = extractor(synthetic[:8])
    alone = extractor(synthetic[3:4])
    torch.testing.assert_close(alone.pooled[0], whole.pooled[3], rtol=1e-5, atol=1e-5)


def test_the_extractor_never_trains_nor_leaves_float32(
    extractor: Shapes, synthetic: Tensor
) -> None:
    assert not any(module.training for module in extractor.train().modules())
    plain = extractor(synthetic[:8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(synthetic[:8])
    assert torch.equal(inside.pooled, plain.pooled)
    assert isinstance(plain, Features)
    assert not plain.pooled.requires_grad
    assert plain.pooled.shape == (8, extractor.dimension)
    assert plain.pooled.dtype == torch.float32


def test_what_is_not_bytes_is_refused(extractor: Shapes) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        extractor(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\) with C of 1, 3 or 4"):
        extractor(torch.zeros(3, 32, 32, dtype=torch.uint8))


def test_the_file_is_small_and_named_by_its_content(extractor: Shapes) -> None:
    content = shapes.WEIGHTS.read_bytes()
    assert len(content) < 2**20
    assert extractor.digest == hashlib.sha256(content).hexdigest()[:12]
    assert sum(value.numel() for value in ShapesNetwork(8).parameters()) < 250_000
    assert extractors.load("shapes").digest == extractor.digest


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="not the embedded extractor") as error:
        shapes.load(path)
    assert "\n" not in str(error.value)


def test_no_metric_imports_lightning_and_the_extractor_is_light() -> None:
    code = (
        "import sys, diffusion_pl.metrics.reference, diffusion_pl.metrics.shapes as shapes;"
        "shapes.load();"
        "print([name for name in ('torchmetrics', 'torchvision') if name in sys.modules]);"
        "import diffusion_pl.metrics.fid, diffusion_pl.metrics.inception_score;"
        "print([name for name in ('lightning', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stdout + done.stderr
