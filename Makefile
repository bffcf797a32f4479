# make demo, test, lint, docs or tutorials: each makes .venv if it is missing and installs what it needs, once.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Two test processes, since small machines have two cores; the idle one takes over what the other has left.
# More on a larger machine: make test JOBS=8
JOBS ?= 2

.PHONY: demo test lint docs tutorials clean
.DELETE_ON_ERROR:

demo: .venv/.installed-demo
	$(BIN)/vig-ref demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile ci

lint: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/pyright

# Into out/site. Without --quiet, which would hide what --strict counts; the variable silences an advertisement.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open out/site/index.html"

# The chapters in JupyterLab, in a browser.
tutorials: .venv/.installed-tutorials
	$(BIN)/jupyter lab --notebook-dir=tutorials

clean:
	rm -rf .venv out

# The stamp is younger than what decides the installation, so that a second call installs nothing.
# torch goes first: it is most of the download, and the line above it says what is being waited for.
.venv/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "[1/3] creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vig_ref needs Python 3.11 or later: make PYTHON=...")'
	@echo "[2/3] installing torch, as pinned in constraints.txt: 200 MB, or some GB where it comes with CUDA"
	@$(PIP) torch
	@echo "[3/3] installing vig_ref with the extra '$*'"
	@$(PIP) -e ".[$*]"
	@touch $@
