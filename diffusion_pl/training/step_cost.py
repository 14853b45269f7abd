"""What an optimizer step costs, counted without numbers: memory and floating-point operations.

The step is that of `DiffusionModule`: the objective's own loss, backward, optimizer, averages. It
runs over tensors that have shapes and no contents, so networks of billions of parameters fit
anywhere, and any network is counted, a user's own too. Every storage counts from the operation that
makes it to its end; so what autograd keeps, what activation checkpointing drops and what lives for
a moment alone are all in the curve of living bytes.

A storage has a bytes and b more an image (see meter.py), so the peak at any batch n is the maximum
of a + b n over the step.

Not counted: work space within a kernel (oneDNN's, cuDNN's), an allocator's fragments, and what a
compiled network spares.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from diffusion_pl.diffusion.objective import RemembersSteps, TrainingObjective, needing_network
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.images import from_bytes
from diffusion_pl.training import ema as averaging
from diffusion_pl.training.counted import Counted
from diffusion_pl.training.meter import BATCH, Meter
from diffusion_pl.training.optimizers import MakeOptimizer, optimizer_of

# What CUDA's autocast computes in float32 and the CPU's does not ("Autocast Op Reference" of
# torch's documentation), as far as it is a layer; the copies are memory.
FLOAT32_ON_CUDA = (nn.GroupNorm, nn.LayerNorm, nn.Softmax)


def _float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook that casts a layer's inputs as CUDA's autocast does."""
    halves = (torch.bfloat16, torch.float16)
    return tuple(
        each.float() if isinstance(each, Tensor) and each.dtype in halves else each
        for each in inputs
    )


class Step:
    """The parts of an optimizer step, and what it is given: made-up images and conditions.

    Args:
        network: the raw F.
        objective: what is trained.
        optimizer: makes the optimizer.
        ema: how many averages there are.
        shape: (C, H, W) of a full-resolution image.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: TrainingObjective,
        optimizer: MakeOptimizer,
        ema: averaging.EMA,
        shape: tuple[int, int, int],
    ) -> None:
        _channels_last(network)
        for buffer in network.buffers():
            if getattr(buffer, "constant", None) is not None:
                buffer.constant = None  # type: ignore[attr-defined]  # a number that torch kept
        self.network, self.objective = network, objective
        self.denoiser: Denoiser = objective.denoiser(network)
        count = 3 if ema.posthoc_every else 1
        # Not a copy of the denoiser: it may hold tables with numbers.
        self.averages: list[Denoiser] = [
            objective.denoiser(averaging.averaged_copy(network)).requires_grad_(False).eval()
            for _ in range(count)
        ]
        for part in needing_network(objective):
            part.attach(network, shape[1])
        whole = nn.Module()
        if isinstance(objective, nn.Module):
            whole.objective = objective
        whole.denoiser = self.denoiser
        self.whole = whole
        self.optimizer: Optimizer = optimizer_of(optimizer, whole)
        self.updates = [averaging.Updates(each, self.denoiser) for each in self.averages]
        self.rows = _rows(network)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [each for each in self.whole.parameters() if each.requires_grad]

    def begin(self, images: int, device: torch.device | str) -> None:
        """Begin a step, and give the layers that draw by image what they draw from.

        What a step remembers at its end, some bytes an image, is left out.
        """
        for part in self.whole.modules():
            if isinstance(part, RemembersSteps):
                part.begin_step()
        for layer, row in self.rows:
            places = torch.zeros(images, dtype=torch.int64, device=device)
            layer.begin(row if row.device == places.device else row.to(device), places)

    def loss(self, image: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of bytes (B, C, H, W)."""
        clean = from_bytes(image)
        noise = torch.randn_like(clean)
        u = torch.rand(len(image), dtype=torch.float64, device=image.device)
        losses = self.objective.loss(self.denoiser, clean, u, noise, **condition)
        return losses.sum() / len(image)

    def update(self) -> None:
        """The optimizer's step, and the averages'."""
        self.optimizer.step()
        for each in self.updates:
            each(0.5)


