"""Inception against torch-fidelity's own, on weights of the published layout drawn at random."""

import hashlib
import logging
import pickle
import time
from pathlib import Path

import pytest
import torch
from servers import served
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from diffusion_pl.metrics import extractors, inception
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.inception import PUBLISHED, Inception
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.reference import Reference


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in torch-fidelity's layout, scaled so that features stay apart."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Its constructor insists on loading a file; here the file is still to be made.
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("n", ["2048"], feature_extractor_weights_path="")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Inception:
    return inception.load(str(weights))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def seen(extractor: Inception, images: Tensor) -> Features:
    return extractor(images)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """An empty cache, and a proxy that refuses every connection."""
    monkeypatch.setenv("TORCH_HOME", str(cache))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


class Nameless(FeatureExtractorInceptionV3):
    """The network without its 24 million weights, for what asks for a name and nothing else."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Identity()})


@pytest.fixture(scope="module")
def theirs(weights: Path, images: Tensor) -> Features:
    """torch-fidelity's own features, with the batch norms where they are."""
    network = FeatureExtractorInceptionV3(
        "n", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    assert isinstance(network.Mixed_6d.branch1x1.bn, nn.BatchNorm2d)
    places: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *seen: places.append(seen[-1]))
    pooled, logits = network(images)
    return Features(pooled, logits, places[0])


def error(got: Tensor | None, expected: Tensor | None) -> float:
    """Root mean square of the difference, over that of what is expected."""
    assert got is not None and expected is not None and got.shape == expected.shape
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_features_are_those_of_torch_fidelity(seen: Features, theirs: Features) -> None:
    assert error(seen.pooled, theirs.pooled) < 1e-6
    assert error(seen.logits, theirs.logits) < 1e-6
    assert seen.pooled.shape == (12, Inception.dimension)
    assert seen.pooled.std(dim=0).mean() > 1e-3, "the weights do not tell images apart"


def test_spatial_features_are_seven_channels_at_each_place_in_turn(
    seen: Features, theirs: Features
) -> None:
    # ADM's network puts channels last: the 7 of one place, then those of the place right of it.
    places = theirs.spatial
    assert places is not None and places.shape == (12, 192, 17, 17)
    expected = torch.stack(
        [places[:, channel, y, x] for y in range(17) for x in range(17) for channel in range(7)],
        dim=1,
    )
    # Float32 through some ninety layers whose norms are folded: 1.2e-6 on some processors.
    assert error(seen.spatial, expected) < 3e-6
    assert expected.shape == (12, Inception.spatial)
    assert expected.std(dim=0).mean() > 1e-3, "the weights do not tell images apart"


def test_folding_keeps_what_a_batch_norm_does() -> None:
    torch.manual_seed(2)
    block = nn.Module()
    block.conv = nn.Conv2d(3, 5, 3, bias=False)
    block.bn = nn.BatchNorm2d(5, eps=0.1)
    for values in (block.bn.weight.data, block.bn.bias.data):
        values.normal_()
    assert block.bn.running_mean is not None and block.bn.running_var is not None
    block.bn.running_mean.normal_()
    block.bn.running_var.uniform_(0.01, 2)
    network = nn.Sequential(block).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = block.bn(block.conv(x))
    inception.fold(network)
    assert isinstance(block.bn, nn.Identity)
    assert error(block.conv(x), expected) < 1e-6


def test_bf16_says_what_it_costs(weights: Path, images: Tensor, seen: Features) -> None:
    quick = extractors.load("inception", str(weights), precision="bf16")
    assert isinstance(quick, Inception)
    assert (quick.precision, quick.error) == ("bf16", None)
    few = 4  # bf16 is slow where the processor does not have it
    rough = quick(images[:few])
    assert all(value is not None and value.dtype == torch.float32 for value in rough[:3])
    assert quick.error is not None
    assert 0 < quick.error < 0.02
    assert quick.error == pytest.approx(error(rough.pooled, seen.pooled[:few]), rel=1e-3)
    # What the first images said stays, so that all numbers of one run say the same.
    said = quick.error
    quick(images[4:5])
    assert quick.error == said


def test_full_precision_has_no_error_to_state(extractor: Inception, seen: Features) -> None:
    assert (extractor.precision, extractor.error) == ("fp32", None)
    with pytest.raises(ValueError, match="precision is fp32 or bf16 .got 'fp16'"):
        extractors.load("inception", precision="fp16")
    with pytest.raises(ValueError, match="shapes computes in fp32 only; remove precision=bf16"):
        extractors.load("shapes", precision="bf16")


