"""Films and strips of progressive denoising: D(x; sigma) from level to level, the image at last.

What is shown is the network's guess of the clean image (Ho et al. 2020, section 4.3).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from diffusion_pl.commands.progressive import denoised_frames
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.images import grid, save_png, sheet, titled, to_bytes
from diffusion_pl.io.files import aside, write_atomically

FILMED = 16  # images of a film
FRAMES = 48  # levels of a film at most
ROWS, COLUMNS = 8, 10  # images and levels of a strip
RATE = 10  # frames a second
HELD = 20  # frames for which the images stay at the end
COLOURS = 256  # of a GIF's frame


def denoised(
    generator: ImageGenerator, indices: Sequence[int], frames: int
) -> tuple[Tensor, list[str]]:
    """The denoised images from level to level, and the images themselves.

    Args:
        generator: of the run.
        indices: of the images.
        frames: levels at most, evenly spaced over the sampler's steps.

    Returns:
        uint8 (n, frames + 1, C, H, W) on the CPU, and for each frame its level, such as "sigma 80".
    """
    with generator.inference():
        images, at = denoised_frames(generator, indices, frames, base_alone=False)
    sides = {side for side, _ in at}
    words = [f"sigma {sigma:.3g}" if sigma else "the images" for _, sigma in at]
    if len(sides) > 1:
        words = [f"{word}, {side} px" for word, (side, _) in zip(words, at, strict=True)]
    return to_bytes(images).cpu(), words


def check(kind: str) -> None:
    """Refuse an MP4 film where there is no ffmpeg, before anything is sampled.

    Raises:
        UserError: ffmpeg is not on the PATH.
    """
    if kind == "mp4" and shutil.which("ffmpeg") is None:
        raise UserError("--film mp4: needs ffmpeg, which is not here; install it, or --film gif")


def write_film(generator: ImageGenerator, indices: Sequence[int], path: Path) -> None:
    """Write the film of some images, their noise level above them.

    Args:
        generator: of the run.
        indices: of the images.
        path: .gif or .mp4, replaced if there.

    Raises:
        UserError: it cannot be written, or ffmpeg failed.
    """
    images, words = denoised(generator, indices, FRAMES)
    frames = [
        titled(grid(each), word).permute(1, 2, 0).numpy()[..., :3]
        for each, word in zip(images.unbind(dim=1), words, strict=True)
    ]
    (write_gif if path.suffix == ".gif" else write_mp4)(frames, path)


def write_strip(generator: ImageGenerator, indices: Sequence[int], path: Path) -> None:
    """Write one PNG: an image a row, a noise level a column, the image itself at last.

    Args:
        generator: of the run.
        indices: of the images.
        path: the PNG, replaced if there.

    Raises:
        UserError: it cannot be written.
    """
    images, words = denoised(generator, indices, COLUMNS)
    save_png(sheet(images, columns=[*words[:-1], "image"]), path)


def write_gif(frames: Sequence[npt.NDArray[np.uint8]], path: Path) -> None:
    """Write frames, uint8 (H, W, 3), as a GIF that repeats; the last stays longer.

    A frame has its own 256 colours: one of more is shown in the nearest.

    Raises:
        UserError: it cannot be written.
    """
    # Median cut is exact where there are no more colours than it may keep.
    first, *more = (
        Image.fromarray(each).quantize(COLOURS, Image.Quantize.MEDIANCUT) for each in frames
    )
    duration = [1000 // RATE] * len(more) + [1000 * HELD // RATE]
    options: dict[str, Any] = {"save_all": True, "append_images": more, "duration": duration}
    write_atomically(
        path, lambda file: first.save(file, format="GIF", loop=0, disposal=1, **options)
    )


def write_mp4(frames: Sequence[npt.NDArray[np.uint8]], path: Path) -> None:
    """Write frames, uint8 (H, W, 3), as an MP4 in H.264, by ffmpeg; the last stays longer.

    Raises:
        UserError: ffmpeg failed, or the file cannot be written.
    """
    height, width = frames[0].shape[:2]
    padded = (height + height % 2, width + width % 2)  # 4:2:0 wants even sides
    content = b"".join(
        np.pad(
            each, ((0, padded[0] - height), (0, padded[1] - width), (0, 0)), constant_values=255
        ).tobytes()
        for each in [*frames, *([frames[-1]] * (HELD - 1))]
    )
    with aside(path) as temporary:
        words = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                 "-s", f"{padded[1]}x{padded[0]}", "-r", str(RATE), "-i", "-", "-c:v", "libx264",
                 "-pix_fmt", "yuv420p", "-crf", "12", "-movflags", "+faststart", "-f", "mp4",
                 f"file:{temporary}"]  # fmt: skip
        done = subprocess.run(words, input=content, capture_output=True)
        if done.returncode:
            reason = " ".join(done.stderr.decode(errors="replace").split())[-200:]
            raise UserError(f"{path}: ffmpeg failed ({reason}); --film gif needs none")
