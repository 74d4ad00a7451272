# A fresh machine needs only Python, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL_INTEGRATION := $(VENV)-integration/bin/python -m pip install --quiet --disable-pip-version-check \
	-c constraints-integration.txt
INSTALL_DOCS := $(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-docs.txt
INSTALL_WHEEL := $(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-wheel.txt
INSTALL_LOWEST := $(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt

.PHONY: quickstart test test-lowest test-integration docs tutorials wheel bench clean

quickstart: $(VENV)/.examples
	$(BIN)/python examples/quickstart.py

# pytest comes last: its own last line ends the output.
test: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# The core with the lowest versions that setup.cfg names. Other versions warn of other things.
test-lowest: $(VENV)-lowest/.ready
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings=default \
		-m "not slow" tests/test_checks.py tests/test_gramian.py tests/test_randomness.py tests/rules tests/optim \
		tests/solvers/test_rule.py tests/objectives tests/metrics tests/callbacks/passes

# Other projects with their own dependencies, so in an environment of their own.
test-integration: $(VENV)-integration/.ready
	OMP_NUM_THREADS=1 $(VENV)-integration/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings=default integration

# Every warning is an error: a link, an anchor or a name in a docstring that leads nowhere.
docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build

# Programs in jupytext's percent format; the site shows them as pages.
tutorials: $(VENV)/.dev
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" && for tutorial in $(CURDIR)/docs/tutorials/*.py; do \
		OMP_NUM_THREADS=1 $(abspath $(BIN))/python "$$tutorial" || exit 1; done

# The wheel is installed into a fresh environment outside of the repository, where the README's example runs.
wheel: $(VENV)-wheel/.ready
	rm -rf dist
	$(VENV)-wheel/bin/python -m build
	$(VENV)-wheel/bin/python -m twine check --strict dist/*
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cp README.md tests/readme_example.py "$$folder" && \
		$(PYTHON) -m venv "$$folder/venv" && "$$folder/venv/bin/python" -m pip install --quiet \
		--disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt) dist/*.whl && \
		cd "$$folder" && venv/bin/python readme_example.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) $(VENV)-integration $(VENV)-lowest $(VENV)-docs $(VENV)-wheel site dist build

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: a range would fetch several GB of CUDA packages.
$(VENV)/.torch: $(VENV)/pyvenv.cfg constraints.txt
	$(INSTALL) $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.examples: $(VENV)/.torch setup.cfg
	$(INSTALL) -e '.[examples]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch setup.cfg requirements/dev.txt
	$(INSTALL) -r requirements/dev.txt
	touch $@ $(VENV)/.examples

$(VENV)-lowest/.ready: constraints.txt constraints-lowest.txt setup.cfg requirements/lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(INSTALL_LOWEST) $$(grep '^torch==' constraints.txt)
	$(INSTALL_LOWEST) -r requirements/lowest.txt
	touch $@

# pytorch-tabular comes without its dependencies: it asks for torchmetrics<1.9, where we need 1.9, and works with it.
$(VENV)-integration/.ready: constraints.txt constraints-integration.txt setup.cfg requirements/integration.txt
	$(PYTHON) -m venv $(VENV)-integration
	$(INSTALL_INTEGRATION) $$(grep '^torch==' constraints.txt)
	$(INSTALL_INTEGRATION) -r requirements/integration.txt
	$(INSTALL_INTEGRATION) --no-deps pytorch-tabular
	touch $@

$(VENV)-docs/.ready: constraints-docs.txt requirements/docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(INSTALL_DOCS) -r requirements/docs.txt
	touch $@

$(VENV)-wheel/.ready: constraints-wheel.txt requirements/wheel.txt
	$(PYTHON) -m venv $(VENV)-wheel
	$(INSTALL_WHEEL) -r requirements/wheel.txt
	touch $@
