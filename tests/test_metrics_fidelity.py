"""torch-fidelity's other extractors, without internet: CLIP from a file, DINOv2 through a hub."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_metrics_inception import _Attack, offline
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from diffusion_pl.metrics import extractors, fidelity
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.fidelity import Fidelity
from diffusion_pl.metrics.inception_score import InceptionScore

HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.drop = nn.Dropout(0.5)
        torch.nn.init.constant_(self.head.bias, 0.25)
        with torch.no_grad():
            self.head.weight.copy_(torch.arange(15.0).reshape(5, 3) / 15 + SHIFT)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.drop(self.head(x.mean(dim=(2, 3))))

def dinov2_vits14():
    return Tiny()
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a hub of one's own."""
    offline(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    # Where torch-fidelity and torch's hub leave traces.
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])


def hub(home: Path, shift: float = 0.0) -> None:
    """Put a repository of one tiny network where torch's hub looks for DINOv2's."""
    folder = home / "home" / "hub" / "facebookresearch_dinov2_main"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hubconf.py").write_text(HUBCONF.replace("SHIFT", str(shift)))
    # The second import in a process must not be answered from the first one's compiled file.
    for compiled in folder.rglob("*.pyc"):
        compiled.unlink()


def clip(path: Path, seed: int = 0) -> Path:
    """A file of a vision transformer in CLIP's layout: 32 px in patches of 16, one block, D = 7."""
    torch.manual_seed(seed)
    width = 64
    visual = nn.Module()
    visual.conv1 = nn.Conv2d(3, width, 16, 16, bias=False)
    for name, shape in (
        ("class_embedding", (width,)),
        ("positional_embedding", (5, width)),
        ("proj", (width, 7)),
    ):
        setattr(visual, name, nn.Parameter(torch.randn(*shape) / 8))
    visual.ln_pre, visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    block = nn.Module()
    block.attn = nn.MultiheadAttention(width, 1)
    block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    block.mlp = nn.Module()
    block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    visual.transformer = nn.Module()
    visual.transformer.resblocks = nn.ModuleList([block])
    whole = nn.Module()
    whole.visual = visual
    whole.text_projection = nn.Parameter(torch.zeros(3, 7))
    return scripted(whole, path)


