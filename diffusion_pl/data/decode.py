"""Decode image files to square images, RGB unless one or four channels are wanted.

file                              becomes
PNG, JPEG, WebP by content        read; any other format is refused, whatever its name
grey, 1 bit, palette              RGB by repetition or by the palette
16-bit grey                       v / 257, rounded (Pillow alone would clip to white)
16-bit colour                     its high byte, at most one level from v / 257
alpha, transparent colour         laid over white; of four channels, the fourth
colour, where one is wanted       its luma (ITU-R 601), as Pillow's "L"
CMYK                              RGB as Pillow converts it; colour profiles are ignored
EXIF orientation                  applied; all other metadata is passed over, whole or broken
a JPEG of several images           its first, which is the photograph
animation                         refused
float, 32-bit integer             refused
over 64 megapixels or 16,384 px   refused before it is decoded
"""

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusion_pl.data.depths import Depths
from diffusion_pl.data.image_metadata import split_metadata, upright
from diffusion_pl.data.reduce import WHOLE_FIRST, Resize, lanczos
from diffusion_pl.errors import UserError

Fit = Literal["crop", "pad", "exact"]

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST_AREA = 64_000_000
LARGEST_SIDE = 16_384

# Beyond this factor the result would be mostly the resize filter's invention.
LARGEST_ENLARGEMENT = 4


def decode(data: bytes, *, where: str, depths: Depths | None = None) -> Image.Image:
    """Decode one image file.

    Args:
        data: the file's bytes.
        where: names the file in error messages.
        depths: counts 16-bit images.

    Returns:
        The image, mode RGB, upright, at its own size.

    Raises:
        UserError: broken, or refused by the rules above.
    """
    return to_rgb(_upright(data, where, depths), where=where)


def planes(
    data: bytes, channels: int, *, where: str, depths: Depths | None = None
) -> list[Image.Image]:
    """Decode one image file to RGB images that together hold its channels.

    So every filter works on RGB images; `join_planes` puts them together.

    Args:
        data: the file's bytes.
        channels: 1, 3 or 4.
        where: names the file in error messages.
        depths: counts 16-bit images.

    Raises:
        UserError: as `decode`.
    """
    image = _upright(data, where, depths)
    if channels == 4 and image.has_transparency_data:
        return planes_of(image.convert("RGBA"), channels)
    return planes_of(to_rgb(image, where=where), channels)


def planes_of(image: Image.Image, channels: int) -> list[Image.Image]:
    """The same for a decoded RGB or RGBA image; an image without alpha is opaque."""
    if channels == 1:
        return [image.convert("L").convert("RGB")]
    if channels == 3:
        return [image]
    alpha = image.convert("RGBA").getchannel("A")
    # The fourth channel need not be alpha: nothing is premultiplied.
    bands = image.split()[:3]
    return [Image.merge("RGB", bands), Image.merge("RGB", (alpha, alpha, alpha))]


def join_planes(found: list[Image.Image], channels: int) -> npt.NDArray[np.uint8]:
    """The pixels that the RGB images of `planes` hold, uint8 (C, H, W)."""
    arrays = [np.array(image).transpose(2, 0, 1) for image in found]
    if channels == 1:
        return arrays[0][:1]
    return arrays[0] if channels == 3 else np.concatenate([arrays[0], arrays[1][:1]])


def check_channels(channels: int, where: str) -> None:
    """Raise UserError unless there are 1, 3 or 4 channels."""
    if channels not in (1, 3, 4):
        raise UserError(
            f"{where}: channels must be 1 (grey), 3 (RGB) or 4 (RGB and a fourth, such as alpha; "
            f"got {channels})"
        )


def _upright(data: bytes, where: str, depths: Depths | None) -> Image.Image:
    parts = split_metadata(data)
    image = _loaded(parts.data, where)
    if depths is not None:
        depths.note(image, data)
    return upright(image, parts)


