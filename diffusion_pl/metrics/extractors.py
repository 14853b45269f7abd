"""The extractor that an experiment names: what every metric looks through."""

import logging

from diffusion_pl.errors import UserError
from diffusion_pl.metrics import pixels, shapes
from diffusion_pl.metrics.features import Extractor

logger = logging.getLogger(__name__)


def load(name: str = "auto", weights: str | None = None, precision: str = "fp32") -> Extractor:
    """Load the extractor that an experiment names.

    Args:
        name: "inception", the network of FID and IS; "shapes", the small one that comes with the
            package; "pixels", a few means of pixels, which see place and colour; "auto", Inception
            where its weights can be had, else "shapes", which one line of the log then says; or
            what torch-fidelity calls its others, such as "dinov2-vit-l-14" and "clip-vit-b-32".
        weights: file of Inception's or CLIP's weights; torch's hub cache, then the download, when
            not given.
        precision: "bf16" computes Inception several times faster, with an error that is measured
            and stands beside every number; for what runs during training.

    Returns:
        The extractor, on the CPU.

    Raises:
        UserError: the weights cannot be had or are unfit; never for "auto" without `weights`.
    """
    # Inception brings torchvision, 2 s of CPU, which an error or the others need not wait for.
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
