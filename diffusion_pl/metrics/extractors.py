"""Loads the feature extractor that an experiment names."""

import logging

from diffusion_pl.errors import UserError
from diffusion_pl.metrics import pixels, shapes
from diffusion_pl.metrics.features import Extractor

logger = logging.getLogger(__name__)


def load(name: str = "auto", weights: str | None = None, precision: str = "fp32") -> Extractor:
    """Load a feature extractor.

    Args:
        name: "inception", the network of FID and IS; "shapes", the small one of this package;
            "pixels", means over areas, for position and colour; "auto", Inception if its weights
            are available, else "shapes" with a warning; or one of torch-fidelity's, such as
            "dinov2-vit-l-14" and "clip-vit-b-32".
        weights: file of Inception's or CLIP's weights; by default torch's hub cache, else the
            download.
        precision: "bf16" computes Inception several times faster, with an error that is measured
            and reported with every value; meant for evaluations during training.

    Returns:
        The extractor, on the CPU.

    Raises:
        UserError: weights unavailable or unfit; never for "auto" without `weights`.
    """
    # Inception imports torchvision (2 s of CPU), so it is imported last.
    if precision not in ("fp32", "bf16"):
        raise UserError(f"extractor: precision is fp32 or bf16 (got {precision!r})")
    if name in ("inception", "auto"):
        from diffusion_pl.metrics import inception

        if name == "inception" or weights is not None:
            return inception.load(weights, precision)
        try:
            return inception.load(None, precision)
        except ValueError as error:
            logger.warning(
                "%s; going on with the embedded extractor, whose numbers are no FID", error
            )
            return shapes.load()
    if precision != "fp32":
        raise UserError(f"extractor: {name} computes in fp32 only; remove precision={precision}")
    if name in ("shapes", "pixels"):
        if weights is not None:
            raise UserError(f"extractor: {name} has its own weights; remove weights={weights!r}")
        return shapes.load() if name == "shapes" else pixels.Pixels()
    from diffusion_pl.metrics import fidelity

    return fidelity.load(name, weights)
