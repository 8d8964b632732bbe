# make revival | make behavior | make pruning | make probing | make tracr | make tracr_readings | make mixing | make jailbreak | make randft | make sweeps | make stories | make paper | make status | make plan | make verdicts | make test | make test-slow | make bench | make faults | make docs | make docs-serve | make export | make pins
# Each does its own set-up in .venv; needs Python 3.11 or newer, and make.
PYTHON ?= python3
SCALE ?= desk
SEEDS ?= 1
TASK ?= count
# of tracr: seeds after those, of the runs alone that claims rest on
MORE_SEEDS ?= 0
DEVICE ?= auto
# of the stories: tales, hub, or a folder with TinyStories-Instruct; nothing: tales, where the scale has them
DATA ?=
OUT ?= outputs
WORKERS ?= 0
# of paper: ENGINE=ray [ADDRESS=head:6379] [GPUS=0.25], FAIL_FAST=1; of plan: GPUS=0.25
ENGINE ?= local
ADDRESS ?=
GPUS ?= 0
FAIL_FAST ?=
# of faults: MOMENTS=3 kills less, AUDIT=1 asks pip-audit
MOMENTS ?= 50
AUDIT ?= 0

BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers
COMPILER := .venv/.compiler
SITE := .venv/.site
CLUSTER := .venv/.cluster
TOKENS := .venv/.tokens
AUDITOR := .venv/.auditor
# the installed torch: 2.13.0 first and alone, so that nothing else decides which build comes
TORCH := torch==2.13.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# progress is told in lines, so that nobody needs the widget whose absence transformers and Ray would note in an executed copy
export PYTHONWARNINGS := ignore:IProgress not found

# what the tests last passed with, exactly, where that is known for this Python; `rm -rf .venv; make test PINS=` takes the newest
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS ?= $(wildcard tests/versions-$(VERSION).txt)

BENCHES := $(patsubst nbs/%.ipynb,%,$(sort $(wildcard nbs/bench_*.ipynb)))

.PHONY: revival behavior pruning probing tracr tracr_readings mixing jailbreak randft sweeps stories paper status plan verdicts test test-slow bench faults docs docs-serve export pins setup $(BENCHES)
.NOTPARALLEL: # what is measured must not wait for what is measured beside it

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "PYTHON is %s; allowed: Python 3.11 or newer, e.g. make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# The executed copy is written elsewhere and comes to its place when it is whole: a failed run leaves the last good one.
# $(1) notebook, $(2) folder, $(3) papermill's parameters
define run
	@set -e; made=$$(mktemp -d); trap 'rm -rf "$$made"' EXIT; set -x; \
	$(BIN)/papermill --log-output --no-progress-bar --start-timeout 600 nbs/$(1).ipynb "$$made/$(1).ipynb" $(3); \
	{ set +x; } 2>/dev/null; cp "$$made/$(1).ipynb" '$(2)'/.$(1).$$$$; mv '$(2)'/.$(1).$$$$ '$(2)/$(1).ipynb'
endef

revival mixing jailbreak randft: $(READY)
	$(call run,exp_$@,$(OUT)/exp_$@/$(SCALE),-p scale '$(SCALE)' -p seeds '$(SEEDS)' -p device '$(DEVICE)' -p out '$(OUT)')

# Results of another task than count lie in a folder of their own.
behavior pruning probing sweeps: $(READY)
	$(call run,exp_$@,$(OUT)/exp_$@/$(SCALE)$(if $(filter index,$(TASK)),_index),-p scale '$(SCALE)' -p seeds '$(SEEDS)' -p task '$(TASK)' -p device '$(DEVICE)' -p out '$(OUT)')

# Compiled programs: scale smoke, desk or paper.
tracr tracr_readings: $(READY)
	$(call run,exp_$@,$(OUT)/exp_$@/$(SCALE),-p scale '$(SCALE)' -p device '$(DEVICE)' -p out '$(OUT)' $(if $(filter tracr,$@),-p seeds '$(SEEDS)' -p more_seeds '$(MORE_SEEDS)'))

