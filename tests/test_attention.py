"""Softmax attention equals its formula, in whatever precision a device computes it."""

import pytest
import torch

from diffusion_pl.networks.attention import FEW, attention


def formula(q, k, v, mask=None):
    """softmax(q k^T / sqrt(channels)) v in float64."""
    q, k, v = (each.detach().double().requires_grad_() for each in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out = scores.softmax(dim=3) @ v
    out.sin().sum().backward()
    return [out, q.grad, k.grad, v.grad]


@pytest.mark.parametrize("keys", [5, 64, FEW - 1, FEW])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_the_formula_s(keys, masked, dtype, bound, autocast):
    made = torch.Generator().manual_seed(keys)
    q, k, v = (
        torch.randn(2, 3, n, 8, generator=made).to(dtype).requires_grad_() for n in (7, keys, keys)
    )
    mask = torch.rand(2, 1, 1, keys, generator=made) > 0.3 if masked else None
    wide = autocast and dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=wide):
        out = attention(q, k, v, mask)
    assert out.dtype == dtype
    out.sin().sum().backward()
    if dtype == torch.bfloat16 and keys < FEW:  # rounded once, at the end
        exact = formula(q, k, v, mask)[0].detach()
        assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    for mine, exact in zip([out, q.grad, k.grad, v.grad], formula(q, k, v, mask), strict=True):
        assert mine.dtype == dtype
        assert ((mine - exact).abs().max() / exact.abs().max()).item() < bound


def test_few_keys_are_trained_on_in_float32_on_a_cpu():
    """The CPU's backward pass in bfloat16 takes up to 15 times as long."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.scaled_dot_product_attention:
                seen.append(args[0].dtype)
            return function(*args, **kwargs or {})

    for keys in (FEW - 1, FEW):
        q, k, v = (torch.randn(1, 1, keys, 4, dtype=torch.bfloat16) for _ in range(3))
        with Watch():
            attention(q.requires_grad_(), k, v)
            with torch.no_grad():
                attention(q, k, v)
    bf16 = torch.bfloat16
    assert seen == [torch.float32, bf16, bf16, bf16]
