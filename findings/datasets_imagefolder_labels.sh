#!/usr/bin/env bash
# One expects: load_dataset("imagefolder", drop_labels=False) keeps the class that each folder names, also
# where a metadata.jsonl adds captions; the option has no other use.
# What happens: once there is a metadata file the folders' classes are gone, whatever drop_labels says, and
# with drop_metadata=True and drop_labels=False both captions and classes are.
# Versions: datasets 5.2.0. Seen on 2026-11-29.
# Source: github.com/huggingface/datasets pull request 4622 (2022) lets an explicit drop_labels=False add the
# classes; the released reader no longer asks for it where metadata was found.
# Why it matters: adding captions to a class-conditional set takes its classes away, and a training script
# that looks for a label column goes on as an unconditional one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 2> /dev/null
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
folder = Path(sys.argv[1])


def look(words, captions, **options):
    root = folder / words.replace(" ", "_").replace(",", "").replace("=", "_")
    rows = []
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8)).save(root / "train" / name / f"{index}.png")
            rows.append({"file_name": f"{name}/{index}.png", "caption": f"{name} {index}"})
    if captions:
        (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(root / "cache"), **options
    )
    print(f"{words}: {', '.join(sorted(read.column_names))}")


print("datasets", datasets.__version__)
look("no metadata", False)
look("metadata", True)
look("metadata, drop_labels=False", True, drop_labels=False)
look("metadata, drop_metadata=True, drop_labels=False", True, drop_metadata=True, drop_labels=False)
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/env/bin/python" -W ignore "$folder/look.py" "$folder" > "$folder/seen" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
datasets 5.2.0
no metadata: image, label
metadata: caption, image
metadata, drop_labels=False: caption, image
metadata, drop_metadata=True, drop_labels=False: image
SEEN
