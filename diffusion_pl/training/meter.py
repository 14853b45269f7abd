"""Counts operations, and the bytes of living storages, of whatever runs within.

A batch is of BATCH images, a number far above the bytes of any tensor that does not grow with the
batch: the bytes of a storage are then a + b BATCH with a < BATCH, and one pass tells both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BATCH = 2**31 + 11  # prime; a tensor of an image may have 4 GB, one of no image 2 GB

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *more: Any, **keywords: Any) -> int:
    """Two products: queries by keys, weights by values; shapes (B, heads, tokens, channels)."""
    *batch, rows, width = query
    return 2 * prod(batch) * rows * key[-2] * (width + value[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *more: Any, **kw: Any) -> int:
    """Five products, as torch counts its other kernels: the weights are computed again."""
    *batch, rows, width = query
    return 2 * prod(batch) * rows * key[-2] * (3 * width + 2 * value[-1])


def _shapes(tree: Any) -> Any:
    return tuple(each.shape if isinstance(each, Tensor) else each for each in tree)


# The CPU's attention, which torch's counter leaves out.
OWN_FLOPS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter(TorchDispatchMode):
    """Counts what the operations within it compute and the bytes of the storages that they make.

    Attributes:
        flops: floating-point operations, 2 of a multiply-add.
        kernels: operations that write something, each about a kernel.
        curve: by (bytes an image, bytes of gradients): most further bytes alive together with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.kernels = 0
        self.fixed = self.per_image = self.gradients = 0
        self.curve: dict[tuple[int, int], int] = {}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if operation.namespace == "prim":  # questions about a tensor
            return operation(*arguments, **keywords)
        if operation is aten._local_scalar_dense.default:
            # There are no numbers: whoever asks for one is told 1.
            return True if arguments[0].dtype == torch.bool else 1
        results = operation(*arguments, **keywords)
        self._count(operation, arguments, keywords, results)
        # What an operation changes in place or looks at was there before it.
        for given in _tensors((arguments, tuple(keywords.values()))):
            self._note(given.untyped_storage(), new=False)
        made = [self._note(each.untyped_storage(), new=True) for each in _tensors(results)]
        self.kernels += any(made) or operation._schema.is_mutable
        self._sample()
        return results

    def gradient(self, parameter: nn.Parameter) -> None:
        """Count a gradient, which stays, apart from what is let go; a hook of the parameter's."""
        size = parameter.numel() * parameter.element_size()
        self.gradients += size
        self.fixed -= size

    def _count(self, operation: Any, arguments: Any, keywords: Any, results: Any) -> None:
        packet = operation._overloadpacket
        if packet in OWN_FLOPS:
            self.flops += OWN_FLOPS[packet](*_shapes(arguments))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*arguments, **keywords, out_val=results)

    def _note(self, storage: Any, *, new: bool) -> bool:
        if storage in self._known:
            return False
        self._known.add(storage)
        if new:
            per_image, fixed = divmod(storage.nbytes(), BATCH)
            self.fixed += fixed
            self.per_image += per_image
            weakref.finalize(storage, self._gone, fixed, per_image)
        return new

    def _gone(self, fixed: int, per_image: int) -> None:
        self.fixed -= fixed
        self.per_image -= per_image

    def _sample(self) -> None:
        key = self.per_image, self.gradients
        self.curve[key] = max(self.fixed, self.curve.get(key, 0))


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in lists and tuples of them."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
