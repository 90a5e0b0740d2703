# Every target makes .venv and installs what is pinned, when that is not there or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FLOW ?= flows/train-and-encode.yml
# the peers of the benchmarks cannot live with our packages
PEERS_VENV := .venv-peers
PEERS_INSTALLED := $(PEERS_VENV)/.installed
# options of the peers' table, such as --seeds 1
PEERS ?=
# a server of others, which cannot live with those either
INFINITY_VENV := .venv-infinity
INFINITY_INSTALLED := $(INFINITY_VENV)/.installed
# options of the table of servers, such as --only texts
SERVE ?=

.PHONY: demo test serve lint bench bench-peers bench-serve install clean

demo: $(INSTALLED)  ## fine-tune on the emoji pictures and serve the result
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  ## run the tests, three files at a time: many of them wait for servers
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

serve: $(INSTALLED)  ## serve /fit and /encode until interrupted; FLOW=... for another Flow
	$(BIN)/finetuner serve $(FLOW)

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy finetuner executors

bench: bench-peers bench-serve  ## compare training and serving with others', then speed with plain loops
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/content_cache.py
	$(BIN)/python benchmarks/linear_probe.py
	$(BIN)/python benchmarks/pages.py
	$(BIN)/python benchmarks/column_rates.py

bench-peers: $(INSTALLED) $(PEERS_INSTALLED)  ## train side by side with others: one table
	$(BIN)/python benchmarks/peers.py $(PEERS)

bench-serve: $(INSTALLED) $(INFINITY_INSTALLED)  ## serve side by side with others: one table a kind
	$(BIN)/python benchmarks/serve.py $(SERVE)

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(PEERS_INSTALLED): benchmarks/requirements-peers.txt
	test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(INFINITY_INSTALLED): benchmarks/requirements-infinity.txt
	test -x $(INFINITY_VENV)/bin/python || $(PYTHON) -m venv $(INFINITY_VENV)
	$(INFINITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf $(VENV) $(PEERS_VENV) $(INFINITY_VENV) demo-output .pytest_cache .mypy_cache .ruff_cache build *.egg-info
