#!/usr/bin/env bash
# One expects: Dataset.to_parquet writes the images of an image column, as push_to_hub does: a parquet
# file is one file, to be copied to a cluster.
# What happens: images that the data set knows by path are written as the paths alone, with no bytes; the
# table opens and has the right schema and row count, and on another machine there is nothing in it.
# Versions: datasets 5.2.0, pyarrow 26.0.1. Seen on 2026-11-29.
# Source: github.com/huggingface/datasets; push_to_hub has embed_external_files=True, to_parquet has no such.
# Why it matters: photographs are brought to a cluster as parquet, the originals are removed, and the first
# job finds rows whose image is a path of another machine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pillow==13.0.0 2> /dev/null
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

import datasets
import pyarrow
from PIL import Image
from pyarrow import parquet

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
paths = [str(folder / f"{index}.png") for index in range(3)]
for path in paths:
    Image.new("RGB", (8, 8)).save(path)


def look(words, data):
    data.to_parquet(str(folder / "out.parquet"))
    cells = parquet.read_table(folder / "out.parquet")["image"].to_pylist()
    print(f"{words}: {sum(cell['bytes'] is not None for cell in cells)} of 3 rows hold an image")


print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
by_path = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
look("images by path", by_path)
look("the same, once mapped over", by_path.map(lambda row: {"image": row["image"]}))
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/env/bin/python" -W ignore "$folder/look.py" "$folder" > "$folder/seen" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
datasets 5.2.0 pyarrow 26.0.1
images by path: 0 of 3 rows hold an image
the same, once mapped over: 0 of 3 rows hold an image
SEEN
