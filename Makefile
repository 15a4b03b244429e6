# Needs make, a POSIX shell and Python. demo needs nc of OpenBSD too; check and coverage need the
# network, to install their tools.

PYTHON = python3
COUNT = 100000

help:		## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1	/p' $(MAKEFILE_LIST)

run:		## serve on 127.0.0.1:1080
	$(PYTHON) socks5.py

# A server writes its first line into a pipe as soon as it listens.
demo:		## send a line through a proxy to an echo server and back
	@trap 'trap "" INT TERM; kill $$proxy $$echo 2>/dev/null; wait; rm -r $$pipes' EXIT; \
	trap 'exit 1' INT TERM HUP; \
	pipes=$$(mktemp -d); mkfifo $$pipes/proxy $$pipes/echo; \
	$(PYTHON) socks5.py 0 >$$pipes/proxy & proxy=$$!; \
	$(PYTHON) echo_server.py 0 >$$pipes/echo & echo=$$!; \
	{ read -r _ _ _ proxy_host _ proxy_port _ <&3 && read -r _ _ _ _ _ host _ port _ <&4 && \
	said=$$(printf hello | nc -N -X 5 -x $$proxy_host:$$proxy_port $$host $$port) && \
	echo "sent hello through the proxy and received $$said"; } 3<$$pipes/proxy 4<$$pipes/echo

bench:		## compare the proxy with a direct connection; more with ARGS="--seconds 10"
	@trap 'trap "" INT TERM; kill $$proxy 2>/dev/null; wait; rm -r $$pipes' EXIT; \
	trap 'exit 1' INT TERM HUP; \
	pipes=$$(mktemp -d); mkfifo $$pipes/proxy; \
	$(PYTHON) socks5.py -q 0 >$$pipes/proxy & proxy=$$!; \
	{ read -r greeting && url=$${greeting#*\(} && \
	$(PYTHON) echo_server.py --through $${url%%)*} $(ARGS) </dev/null; } <$$pipes/proxy

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
