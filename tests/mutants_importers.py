"""Planted bugs of the readers of other people's files."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "networks/ddpm_unet.py",
        "import_diffusers",
        ("vector.roll(vector.shape[1] // 2, dims=1)", "vector"),
        ("torch.addcmul(shift, self.norm1(hidden), 1 + scale)",
         "torch.addcmul(shift, self.norm1(hidden), scale)"),
        ("heads = channels_out // head_channels if head_channels else heads", "heads = heads"),
        ("padding=int(even))", "padding=1)"),
        ("        x = self._resampled(x)\n", "        x = x\n"),
    ),
    *at(
        "diffusion/timesteps.py",
        "import_diffusers",
        ("Timesteps(roots.square())", "Timesteps(roots)"),
        ("torch.linspace(-6.0, 6.0, T", "torch.linspace(-5.0, 5.0, T"),
        ("torch.where(middle < 0, -1.0, 1.0)", "torch.where(middle < 0, 1.0, -1.0)"),
        ("alpha_bar = torch.sqrt(signal / (1 + signal))", "alpha_bar = signal / (1 + signal)"),
        ("(root - root[-1]) * root[0] / (root[0] - root[-1])", "(root - root[-1])"),
    ),
    *at(
        "diffusion/spacings.py",
        "import_diffusers",
        ("* stride + self.offset", "* stride"),
        ("_quantiles(left.round() - 1, self.T)", "_quantiles(left.round() - 2, self.T)"),
    ),
    *at(
        "diffusion/guidance.py",
        "import_diffusers",
        ("image.clamp(-limit, limit)", "image.clamp(-1, 1)"),
        ("return image.clamp(-s, s) / s", "return image.clamp(-s, s)"),
        (".clamp(1.0, max(1.0, most))", ".clamp(min=1.0)"),
        ("image.abs().flatten(1), share", "image.flatten(1), share"),
    ),
    *at(
        "diffusion/preconditioning.py",
        "import_diffusers",
        ("-c_out if self.velocity else c_out", "c_out"),
    ),
    *at(
        "samplers/euler.py",
        "import_diffusers",
        ("x.add_(limit(denoised) - denoised)", "x.add_(0 * denoised)"),
    ),
    *at(
        "interop/diffusers_schedulers.py",
        "import_diffusers",
        ("last = shift / T / (1 + (shift - 1) / T)", "last = 1 / T"),
        ('"scale": float(T)}', '"scale": 1000.0}'),
        ("if not isinstance(name, str) or name not in READERS:", "if False:"),
        ('{"epsilon": False, "v_prediction": True}', '{"epsilon": False, "v_prediction": False}'),
        ('integrator={"variance": variance}', 'integrator={"variance": "small"}'),
        ('integrator={} if clip is False else {"clip": clip}', 'integrator={}, clip=clip'),
        ('if config.get("beta_schedule", "linear") in BETWEEN:', "if False:"),
        ('if _prediction(config) == "epsilon":\n            raise',
         'if False:\n            raise'),
    ),
    *at(
        "interop/diffusers.py",
        "import_diffusers",
        ("if name not in PIPELINES:", "if False:"),
        ('part != ["diffusers", NETWORK]', "False"),
        ("if name != NETWORK:", "if False:"),
        ('(average, "raw") if weights == "ema" else (raw, "ema")', '(raw, "ema")'),
        ('if network["variance"] != found.learned:', "if False:"),
        ("if own != groups and (own is not None or scale):", "if False:"),
        ("if folder.name in (RAW, AVERAGE) and (folder", "if False and (folder"),
    ),
    *at(
        "interop/diffusers_export.py",
        "import_diffusers",
        ('"attention_head_dim": _head(network)', '"attention_head_dim": 8'),
        ("_equal(betas, LinearBetas(timesteps.T, first, last).betas)", "first <= last"),
        ('1 if network.resample == "even" else 0', "1"),
        ('"freq_shift": int(network.map_noise.endpoint)', '"freq_shift": 0'),
    ),
    *at(
        "interop/files.py",
        "import_diffusers",
        ('struct.unpack("<Q", length)[0] > MOST_HEADER', "False"),
        ("if len(text) > MOST_JSON:", "if False:"),
    ),
]  # fmt: skip
