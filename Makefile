# make demo      train, evaluate and explain a model on synthetic recordings (4 minutes on 2 cores, after set-up)
# make test      everything that guards the project (20 minutes on 2 cores, after set-up)
# make test-slow the longer checks: chapters in a real browser, the real run on HAPT (where ../shared lies beside the project), the demo's number
# make hapt      the real run: raw sensor recordings to three trained, evaluated models
# make world     three heads on the generated world, three seeds, and their ablation; writes results/world (45 minutes on 2 cores)
# make bench     how long evaluation and kernels take at real sizes; writes results/ (20 minutes)
# make gpu       the tests of the GPU kernels, and their race, where there is a GPU
# make export    notebooks -> package, README, and both cleaned; make outputs also executes the notebooks and keeps what they show
# make docs      the site: staged always, rendered where quarto is installed; make docs-check finds broken links and pages, without quarto

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SHELL  := /bin/bash
HAPT   ?= $(wildcard ../shared/data/hapt.zip)
export PLOTLY_RENDERER := plotly_mimetype
took = printf '%s: %d s\n' "$(1)" $$((SECONDS))

.PHONY: setup demo test test-slow hapt world export outputs docs docs-check bench gpu clean

setup: $(READY)

$(READY): settings.ini setup.py
	@echo "setting up $(VENV) (downloads torch and friends: minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) came. Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -m pip install -q -e '.[dev]' && touch $@ && $(call took,set-up)

demo: $(READY)
	@rm -rf runs/demo
	@$(BIN)/actloc train -f params/demo.yaml --out runs/demo && $(call took,demo)

test: export OMP_NUM_THREADS = 1
test: $(READY)
	@echo "1/2 tests" && $(BIN)/python -m pytest -q -m 'not slow' tests && echo "2/2 notebooks: each is executed, its assertions are tests" && $(BIN)/nbdev_test --n_workers 2 --timing && $(call took,tests)

test-slow: export OMP_WAIT_POLICY = PASSIVE
test-slow: $(READY)
	@$(BIN)/python -m pytest -q -m slow tests && $(call took,slow tests)

data/hapt/annotations.json: $(READY)
	@$(BIN)/python data_scripts/prepare_hapt.py $(HAPT) data/hapt

hapt: data/hapt/annotations.json
	@for seed in 1 2 3; do $(BIN)/actloc train -f params/hapt.yaml -p seed=$$seed --out runs/hapt_seed$$seed && cp runs/hapt_seed$$seed/metrics.json results/hapt_seed$$seed.json || exit; done; $(call took,hapt)

world: export OMP_NUM_THREADS = 1
world: $(READY)
	@$(BIN)/python tests/reach_world.py && $(call took,world)

RACE = $(BIN)/papermill nbs/experiments/kernel_race.ipynb runs/kernel_race.ipynb -k python3 --no-progress-bar --log-output
bench: export OMP_WAIT_POLICY = PASSIVE
bench: $(READY)
	@$(BIN)/papermill nbs/experiments/evaluation_race.ipynb runs/evaluation_race.ipynb -k python3 --no-progress-bar --log-output -p scale 1.0 -p out results/evaluation_race_cpu.json 2>&1 | grep CPU-s
	@$(RACE) -p full True -p threads 1 -p flex True -p out results/kernel_race_cpu.json 2>&1 | grep -e " ms " -e "per second" -e Error -e "'ours'"
	@$(BIN)/papermill nbs/experiments/acar_race.ipynb runs/acar_race.ipynb -k python3 --no-progress-bar --log-output -p full True -p out results/acar_race_cpu.json 2>&1 | grep -e " ms" -e " MB" -e " s," -e Error; $(call took,bench)

gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU is here; the tests run the kernels through the interpreter instead")'
	@$(BIN)/python -m pytest -q -s tests/test_triton.py
	@$(RACE) -p full True -p device cuda -p flex True -p out results/kernel_race_cuda.json 2>&1 | grep -e " ms " -e "per second" -e Error
	@$(RACE) -p full True -p device cuda -p dtype bfloat16 -p out results/kernel_race_cuda_bfloat16.json 2>&1 | grep -e " ms " -e "per second" -e Error; $(call took,gpu)

export: $(READY)
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/python -c 'from actloc.app.site import write_readme; write_readme()'

outputs: $(READY)
	@for nb in $$(find nbs -name '*.ipynb' -not -path '*/.*' -not -path '*experiments*' | sort); do echo $$nb && $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.store_widget_state=False --log-level ERROR $$nb || exit; done
	@$(MAKE) -s export

docs: $(READY)
	@$(BIN)/python -c 'if __name__ == "__main__": from actloc.app.site import stage; stage()'
	@if command -v quarto > /dev/null; then cd _proc && quarto render --no-execute; else echo "the site is staged in _proc; to render it, install quarto (https://quarto.org/docs/get-started) and call make docs again"; fi

docs-check: $(READY)
	@$(BIN)/python -c 'import sys; from actloc.app.site_check import say_what_is_wrong; sys.exit(say_what_is_wrong())'

clean:
	rm -rf $(VENV) runs/* _proc _docs *.egg-info
