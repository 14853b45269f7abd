"""Planted bugs in EDM's family; see mutants.py."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "objectives/vp.py",
        "vp_ve_iddpm",
        ("c_out=-sigma", "c_out=sigma"),
        ("c_in=(1 + sigma.square()).rsqrt()", "c_in=torch.ones_like(sigma)"),
        ("(self.M - 1) * self.path", "self.M * self.path"),
        ("[self.epsilon_t, 1.0]", "[1e-3, 1.0]"),
        ("schedule=Along(path, epsilon_t)", "schedule=Along(path, 1e-3)"),
        ("reduce=pixel_sum", "reduce=lambda error: error.square().flatten(1).mean(1)"),
    ),
    *at(
        "objectives/ve.py",
        "vp_ve_iddpm",
        ("c_out=sigma,", "c_out=-sigma,"),
        ("torch.log(sigma / 2)", "torch.log(sigma)"),
        ("return self.sigma_min, self.sigma_max", "return 0.0, self.sigma_max"),
        ("schedule=LogUniform(sigma_min, sigma_max)", "schedule=LogUniform(0.01, 50)"),
    ),
    *at(
        "objectives/edm_iddpm.py",
        "vp_ve_iddpm",
        ("(table[1:] + table[:-1]) / 2", "table[:-1]"),
        ("c_out=-sigma", "c_out=sigma"),
        ("max(sigma_min, low), min(sigma_max, high)", "sigma_min, sigma_max"),
        ("return self.timesteps.sigmas(u.device)[index]", "return self.schedule(u)"),
    ),
    *at(
        "interop/edm_layout.py",
        "interop_edm parity_edm",
        ("_up\"", "_down\""),
        ("blocks + 1", "blocks"),
        ("\"dec.{sizes[0]}x{sizes[0]}_aux\"", "\"enc.{sizes[0]}x{sizes[0]}_aux\""),
    ),
    *at(
        "interop/edm.py",
        "interop_edm",
        ("if key in FIXED and value != FIXED[key]:", "if False:"),
        ("torch.allclose(value.float(), taps)", "True"),
    ),
    *at(
        "interop/pickles.py",
        "interop_edm",
        ("raise refused(module, name)", "return super().find_class(module, name)"),
        ("last >= len(flat)", "last > len(flat)"),
        ("and name.isidentifier()", ""),
    ),
]  # fmt: skip
