#!/usr/bin/env bash
# One expects: TarWriter rounds a float image to the nearest of 256 levels when it writes a PNG, so that
# decoding and writing again changes nothing on average.
# What happens: it cuts. Uniform pixels come back darker by half a level, and pixels that went through
# [-1, 1] in float32, as a diffusion model's do, do not survive: 63 of the 256 levels come back one lower.
# Versions: webdataset 1.0.2, numpy 2.4.6, pillow 13.0.0. Seen on 2026-11-29.
# Source: webdataset's documentation of its writer says that float images between 0 and 1 are encoded.
# Why it matters: a set of samples written this way, for FID or for distillation, is shifted against its
# own reference by up to one level, with no word; half a level moves every mean that FID compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  webdataset==1.0.2 numpy==2.4.6 pillow==13.0.0 2> /dev/null
cat > "$folder/look.py" <<'PY'
import io
import sys
from importlib.metadata import version

import numpy
import webdataset
from PIL import Image

path = f"{sys.argv[1]}/a.tar"
levels = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16, 1).repeat(3, axis=2)
signed = levels.astype(numpy.float32) / numpy.float32(127.5) - numpy.float32(1)
uniform = numpy.random.default_rng(0).random((256, 256, 3), dtype=numpy.float32)
with webdataset.TarWriter(path) as writer:
    writer.write({"__key__": "levels", "png": (signed + 1) / 2})
    writer.write({"__key__": "uniform", "png": uniform})
read = {
    sample["__key__"]: numpy.asarray(Image.open(io.BytesIO(sample["png"])))
    for sample in webdataset.WebDataset(path, shardshuffle=False)
}
print("webdataset", version("webdataset"), "numpy", version("numpy"), "pillow", version("pillow"))
back = read["levels"][..., 0].ravel()
print("levels that went through [-1, 1] and came back:", int((back == numpy.arange(256)).sum()), "of 256")
print("those that did not are lower by:", sorted(set((numpy.arange(256) - back)[back != numpy.arange(256)].tolist())))
print(f"mean of uniform pixels, levels: {read['uniform'].mean() - 255 * uniform.mean():+.1f}")
PY
"$folder/env/bin/python" -W ignore "$folder/look.py" "$folder" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
webdataset 1.0.2 numpy 2.4.6 pillow 13.0.0
levels that went through [-1, 1] and came back: 193 of 256
those that did not are lower by: [1]
mean of uniform pixels, levels: -0.5
SEEN
