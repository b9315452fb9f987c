# Onlap: what to run. "make" alone lists the targets.
#
#   PYTHON=python3.12 make ...   use this Python
#   make demo ARGS="--require overlay"
#   make test ARGS="-k whiteout"

SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
# "make peers lint test" in that order, also under -j.
.NOTPARALLEL:
.PHONY: help demo peers peers-soft lint docs dist test test-crash test-long bench bench-check protocol clean

# Else each process of the tests and benchmarks would compile all that it imports, which takes longer than most commands.
unexport PYTHONDONTWRITEBYTECODE

ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
TOOLS_STAMP := $(VENV)/.tools-up-to-date
BENCH_STAMP := $(VENV)/.bench-up-to-date

# The Pythons to try. Each is run before it is taken: a name on PATH may be a shim without a Python behind it.
PYTHONS := $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)

# $(call find_python,MODULES,PACKAGE): sets the shell's $$py to the first that is new enough and has the modules,
# else says what is missing and ends the recipe.
define find_python
for py in $(PYTHONS) ''; do \
	"$${py:-false}" -c 'import sys; assert sys.version_info >= (3, 11); import $(1)' 2>/dev/null && break; \
done; \
if [ -z "$$py" ]; then \
	echo 'Onlap needs Python 3.11 or newer, with the modules $(1).' >&2; \
	echo 'Tried: $(PYTHONS). On Debian and Ubuntu: apt-get install $(2)' >&2; \
	exit 1; \
fi
endef

# Mounts of tests stay in a mount namespace of their own, which the kernel takes down with its last process.
PRIVATE = private=; \
	if unshare --mount --propagation private true 2>/dev/null; then \
		private='unshare --mount --propagation private'; \
	fi

# $(call run_tests,OPTIONS): pure and kernel beside each other. Then the peers one after the other, since each module has
# its own daemons; they mostly wait, so the other stores and the crashes run beside them, each in a mount namespace of
# their own. All of them run, also after a failure. A folder without tests (pytest's status 5) is not a failure.
define run_tests
	@$(PRIVATE); started=$$(date +%s); status=0; \
	suite() { \
		dirs=; \
		for name in $$1; do \
			if [ -n "$$(find tests/$$name -name 'test_*.py' 2>/dev/null | head -n 1)" ]; then dirs="$$dirs tests/$$name"; fi; \
		done; \
		[ -n "$$dirs" ] || return 0; \
		shift; \
		echo; echo "==$$dirs"; \
		$$private tools/scratch $(BIN)/python -m pytest -q --durations=15 --durations-min=0.5 $(1) "$$@" $$dirs $(ARGS); rc=$$?; \
		[ $$rc -eq 0 ] || [ $$rc -eq 5 ] || status=$$rc; \
	}; \
	suite 'pure kernel' -n 3; \
	mkdir -p .cache; \
	(suite crash -n 2 --dist loadfile; exit $$status) >.cache/crash.log 2>&1 & crash=$$!; \
	(suite stores -n 0; exit $$status) >.cache/stores.log 2>&1 & stores=$$!; \
	suite peers -n 0; \
	wait $$crash || status=$$?; wait $$stores || status=$$?; cat .cache/crash.log .cache/stores.log; \
	took=$$(($$(date +%s) - started)); echo; \
	if [ $$status -eq 0 ]; then echo "All passed in $$took s."; else echo "Tests failed ($$took s)." >&2; fi
endef

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: ## the main job, on a real tree; installs nothing
	@$(call find_python,ctypes$(,) sqlite3$(,) zlib,python3); PYTHONPATH=src exec "$$py" -B -m onlap demo $(ARGS)

peers: ## install what Onlap is tested against (as root; Debian, Ubuntu)
	@tools/peers

peers-soft:
	@tools/peers --soft

lint: $(STAMP) ## ruff, mypy, the direction of imports, the numbers of README.md
	@status=0; \
	$(BIN)/ruff check --quiet . || status=1; \
	$(BIN)/ruff format --check --quiet --diff . || status=1; \
	$(BIN)/mypy --no-error-summary || status=1; \
	$(BIN)/python -m bench.readme --check || status=1; \
	said=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$said"; status=1; }; \
	[ $$status -eq 0 ] && echo 'lint: clean'; \
	exit $$status

docs: $(TOOLS_STAMP) ## the documentation as a site, in build/docs; warnings are errors
	@$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs && echo 'docs: build/docs/index.html'

