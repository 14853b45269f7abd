"""The papers' networks: raw functions F(x, c_noise, **condition) that a preconditioning wraps."""
