# Two commands from nothing: `make demo` and `make test`. Everything is installed into .venv/ here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TINY := checkpoints/tiny-wan-i2v
RANDOM := checkpoints/random-wan
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test check clean

help:
	@echo "make demo   set up, then train and edit the example job (no GPU needed; a CUDA GPU is used if there)"
	@echo "make test   set up, then run all tests"
	@echo "make check  lint and tests, as CI runs them"
	@echo "make clean  remove the environment and everything that was made here"

setup: $(STAMP)

# torch first: its exact version decides between the CUDA and the CPU build for everything behind it.
$(STAMP): requirements.txt requirements-ray.txt requirements-dev.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found. Set PYTHON=/path/to/python3.11."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -r requirements-dev.txt
	touch $(STAMP)

$(RANDOM)/config.json: $(STAMP)
	rm -rf $(RANDOM)
	$(BIN)/python -m models.wan.random_weights $(RANDOM)

demo: $(STAMP) $(if $(wildcard $(TINY)/config.json),,$(RANDOM)/config.json)
	$(eval CKPT := $(abspath $(if $(wildcard $(TINY)/config.json),$(TINY),$(RANDOM))))
	$(BIN)/python train.py --config examples/demo/edit.toml model.ckpt_path=$(CKPT)
	$(BIN)/python inference.py --config examples/demo/edit.toml --out runs/demo/result model.ckpt_path=$(CKPT)
	$(BIN)/python evaluate.py --source examples/demo/source --edited runs/demo/result/edited.mp4 --mask examples/demo/mask \
		--reference examples/demo/edited_00000.png --generated runs/demo/result/generated.mkv \
		--truth examples/demo/truth --out runs/demo/result/evaluation
	@echo
	@echo "Numbers and pictures: runs/demo/result/evaluation/report.html (open it in a browser)."
	@echo "Look at runs/demo/result/comparison.mp4, or as one picture contact_sheet.png: source, mask, edited. Alone: edited.mp4."
	@test -f $(TINY)/config.json || echo "The checkpoint is random, so the region holds noise; everything else is real."

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(VENV) runs $(RANDOM) .pytest_cache .ruff_cache
