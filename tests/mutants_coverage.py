"""Planted bugs in which images a run sees; see mutants.py."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "data/order.py",
        "coverage",
        ("divmod(first, self.count)", "divmod(first, self.count + 1)"),
        ("[start - begin : start", "[start : start"),
        ("start - begin + last - first]", "start - begin + last]"),
        ("order.window - 1 : -1", "order.window : -1"),
        ('side="right"', 'side="left"'),
        ("return int(begins[number]),", "return 0,"),
        ("number * order.window : (number + 1)", "number * order.window + 1 : (number + 1)"),
        ("(number + 1) * order.window]", "(number + 2) * order.window]"),
        ("last[i] - order.shards[shard], last[i]", "last[i], last[i] + order.shards[shard]"),
        ("np.cumsum(order.shards)[shards]", "np.cumsum(np.array(order.shards)[shards])"),
        ("default=(), hash=False", "default=(), compare=False"),
        ("torch.randperm(count, generator=source)", "torch.randperm(count)"),
        ("torch.randperm(count,", "torch.randint(count, (count,),"),
    ),
    *at(
        "data/loader.py",
        "coverage",
        ("+ self.rank * size", "+ (self.world_size - 1 - self.rank) * size"),
        ("step * self.data.batch_size + self", "step * (self.data.batch_size - 1) + self"),
        ("range(first, first + size)", "range(first, first + size - 1)"),
        (
            "range(first, first + size)",
            "range(step * self.data.batch_size + self.rank, first + size, self.world_size)",
        ),
        ("range(first, first + size)", "range(first - first % 2, first - first % 2 + size)"),
        ("indices = self.order(share.start, share.stop)", "indices = self.order(0, len(share))"),
        ("torch.arange(share.start, share.stop)", "torch.arange(len(share))"),
        ("= images.read(indices)", "= images.read(indices.sort().values)"),
        ('uniforms(self.seed, "hflip", positions)', "torch.rand(len(positions))"),
        ('uniforms(self.seed, "resolution", torch.tensor([step]))', "torch.rand(1)"),
        ("for step in range(self.start, self.stop))", "for step in range(self.stop))"),
        ("range(self.start, self.stop))", "range(self.start + 1, self.stop))"),
        ("for step in range(self.start, self.stop):", "for step in range(self.stop):"),
        ("range(self.start, self.stop):", "range(self.start + 1, self.stop):"),
        ("range(first, self.stop, workers)", "range(first, self.stop)"),
    ),
]  # fmt: skip
