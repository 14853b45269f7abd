"""A run's data: opened at every resolution, held against the network, cut for each device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion_pl.data.crops import Crop
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.training.opening import open_for
from diffusion_pl.training.run_data import RunData
from diffusion_pl.training.settings import TrainerConfig

BATCH = 4


class Net(nn.Module):
    """What a run asks of a network, and what it was asked."""

    def __init__(self, classes=8, channels=3):
        super().__init__()
        self.classes, self.channels, self.asked = classes, channels, []

    def check_resolution(self, height, width):
        self.asked.append((height, width))


def source(**settings):
    return DataConfig(Synthetic(24, 16), batch_size=BATCH, **settings)


def loader(seed=1, step=0, rank=0, ranks=1, images=24, accelerator="cpu", **settings):
    data = RunData(
        source(**settings),
        TrainerConfig(
            total_images=images, checkpoint_every=images, accelerator=accelerator, read_timeout=7.0
        ),
        Net(),
        seed,
    )
    data.prepare_data()
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step)
    return data.train_dataloader()


def test_the_data_are_opened_at_each_resolution_of_the_run():
    network = Net()
    opened = open_for(network, source(resolution_weights={8: 1.0, 16: 2.0}))
    assert {side: images.resolution for side, images in opened.items()} == {8: 8, 16: 16}
    assert sorted(network.asked) == [(8, 8), (16, 16)]


def test_the_network_sees_windows_where_images_are_cut():
    network = Net()
    open_for(network, source(resolution_weights={8: 1.0, 16: 2.0}, crop=Crop(12)))
    assert sorted(network.asked) == [(8, 8), (12, 12)]


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (
            Net(),
            {"resolution_weights": {32: 1.0}},
            "data.resolution_weights: 32 is more than data.dataset.resolution, 16",
        ),
        (Net(channels=1), {}, "network.channels is 1, synthetic-16 has 3"),
        (Net(classes=10), {}, "network.classes is 10, synthetic-16 has 8; set network.classes=8"),
    ],
)
def test_data_that_the_network_was_not_built_for_is_refused(network, settings, message):
    with pytest.raises(ValueError, match="16") as error:
        open_for(network, source(**settings))
    assert str(error.value) == message


def test_a_network_without_classes_takes_labelled_data():
    assert open_for(Net(classes=0), source())[16].classes == 8


def test_devices_share_a_batch_and_a_run_goes_on_where_it_stopped():
    whole = list(loader())
    assert [batch["index"].tolist() for batch in whole] == [
        list(range(first, first + BATCH)) for first in range(0, 24, BATCH)
    ]
    later = list(loader(step=4))
    parts = [list(loader(step=4, rank=rank, ranks=2)) for rank in (0, 1)]
    for step, batch in enumerate(whole[4:]):
        halves = (parts[0][step], parts[1][step])
        for key, value in batch.items():
            assert torch.equal(later[step][key], value)
            assert torch.equal(torch.cat([half[key] for half in halves]), value)


def test_an_image_comes_with_its_label_and_each_once_an_epoch():
    batches = list(loader())
    every = source().dataset.open()
    seen = [bytes(image.numpy()) for batch in batches for image in batch["image"]]
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    truth = {
        bytes(image.numpy()): int(label)
        for image, label in zip(every.read(torch.arange(24)), every.labels, strict=True)
    }
    assert sorted(seen) == sorted(truth)
    assert [truth[image] for image in seen] == labels


def test_the_seed_decides_the_order():
    first, again, other = (next(iter(loader(seed=seed)))["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_settings_of_the_data_reach_the_batches():
    plain = torch.cat([batch["image"] for batch in loader()])
    flipped = torch.cat([batch["image"] for batch in loader(hflip=True)])
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    turned = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    assert 0 < sum(same) < 24 and all(a or b for a, b in zip(same, turned, strict=True))
    assert {batch["image"].shape[-1] for batch in loader(crop=Crop(12))} == {12}
    sizes = {
        batch["image"].shape[-1]
        for batch in loader(resolution_weights={8: 1.0, 16: 1.0}, images=160)
    }
    assert sizes == {8, 16}
    read = loader(num_workers=2)
    assert (read.data.num_workers, read.timeout, read.pin, len(read)) == (2, 7.0, False, 6)


def test_the_index_stays_on_the_host_where_it_seeds():
    data = RunData(source(), TrainerConfig(total_images=24, checkpoint_every=24), Net(), 0)
    batch = {"image": torch.zeros(1), "label": torch.zeros(1), "index": torch.zeros(1)}
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    places = {key: value.device.type for key, value in moved.items()}
    assert places == {"image": "meta", "label": "meta", "index": "cpu"}
