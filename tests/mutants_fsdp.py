"""Planted bugs of a model that is spread over its ranks."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "training/sharding.py",
        "sharding",
        ("    denoiser.to(memory_format=torch.contiguous_format)\n", ""),
        ("        fully_shard(unit, mesh=mesh)", "        pass"),
        ("    fully_shard(denoiser, mesh=mesh)\n", ""),
        ("if not isinstance(block, nn.ModuleList) and any(", "if any("),
        ("if mine < len(pieces) else tensor.detach()[:0]", "if mine < len(pieces) else pieces[0]"),
        ("    mine = mesh.get_local_rank()", "    mine = 0"),
        ("mesh.device_type, copy=True,", "mesh.device_type, copy=False,"),
        ("return tensor.to_local() if isinstance(tensor, DTensor)",
         "return tensor.to_local().clone() if isinstance(tensor, DTensor)"),
        ("memory_format=torch.channels_last).copy_(whole)",
         "memory_format=torch.contiguous_format).copy_(whole)"),
        ("    if whole.dim() != 4:", "    if True:"),
        ("kept: Any = copy.copy(tensors)", "kept: Any = dict(tensors)"),
        ("        if ranks.rank() == 0:\n            kept", "        if True:\n            kept"),
        ('if ranks.rank() == 0 else {}', ""),
        ("and value.shape == parameter.shape", "and value.shape != parameter.shape"),
        ("return norm.full_tensor() if isinstance(norm, DTensor) else norm", "return norm"),
        ("denoiser.set_requires_gradient_sync(False)", "denoiser.set_requires_gradient_sync(True)"),
        ("    finally:\n        denoiser.set_requires_gradient_sync(True)",
         "    finally:\n        denoiser.set_requires_gradient_sync(False)"),
        ("nn.Parameter(gather(parameter), req", "nn.Parameter(parameter.detach(), req"),
        ("in owned:\n            setattr(owner, name, parameter)", "in owned:\n            pass"),
    ),
    *at(
        "training/strategy.py",
        "fsdp",
        ("for average in (module.ema, *module.profiles):", "for average in (module.ema,):"),
        ("return sharding.saved(self.lightning_module.state_dict())",
         "return self.lightning_module.state_dict()"),
        ("return sharding.saved_optimizer(plain.state_dict())", "return plain.state_dict()"),
        ("sharding.shard_optimizer(state, optimizer)", "state"),
    ),
    *at(
        "training/strategy.py",
        "sharding",
        ('Sharded if settings.strategy == "fsdp" else', "Sharded if False else"),
        ('Sharded if settings.strategy == "fsdp" else', "Sharded if True else"),
        ("settings.world_size() == 1", "settings.world_size() == 0"),
    ),
    *at(
        "training/evaluating.py",
        "fsdp",
        ("            with sharding.assembled(pl_module.ema):  # ranks",
         "            with sharding.assembled(pl_module.denoiser):  # ranks"),
    ),
    *at(
        "training/settings.py",
        "sharding",
        ('if self.strategy == "fsdp" and self.precision', "if False and self.precision"),
        ('if self.strategy == "fsdp" and any(', "if False and any("),
    ),
    *at(
        "commands/check.py",
        "sharding",
        ('return "" if devices == 1 else f"ddp', 'return f"ddp'),
        ("        settings.check_objective(objective)\n", "        pass\n"),
    ),
]  # fmt: skip