# Every experiment; what would be done; what it would cost.
paper status plan: $(TOKENS)
paper status: $(if $(filter ray,$(ENGINE)),$(CLUSTER))
	@$(BIN)/python -m wrapperlib.sweep $@ --scale '$(SCALE)' --seeds '$(SEEDS)' --device '$(DEVICE)' --data '$(DATA)' --out '$(OUT)' --workers '$(WORKERS)' \
	--engine '$(ENGINE)' --address '$(ADDRESS)' --gpus '$(GPUS)' $(if $(filter-out 0,$(FAIL_FAST)),--fail-fast)

plan:
	@$(BIN)/python -m wrapperlib.sweep plan --scale '$(SCALE)' --seeds '$(SEEDS)' --device '$(DEVICE)' --data '$(DATA)' --gpus '$(GPUS)' --out '$(OUT)'

# The experiment on stories has a tokeniser of its own, and DATA: tales, hub, or a folder with TinyStories-Instruct.
$(TOKENS): $(READY)
	$(BIN)/pip install --quiet --editable '.[stories]'
	@touch $@

stories: $(TOKENS)
	$(call run,exp_$@,$(OUT)/exp_$@/$(SCALE),-p scale '$(SCALE)' -p seeds '$(SEEDS)' -p device '$(DEVICE)' -p data '$(or $(DATA),tales)' -p judge '$(if $(filter tales,$(or $(DATA),tales)),exact,learned)' -p out '$(OUT)')

# One page of all results in $(OUT).
verdicts: $(READY)
	$(BIN)/python -c 'import sys; from wrapperlib.claims import write_page; write_page(sys.argv[1])' '$(OUT)'

# Only the benchmarks need what they compare with; `make bench_step` runs one of them.
$(PEERS): $(READY)
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

# JAX and tracr are there for what compiles programs anew: the tests, and the benchmark beside JAX.
$(COMPILER): $(READY)
	$(BIN)/pip install --quiet --editable '.[tracr]'
	@touch $@

# Only runs on other machines need Ray.
$(CLUSTER): $(READY)
	$(BIN)/pip install --quiet --editable '.[cluster]'
	@touch $@

bench: $(BENCHES)

bench_tracr: $(COMPILER)

bench_sweep: $(CLUSTER)

bench_stories: $(TOKENS)

$(BENCHES): $(PEERS)
	$(call run,$@,$(OUT)/$@,-p out '$(OUT)')

# What breaks on purpose. Only the audit needs pip-audit, and the network.
$(AUDITOR): $(READY)
	$(BIN)/pip install --quiet 'pip-audit>=2.7,<3'
	@touch $@

faults: $(READY) $(if $(filter 1,$(AUDIT)),$(AUDITOR))
	$(call run,$@,$(OUT)/$@,-p moments '$(MOMENTS)' -p audit '$(AUDIT)' -p out '$(OUT)')

# Only the site needs what builds it. Its tests also look at it in Chromium, if there is one (Debian: apt-get install chromium).
$(SITE): $(READY)
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(SITE)
	$(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

docs-serve: $(SITE)
	$(BIN)/mkdocs serve --config-file docs/mkdocs.yml

test test-slow: export PIP_CONSTRAINT := $(PINS)
test: $(COMPILER) $(SITE) $(TOKENS)
	$(BIN)/ruff check .
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

# What is skipped by `make test`: what needs Ray, and what takes minutes each (kills, a cluster, predictions of time), one at a time, for some measure time.
test-slow: $(CLUSTER) $(COMPILER) $(SITE) $(TOKENS)
	$(BIN)/pytest tests/test_sweep.py
	$(BIN)/pytest -m slow -n 0

export: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

# Once the tests passed with newer packages.
pins: $(COMPILER) $(SITE) $(TOKENS)
	$(BIN)/pip freeze --exclude-editable >.venv/versions
	sed 's/+cpu$$//' .venv/versions >tests/versions-$(VERSION).txt
