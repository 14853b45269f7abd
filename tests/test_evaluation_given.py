"""Images that lie in files, measured like drawn ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.evaluation import Evaluation, evaluate
from diffusion_pl.evaluation.image_files import ImageFiles
from diffusion_pl.evaluation.pareto import pareto
from diffusion_pl.metrics import real_images, shapes
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.npz import arrays

CPU = torch.device("cpu")


@pytest.fixture
def real():
    return Synthetic(60, 16).open()


def test_the_data_itself_is_no_distance_from_itself(real):
    extractor = shapes.load()
    given = ImageFiles(real, "here", CPU)
    settings = Evaluation(every=1, count=60, metrics=(Frechet(),))
    rows, shown = evaluate(given, settings, extractor, real_images.compute(real, extractor))
    assert rows[0]["value"] < 1e-6
    assert (rows[0]["source"], rows[0]["source_fingerprint"]) == ("here", real.fingerprint)
    assert (rows[0]["evaluations"], "sampler" in rows[0]) == (0, False)
    assert torch.equal(shown, real.read(torch.arange(60)))


def test_more_images_than_there_are_is_one_line(real):
    given = ImageFiles(real, "here", CPU)
    settings = Evaluation(every=1, count=61, metrics=(Frechet(),))
    extractor = shapes.load()
    with pytest.raises(ValueError, match=r"here: has 60 images \(need 61\)"):
        evaluate(given, settings, extractor, real_images.compute(real, extractor))


def test_images_of_another_size_than_the_reference_are_refused(real):
    extractor = shapes.load()
    reference = real_images.compute(real, extractor)
    given = ImageFiles(Synthetic(60, 32).open(), "here", CPU)
    settings = Evaluation(every=1, count=60, metrics=(Frechet(),))
    with pytest.raises(ValueError, match="resolution is 16, the evaluation has 32"):
        evaluate(given, settings, extractor, reference)


@pytest.mark.parametrize("key", ["images", "arr_0"])
def test_an_npz_holds_the_images_that_were_put_there(real, tmp_path, key):
    pixels = real.read(torch.arange(60))
    np.savez(tmp_path / "drawn.npz", **{key: pixels.permute(0, 2, 3, 1).numpy()})
    found = arrays(tmp_path / "drawn.npz")
    assert (len(found), found.resolution, found.name) == (60, 16, "drawn")
    assert torch.equal(found.read(torch.tensor([3, 59])), pixels[[3, 59]])


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_what_is_no_archive_of_images_is_one_line_and_runs_nothing(tmp_path):
    path, victim = tmp_path / "a.npz", tmp_path / "victim"
    attack = np.empty(1, dtype=object)
    attack[0] = Attack(victim)
    for content, message in (
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "must be uint8"),
        ({"images": np.zeros((2, 8, 9, 3), np.uint8)}, "must be uint8"),
        ({"labels": np.zeros(2)}, "no array 'images' or 'arr_0'"),
        ({"images": attack}, "not an archive of images"),
    ):
        np.savez(path, **content)
        with pytest.raises(ValueError, match=message) as error:
            arrays(path)
        assert "\n" not in str(error.value)
    assert not victim.exists()
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not an archive of images"):
        arrays(path)
    with pytest.raises(ValueError, match="not an archive of images"):
        arrays(tmp_path / "absent.npz")


def test_pareto_points_are_those_that_no_other_beats():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs, values = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
        kept = pareto(costs, values)
        for i in range(12):
            beaten = any(
                costs[j] <= costs[i]
                and values[j] <= values[i]
                and (costs[j] < costs[i] or values[j] < values[i])
                for j in range(12)
            )
            same = any(costs[j] == costs[i] and values[j] == values[i] for j in kept)
            assert same != beaten
        assert [costs[i] for i in kept] == sorted(costs[i] for i in kept)
