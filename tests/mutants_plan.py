"""Bugs in what a run is planned to need."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "training/meter.py",
        "plan",
        ("key[-2] * (width + value[-1])", "key[-2] * width"),
        ("(3 * width + 2 * value[-1])", "(2 * width + 2 * value[-1])"),
        ("divmod(storage.nbytes(), BATCH)", "divmod(storage.nbytes() // 2, BATCH)"),
        ("weakref.finalize(storage, self._gone, fixed, per_image)", "pass"),
        ("        self.fixed -= size\n", ""),
        ("max(self.fixed, self.curve.get(key, 0))", "self.fixed"),
        ("untyped_storage(), new=False)", "untyped_storage(), new=True)"),
        ("return True if arguments[0].dtype == torch.bool else 1", "return None"),
    ),
    *at(
        "training/step_cost.py",
        "plan",
        ("count = 3 if ema.posthoc_every else 1", "count = 2 if ema.posthoc_every else 1"),
        ("self.moments + self.averages) // shards", "self.moments) // shards"),
        (" + (whole or gradients // shards)", ""),
        ("return StepCost(flops / BATCH,", "return StepCost(3 * flops / BATCH,"),
        ("if cuda and precision is not None and", "if precision is not None and"),
        ("whole = self.gradients if accumulating else 0", "whole = 0"),
        ("each.float() if isinstance(each, Tensor) and each.dtype in halves else each", "each"),
    ),
    *at(
        "training/hardware.py",
        "plan",
        ('(precision == "bf16" and not self.bf16)', "False"),
        ("if len(words[gpu.name]) == most]", "]"),
        ('_gpu("H100", 989.5,', '_gpu("H100", 1979,'),
    ),
    *at(
        "commands/planned.py",
        "plan",
        ("low, high = 0, self.device_batch", "low, high = 0, self.device_batch // 2"),
        ("(whole / size.side) ** 2", "(whole / size.side)"),
        ("if self.ranks > 1 else 0  # DDP's", "if False else 0  # DDP's"),
        (
            'ceil(self.images / self.evaluation["every"])',
            'floor(self.images / self.evaluation["every"])',
        ),
        ("* self.state.averages * 2 // 3", "* self.state.averages"),
        ("newest = min(settings.keep, written)", "newest = settings.keep + 1"),
        ("seconds += size.share * max(computed, launched)", "seconds += size.share * computed"),
        ("seconds * self.images / self.data.batch_size", "seconds * self.images"),
        ("kinds=removable(sizes(stub), settings.dropout)", "kinds=()"),
        ("return int(memory * (1 - RESERVED))", "return memory"),
        ("self.counted[x.shape[-1]] += len(x)", "self.counted[x.shape[-1]] += 1"),
    ),
    *at(
        "commands/plan.py",
        "plan",
        ("if not 0 < efficiency <= 1:", "if not 0 < efficiency:"),
        ("if self.target is not None and gpu_here() is None:", "if False:"),
        ('return "bf16" if target is None or target.bf16 else "fp32"', 'return "bf16"'),
        ('words.append(f"trainer.device_batch_size={largest}")', "pass"),
    ),
]
