"""Loaders of images that are opened already."""

from __future__ import annotations

from diffusion_pl.data.loader import DataConfig, Loader

PLACE = ("start", "rank", "world_size", "pin", "timeout")


def loader(images, batch_size, stop=1, *, seed=0, **settings):
    """A device's batches of a data set, or of one at several resolutions.

    Args:
        images: the set, or a mapping by resolution.
        batch_size: of all devices.
        stop: the step after the last.
        seed: of the run.
        settings: of `DataConfig` and `Loader`.
    """
    sets = images if isinstance(images, dict) else {images.resolution: images}
    place = {name: settings.pop(name) for name in PLACE if name in settings}
    data = DataConfig(None, batch_size=batch_size, **settings)
    return Loader(data, sets, seed, stop, **place)
