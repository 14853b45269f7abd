"""A run from Python: opened, sampled, measured, enlarged, inpainted. Defaults are the commands'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion_pl.commands.options import (
    ConditionOptions,
    FeatureOptions,
    MetricOptions,
    RunOptions,
    SamplerOptions,
    grouped,
)
from diffusion_pl.commands.options import weights as option_weights
from diffusion_pl.config.objects import Lazy, import_path, plain
from diffusion_pl.errors import UserError

if TYPE_CHECKING:  # slow to import, so only where they are used
    import torch

    from diffusion_pl.diffusion.preconditioning import Denoiser
    from diffusion_pl.evaluation import ImageGenerator

Changes = Mapping[str, Any]


class Run:
    """A trained run, opened at its newest checkpoint.

    Args:
        path: the run's folder, or a checkpoint file.
        weights: "ema", "denoiser" (raw), or "ema:0.1" for the average of that relative length.
        allow: packages to trust, such as your own.
        changes: dotted key to value, over the run's config.

    Raises:
        UserError: there is no run, it is unfit, or it has parts that are not trusted.
    """

    def __init__(
        self,
        path: str | Path,
        weights: str = "ema",
        allow: Sequence[str] = (),
        changes: Changes | None = None,
    ) -> None:
        from diffusion_pl.commands import runs

        try:
            weights = option_weights(weights)
        except ValueError as error:
            raise UserError(f"weights: {error}") from error
        overrides = [f"{k}={json.dumps(plain(v, k))}" for k, v in (changes or {}).items()]
        allow = names(allow)
        self._options = {"weights": weights, "allow": allow, "set": tuple(overrides)}
        self.model = runs.open_model(Path(path), weights, allow, overrides)

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Run:
        """Open a run; arguments as of the class."""
        return cls(path, **options)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.model.checkpoint.parent.parent

    @property
    def images_seen(self) -> int:
        """Images that the weights were trained on."""
        return self.model.images

    @property
    def class_names(self) -> tuple[str, ...]:
        """In order; () where the data had none."""
        return self.model.class_names

    @property
    def denoiser(self) -> Denoiser:
        """D(x, sigma, label=...) with x (B, C, H, W) and sigma (B,)."""
        return self.model.denoiser

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: what was logged and measured in training."""
        from diffusion_pl.training.history import History

        return History(self.folder / "metrics.jsonl").rows()

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        from diffusion_pl.training import checkpoint

        return checkpoint.found(self.folder / "checkpoints")

    def sample(
        self,
        count: int,
        *,
        label: int | str | None = None,
        prompt: str | Sequence[str] = (),
        image: str | Path | Sequence[str | Path] = (),
        first: int = 0,
        batch_size: int = 64,
        encoder: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Sample images; image i depends on (seed, i) alone.

        Args:
            count: number of images.
            label: the class of every image, its name or index; uniform when not given.
            prompt: what the images show, of a model that takes text; of several, image i has number
                i modulo how many there are. Captions of the run's data when not given.
            image: files to go by, of a model that takes images; of several, image i takes number i
                modulo how many there are. Images of the run's data when not given.
            first: index of the first image.
            batch_size: images per batch; changes no image.
            encoder: the model's text encoder, where it is not found by its own name.
            options: of the command `sample`: sampler, steps, seed, guidance, guidance_interval,
                guide, device.

        Returns:
            uint8 (count, C, H, W) on the CPU.

        Raises:
            UserError: a setting that does not fit the run.
        """
        import torch

        from diffusion_pl.evaluation import batches

        if count < 1 or first < 0:
            raise UserError(f"count: must be positive, first at least 0 (got {count}, {first})")
        if batch_size < 1:
            raise UserError(f"batch_size: must be at least 1 (got {batch_size})")
        files = (image,) if isinstance(image, str | Path) else image
        wanted = ConditionOptions(
            label=label, prompt=names(prompt), encoder=encoder, image=tuple(map(Path, files))
        )
        generator = self._generator("sample", options, wanted)
        pieces = batches(range(first, first + count), batch_size)
        return torch.cat([generator.images(piece)[0].cpu() for piece in pieces])

    def evaluate(
        self,
        count: int | None = None,
        metrics: Sequence[str] | None = None,
        blocks: int = 1,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Evaluate the run; the rows are also written to its folder.

        Args:
            count: number of images; the experiment's when not given.
            metrics: frechet, spatial, score, kernel, precision_recall, density_coverage,
                cmmd, agreement, clip_score, or all; the experiment's when not given.
            blocks: number of disjoint blocks of images; gives mean, minimum and range.
            options: of the command `evaluate`: reference, features, sampler, steps, seed, guidance,
                device, ...

        Returns:
            One row for each number, with all that it depends on.

        Raises:
            UserError: a setting that does not fit the run.
        """
        from diffusion_pl.commands import evaluate, runs

        for metric in names(metrics or ()):
            if not isinstance(metric, str):
                raise UserError(
                    f"metrics: takes names (got {metric!r}); a metric of your own is listed in the "
                    'run\'s config: dp.Run(..., changes={"evaluation.metrics": [...]})'
                )
        given = {"count": count, "metrics": metrics, **self._given(options)}
        sampling, run_options, metric_options, features = grouped(
            "evaluate", given, SamplerOptions, RunOptions, MetricOptions, FeatureOptions
        )
        generator, _ = runs.make_generator(self.model, sampling, run_options)
        opened = runs.OpenedRun(self.folder, self.model, generator)
        rows: list[dict[str, Any]] = evaluate.measured(
            opened, blocks, run_options, metric_options, features
        )["measures"]
        return rows

    def enlarge(
        self,
        images: torch.Tensor,
        to: int | None = None,
        *,
        restart: float | None = None,
        consistent: bool = True,
        label: int | str | None = None,
        prompt: str | Sequence[str] = (),
        encoder: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Super-resolution: sample larger images that are consistent with the given ones.

        Args:
            images: uint8 (N, 3, h, w).
            to: longer side of the result in pixels; the run's when not given.
            restart: sigma to restart from at each size; half the factor when not given.
            consistent: make the result, downsampled, equal the image.
            label: the class of every image, its name or index.
            prompt: what the images show, as for `sample`.
            encoder: as for `sample`.
            options: of the command `enlarge`: sampler, steps, seed, device, ...

        Returns:
            uint8 (N, 3, H, W) on the CPU.

        Raises:
            UserError: an image or a size that does not fit the run.
        """
        import torch

        from diffusion_pl.commands import enlarge

        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"images: must be uint8 (N, 3, h, w) (got {got})")
        wanted = ConditionOptions(label=label, prompt=names(prompt), encoder=encoder)
        generator = self._generator("enlarge", options, wanted, complete=True)
        side = generator.shape[1] if to is None else to
        found = []
        for number, image in enumerate(images):
            where = Path(f"images[{number}]")
            task = enlarge.make_task(image, where, generator, side, restart, consistent)
            indices = [number * enlarge.VARIATIONS]
            found.append(enlarge.enlarged(generator, task, indices, consistent)[0])
        return torch.cat(found)

    def inpaint(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        count: int = 4,
        *,
        method: Literal["replacement", "gradient"] = "gradient",
        resample: int = 1,
        label: int | str | None = None,
        prompt: str | Sequence[str] = (),
        encoder: str | None = None,
        source: str | Path | Sequence[str | Path] = (),
        base_alone: bool = False,
        batch_size: int = 16,
        **options: Any,
    ) -> torch.Tensor:
        """Sample the masked part of an image; the rest stays as it is.

        Args:
            image: uint8 (C, H, W), of the run's size.
            mask: bool (H, W), True where it is filled.
            count: number of images; image i depends on (seed, i) alone.
            method: "gradient" guides the filled part through the network; "replacement" only sets
                the known part.
            resample: times that each step is taken, with noise added in between.
            label: the class of every image, its name or index.
            prompt: what the images show, as for `sample`.
            encoder: as for `sample`.
            source: files to go by, of a model that takes images; `image` of `sample`.
            base_alone: of a run that samples over a pyramid, use its base sampler.
            batch_size: images per batch; changes no image.
            options: of the command `inpaint`: sampler, steps, seed, guidance, device, ...

        Returns:
            uint8 (count, C, H, W) on the CPU.

        Raises:
            UserError: an image, a mask or a setting that does not fit the run.
        """
        import torch

        from diffusion_pl.commands import inpaint
        from diffusion_pl.evaluation import batches
        from diffusion_pl.images import from_bytes

        if method not in ("replacement", "gradient"):
            raise UserError(f"method: must be replacement or gradient (got {method!r})")
        if batch_size < 1:
            raise UserError(f"batch_size: must be at least 1 (got {batch_size})")
        inpaint.check_counts(count, resample)
        files = (source,) if isinstance(source, str | Path) else source
        wanted = ConditionOptions(
            label=label, prompt=names(prompt), encoder=encoder, image=tuple(map(Path, files))
        )
        generator = self._generator("inpaint", options, wanted, complete=True)
        if image.dtype != torch.uint8 or tuple(image.shape) != generator.shape:
            got = f"{image.dtype} {tuple(image.shape)}"
            raise UserError(f"image: must be uint8 {generator.shape} (got {got})")
        if mask.dtype != torch.bool or mask.shape != image.shape[1:]:
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise UserError(f"mask: must be bool {tuple(image.shape[1:])} (got {got})")
        mask = mask.cpu()
        inpaint.check_mask(mask, "mask", "image")
        sampler = inpaint.sampler_of(generator, base_alone, resample)
        given = from_bytes(image[None]).to(generator.device)
        found = [
            inpaint.inpainted(generator, sampler, given, mask, piece, method)[0]
            for piece in batches(range(count), batch_size)
        ]
        return inpaint.pasted(torch.cat(found), given, mask)

    def _given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a command with those that the run was opened with.

        Raises:
            UserError: an option that opening alone takes.
        """
        for name in {"weights", "allow", "set"} & {*options}:
            word = "changes" if name == "set" else name
            raise UserError(f"{name}: is chosen when a run is opened: dp.Run(path, {word}=...)")
        return {**self._options, **_sampler_options(options)}

    def _generator(
        self,
        command: str,
        given: Mapping[str, Any],
        wanted: ConditionOptions,
        *,
        complete: bool = False,
    ) -> ImageGenerator:
        """What samples images from the run, by the options of a command."""
        from diffusion_pl.commands import runs

        given = self._given(given)
        sampling, options = grouped(command, given, SamplerOptions, RunOptions)
        return runs.make_generator(self.model, sampling, options, wanted, complete=complete)[0]

    def __repr__(self) -> str:
        return f"<Run {self.folder}, {self.images_seen:,} images>"


def names(given: Sequence[str]) -> tuple[str, ...]:
    """Several names; one alone need not stand in a list."""
    return (given,) if isinstance(given, str) else tuple(given)


def _sampler_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which a sampler may be a function.

    Raises:
        UserError: it cannot be imported by its name.
    """
    sampler = given.get("sampler")
    if sampler is None or isinstance(sampler, str):
        return dict(given)
    if isinstance(sampler, Lazy):
        if sampler.arguments:
            raise UserError(
                "sampler: takes the name of a function without arguments; set them in the run's "
                'config: dp.Run(..., changes={"sampler.integrate": dp.lazy(...)})'
            )
        return {**given, "sampler": sampler.target}
    return {**given, "sampler": import_path(sampler)}
