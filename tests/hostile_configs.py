"""Hostile experiments and settings; reliability tables F and G."""

from __future__ import annotations

from pathlib import Path

from hostile import case

CHECK = ["check", "tiny"]


def written(text: str | bytes) -> list[str]:
    """An experiment of this text."""
    data = text if isinstance(text, bytes) else text.encode()
    Path("experiments/evil.yaml").write_bytes(data)
    return ["check", "evil"]


@case("evil.yaml", "is empty")
def config_without_a_byte(place):
    return written("")


@case("evil.yaml", "must be a mapping of sections")
def config_of_one_word(place):
    return written("hello")


@case("evil.yaml", "must be a mapping of sections (got a list)")
def config_that_is_a_list(place):
    return written("- 1\n- 2\n")


@case("evil.yaml", "not valid YAML")
def config_that_makes_an_object(place):
    return written("defaults: base\nseed: !!python/object/apply:os.system ['touch ran']\n")


@case("evil.yaml")
def config_of_aliases_that_expand_without_end(place):
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for level in range(1, 9):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return written("\n".join(lines))


@case("evil.yaml")
def config_that_holds_itself(place):
    return written("seed: &a [*a]\n")


@case("evil.yaml", "duplicate key")
def config_with_a_key_twice(place):
    return written("defaults: base\nseed: 1\nseed: 2\n")


@case("evil.yaml", "seed", "only ${dotted.key} can be interpolated")
def config_that_reads_the_environment(place):
    return written("defaults: base\nseed: ${oc.env:SECRET}\n")


@case("evil.yaml", "only ${dotted.key} can be interpolated")
def config_that_decodes_what_it_reads(place):
    return written('defaults: base\nseed: "${oc.decode:${oc.env:SECRET}}"\n')


@case("evil.yaml", "refers to itself")
def config_of_references_in_a_circle(place):
    return written("defaults: base\nseed: ${a}\na: ${seed}\n")


@case("evil.yaml", "nested more than 32 deep")
def config_nested_deeply(place):
    return written("seed: " + "[" * 60 + "]" * 60)


@case("evil.yaml", "nested too deeply")
def config_nested_3000_deep(place):
    return written("seed: " + "[" * 3000 + "]" * 3000)


@case("evil.yaml", "keys and brackets; keep data out")
def config_nested_100000_deep(place):
    return written("seed: " + "[" * 100_000)


@case("evil.yaml", "larger than 1,000,000 bytes")
def config_of_two_megabytes(place):
    return written("#" * 2_000_000)


@case("evil.yaml", "is not UTF-8 text")
def config_that_is_no_text(place):
    return written(bytes(range(128, 256)))


@case("evil.yaml", "not valid YAML")
def config_with_a_zero_byte(place):
    return written(b"seed: 1\0\n")


@case("evil.yaml", "must name YAML files beside this one")
def config_whose_base_lies_elsewhere(place):
    return written("defaults: ../../etc/passwd\n")


@case("evil.yaml", "has this file among its own defaults")
def config_that_is_its_own_base(place):
    return written("defaults: evil\n")


@case("evil.yaml", "network._target_", "there is no module 'nowhere'")
def config_of_a_package_that_is_not_there(place):
    return written("defaults: tiny\nnetwork: {_target_: nowhere.Network}\n")


@case("SET: trainer.imagse", "did you mean 'total_images'")
def setting_misspelt(place):
    return [*CHECK, "trainer.imagse=3"]


@case("SET: data.batch_size", "must be int", "got 'abc'")
def setting_of_a_wrong_type(place):
    return [*CHECK, "data.batch_size=abc"]


@case("SET: data.batch_size", "must be at least 1 (got -4)")
def batch_size_below_zero(place):
    return [*CHECK, "data.batch_size=-4"]


@case("SET: data.batch_size", "must be at least 1 (got 0)")
def batch_size_of_zero(place):
    return ["train", "tiny", "data.batch_size=0"]


@case("SET: optimizer.lr", "must be finite (got nan)")
def learning_rate_without_a_value(place):
    return ["train", "tiny", "optimizer.lr=.nan"]


@case("SET: optimizer.lr", "must be finite (got inf)")
def learning_rate_without_a_limit(place):
    return [*CHECK, "optimizer.lr=.inf"]


@case("SET: seed", "must be below 2^63 (got one of 64 bits)")
def seed_beyond_64_bits(place):
    return ["train", "tiny", f"seed={2**63}"]


@case("SET: trainer.total_images", "must be below 2^63")
def budget_beyond_all_floats(place):
    return [*CHECK, f"trainer.total_images={'9' * 400}"]


@case("optimizer: Invalid learning rate: -1.0")
def learning_rate_below_zero(place):
    return [*CHECK, "optimizer.lr=-1.0"]


@case("trainer", "total_images must be at least 1 (got -1)")
def budget_below_zero(place):
    return [*CHECK, "trainer.total_images=-1"]


@case("network", "cannot be built from these values (RuntimeError")
def network_of_fewer_channels_than_none(place):
    return [*CHECK, "network.model_channels=-8"]


@case("trainer", "devices must be at least 1, or auto (got 0)")
def devices_of_none(place):
    return [*CHECK, "trainer.devices=0"]


@case("SET: data.num_workers", "must be at least 0 (got -1)")
def workers_below_zero(place):
    return [*CHECK, "data.num_workers=-1"]


@case("photographs: no such folder or zip file")
def data_that_is_not_there(place):
    return [
        "train", "tiny", "data.dataset._target_=diffusion_pl.data.folder.ImageFolder",
        "data.dataset.path=photographs", "data.dataset.resolution=16", "data.batch_size=8",
    ]  # fmt: skip


@case("runs/tiny", "cannot be written")
def output_that_is_read_only(place):
    Path("runs").symlink_to("/proc/nowhere")
    return ["train", "tiny"]


@case("nowhere://x/dataset.json: cannot be opened (Protocol not known")
def shards_at_an_address_of_no_kind(place):
    return [
        "train", "tiny", "data.dataset._target_=diffusion_pl.data.shards.Shards",
        "data.dataset.path=nowhere://x", "data.dataset.resolution=16", "data.batch_size=8",
    ]  # fmt: skip
