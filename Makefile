# make demo: SAVE and its two baselines, trained on clips that the demo makes itself.
# TRANSCRIBE=1 make demo: the same, with what Whisper hears in the clips instead of their scripts.
# make test: lint (style and types) and every test. Each sets up its own environment in .venv first.
# make soak: what takes too long for every change; see tests/README.md.

PYTHON ?= python3
VENV ?= .venv
# Empty or 0: no. Whisper's model is an id, which is downloaded, or a directory.
TRANSCRIBE ?=
WHISPER ?= tiny.en
HEARD = $(filter-out 0,$(TRANSCRIBE))
DEMO ?= $(if $(HEARD),runs/demo_whisper,runs/demo)
SEED ?= 0
# Of `make soak`: the prepared demo that its SLURM test trains on, made if absent; and where its
# 200 faults are counted, which goes on where it was.
SLURM_DEMO ?= demo_data
CHAOS ?= runs/chaos
# Extra flags for the demo's three runs, say FLAGS=--config.steps=20 for a first look.
FLAGS ?=

export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo transcribe test soak lint clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.prepare: setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[prepare]'
	touch $@

$(VENV)/.whisper: setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[prepare,whisper]'
	touch $@ $(VENV)/.prepare

$(VENV)/.test: setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.prepare

# The sizes are those of configs/demo.py, which refuses others.
transcribe: $(VENV)/.whisper
	$(VENV)/bin/python -m data_pipelines.prepare demo --root=demo_data/corpus \
	  --out=demo_data_whisper --transcripts=whisper --whisper=$(WHISPER) \
	  --image_size=32 --max_frames=4 --fbank_frames=128

demo: $(if $(HEARD),transcribe,$(VENV)/.prepare)
	for model in clip4clip avigate save; do \
	  echo "== $$model: $(DEMO)/seed$(SEED)/$$model" && \
	  $(VENV)/bin/python -m save_jax.main --config=configs/demo.py:$$model \
	    --workdir=$(DEMO)/seed$(SEED)/$$model --config.seed=$(SEED) \
	    $(if $(HEARD),--config.data.dir=demo_data_whisper) $(FLAGS) || exit $$?; \
	done
	$(VENV)/bin/python -m launch.compare $(DEMO)/seed$(SEED)/clip4clip \
	  $(DEMO)/seed$(SEED)/avigate $(DEMO)/seed$(SEED)/save

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check --python $(VENV) save_jax data_pipelines launch configs

test: lint
	$(VENV)/bin/python -m pytest tests --numprocesses=2 --dist=loadfile --no-loadscope-reorder

soak: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests -m soak --capture=no -p no:xdist
	PYTHON=$(abspath $(VENV)/bin/python) tests/launch/test_slurm.sh $(SLURM_DEMO)
	$(VENV)/bin/python -m launch.chaos --data=$(SLURM_DEMO) --workdir=$(CHAOS)

clean:
	rm -rf $(VENV) build *.egg-info
