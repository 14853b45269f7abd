#!/usr/bin/env bash
# One expects: load_dataset("webdataset", ...) has a column for every kind of member in the tars; a
# sample without one gives None there, and a kind that it cannot place is an error.
# What happens: the columns are those of the first five samples. A class label or caption that begins at
# the sixth is dropped from all samples, without a word; one that ends there is None from then on. Only
# among the first five is a difference refused.
# Versions: datasets 5.2.0. Seen on 2026-11-29.
# Source: github.com/huggingface/datasets, packaged_modules/webdataset: five samples settle the features.
# Why it matters: a set merged of unlabelled and labelled shards trains as an unconditional one, or its
# captions are lost, depending on nothing but the order of the shards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 2> /dev/null
cat > "$folder/look.py" <<'PY'
import io
import sys
import tarfile

import datasets
from PIL import Image

datasets.disable_progress_bars()
folder = sys.argv[1]
picture = io.BytesIO()
Image.new("RGB", (8, 8)).save(picture, "PNG")


def columns(name, labelled):
    with tarfile.open(f"{folder}/{name}.tar", "w") as tar:
        for index in range(12):
            members = {f"{index:04d}.png": picture.getvalue()}
            if index in labelled:
                members[f"{index:04d}.cls"] = b"1"
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    read = datasets.load_dataset(
        "webdataset", data_files=f"{folder}/{name}.tar", split="train", cache_dir=f"{folder}/cache"
    )
    labels = sum(label is not None for label in read["cls"]) if "cls" in read.column_names else "no column"
    print(f"samples {labelled[0]} to {labelled[-1]} of 0 to 11 have a label; labels read: {labels}")


print("datasets", datasets.__version__)
columns("all", range(12))
columns("from_sixth", range(5, 12))
columns("to_fifth", range(5))
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/env/bin/python" -W ignore "$folder/look.py" "$folder" > "$folder/seen" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
datasets 5.2.0
samples 0 to 11 of 0 to 11 have a label; labels read: 12
samples 5 to 11 of 0 to 11 have a label; labels read: no column
samples 0 to 4 of 0 to 11 have a label; labels read: 5
SEEN
