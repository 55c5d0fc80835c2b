# make course   sets up, trains every stage on the built-in data, prints the report card and a chat
# make test     sets up, runs all tests and all notebooks (tiny preset)
# make lab      sets up, opens JupyterLab
# make notebooks / make exercises / make data    write again what is generated

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed

.PHONY: course test lab notebooks exercises data lint clean

course: $(SETUP)
	$(BIN)/minimind course

test: $(SETUP) lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations=8 tests
	OMP_WAIT_POLICY=passive MINIMIND_PRESET=tiny $(BIN)/python -m pytest -q --durations=0 \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=120 notebooks

lab: $(SETUP)
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(SETUP)
	MINIMIND_PRESET=course $(BIN)/python notebooks/execute.py

exercises: $(SETUP)
	$(BIN)/python exercises/build.py

data: $(SETUP)
	$(BIN)/python data_samples/generate.py

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[course,test]"
	touch $(SETUP)

clean:
	rm -rf .venv out checkpoints
