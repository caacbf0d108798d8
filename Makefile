# make demo | install | test | test-slow | lint | bench | parity | clean
PYTHON ?= python3
BIN := .venv/bin
ROOMS := layers tokenizers priors pipeline training

.PHONY: install demo test test-slow lint bench parity clean

install: .venv/.installed

# A stamp: the second run starts at once, and a changed pin installs again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if v >= (3, 11) else "kartina needs Python 3.11 or newer, got %d.%d: make install PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,track,perceptual,dev]"
	@touch $@

demo: .venv/.installed
	$(BIN)/kartina demo

test: .venv/.installed
	@start=$$(date +%s); OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadgroup; status=$$?; \
	  echo "make test: $$(( $$(date +%s) - start )) s"; exit $$status

test-slow: .venv/.installed
	@start=$$(date +%s); OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --durations=0; status=$$?; \
	  echo "make test-slow: $$(( $$(date +%s) - start )) s"; exit $$status

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typing && ln -sfn ../.. build/typing/kartina
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
	  -m kartina -m kartina.cli $(ROOMS:%=-p kartina.%)

bench: .venv/.installed
	set -e; for file in benchmarks/[a-z]*.py; do \
	  echo "== $$file"; peers=build/bench/$$(basename $$file .py); list=$${file%.py}.txt; \
	  test ! -f $$list || test -d $$peers || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --target $$peers -r $$list; \
	  PYTHONPATH=$$peers $(BIN)/python $$file; done

# Peers whose pins conflict with ours: installed one folder each, their small outputs recorded for `make test`.
parity: .venv/.installed
	set -e; for file in tests/parity/record*.py; do \
	  echo "== $$file"; peer=build/parity/$$(basename $$file .py); \
	  test -d $$peer || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $$peer \
	    -r $${file%.py}.txt; \
	  PYTHONPATH=$$peer $(BIN)/python $$file; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
