"""GPUs that researchers rent: their peak speed and memory, from their makers' data sheets.

Speeds are of dense matrices; a data sheet's figure "with sparsity" is twice as high. bf16 is that
of matrix units which add up in float32, as torch's do; float32 is without TF32, as this package
trains. A network reaches a share of the peak.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from diffusion_pl.config.tree import nearest
from diffusion_pl.errors import UserError

T = 1e12


@dataclass(frozen=True)
class GPU:
    """A GPU.

    Args:
        name: of the product.
        half: FLOP/s of matrix products in bf16, in fp16 where there is no bf16.
        fp32: FLOP/s in float32.
        memory: bytes; makers' GB are 2^30 bytes, rounded.
        bandwidth: of the memory, bytes/s.
        bf16: whether its matrix units compute bf16 (compute capability 8.0 on).
    """

    name: str
    half: float
    fp32: float
    memory: int
    bandwidth: float
    bf16: bool = True

    def peak(self, precision: str) -> float:
        """FLOP/s in fp32, bf16 or fp16; bf16 without units for it is no faster than fp32."""
        if precision == "fp32" or (precision == "bf16" and not self.bf16):
            return self.fp32
        return self.half


def _gpu(
    name: str, half: float, fp32: float, gib: float, gb_per_s: float, bf16: bool = True
) -> GPU:
    return GPU(name, half * T, fp32 * T, int(gib * 2**30), gb_per_s * 1e9, bf16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA T4 datasheet: 65 TFLOPS fp16, 8.1 fp32, 16 GB of which ECC leaves 15, 320 GB/s.
        _gpu("T4", 65, 8.1, 15, 320, bf16=False),
        # NVIDIA V100 datasheet, SXM2: 125 TFLOPS fp16, 15.7 fp32, 900 GB/s.
        _gpu("V100 16GB", 125, 15.7, 16, 900, bf16=False),
        _gpu("V100 32GB", 125, 15.7, 32, 900, bf16=False),
        # NVIDIA Ampere GA102 whitepaper, table of RTX 3090: 71 TFLOPS bf16 with fp32 accumulate
        # (dense), 35.6 fp32, 936 GB/s.
        _gpu("RTX 3090", 71, 35.6, 24, 936),
        # NVIDIA RTX A6000 datasheet: 309.7 TFLOPS with sparsity, 38.7 fp32, 48 GB, 768 GB/s.
        _gpu("RTX A6000", 154.8, 38.7, 48, 768),
        # NVIDIA A10 datasheet: 125 TFLOPS bf16, 31.2 fp32, 24 GB, 600 GB/s.
        _gpu("A10", 125, 31.2, 24, 600),
        # NVIDIA A40 datasheet: 149.7 TFLOPS bf16, 37.4 fp32, 48 GB, 696 GB/s.
        _gpu("A40", 149.7, 37.4, 48, 696),
        # NVIDIA A100 datasheet: 312 TFLOPS bf16, 19.5 fp32; 1,555 GB/s (40 GB), 2,039 (80, SXM).
        _gpu("A100 40GB", 312, 19.5, 40, 1555),
        _gpu("A100 80GB", 312, 19.5, 80, 2039),
        # NVIDIA Ada GPU architecture whitepaper, RTX 4090: 165.2 TFLOPS bf16 with fp32 accumulate
        # (dense), 82.6 fp32, 1,008 GB/s.
        _gpu("RTX 4090", 165.2, 82.6, 24, 1008),
        # NVIDIA L4 datasheet: 242 TFLOPS bf16 with sparsity, 30.3 fp32, 24 GB, 300 GB/s.
        _gpu("L4", 121, 30.3, 24, 300),
        # NVIDIA L40S datasheet: 362.05 TFLOPS bf16, 91.6 fp32, 48 GB, 864 GB/s; ECC leaves 45.
        _gpu("L40S", 362.05, 91.6, 45, 864),
        # NVIDIA RTX 6000 Ada datasheet: 1,457 TFLOPS fp8 with sparsity, a quarter of it in dense
        # bf16; 91.1 fp32, 48 GB, 960 GB/s.
        _gpu("RTX 6000 Ada", 364.2, 91.1, 48, 960),
        # NVIDIA RTX Blackwell whitepaper, RTX 5090: 209.5 TFLOPS bf16 with fp32 accumulate (dense),
        # 104.8 fp32, 1,792 GB/s.
        _gpu("RTX 5090", 209.5, 104.8, 32, 1792),
        # NVIDIA H100 datasheet: SXM 1,979 TFLOPS bf16 with sparsity, 67 fp32, 3.35 TB/s; PCIe
        # 1,513 with sparsity, 51 fp32, 2 TB/s.
        _gpu("H100", 989.5, 67, 80, 3350),
        _gpu("H100 PCIe", 756.5, 51, 80, 2000),
        # NVIDIA H200 datasheet, SXM: 1,979 TFLOPS bf16 with sparsity, 67 fp32, 141 GB, 4.8 TB/s.
        _gpu("H200", 989.5, 67, 140, 4800),
        # NVIDIA Blackwell datasheet, HGX B200: 4.5 PFLOPS bf16 with sparsity, 75 fp32, 180 GB,
        # 7.7 TB/s.
        _gpu("B200", 2250, 75, 179, 7700),
        # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS bf16, 163.4 fp32, 192 GB, 5.3 TB/s.
        _gpu("MI300X", 1307.4, 163.4, 191, 5300),
    )
}

# Of the memory, for the device's context, kernels' work space and the allocator's fragments: an
# assumption.
RESERVED = 0.08


IDLE = frozenset({
    "nvidia", "geforce", "tesla", "rtx", "gpu", "amd", "instinct", "gb", "sxm", "sxm2", "sxm4",
    "sxm5", "hbm3", "hbm3e", "generation", "graphics",
})  # fmt: skip


def gpu_named(name: str) -> GPU:
    """The GPU of a name as people write it, such as h200, "NVIDIA H200" or a100-80.

    Raises:
        UserError: none is known by it; says the nearest, and how to measure.
    """
    found = _matching(name)
    if len(found) == 1:
        return found[0]
    near = nearest(name.upper(), GPUS, count=3)
    known = "" if near.startswith("; did") else f"; it has {', '.join(GPUS)}."
    if found:
        known = f"; is it {' or '.join(each.name for each in found)}?"
    elif not known:
        known = near
    raise UserError(
        f"--gpu: {name!r} is no GPU of the table{known} On that machine, plan EXP --measure "
        "times ten steps"
    )


def gpu_here() -> GPU | None:
    """This machine's GPU, with the memory that it says to have; None where there is none, or one
    that the table has not."""
    if not torch.cuda.is_available():
        return None
    found = _matching(torch.cuda.get_device_name())
    memory = torch.cuda.get_device_properties(0).total_memory
    if not found:
        return None
    own = min(found, key=lambda gpu: abs(gpu.memory - memory))
    return GPU(own.name, own.half, own.fp32, memory, own.bandwidth, own.bf16)


def _matching(name: str) -> list[GPU]:
    """The GPUs that a name says all words of, those with most words; else those that it may be."""
    said = set(_words(name))
    words = {gpu.name: set(_words(gpu.name)) for gpu in GPUS.values()}
    whole = [gpu for gpu in GPUS.values() if words[gpu.name] <= said]
    most = max((len(words[gpu.name]) for gpu in whole), default=0)
    if whole:
        return [gpu for gpu in whole if len(words[gpu.name]) == most]
    return [gpu for gpu in GPUS.values() if said and said <= words[gpu.name]]


def _words(name: str) -> list[str]:
    """Lower-case words and numbers, without makers, product lines and units."""
    split = re.findall(r"[a-z]+\d*[a-z]*|\d+", re.sub(r"(\d)gb\b", r"\1", name.lower()))
    return [word.removeprefix("rtx") for word in split if word not in IDLE]
