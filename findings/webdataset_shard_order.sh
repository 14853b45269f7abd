#!/usr/bin/env bash
# One expects: WebDataset(urls, shardshuffle=N) gives the shards in a new order at each pass over the
# data; a seed would only make these orders repeatable.
# What happens: every pass has the same order of shards, with a seed and without one. Only
# detshuffle=True changes it from pass to pass.
# Versions: webdataset 1.0.2. Seen on 2026-11-29.
# Source: github.com/webdataset/webdataset pull request 502 (open) reports it.
# Why it matters: shards are often written class by class or size by size. A buffer of samples does not
# reach across them, so a diffusion model meets the same neighbours at the same moment of every epoch,
# and a loss curve or an average of weights gets a period that looks like learning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 2> /dev/null
cat > "$folder/look.py" <<'PY'
import sys
import warnings

import webdataset

warnings.simplefilter("ignore")
folder = sys.argv[1]
urls = [f"{folder}/{shard}.tar" for shard in range(8)]
for shard, url in enumerate(urls):
    with webdataset.TarWriter(url) as writer:
        writer.write({"__key__": f"{shard}", "cls": shard})


def passes(**options):
    data = webdataset.WebDataset(urls, **options).decode()
    return [[sample["cls"] for sample in data] for _ in range(4)]


print("webdataset", webdataset.__version__)
for name, options in {
    "shardshuffle=8": {"shardshuffle": 8},
    "shardshuffle=8, seed=1": {"shardshuffle": 8, "seed": 1},
    "shardshuffle=8, detshuffle=True": {"shardshuffle": 8, "detshuffle": True},
}.items():
    orders = {tuple(order) for order in passes(**options)}
    print(f"{name}: {len(orders)} order(s) of the shards in 4 passes")
PY
"$folder/env/bin/python" "$folder/look.py" "$folder" > "$folder/seen" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
webdataset 1.0.2
shardshuffle=8: 1 order(s) of the shards in 4 passes
shardshuffle=8, seed=1: 1 order(s) of the shards in 4 passes
shardshuffle=8, detshuffle=True: 4 order(s) of the shards in 4 passes
SEEN