# Tests that find their way to whatever Onlap is installed: "src" is not on the path here.
WHEEL_TESTS ?= $(addprefix tests/pure/test_,arguments.py catalog_records.py cli.py completion.py doctests.py images_model.py \
	serve_sockets.py tar_reader.py)

dist: $(TOOLS_STAMP) ## sdist and wheel, in dist; checked, and the wheel installed elsewhere and tried
	@rm -rf dist build/wheel; mkdir -p build; set -e; \
	$(BIN)/python -m build --outdir dist . >build/dist.log 2>&1 || { cat build/dist.log >&2; exit 1; }; \
	$(BIN)/python -m twine --no-color check --strict dist/*; \
	$(BIN)/python -m venv build/wheel; \
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(echo dist/*.whl)[containerd]" hypothesis pytest pytest-timeout; \
	build/wheel/bin/onlap --version; \
	test -s build/wheel/share/man/man1/onlap-diff.1; \
	build/wheel/bin/python -c 'import onlap; assert "build/wheel" in onlap.__file__, onlap.__file__'; \
	build/wheel/bin/python -m pytest -q -p no:cacheprovider -o 'pythonpath=tests .' $(WHEEL_TESTS)

# 720 s on 2 cores is the budget of the whole run; a machine that is busy or slower gets a quarter more.
test: $(STAMP) peers-soft ## the tests, in a virtual environment that this makes
	$(run_tests); \
	if [ "$${CI-}" = true ] && [ $$took -gt 900 ]; then echo "Over the budget of 720 s by more than a quarter." >&2; status=1; fi; \
	exit $$status

test-crash: $(STAMP) ## the tests of crashes alone; more of them with ARGS=--long
	@$(PRIVATE); $$private $(BIN)/python -m pytest -q tests/crash $(ARGS)

test-long: export HYPOTHESIS_PROFILE := long
test-long: $(STAMP) peers-soft ## the same with the long tests and the long Hypothesis profile (hours)
	$(call run_tests,--long --timeout=3600 -o faulthandler_timeout=3500); exit $$status

# $(call run_bench,OPTIONS): each writes its section of docs/benchmarks.md, unless the options say otherwise.
BENCHMARKS = $(basename $(notdir $(shell grep -l 'lib\.main' bench/*.py)))
define run_bench
	@$(PRIVATE); status=0; read -r ONLAP_BENCH_LOAD _ </proc/loadavg; export ONLAP_BENCH_LOAD; \
	for name in $(BENCHMARKS); do \
		echo "== $$name"; $$private $(BIN)/python -m "bench.$$name" $(1) $(ARGS) || status=1; \
	done
endef

bench: $(BENCH_STAMP) peers-soft ## the benchmarks, beside the peers; short with ARGS=--quick
	$(run_bench); $(BIN)/python -m bench.readme || status=1; exit $$status

bench-check: $(STAMP) peers-soft ## measures, and fails if all rounds of a ratio are worse than all recorded ones
	@rm -f .cache/bench/*.json
	$(call run_bench,--no-publish); $(BIN)/python -m bench.check || status=1; exit $$status

protocol: $(STAMP) ## make the protobuf stubs again from their source
	@cd src && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. \
		onlap/serve/containerd/protocol/*.proto

clean: ## remove all that make made
	@rm -rf $(VENV) .cache build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find src tests tools bench peers -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || :

# A virtual environment whose Python has gone, or was another one, is made anew.
$(STAMP): pyproject.toml
	@$(call find_python,ctypes$(,) ensurepip$(,) sqlite3$(,) venv$(,) zlib,python3 python3-venv); \
	want=$$("$$py" -c 'import sys; print(sys.version)'); \
	if [ "$$want" != "$$($(BIN)/python -c 'import sys; print(sys.version)' 2>/dev/null)" ]; then \
		echo "Making $(VENV) with $$py"; "$$py" -m venv --clear $(VENV) || exit 1; \
	fi; \
	echo 'Installing Onlap and its tools into $(VENV)'; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,containerd,examples]' && \
	: 'Its own dependencies are clients of language models, which the tests of examples/ do not need.' && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'mini-swe-agent>=2.4,<3'
	@touch $@

# What only "bench" needs: it draws.
$(BENCH_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

# What only "docs" and "dist" need.
$(TOOLS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs,dist]'
	@touch $@

# A comma inside the arguments of a call.
, := ,
