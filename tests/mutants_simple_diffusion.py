"""One-line bugs in simple diffusion and SiD2; how they are tried is in mutants.py."""

from __future__ import annotations

from mutant import at

MUTANTS = [
    *at(
        "objectives/shifted_cosine.py",
        "simple_diffusion",
        ("torch.arange(steps, 0, -1, dtype=torch.float64)", "torch.arange(steps - 1.0, -1, -1)"),
        ("0.0 if self.moved_ends else", "0.0 if not self.moved_ends else"),
        ("else 2 * math.log(self", "else -2 * math.log(self"),
        ("math.exp((shift - self.limit) / 2)", "math.exp(shift - self.limit)"),
        ("math.exp((shift + self.limit) / 2)", "math.exp((self.limit - shift) / 2)"),
        ("torch.tan(low + u * (high - low))", "torch.tan(low + u * high)"),
        ("* (self.resolution / self.reference)", "* (self.reference / self.resolution)"),
        ("tangent = sigma * (self.reference / self.resolution)", "tangent = sigma"),
        ("return 2 * (high - low) *", "return 4 * (high - low) *"),
        ("if self.low_at_image else", "if not self.low_at_image else"),
        ("at_image ** (1 - u) * at_noise**u", "at_image * (1 - u) + at_noise * u"),
        ("self.high < 23 * self.low", "self.high < 24 * self.low"),
    ),
    *at(
        "objectives/simple_diffusion.py",
        "simple_diffusion",
        ("alpha = (1 + sigma.square()).rsqrt()", "alpha = 1 / (1 + sigma)"),
        ("math.exp(-10), math.exp(10)", "math.exp(-20), math.exp(20)"),
        ("c_skip=alpha.square()", "c_skip=alpha"),
        ("c_out=-sigma * alpha", "c_out=sigma * alpha"),
        ("c_in=alpha,", "c_in=torch.ones_like(sigma),"),
        ("c_noise=1000 * angle / (math.pi / 2)", "c_noise=angle / (math.pi / 2)"),
        ("[0.0, 1.0], dtype", "[0.0, 0.9], dtype"),
        ("total = pixel_mean(error) / side", "total = pixel_mean(error)"),
        ("total = total + pixel_mean(error) / side", "total = total + pixel_mean(error) / side**2"),
        ("side // 2 >= self.smallest", "side // 2 > self.smallest"),
        ("side % 2 == 0 and ", ""),
        ("F.avg_pool2d(error, 2)", "F.max_pool2d(error, 2)"),
        ("EpsWeight() if weight is None", "pixel_mean if weight is None"),
    ),
    *at(
        "objectives/simpler_diffusion.py",
        "simple_diffusion",
        ("self.schedule.speed(sigma) / 2 *", "self.schedule.speed(sigma) *"),
        ("SoftMinSNR(math.exp(self.bias))", "SoftMinSNR(math.exp(-self.bias))"),
        ("else SoftMinSNR(math.exp(bias))", "else SoftMinSNR(math.exp(-bias))"),
        ("schedule) if bound else", "schedule) if not bound else"),
    ),
]  # fmt: skip
