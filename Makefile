# Python 3.11 to 3.13 (the newest that is there) and make are all that is needed; everything else goes
# into .venv.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Three test processes side by side, for two cores, as tests wait, too; a file's tests stay together,
# as they share what they start. Their threads are more than the cores: one that waits must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# A module is compiled by the first process that loads it, for all that follow, even where the
# environment would have each compile it anew: that is half of the time that tests take.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-cuda quickstart test test-fast test-all gpu-smoke check audit format lock clean

install: $(VENV)/.installed

# Nothing is compiled beforehand: that is most of the time, for files of which few are ever loaded.
$(VENV)/.installed: requirements.lock requirements-nodeps.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "there is no Python 3.11, 3.12 or 3.13; set PYTHON to one"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip==26.3"
	$(BIN)/pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --no-compile --no-deps --requirement requirements-nodeps.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# For NVIDIA GPUs: the whole of SGLang with its kernels, and the torch and transformers that it is
# made for. The lock is all there is to install.
install-cuda:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip==26.3"
	$(BIN)/pip install --quiet --no-compile --no-deps --requirement requirements-cuda.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(VENV)/.installed

# A real model distilled on the CPU, from nothing to the report.
quickstart: install
	$(BIN)/kdflow run quickstart

# Rules about the code and unit tests first: what fails there fails in two minutes.
# The folders whose files take longest come first, so that no process is left with one at the end.
test: test-fast
	$(PYTEST) tests/integration tests/faults tests/equivalence tests/contracts tests/numerics

test-fast: install
	$(PYTEST) --exitfirst tests/architecture tests/unit

# With the slow tests: the whole quick start, as its README says it, and what only a nightly run needs.
test-all: install
	$(PYTEST) -m "not gpu"

# Everything once on one GPU, in minutes, without a hub; on a machine without, what a CPU has.
gpu-smoke: install
	$(BIN)/python -m tests.gpu.smoke --json gpu-smoke.json

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	-$(MAKE) audit  # told, not enforced: what is known of a package changes without us

# Known vulnerabilities of what is locked. Fails for one, and for packages that the registry does
# not answer for: those were not audited.
audit: $(VENV)/audit/.installed
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip \
		--requirement requirements.lock --requirement requirements-nodeps.lock \
		--requirement requirements-cuda.lock

$(VENV)/audit/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit==2.10.1
	touch $@

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Resolve pyproject.toml anew and pin everything. SGLang, in requirements-nodeps.lock, says which torch
# and transformers it is made for, and torch's CUDA build which triton: one lock does for both builds.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade "pip==26.3"
	build/lock/bin/pip install --quiet torch==2.13.0 triton==3.7.1 transformers==5.12.1 prefect==3.8.8
	build/lock/bin/pip install --quiet setuptools wheel '.[sglang-cpu]' --group dev
	build/lock/bin/pip freeze --all --exclude kdflow --exclude pip | sed 's/+cpu$$//' > requirements.lock
	build/lock/bin/pip install --quiet --dry-run --ignore-installed --report build/cuda.json \
		setuptools wheel prefect==3.8.8 '.[ray,s3,sglang]' --group dev
	build/lock/bin/python -c 'import json; \
		found = [i["metadata"] for i in json.load(open("build/cuda.json"))["install"]]; \
		print(*sorted(m["name"] + "==" + m["version"] for m in found if m["name"] != "kdflow"), \
		sep="\n")' > requirements-cuda.lock
	grep '^[a-z0-9-]*\(tokenizer\|smollm2\)==' requirements-nodeps.lock >> requirements-cuda.lock
	rm -rf build

clean:
	rm -rf $(VENV) .kdflow build
