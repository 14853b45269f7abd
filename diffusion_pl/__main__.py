"""`python -m diffusion_pl`."""

import sys

from diffusion_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
