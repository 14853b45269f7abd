"""Planted bugs of what happens to a run that is stopped."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "training/stopping.py",
        "stopping",
        ("self._before.setdefault(number, handler)", "self._before[number] = handler"),
        ("os._exit(128 + number)", "os._exit(number)"),
        ("and self.signal == signal.SIGINT", "and False"),
        ("if self.steps % self.every:", "if self.steps % 2:"),
        ("max(computing, 1e-9) / COST", "max(computing, 1e-9)"),
        ("stop = wanted if alone else not", "stop = wanted if True else not"),
        ("signal.SIGHUP)", "signal.SIGCHLD)"),
    ),
    *at(
        "training/callbacks.py",
        "stopping",
        ("        self.wish.listen()", "        abs(1)"),
        ("self.stopped = trainer.should_stop = True", "self.stopped = True"),
    ),
    *at(
        "training/evaluating.py",
        "stopping",
        ("trainer.max_steps:  # not when", "0:  # not when"),
    ),
    *at(
        "training/callbacks.py",
        "training",
        ("if passed >= pl_module.batch_size:", "if passed > pl_module.batch_size:"),
        ("[: -self.keep]", "[: -self.keep - 1]"),
    ),
    *at(
        "training/run.py",
        "stopping",
        ("if stop.stopped and trainer.is_global_zero:", "if trainer.is_global_zero:"),
    ),
    *at(
        "commands/train.py",
        "stopping",
        ("(folder / MARKER).unlink(missing_ok=True)", "abs(1)"),
        ("return RESUMABLE", "return 0"),
    ),
]  # fmt: skip
