# Needs make, a shell and Python; the checks need a network once, to install ruff and mypy.

PYTHON = python3
TOOLS = .tools
COUNT = 100000

help:		## list what can be made
	@sed -n 's/^\([a-z-]*\):.*##/  make \1	/p' $(MAKEFILE_LIST)

run:		## serve on 127.0.0.1:1080
	$(PYTHON) socks5.py

demo:		## a proxy, an echo server, and a client that goes through the one to the other
	@set -e; trap 'kill $$proxy $$echo' EXIT; \
	$(PYTHON) socks5.py & proxy=$$!; \
	$(PYTHON) echo_server.py & echo=$$!; \
	for try in 1 2 3 4 5 6 7 8 9; do \
	  sleep 1; \
	  said=$$(printf hello | nc -N -X 5 -x 127.0.0.1:1080 127.0.0.1 7777) && break; \
	done; \
	echo "sent hello through the proxy, and received $$said"

bench:		## measure the proxy against a direct connection
	@set -e; trap 'kill $$proxy' EXIT; \
	$(PYTHON) socks5.py -q & proxy=$$!; sleep 1; \
	$(PYTHON) echo_server.py --through 127.0.0.1:1080

test:		## the tests, with $(PYTHON)
	$(PYTHON) -m unittest

test-all:	## the tests, with each Python from 3.6 up that is installed
	@.ci/run pythons

fuzz:		## many more random conversations: make fuzz COUNT=100000, SEED=N to repeat them
	FUZZ=$(COUNT) SEED=$(SEED) $(PYTHON) -m unittest test_socks5.FuzzTest

check:		## ruff and mypy
	@.ci/run check

coverage:	## which lines the tests reach
	$(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/pip --quiet install coverage
	$(TOOLS)/bin/coverage run --include=socks5.py,echo_server.py -m unittest
	$(TOOLS)/bin/coverage report --show-missing

clean:		## remove what the above leaves behind
	rm -rf $(TOOLS) .coverage .mypy_cache .ruff_cache __pycache__

.PHONY: help run demo bench test test-all fuzz check coverage clean
