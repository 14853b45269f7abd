"""What runs begun before mean by this name: the rule that is `exponential_adams` now.

Their configs and checkpoints say `diffusion_pl.samplers.dpmpp_3m.dpmpp_3m`, and draw the same
images as ever. The rule that others call DPM-Solver++(3M) is `diffusion_pl.samplers.dpm_solver`'s.
"""

from diffusion_pl.samplers.exponential_adams import exponential_adams as dpmpp_3m

__all__ = ["dpmpp_3m"]
