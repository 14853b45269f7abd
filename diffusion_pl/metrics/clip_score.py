"""CLIP score: how well images agree with their captions, 100 max(cos(image, caption), 0).

Hessel et al. 2021, arXiv 2104.08718, Eq. 1, with the factor 100 of torchmetrics and later papers in
place of 2.5; the mean over all images, each clamped. Values depend on the CLIP: its name and digest
are recorded. Its weights are looked for in a folder or the hub's cache, and never fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor, Features, require_rgb
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.text import hugging_face

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept


class Clip:
    """CLIP's two networks with their preprocessing.

    Args:
        name: "hf:" and a folder or a name of the hub.

    Raises:
        UserError: transformers is not installed, or the model is absent, incomplete or no CLIP.
    """

    def __init__(self, name: str) -> None:
        transformers = hugging_face.library()
        folder = hugging_face.folder_of(name, fetch=False)
        self.digest = hugging_face.digest(hugging_face.weight_files(folder, name))
        with hugging_face.loading(transformers, name):
            config = transformers.AutoConfig.from_pretrained(folder, **hugging_face.OWN_CODE)
            if config.model_type != "clip":
                raise UserError(f"{name}: is no CLIP (its model_type is {config.model_type!r})")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, **hugging_face.OWN_CODE
            )
            self.pixels = transformers.AutoImageProcessor.from_pretrained(
                folder, **hugging_face.OWN_CODE
            )
            network = hugging_face.whole(transformers.CLIPModel, folder, name, dtype=torch.float32)
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.network = network.eval().requires_grad_(False)
        self.length: int = config.text_config.max_position_embeddings

    def __call__(self, features: Features) -> Tensor:
        """The score of each image of a batch, float32 (B, 1), from 0 to 100."""
        assert features.images is not None and features.captions is not None
        device = features.images.device
        self.network.to(device)
        images = list(require_rgb(features.images))
        pixels = self.pixels(images=images, return_tensors="pt")["pixel_values"]
        words = self.tokenizer(
            list(features.captions),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        with torch.autocast(device.type, enabled=False):
            image = self.network.get_image_features(pixels.to(device)).pooler_output
            text = self.network.get_text_features(
                words["input_ids"].to(device), words["attention_mask"].to(device)
            ).pooler_output
        return 100 * F.cosine_similarity(image, text).clamp_min(0)[:, None]


def _mean(scores: Tensor) -> dict[str, float]:
    return {"clip_score": scores.double().mean().item()}


@dataclass(frozen=True)
class ClipScore:
    """Settings of the score.

    Args:
        model: "hf:" and a folder or a name of the hub, in whose cache it is.
    """

    model: str = "hf:openai/clip-vit-large-patch14"

    wants_features = False
    wants_captions = True

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """The name of the value."""
        return ("clip_score",)

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Any number will do; refuse a CLIP that is not there."""
        hugging_face.library()
        hugging_face.folder_of(self.model, fetch=False)

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric; it takes its own CLIP, whatever the extractor.

        Raises:
            UserError: as `Clip`.
        """
        clip = Clip(self.model)
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        metric = Kept(clip, 1, _mean)
        metric.notes = {"clip": self.model, "clip_digest": clip.digest[:12]}
        return metric