def scripted(module: nn.Module, path: Path) -> Path:
    """Write a module's weights as TorchScript, which torch announces the end of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(_stateful(module)).save(str(path))
    return path


def _stateful(module: nn.Module) -> nn.Module:
    """The same names and weights in modules that TorchScript need not compile."""
    copy = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        copy.register_parameter(name, parameter)
    for name, child in module.named_children():
        copy.add_module(name, _stateful(child))
    return copy


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_clip_s_features_are_those_of_torch_fidelity(tmp_path: Path, images: Tensor) -> None:
    path = clip(tmp_path / "clip.pt")
    extractor = extractors.load("clip-vit-b-32", weights=str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = FeatureExtractorCLIP(
            "clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(path)
        )
    seen = extractor(images)
    assert torch.equal(seen.pooled, theirs(images)[0])
    assert seen.pooled.std(dim=0).mean() > 1e-3, "the weights do not tell images apart"
    assert (extractor.name, extractor.dimension) == ("clip-vit-b-32", 7)
    assert (extractor.classes, extractor.spatial, seen.logits, seen.spatial) == (0, 0, None, None)
    assert extractor.resize == "TensorFlow 1 bilinear to 32 px"


def test_dinov2_s_features_are_those_of_the_network_in_the_hub(
    tmp_path: Path, images: Tensor
) -> None:
    hub(tmp_path)
    extractor = extractors.load("dinov2-vit-s-14")
    assert isinstance(extractor, Fidelity)
    assert isinstance(extractor.network, FeatureExtractorDinoV2)
    seen = extractor(images)
    assert seen.pooled.shape == (4, extractor.dimension) == (4, 5)
    assert seen.pooled.dtype == torch.float32
    assert extractor.resize == "TensorFlow 1 bilinear to 224 px"
    # An even image is the same at every size, so its features are these by hand.
    grey = torch.full((1, 1, 9, 9), 51, dtype=torch.uint8)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    weight = torch.arange(15.0).reshape(5, 3) / 15
    expected = functional.linear((0.2 - mean) / spread, weight, torch.full((5,), 0.25))
    torch.testing.assert_close(extractor(grey).pooled[0], expected, rtol=1e-4, atol=1e-5)


def test_a_digest_is_of_all_weights(tmp_path: Path) -> None:
    one, same, other = (
        extractors.load("clip-vit-b-32", weights=str(clip(tmp_path / name, seed))).digest
        for name, seed in (("a.pt", 0), ("b.pt", 0), ("c.pt", 1))
    )
    assert one == same != other
    assert len(one) == 12
    hub(tmp_path)
    before = extractors.load("dinov2-vit-s-14").digest
    hub(tmp_path, shift=0.125)
    assert extractors.load("dinov2-vit-s-14").digest != before


def test_a_digest_knows_which_tensor_has_which_values() -> None:
    values = torch.arange(3.0), torch.zeros(3)

    def digest(first: Tensor, second: Tensor, names: str = "ab") -> str:
        module = nn.Module()
        for name, value in zip(names, (first, second), strict=True):
            module.register_buffer(name, value)
        return fidelity.digest(module)

    assert digest(*values) == digest(*(value.clone() for value in values))
    others = [digest(*reversed(values)), digest(values[0], values[0]), digest(*values, names="cd")]
    assert len({digest(*values), *others}) == 4


def test_an_extractor_never_trains_nor_leaves_float32(tmp_path: Path, images: Tensor) -> None:
    hub(tmp_path)
    for name, weights in (
        ("dinov2-vit-s-14", None),
        ("clip-vit-b-32", str(clip(tmp_path / "clip.pt"))),
    ):
        extractor = extractors.load(name, weights=weights)
        assert isinstance(extractor, Fidelity)
        assert not any(module.training for module in extractor.train().modules())
        assert not any(parameter.requires_grad for parameter in extractor.parameters())
        plain = extractor(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = extractor(images)
        assert torch.equal(inside.pooled, plain.pooled)
        assert isinstance(plain, Features)
        assert not plain.pooled.requires_grad
        grey = images[:, :1]
        assert torch.equal(extractor(grey).pooled, extractor(grey.repeat(1, 3, 1, 1)).pooled)
        with pytest.raises(ValueError, match="must be uint8"):
            extractor(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match=f"classifier score: {name} knows no classes"):
            InceptionScore().build(extractor, None, 100)


def refusal(name: str, weights: str | None = None, precision: str = "fp32") -> str:
    """The one line that a request is refused with."""
    with pytest.raises(ValueError, match="^extractor: ") as error:
        extractors.load(name, weights, precision)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_name_is_answered_with_the_list_of_those_known() -> None:
    message = refusal("dino")
    for name in ("auto", "inception", "shapes", "pixels", "dinov2-vit-l-14", "clip-vit-b-32"):
        assert f" {name}," in message
    assert message.endswith("(got 'dino')")
    # Inception under torch-fidelity's name would be read without its digest.
    assert "inception-v3-compat" not in message
    refusal("inception-v3-compat")


def test_weights_for_what_reads_no_file_are_refused(tmp_path: Path) -> None:
    for name in ("dinov2-vit-s-14", "vgg16"):
        message = refusal(name, str(tmp_path / "w"))
        assert message == f"extractor: {name} reads no file; remove weights='{tmp_path / 'w'}'"
    assert "computes in fp32 only" in refusal("dinov2-vit-s-14", precision="bf16")


def test_a_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "w.pth"
    torch.save({"features.0.bias": _Attack(victim)}, path)
    for name in ("vgg16", "clip-vit-b-32", "dinov2-vit-s-14"):
        refusal(name, str(path))
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the attack is none"


def test_weights_that_cannot_be_fetched_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("dinov2-vit-s-14", "clip-vit-b-32", "vgg16"):
        with caplog.at_level(logging.INFO):
            assert f"extractor: {name}'s weights cannot be had (" in refusal(name)


def test_weights_that_are_damaged_or_of_another_layout_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for content in (None, b"", b"no weights"):
        if content is not None:
            path.write_bytes(content)
        assert "clip-vit-b-32's weights cannot be had (" in refusal("clip-vit-b-32", str(path))
    scripted(nn.Linear(2, 2), path)
    assert "clip-vit-b-32's weights cannot be had (" in refusal("clip-vit-b-32", str(path))
