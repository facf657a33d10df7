# make setup   .venv with everything from PyPI, and Detectron2 from $WHEELHOUSE where a wheel lies there
# make demo    photographs -> pre-training -> detection and segmentation fine-tuning -> table and report; QUICK=1: 3 minutes
# make docs    the documentation, into site/
# make test    lint, types, import contracts, tests
# make test-slow  the slow ones
# make soak    a pre-training killed twenty times equals one that was not; SLURM (apt-get install slurm-wlm munge), two machines
PYTHON ?= python3
VENV ?= .venv
WHEELHOUSE ?= $(HOME)/wheels
CONSTRAINTS ?= constraints.txt
QUICK ?=
DEMO ?= $(if $(QUICK),demo_quick,demo)
JOBS ?= 2
BIN := $(VENV)/bin
PINNED := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
DETECTRON2_WHEEL := $(lastword $(sort $(wildcard $(WHEELHOUSE)/detectron2-*.whl)))

.PHONY: setup demo docs test lint test-slow soak clean

setup: $(VENV)/.installed detectron2

$(VENV)/.installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PINNED) "pip>=23" "setuptools<81" wheel
	$(BIN)/pip install --quiet --no-build-isolation $(PINNED) --editable ".[det,seg,dev,docs]"
	# mmengine and mmcv-lite require the OpenCV for desktops, which needs libGL; the last one installed is the one that is imported.
	$(BIN)/pip install --quiet $(PINNED) --force-reinstall --no-deps opencv-python-headless
	# yapf (of mmengine) caches its grammar without a lock: ranks that import it first at one time would read a half-written file.
	$(BIN)/python -c "import yapf"
	touch $@

# Never by name from an index: detectron2 is not on PyPI, and its name there is free for anyone.
.PHONY: detectron2
detectron2: $(VENV)/.installed
ifneq ($(DETECTRON2_WHEEL),)
	@$(BIN)/python -c "import detectron2" 2>/dev/null || \
		$(BIN)/pip install --quiet --no-index --no-deps --find-links "$(WHEELHOUSE)" detectron2
else
	@$(BIN)/python -c "import detectron2" 2>/dev/null || \
		echo "Detectron2: no wheel in WHEELHOUSE ($(WHEELHOUSE)): the torchvision engine is used, and" \
		"$$(cat tests/test_detectron2*.py | grep -c '^def test_') test functions in tests/test_detectron2*.py, with the comparisons elsewhere, are skipped." \
		"To have it, follow Detectron2's own INSTALL guide, or put a wheel there."
endif

demo: setup
	$(BIN)/python tools/demo.py --output $(DEMO) $(if $(QUICK),--quick)

# Strict: a link, an anchor or a page that does not exist ends the build. The variable silences an advertisement.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

soak: setup
	$(BIN)/python tests/soak.py
	$(BIN)/python -m pytest tests/test_slurm.py tests/test_two_agents.py

# What make made, and nothing else that lies there
clean:
	test ! -e "$(VENV)/.installed" || rm -rf "$(VENV)"
	test ! -e "$(DEMO)/data/toy.json" || rm -rf $(foreach name,data photographs logs $(foreach task,pretrain detect segment,$(task)_intertwined $(task)_dinov2) table.md report.html,"$(DEMO)/$(name)")
	test ! -d "$(DEMO)" || rmdir --ignore-fail-on-non-empty "$(DEMO)"
	test ! -e site/sitemap.xml || rm -rf site
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache posfield.egg-info
