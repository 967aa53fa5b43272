# make demo   install, then trim the embedded Vision Transformer and show the report
# make test   install with the test tools, then run every test, in up to four processes
# make test-x86-64-v3   the tests of exports and kernels again, as on a processor with AVX2 alone
# make fuzz   the property tests, with new examples in each run
# make lint   ruff, clang-format and mypy
# make docs   build the documentation as a static site in build/site
# make docs-reference   write the generated pages of docs/ again
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt
# After the crash of a worker, pytest-xdist 3.8 waits for ever with the files that it had: the run
# ends instead, and names the test.
# Files begin in the order of tests/conftest.py, the long ones first.
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0
MYPY := ../bin/mypy --config-file ../../pyproject.toml

.PHONY: demo test fuzz test-x86-64-v3 lint docs docs-reference clean

demo: .venv/installed
	$(BIN)/vitrim run --overwrite

test: .venv/installed-test
	@# The tests of a file stay together, for their fixtures. Thread pools of several processes would
	@# compete for the cores. Where an environment lets Python write no compiled files, each of the
	@# many processes that tests start would compile all modules again.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest \
		$(WORKERS)

fuzz: .venv/installed-test
	VITRIM_FUZZ=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest \
		$(WORKERS) \
		$$(git grep -l "from hypothesis" -- tests ':!tests/conftest.py')

# Exports choose weights and code by these instruction sets, and torch its kernels by its variable.
# Tests that compile for every processor which this one can run need no second time.
test-x86-64-v3: .venv/installed-test
	VITRIM_CPU_FEATURES="$$($(BIN)/python -c 'from vitrim.targets.catalog import load_target; print(*load_target("x86-64-v3").features)')" \
	ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	$(BIN)/python -m pytest $(WORKERS) \
	  tests/export/quantization tests/export/runtimes/test_runtimes.py \
	  tests/export/tvm_kernels/test_bucket_programs.py \
	  tests/export/tvm_kernels/test_tvm_artifact.py tests/export/tvm_kernels/test_tvm_bundle.py \
	  tests/export/test_export_exporter.py tests/export/test_parity.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	git ls-files '*.c' '*.h' '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	@# The repository root is the package, whatever the folder is called; the type checker finds it
	@# under its name.
	@mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/vitrim
	@ln -sfn ../../benchmarks .venv/typing/benchmarks
	cd .venv/typing && $(MYPY) --exclude '/(tests|benchmarks|build|dist|runs)/' vitrim
	@# The tests are no package: their helpers are found beside them, as pytest finds them.
	cd .venv/typing && MYPYPATH=.:../../tests $(MYPY) --explicit-package-bases \
		--cache-dir .mypy_cache_tests ../../tests
	cd .venv/typing && $(MYPY) --package benchmarks

docs: .venv/installed-docs
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --quiet -d build/doctrees docs build/site
	@echo build/site/index.html

docs-reference: .venv/installed
	$(BIN)/python -m docs.generate

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vitrim needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[test]'
	@touch $@ .venv/installed .venv/installed-docs

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