def conditions(
    network: Any, images: int, size: tuple[int, int], *, augmented: bool, positioned: bool
) -> dict[str, Tensor]:
    """Conditions of every kind that a network takes, of no meaning, on torch's default device.

    Args:
        network: the raw F.
        images: B.
        size: (H, W) of the images.
        augmented: whether there is an augmentation.
        positioned: whether crops say where they are.
    """
    given: dict[str, Tensor] = {}
    if getattr(network, "classes", 0):
        given["label"] = torch.zeros(images, dtype=torch.int64)
    if width := getattr(network, "text_width", 0):
        given["text"] = torch.zeros(images, network.text_length, width)
        given["text_mask"] = torch.ones(images, network.text_length, dtype=torch.bool)
    if channels := getattr(network, "image_channels", 0):
        given["source"] = torch.zeros(images, channels, *size)
        given["source_mask"] = torch.ones(images, 1, *size, dtype=torch.bool)
    if augmented and (length := getattr(network, "augment", 0)):
        given["augment"] = torch.zeros(images, length)
    if positioned:
        given["position"] = torch.zeros(images, 2, *size)
    return given


@dataclass(frozen=True)
class State:
    """Bytes that stay on a device between two steps, unsharded.

    Args:
        weights: of network and objective, with buffers.
        gradients: of what is trained.
        moments: the optimizer's.
        averages: all of them.
        rows: of random numbers that layers share.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    rows: int

    def sum(self, shards: int = 1) -> int:
        """Without gradients, which come and go.

        Args:
            shards: devices that share weights, moments and averages.
        """
        return (self.weights + self.moments + self.averages) // shards + self.rows


@dataclass(frozen=True)
class StepCost:
    """What an optimizer step costs beside the state.

    Args:
        flops: of an image, forward and backward, 2 of a multiply-add.
        kernels: of a pass, forward and backward.
        inputs: bytes of an image and its conditions.
        curve: by (bytes an image, bytes of gradients): most further bytes alive together with them.
        gradients: bytes of all gradients.
        left: bytes that are left after the backward pass, beside gradients.
        update: further bytes of the optimizer's step.
    """

    flops: float
    kernels: int
    inputs: int
    curve: Mapping[tuple[int, int], int] = field(repr=False)
    gradients: int
    left: int
    update: int

    def peak(self, images: int, *, accumulating: bool = False, shards: int = 1) -> int:
        """Most bytes at once.

        Args:
            images: of a micro-batch.
            accumulating: whether the gradients of earlier micro-batches are there, whole.
            shards: devices that share the gradients otherwise.
        """
        whole = self.gradients if accumulating else 0
        forward = max(
            fixed + per_image * images + (whole or gradients // shards)
            for (per_image, gradients), fixed in self.curve.items()
        )
        return max(forward, self.left + self.gradients // shards + self.update // shards)

    def per_image(self, images: int) -> float:
        """Bytes an image at a batch: what twice as many take more."""
        return (self.peak(2 * images) - self.peak(images)) / images


def weightless() -> FakeTensorMode:
    """A world of tensors that have shapes and no contents, for `without_numbers`."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def without_numbers(world: FakeTensorMode | None = None) -> Iterator[None]:
    """Context in which tensors have shapes and no contents.

    Args:
        world: of the tensors; those of two worlds do not mix. None: a new one.

    Raises:
        UserError: something needs numbers.
    """
    try:
        with world or weightless(), warnings.catch_warnings():
            # Copying a module asks where its tensors lie.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"cannot be counted without numbers ({reason})") from error


def state_of(step: Step, *, foreach: bool = False) -> State:
    """The bytes that stay; makes the optimizer's state by a step.

    Args:
        step: without numbers.
        foreach: whether the optimizer takes all parameters at once by default, as on a GPU.
    """
    for group in step.optimizer.param_groups:
        if foreach and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True
    for parameter in step.trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = _bytes(each.grad for each in step.trained)
    step.optimizer.step()
    step.optimizer.zero_grad()
    states = step.optimizer.state.values()
    return State(
        weights=_bytes([*step.whole.parameters(), *step.whole.buffers()]),
        gradients=gradients,
        moments=_bytes(each for own in states for each in own.values()),
        averages=_bytes(
            each for own in step.averages for each in [*own.parameters(), *own.buffers()]
        ),
        rows=_bytes(row for _, row in step.rows),
    )