def _loaded(data: bytes, where: str) -> Image.Image:
    """A decoded image as it is stored.

    Raises:
        UserError: broken, or refused by the rules above.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{where}: not a PNG, JPEG or WebP image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, where it is the tighter one; a warning where warnings are errors.
        raise UserError(f"{where}: too large to be decoded ({error})") from error
    except Exception as error:
        raise UserError(f"{where}: broken image ({error})") from error
    width, height = image.size
    if width * height > LARGEST_AREA or max(width, height) > LARGEST_SIDE:
        raise UserError(
            f"{where}: {width} x {height} pixels; at most {LARGEST_AREA // 10**6} megapixels and "
            f"{LARGEST_SIDE:,} a side are read"
        )
    # A JPEG of several images (MPO) is a photograph with previews or a depth map.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise UserError(f"{where}: animated; save the frame you want as an image")
    try:
        image.load()
    except Exception as error:
        # Decoders raise OSError, SyntaxError, struct.error and more; all mean a broken file.
        raise UserError(f"{where}: broken image ({error})") from error
    return image


def to_rgb(image: Image.Image, *, where: str) -> Image.Image:
    """Convert a decoded image of any mode to RGB by the rules above.

    Raises:
        UserError: a mode whose values have no stated meaning, such as float.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)
        transparent = image.info.get("transparency")
        if transparent is not None:
            values = np.where(values == transparent, 65_535, values)
        # 65,535 = 257 * 255; adding half of 257 rounds to the nearest level.
        grey = ((values + 128) // 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        raise UserError(f"{where}: pixels of mode {image.mode}; save it as 8-bit RGB or grey")
    return image.convert("RGB")


def fit_square(
    image: Image.Image, resolution: int, fit: Fit, *, where: str, resize: Resize = lanczos
) -> Image.Image:
    """Make an RGB image square: proportions are kept, nothing is stretched.

    Args:
        image: any size.
        resolution: side of the result in pixels.
        fit: `crop` takes the central square, `pad` centres the whole image on white, both resized;
            `exact` requires the size as it is. The filters of `reduce.WHOLE_FIRST` are cropped
            after they are resized.
        where: names the file in error messages.
        resize: to (width, height), one of `reduce.FILTERS`.

    Returns:
        The image, `resolution` x `resolution`.

    Raises:
        UserError: another size under `exact`, or an image far too small.
    """
    width, height = image.size
    if fit == "exact":
        if (width, height) != (resolution, resolution):
            raise UserError(
                f"{where}: {width} x {height} pixels where fit: exact needs {resolution} x "
                f"{resolution}; use fit: crop or fit: pad"
            )
        return image
    side = min(width, height) if fit == "crop" else max(width, height)
    if side * LARGEST_ENLARGEMENT < resolution:
        raise UserError(
            f"{where}: {width} x {height} pixels would be enlarged more than "
            f"{LARGEST_ENLARGEMENT} times to {resolution}; remove it or lower the resolution"
        )
    if fit == "crop" and resize in WHOLE_FIRST:
        return _central(WHOLE_FIRST[resize](image, resolution), resolution)
    if fit == "crop":
        return resize(_central(image, side), (resolution, resolution))
    # The shorter side of a very long image may round to nothing.
    size = [max(1, round(length * resolution / side)) for length in (width, height)]
    image = resize(image, (size[0], size[1]))
    square = Image.new("RGB", (resolution, resolution), (255, 255, 255))
    square.paste(image, ((resolution - size[0]) // 2, (resolution - size[1]) // 2))
    return square


def _central(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def read_square(
    data: bytes,
    resolution: int,
    fit: Fit,
    *,
    where: str,
    depths: Depths | None = None,
    channels: int = 3,
) -> npt.NDArray[np.uint8]:
    """Decode one file, as `decode` does, and make it square, as `fit_square` does.

    Returns:
        uint8 (channels, resolution, resolution).

    Raises:
        UserError: as `decode` and `fit_square`.
    """
    found = planes(data, channels, where=where, depths=depths)
    return join_planes(
        [fit_square(image, resolution, fit, where=where) for image in found], channels
    )
