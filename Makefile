# Needs make, a POSIX shell and Python. demo needs nc of OpenBSD too; check and coverage need the
# network, to install their tools.

PYTHON = python3
COUNT = 100000

help:		## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1	/p' $(MAKEFILE_LIST)

run:		## serve on 127.0.0.1:1080
	$(PYTHON) socks5.py

# $(call with,SERVER,NAME,COMMAND): start SERVER on a free port, set $NAME to the port in its
# first line, run COMMAND and stop SERVER. The first sh tells its process ID and becomes SERVER.
# cat waits for the end of SERVER.
with = sh -c 'echo $$$$; exec $(PYTHON) $(1) 0' | { \
	read -r pid; trap 'kill $$pid 2>/dev/null; cat >/dev/null' EXIT; trap 'exit 1' INT TERM HUP; \
	read -r line || { echo "make: $(1) did not start" >&2; exit 1; }; \
	echo "$$line"; $(2)=$${line\#* port }; $(2)=$${$(2)%% *}; \
	$(3); }

demo:		## send a line through a proxy to an echo server and back
	@$(call with,socks5.py,proxy,$(call with,echo_server.py,echo,\
	said=$$(printf hello | nc -N -X 5 -x 127.0.0.1:$$proxy 127.0.0.1 $$echo) && \
	echo "sent hello through the proxy and received $$said"))

bench:		## compare the proxy with a direct connection; more with ARGS="--seconds 10"
	@$(call with,socks5.py -q,proxy,\
	$(PYTHON) echo_server.py --through 127.0.0.1:$$proxy $(ARGS) </dev/null)

test:		## run the tests; another Python with PYTHON=python3.9
	$(PYTHON) -m unittest

test-all:	## run the tests with each installed CPython from 3.6 up
	@.ci/run pythons

fuzz:		## run many random conversations; repeat them with SEED=N, fewer with COUNT=1000
	FUZZ=$(COUNT) SEED=$(SEED) $(PYTHON) -m unittest test_socks5.FuzzTest

check:		## run ruff and mypy
	@.ci/run check

coverage:	## show which lines the tests reach
	@.ci/run tools
	.tools/bin/coverage run --include=socks5.py,echo_server.py -m unittest
	.tools/bin/coverage report --show-missing

clean:		## remove the files that these targets make
	rm -rf .tools .coverage .mypy_cache .ruff_cache __pycache__

.PHONY: help run demo bench test test-all fuzz check coverage clean