def count_step(
    step: Step,
    size: tuple[int, int],
    *,
    channels: int,
    precision: torch.dtype | None,
    cuda: bool,
    augmented: bool = False,
    positioned: bool = False,
) -> StepCost:
    """Count an optimizer step of one micro-batch.

    Args:
        step: without numbers, with its optimizer's state; see `state_of`.
        size: (H, W) of the images.
        channels: of the images.
        precision: autocast dtype, None for float32.
        cuda: cast as CUDA's autocast does.
        augmented: whether there is an augmentation.
        positioned: whether crops say where they are.

    Raises:
        UserError: the step needs numbers.
    """
    with Meter() as meter, casting(step.network, precision, cuda):
        hooks = [each.register_post_accumulate_grad_hook(meter.gradient) for each in step.trained]
        step.begin(BATCH, "cpu")
        given = conditions(step.network, BATCH, size, augmented=augmented, positioned=positioned)
        image = torch.zeros(BATCH, channels, *size, dtype=torch.uint8)
        clean = 8 * image[0].numel()  # the same in float32, and its noise
        inputs = meter.per_image + clean
        step.loss(image, given).backward()
        for hook in hooks:
            hook.remove()
        curve, gradients, flops = dict(meter.curve), meter.gradients, meter.flops
        kernels, left, meter.fixed = meter.kernels, max(meter.fixed, 0), 0
        meter.curve.clear()
        step.update()
        update = max(meter.curve.values(), default=0)
        step.optimizer.zero_grad()
    return StepCost(flops / BATCH, kernels, inputs, curve, gradients, left, max(update, 0))


@dataclass(frozen=True)
class ForwardCost:
    """What a network evaluation costs without gradients.

    Args:
        flops: of an image, 2 of a multiply-add.
        kernels: of a batch.
        per_image: bytes of an image at the peak.
        fixed: further bytes.
    """

    flops: float
    kernels: int
    per_image: int
    fixed: int


def count_forward(
    step: Step, size: tuple[int, int], *, channels: int, precision: torch.dtype | None, cuda: bool
) -> ForwardCost:
    """Count a network evaluation of the average, as sampling makes it.

    Args:
        step, size, channels, precision, cuda: as for `count_step`.
    """
    average = step.averages[0]
    with Meter() as meter, casting(average, precision, cuda), torch.no_grad():
        given = conditions(step.network, BATCH, size, augmented=False, positioned=False)
        average(torch.zeros(BATCH, channels, *size), torch.ones(()), **given)
    per_image = max(per_image for per_image, _ in meter.curve)
    fixed = max(meter.curve.values())
    return ForwardCost(meter.flops / BATCH, meter.kernels, per_image, fixed)


@contextlib.contextmanager
def casting(network: nn.Module, precision: torch.dtype | None, cuda: bool) -> Iterator[None]:
    """Autocast of the CPU's tensors; `cuda`: as a GPU's would be."""
    hooks = [
        module.register_forward_pre_hook(_float32)
        for module in network.modules()
        if cuda and precision is not None and isinstance(module, FLOAT32_ON_CUDA)
    ]
    try:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def without_contents(objective: TrainingObjective) -> TrainingObjective:
    """An objective that was built with numbers, its own weights without; changed in place."""
    modules = objective.modules() if isinstance(objective, nn.Module) else ()
    for module in modules:
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros_like(weight), weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer))
    return objective


def _channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out as a run does; `to` refuses tensors without numbers."""
    laid: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 4 and weight not in laid:
                last = weight.detach().contiguous(memory_format=torch.channels_last)
                laid[weight] = nn.Parameter(last, weight.requires_grad)
            if weight in laid:
                setattr(module, name, laid[weight])


def _rows(network: nn.Module) -> list[tuple[Counted, Tensor]]:
    """The layers that draw by image, each with the row that those like it share."""
    rows: dict[tuple[str, float, int], Tensor] = {}
    found: list[tuple[Counted, Tensor]] = []
    for layer in network.modules():
        if isinstance(layer, Counted) and layer.p:
            key = layer.stream, layer.p, layer.length
            if key not in rows:
                rows[key] = layer.row(torch.Generator())
            found.append((layer, rows[key]))
    return found


def _bytes(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    found = {}
    for each in tensors:
        if isinstance(each, Tensor):
            found[id(each.untyped_storage())] = each.untyped_storage().nbytes()
    return sum(found.values())
