# make demo   install, then trim the embedded Vision Transformer and show the report
# make test   install with the test tools, then run every test
# make lint   ruff and mypy
# make docs   build the documentation as a static site in build/site
# make docs-reference   write the generated pages of docs/ again
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs docs-reference clean

demo: .venv/installed
	$(BIN)/vitrim run --overwrite

test: .venv/installed-test
	$(BIN)/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	@# The repository root is the package, whatever the folder is called; the type checker needs to see it under its name.
	@mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/vitrim
	cd .venv/typing && ../bin/mypy --config-file ../../pyproject.toml --exclude '/(tests|benchmarks|build|dist|runs)/' vitrim
	@# The tests are no package: their helpers are found beside them, as pytest finds them.
	cd .venv/typing && MYPYPATH=.:../../tests ../bin/mypy --config-file ../../pyproject.toml --explicit-package-bases --cache-dir .mypy_cache_tests ../../tests

docs: .venv/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --quiet -d build/doctrees docs build/site
	@echo build/site/index.html

docs-reference: .venv/installed-docs
	$(BIN)/python -m docs.generate

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vitrim needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[test]'
	@touch $@ .venv/installed

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
