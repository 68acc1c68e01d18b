# make demo   both stages on the toy world with both denoisers, the before/after table and the pictures
#             (minutes on 2 CPU cores; fewer steps than `python train.py` takes, so that two runs fit)
# make test   every test
# make storm  runs killed, disks failing, inputs lying: hundreds of each; writes docs/RELIABILITY.md
# make notebooks   execute all notebooks and write them with their outputs
# All work in a fresh clone: they make .venv and install what they need into it.

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python

.PHONY: demo demo-flow demo-perceiver test storm notebooks clean

# Both trainings at once, a core each: two cores on one of them would wait for each other at every
# product, and for a busy neighbour.
demo: $(VENV)/.core
	$(MAKE) --no-print-directory -j 2 demo-flow demo-perceiver
	$(PY) eval_mmvp.py --model toy/clip.safetensors --model runs/demo --model runs/demo-perceiver
	@echo "pictures: runs/demo/samples, runs/demo-perceiver/samples, runs/demo/eval, runs/demo-perceiver/eval"

demo-flow:
	@OMP_NUM_THREADS=1 $(PY) train.py --name demo --stage1_steps 800 --stage2_steps 300

# Its progress bar stands below the other's.
demo-perceiver:
	@OMP_NUM_THREADS=1 TQDM_POSITION=1 $(PY) train.py --name demo-perceiver --denoiser perceiver --stage1_steps 1500 --stage2_steps 450

# In the order of names: xdist would leave the files of few and long tests for the end, and one of
# both workers idle. The slowest thirty are named at the end: whoever makes the suite long sees it.
test: $(VENV)/.test
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30

# Half an hour on two cores.
storm: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PY) -m tests.storm.storm

notebooks: $(VENV)/.notebooks
	$(PY) notebooks/build.py

$(VENV)/.core: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.notebooks: requirements-notebooks.txt $(VENV)/.core
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-notebooks.txt
	touch $@

$(VENV)/.test: requirements-test.txt requirements-notebooks.txt $(VENV)/.core
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