def test_distance_and_score_are_those_of_torch_fidelity_on_these_features(seen: Features) -> None:
    # 96 of the 2,048 features: a general eigenvalue problem of full size takes 10 s.
    real, generated = seen.pooled[:6, :96].double(), seen.pooled[6:, :96].double()
    one, two = (fid_features_to_statistics(values) for values in (real, generated))
    theirs = fid_statistics_to_metric(one, two, False)["frechet_inception_distance"]
    mean, covariance = real.mean(dim=0), real.T.cov()
    published = Inception(Nameless(), PUBLISHED)
    published.dimension = 96
    digest, resize = published.digest, published.resize
    reference = Reference("r", "f", 32, 6, "inception", digest, resize, mean, covariance)
    metric = Frechet().build(published, reference, 6)
    metric.update(Features(generated))
    assert metric.compute()["fid"] == pytest.approx(theirs, rel=1e-6)

    assert seen.logits is not None
    score = InceptionScore().build(published, None, 12)
    score.update(seen)
    expected = isc_features_to_metric(seen.logits)["inception_score_mean"]
    assert score.compute()["is"] == pytest.approx(expected, rel=1e-6)


def test_only_the_published_weights_are_called_inception(
    weights: Path, extractor: Inception
) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.name == f"inception-{digest[:8]}"
    assert extractor.digest == digest[:12]
    assert extractors.load("auto", weights=str(weights)).digest == extractor.digest
    assert Inception(Nameless(), PUBLISHED).name == "inception"
    assert inception.FILE.endswith(f"{PUBLISHED[:8]}.pth")
    assert inception.URL_INCEPTION_V3.endswith(inception.FILE)


def test_the_extractor_never_trains_nor_leaves_float32(
    extractor: Inception, images: Tensor
) -> None:
    assert not any(module.training for module in extractor.train().modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    plain = extractor(images[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(images[:1])
    assert torch.equal(inside.pooled, plain.pooled)
    assert inside.pooled.dtype == torch.float32
    assert not inside.pooled.requires_grad


def test_what_is_not_bytes_is_refused(extractor: Inception) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(got torch.float32\)"):
        extractor(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got \(1, 2, 8, 8\)"):
        extractor(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


def test_another_layout_is_refused_with_the_first_difference(weights: Path, tmp_path: Path) -> None:
    # One stored number stands for all of a tensor, so that the files are small.
    full = torch.load(weights, weights_only=True)
    state = {key: value.new_zeros(()).expand(value.shape) for key, value in full.items()}
    bias = state.pop("fc.bias")
    for name, value, expected in (
        ("fc.weight", state["fc.weight"], "Missing key.*: fc.bias"),
        ("fc.bias", bias[:3], r"size mismatch for fc.bias.*\[3\].*\[1008\]"),
        ("fc.bias", 3, "not a dictionary of named tensors"),
    ):
        torch.save(state | {name: value}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=expected) as error:
            inception.load(str(tmp_path / "w.pth"))
        assert "\n" not in str(error.value)


class _Attack:
    """Unpickled in full, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"fc.bias": _Attack(victim)}, tmp_path / "w.pth")
    pickle.loads(pickle.dumps(_Attack(victim)))
    assert victim.exists(), "the attack is none"
    victim.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        inception.load(str(tmp_path / "w.pth"))
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_bad_weights_by_name_are_an_error_also_for_auto(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    for name in ("auto", "inception"):
        with pytest.raises(ValueError, match="weights"):
            extractors.load(name, weights=str(path))
    with pytest.raises(ValueError, match="has its own weights"):
        extractors.load("shapes", weights=str(path))


def test_auto_without_weights_says_so_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offline(monkeypatch, tmp_path)
    started = time.monotonic()
    with caplog.at_level(logging.INFO):
        extractor = extractors.load("auto")
    assert extractor.name == "shapes"
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()
    assert time.monotonic() - started < inception.TIMEOUT_SECONDS


def test_inception_by_name_without_weights_is_an_error_that_says_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="put it at") as error:
        extractors.load("inception")
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cached_file_that_is_not_the_published_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    offline(monkeypatch, tmp_path)
    place = tmp_path / "hub" / "checkpoints" / inception.FILE
    place.parent.mkdir(parents=True)
    place.symlink_to(weights)
    with pytest.raises(ValueError, match="not the published Inception"):
        extractors.load("inception")


def test_a_download_is_kept_whole_and_only_with_its_digest(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"weights" * 400_000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with served(tmp_path) as server:
        with pytest.raises(ValueError, match="damaged or has changed; try again"):
            inception.download(f"{server.url}/source", target, "0" * 64)
        assert list(target.parent.iterdir()) == []
        inception.download(f"{server.url}/source", target, digest)
    assert target.read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]
