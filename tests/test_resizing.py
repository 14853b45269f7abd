"""Resizing against its definition, and against the coordinates that are resized with images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffusion_pl.diffusion.consistency import consistent, factor, nearest
from diffusion_pl.diffusion.resizing import KERNELS, coverage, resized
from diffusion_pl.networks.position import PositionEncoding
from diffusion_pl.positions import coordinates

F64 = torch.float64


def picture(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("times", [2, 3, 4])
def test_area_by_a_whole_factor_is_the_mean_of_blocks_and_back_repeats_pixels(times):
    image = picture(2, 3, 4 * times, 5 * times)
    small = resized(image, (4, 5))
    torch.testing.assert_close(small, F.avg_pool2d(image, times), rtol=1e-14, atol=1e-14)
    repeated = small.repeat_interleave(times, 2).repeat_interleave(times, 3)
    assert torch.equal(resized(small, image.shape[-2:]), repeated)


@pytest.mark.parametrize(("source", "target"), [(6, 4), (7, 3), (5, 8), (9, 9), (12, 4), (4, 12)])
def test_area_at_any_factor_weighs_by_the_overlap(source, target):
    """The overlap of intervals, counted on a grid that both axes share."""
    fine = torch.arange(source * target)
    covers = F.one_hot(fine // source, target).to(F64).T  # (target, source * target)
    lies_in = F.one_hot(fine // target, source).to(F64)
    torch.testing.assert_close(coverage(source, target), covers @ lies_in / source)
    assert torch.equal(coverage(source, target).sum(1), torch.ones(target, dtype=F64))


@pytest.mark.parametrize(
    ("size", "then"), [((7, 9), (14, 18)), ((6, 8), (9, 12)), ((8, 8), (5, 3))]
)
def test_area_keeps_the_mean_of_the_image(size, then):
    image = picture(1, 2, *size)
    for kernel, tolerance in (("area", 1e-14), ("bilinear", 1.0), ("bicubic", 1.0)):
        found = resized(image, then, kernel)
        assert found.shape == (1, 2, *then) and found.dtype == F64
        torch.testing.assert_close(found.mean((2, 3)), image.mean((2, 3)), rtol=0, atol=tolerance)


def test_smooth_kernels_reproduce_what_their_order_can():
    """In the interior a ramp stays one, by bicubic a parabola too; area makes stairs of them."""
    ramp = torch.arange(16, dtype=F64).expand(1, 1, 16, 16)
    centres = (torch.arange(48, dtype=F64) + 0.5) / 3 - 0.5
    inside = slice(9, 39)
    for kernel in ("bilinear", "bicubic"):
        found = resized(ramp, (48, 48), kernel)[0, 0, 24]
        torch.testing.assert_close(found[inside], centres[inside], rtol=0, atol=1e-6)
    parabola, off = ramp.square(), {}
    for kernel in ("bilinear", "bicubic"):
        found = resized(parabola, (48, 48), kernel)[0, 0, 24]
        off[kernel] = float((found[inside] - centres[inside].square()).abs().max())
    assert off["bicubic"] < 1e-5 < 0.1 < off["bilinear"]
    stairs = resized(ramp, (48, 48), "area")[0, 0, 24]
    assert stairs.unique().numel() == 16


def test_smooth_kernels_do_not_alias():
    """Stripes of one pixel are beyond the smaller image: they must become grey."""
    stripes = torch.ones(1, 1, 32, 32, dtype=F64)
    stripes[..., 1::2] = -1
    for kernel in KERNELS:
        # At the edges a part of a smooth kernel's window is missing.
        assert resized(stripes, (8, 8), kernel)[..., 2:-2].abs().max() < 1e-12


def test_resizing_is_exact_under_autocast():
    image = picture(1, 1, 6, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        for kernel in KERNELS:
            found = resized(image, (3, 3), kernel)
            assert found.dtype == torch.float32
            wide = resized(image.double(), (3, 3), kernel).float()
            torch.testing.assert_close(found, wide, rtol=1e-6, atol=1e-6)


def test_noise_made_smaller_by_area_is_noise_of_a_level_smaller_by_the_factor():
    noise = picture(64, 1, 32, 32)
    for times in (2, 4):
        # The standard error of a std of 64 x (32 / times)^2 numbers is below 1.2 %.
        found = resized(noise, (32 // times, 32 // times)).std()
        assert found.item() * times == pytest.approx(1, abs=0.05)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="no kernel 'cubic'; there are area, bilinear, bicubic"):
        resized(picture(1, 1, 4, 4), (8, 8), "cubic")


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (64, 128)])
def test_the_encoding_keeps_the_shape_and_is_that_of_the_resized_grid(size):
    encode = PositionEncoding(6, 256)
    full = torch.arange(256, dtype=F64) / 255
    grid = torch.stack(torch.meshgrid(full, full, indexing="ij"))[None]
    position = resized(grid, size)[0].float()
    x = torch.zeros(1, 3, *size)
    whole = encode(x, None)
    assert whole.shape == (1, 27, *size)
    # float32 coordinates times pi 2^5: rounding of 6e-8 becomes one of 6e-6.
    torch.testing.assert_close(encode(x, position), whole, rtol=0, atol=3e-5)


def test_coordinates_of_256_pixels_have_the_published_spacings():
    for side, first, spacing in ((64, 0.00588235, 0.01568627), (128, 0.00196078, 0.00784314)):
        rows = coordinates(side, side, 256)[0, :, 0].double()
        assert rows[0].item() == pytest.approx(first, abs=1e-8)
        assert (rows[1] - rows[0]).item() == pytest.approx(spacing, abs=1e-7)
    assert coordinates(64, 64, 256)[0, -1, 0].item() == pytest.approx(0.99411765, abs=1e-7)


def test_a_crop_of_the_coordinates_is_the_coordinates_of_the_crop():
    whole = coordinates(64, 64, 256)
    crop = coordinates(32, 16, 256, window=(0.25, 0.5, 0.5, 0.25))
    torch.testing.assert_close(crop, whole[:, 16:48, 32:48])


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_the_nearest_consistent_image_has_the_picture_as_its_mean(times):
    """Within the range too, whatever stood outside of it before."""
    wanted = picture(2, 3, 4, 6).clamp(-1, 1)
    image = 2 * picture(2, 3, 4 * times, 6 * times, seed=1)
    found = nearest(image, wanted)
    assert found.min() >= -1 and found.max() <= 1
    torch.testing.assert_close(resized(found, (4, 6)), wanted, rtol=0, atol=1e-10)


def test_inside_the_range_consistency_is_the_range_null_space_formula():
    wanted, image = 0.1 * picture(1, 1, 3, 3), 0.1 * picture(1, 1, 6, 6, seed=1)
    lacking = resized(wanted - resized(image, (3, 3)), (6, 6))
    torch.testing.assert_close(nearest(image, wanted), image + lacking, rtol=1e-13, atol=1e-13)
    # What agrees already stays as it is.
    again = nearest(image + lacking, wanted)
    torch.testing.assert_close(again, image + lacking, rtol=1e-13, atol=1e-13)


def test_no_other_consistent_image_is_nearer():
    """A projection on a convex set: the remainder has no positive part towards any point of it."""
    wanted, image = picture(1, 1, 2, 2).clamp(-1, 1), 2 * picture(1, 1, 8, 8, seed=1)
    found = nearest(image, wanted)
    for seed in range(2, 40):
        other = nearest(2 * picture(1, 1, 8, 8, seed=seed), wanted)
        assert ((image - found) * (other - found)).sum() < 1e-8


@pytest.mark.parametrize("level", [-1.0, 1.0])
def test_black_and_white_are_reached(level):
    wanted = torch.full((1, 1, 2, 2), level)
    found = nearest(picture(1, 1, 6, 6).float(), wanted)
    torch.testing.assert_close(found, torch.full_like(found, level), rtol=0, atol=1e-6)


def test_a_consistent_denoiser_passes_the_variance_on_and_takes_every_size():
    wanted = 0.1 * picture(1, 2, 2, 2)

    def denoise(x, sigma, *, variance=False):
        return torch.cat([x, x + 7], dim=1) if variance else x

    agreeing = consistent(denoise, wanted)
    for side in (4, 6):
        x = 0.1 * picture(1, 2, side, side, seed=side)
        image, variance = agreeing(x, torch.tensor(1.0), variance=True).chunk(2, dim=1)
        assert torch.equal(variance, x + 7)
        assert torch.equal(image, agreeing(x, torch.tensor(1.0)))
        torch.testing.assert_close(resized(image, (2, 2)), wanted)


@pytest.mark.parametrize("large", [(7, 6), (6, 9), (2, 2), (6, 12)])
def test_a_size_that_is_no_multiple_is_refused(large):
    with pytest.raises(ValueError, match="3 x 3 pixels are no whole part of"):
        nearest(picture(1, 1, *large), picture(1, 1, 3, 3).clamp(-1, 1))
    assert factor((3, 3), (9, 9)) == 3
