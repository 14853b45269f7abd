"""`python -m diffusion_pl`, and the command `diffusion_pl`."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn

from diffusion_pl.cli import main


def run() -> NoReturn:
    """Run one command, and end the process with a code that nothing can change any more.

    After Python's own end come those of the libraries below it. On a busy machine one of them
    aborts now and then ("terminate called without an active exception"), and a finished run would
    answer 134 in place of 0.
    """
    code = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # the reader has left, as `| head` does
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
