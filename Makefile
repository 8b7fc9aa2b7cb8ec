# The relay needs no build step: python3 transit_relay.py runs it.

PYTHON ?= python3
prefix = /usr/local

sources = transit_relay.py ws_frames.py
# For --status and --forward. An installed relay finds these files beside transit_relay.py.
status_module = packaging/status-page/transit_relay_status.py
status_page = packaging/status-page/status.html
gateway_module = packaging/gateway/transit_relay_gateway.py
parts = $(status_module) $(status_page) $(gateway_module)
share = $(DESTDIR)$(prefix)/share/transit-relay
entry = $(DESTDIR)$(prefix)/sbin/transit-relay
man8 = $(DESTDIR)$(prefix)/share/man/man8

# The probe finds ws_frames.py in the same folder.
probe = packaging/probe/transit_relay_probe.py
probe_entry = $(DESTDIR)$(prefix)/bin/transit-relay-probe
man1 = $(DESTDIR)$(prefix)/share/man/man1

# Sums the usage databases of several relays.
sum_script = packaging/growing/transit_relay_sum.py

# munin-node-configure links this plugin once for each graph.
munin_plugin = packaging/munin/wormhole_transit_
munin = $(DESTDIR)$(prefix)/share/munin/plugins

# The venv for pytest, if $(PYTHON) has no pytest: one for each value of PYTHON.
python_name = $(subst /,_,$(PYTHON))
venv = $(if $(filter python3,$(PYTHON)),.venv,build/venv-$(python_name))

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests need no pytest plugins, and must not depend on those of the machine.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1

.PHONY: help pytest test test-in-process test-processes test-reloads fuzz fuzz-venv fuzz-guided \
	interop hostile hostile-waiting hostile-alone rates gateway-test reload-test reload-load soak check-packaging \
	bench bench-quick bench-against lint screenshots install uninstall onefile sdist check-sdist deb clean

help: ## list these targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Set $$python to a Python with pytest. A venv that is incomplete, or whose Python is gone, is made
# again.
define find_pytest
python='$(PYTHON)'; \
if ! "$$python" -c 'import pytest' 2>/dev/null; then \
	python='$(venv)/bin/python'; \
	"$$python" -c 'import pytest' 2>/dev/null || { \
		echo 'no pytest in $(PYTHON): installing it in $(venv)'; \
		'$(PYTHON)' -m venv --clear '$(venv)' && "$$python" -m pip install -qq pytest; \
	} || exit 1; \
fi
endef

pytest: # install pytest only. Two processes must not do so at the same time.
	@$(find_pytest)

# The tests that start processes, in two groups. They wait for much of their time.
process_tests = $(addprefix tests/test_,$(addsuffix .py,backpressure check cli hostile \
	onefile splice systemd usage))
reload_tests = $(addprefix tests/test_,$(addsuffix .py,daemon kill gateway_options gateway_plugin \
	reload reload_plugin probe status munin hints sum hashing capacity))
# The logs are named for the Python, because CI tests two of them at the same time.
test_log = build/$@-$(python_name).log
test_logs = $(patsubst %,build/test-%-$(python_name).log,processes reloads)

# Three runs of pytest share the tests. The output of the last two is printed at the end.
test: pytest ## run the tests; PYTHON=python3.9 make test for another Python
	@mkdir -p build; $(MAKE) -s -j3 test-in-process test-processes test-reloads; status=$$?; \
	cat $(test_logs); exit $$status

test-in-process:
	@$(find_pytest); "$$python" -m pytest -q tests $(addprefix --ignore=,$(process_tests) $(reload_tests))

test-processes:
	@$(find_pytest); "$$python" -m pytest -q $(process_tests) >$(test_log) 2>&1

test-reloads:
	@$(find_pytest); "$$python" -m pytest -q $(reload_tests) >$(test_log) 2>&1

fuzz: pytest fuzz-venv ## fuzz and fuzz-guided, 45 minutes; RELAY_FUZZ_FIRST=200000: other inputs
	@$(find_pytest); status=0; RELAY_FUZZ_CASES=$${RELAY_FUZZ_CASES:-200000} \
		RELAY_WALK_STEPS=$${RELAY_WALK_STEPS:-1000000} \
		"$$python" -m pytest -q -s -o faulthandler_timeout=0 tests/test_fuzz.py tests/test_walk.py || status=1; \
	$(MAKE) --no-print-directory fuzz-guided || status=1; exit $$status

# Fuzz tests that coverage guides. atheris has wheels for some versions of Python only; building it
# needs clang.
FUZZ_PYTHON ?= $(PYTHON)
FUZZ_SECONDS ?= 110
FUZZ_JOBS ?= 1
FUZZ_TARGETS ?=
fuzz_venv = build/venv-fuzz-$(subst /,_,$(FUZZ_PYTHON))

# FUZZ_SECONDS is for each of the 8 targets. FUZZ_JOBS of them run at a time.
fuzz-guided: fuzz-venv ## fuzz with atheris, 15 minutes; FUZZ_SECONDS=110 FUZZ_JOBS=1 FUZZ_TARGETS='frames http'
	@'$(fuzz_venv)/bin/python' tests/fuzz --seconds '$(FUZZ_SECONDS)' --jobs '$(FUZZ_JOBS)' $(FUZZ_TARGETS)

# A venv that is incomplete, older than pyproject.toml, or whose Python is gone, is made again. The
# first pip that reads dependency groups is 25.1.
fuzz-venv:
	@if ! '$(fuzz_venv)/bin/python' -c 'import atheris, pytest' 2>/dev/null \
		|| [ '$(fuzz_venv)/made' -ot pyproject.toml ]; then \
		'$(FUZZ_PYTHON)' -m venv --clear '$(fuzz_venv)' || exit 1; \
		'$(fuzz_venv)/bin/pip' install -qq --upgrade 'pip>=25.1' || exit 1; \
		'$(fuzz_venv)/bin/pip' install -qq --only-binary atheris --group fuzz || { \
			echo 'fuzz-guided: pip cannot install the group fuzz for $(FUZZ_PYTHON), for the reason' \
				'above. atheris has wheels for CPython 3.11 to 3.13:' \
				'FUZZ_PYTHON=python3.11 make fuzz-guided' >&2; exit 1; }; \
		touch '$(fuzz_venv)/made'; \
	fi

# Two runs at the same time, because the programs wait for much of their time.
interop_waiting = $(addprefix tests/interop/test_,$(addsuffix .py,clients dilation injection \
	prometheus))

interop: pytest ## run the tests against the Twisted relay and the real clients
	@mkdir -p build; $(find_pytest); status=0; \
	"$$python" -m pytest -q $(interop_waiting) >build/interop.log 2>&1 & waiting=$$!; \
	"$$python" -m pytest -q tests/interop $(addprefix --ignore=,$(interop_waiting)) || status=1; \
	wait $$waiting || status=1; cat build/interop.log; exit $$status

screenshots: pytest ## pictures of the status page: build/screenshots, docs/status.png; needs chromium and pngquant
	@$(find_pytest); "$$python" tests/interop/screenshots.py build/screenshots docs/status.png

# Four runs at the same time, because the tests of three of them wait for most of their time. Then
# those that compare times or use both cores run alone.
hostile_alone = $(addprefix tests/hostile/test_,database_locked.py floods.py scrapes.py)
hostile_runs = suspended stalled vanished resets+resources
hostile_pytest = "$$python" -m pytest -q -s -o faulthandler_timeout=0

# The files whose tests run a Server in the process of the tests. Those in test_server.py replace
# parts of it, such as the selector, which a reload makes anew.
reload_files = $(addprefix tests/test_,$(addsuffix .py,addresses backpressure bandwidth connection \
	endings framing fuzz handshake limits memory rates rendezvous room splice walk websocket))

gateway_files = $(addprefix tests/test_,$(addsuffix .py,backpressure bandwidth connection endings \
	faults limits memory relay splice walk websocket))
gateway_pytest = PYTHONPATH=tests:. "$$python" -m pytest -q -p gateway_plugin -o faulthandler_timeout=0

gateway-test: pytest ## the tests of pairs over a gateway; those left out must fail there; 3 minutes
	@$(find_pytest); status=0; $(gateway_pytest) $(gateway_files) || status=1; \
	[ -n "$$RELAY_GATEWAY_SHORT" ] || RELAY_GATEWAY_LISTED=1 \
		$(gateway_pytest) -o addopts= -W ignore $(gateway_files) || status=1; \
	exit $$status

reload-test: pytest ## the tests of the loop, with a reload before each turn, 10 minutes
	@$(find_pytest); PYTHONPATH=tests:. RELAY_ENDINGS=$${RELAY_ENDINGS:-100} \
		RELAY_FUZZ_CASES=$${RELAY_FUZZ_CASES:-500} "$$python" -m pytest -q -p reload_plugin \
		-o faulthandler_timeout=0 $(reload_files)

hostile: pytest ## faults and floods around a relay, 8 minutes; RELAY_HOSTILE_SHORT=1: 4; needs root
	@status=0; $(MAKE) -s hostile-waiting || status=1; $(MAKE) -s hostile-alone || status=1; exit $$status

hostile-waiting: pytest
	@mkdir -p build; $(find_pytest); status=0; runs=; \
	for run in $(hostile_runs); do \
		$(hostile_pytest) $$(echo "+$$run" | sed 's,+\([a-z]*\), tests/hostile/test_\1.py,g') \
			>build/hostile-$$run.log 2>&1 & runs="$$runs $$!"; \
	done; \
	for run in $$runs; do wait $$run || status=1; done; \
	cat $(patsubst %,build/hostile-%.log,$(hostile_runs)); exit $$status

hostile-alone: pytest
	@$(find_pytest); $(hostile_pytest) $(hostile_alone)

rates: pytest ## the rates in real time, 2 minutes; RELAY_HOSTILE_SHORT=1: 50 seconds
	@$(find_pytest); $(hostile_pytest) tests/hostile/test_real_rates.py

reload-load: pytest ## reloads under load, 3 minutes; RELAY_RELOAD_SHORT=1: 1
	@$(find_pytest); $(hostile_pytest) tests/reload

MINUTES = 10

soak: ## random clients; bytes, records and the counters of pairs are checked: make soak MINUTES=10
	@PYTHONPATH=.:tests '$(PYTHON)' tests/hostile/soak.py $(MINUTES) $(SOAK)

check-packaging: pytest ## build, check, install and boot the packages, minutes; needs root and Debian
	@$(find_pytest); "$$python" -m pytest -q --durations=10 tests/packaging

bench: ## compare with the Twisted relay and HAProxy, 13 minutes; BENCH=--help lists the options
	@'$(PYTHON)' tests/bench $(BENCH)

bench-quick: ## most of it, in 2 minutes, judged less strictly
	@'$(PYTHON)' tests/bench --quick $(BENCH)

bench-against: ## compare with another commit, 30 minutes; BENCH=--quick: 8: make bench-against DIR=CHECKOUT
	@'$(PYTHON)' tests/bench --against '$(or $(DIR),$(error DIR is not set: the checkout to compare with))' $(BENCH)

modules = $(sources) $(status_module) $(gateway_module) $(probe) $(sum_script) packaging/docker/health_check.py
mypy_path = .:packaging/status-page:packaging/gateway

lint: build/lint/made ## ruff, and mypy --strict for the oldest and the newest Python
	build/lint/bin/ruff check . $(munin_plugin)
	MYPYPATH=$(mypy_path) build/lint/bin/mypy --strict --python-version 3.9 $(modules)
	MYPYPATH=$(mypy_path) build/lint/bin/mypy --strict --python-version 3.13 $(modules)
	build/lint/bin/mypy --strict --python-version 3.9 $(munin_plugin)
	build/lint/bin/mypy --strict --python-version 3.13 $(munin_plugin)

build/lint/made: pyproject.toml
	$(PYTHON) -m venv --clear build/lint
	build/lint/bin/pip install -qq --upgrade 'pip>=25.1' # the first that reads dependency groups
	build/lint/bin/pip install -qq --group lint
	touch $@

# The entry imports the relay: Python caches the bytecode of modules, but compiles a script at every
# start. The entry finds the module relative to its own path, so it also runs in a staging folder.
define entry_text
#!/usr/bin/python3
import os.path
import sys

prefix = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, os.path.join(prefix, "share", "transit-relay"))

import transit_relay

sys.exit(transit_relay.main())
endef

install: export entry_text := $(entry_text)
install: ## install below prefix (/usr/local), staged below DESTDIR if that is set
	install -d '$(share)' '$(dir $(entry))' '$(dir $(probe_entry))' '$(man8)' '$(man1)' '$(munin)'
	install -m 644 $(sources) $(parts) $(probe) $(sum_script) '$(share)'
	install -m 644 packaging/transit-relay.8 '$(man8)'
	install -m 644 packaging/probe/transit-relay-probe.1 '$(man1)'
	printf '%s\n' "$$entry_text" | install -m 755 /dev/stdin '$(entry)'
	printf '%s\n' "$$entry_text" | sed 's/transit_relay/&_probe/' | install -m 755 /dev/stdin '$(probe_entry)'
	sed '1s,env python3,python3,' $(munin_plugin) | install -m 755 /dev/stdin '$(munin)/$(notdir $(munin_plugin))'

uninstall: ## remove what install put there
	rm -f '$(entry)' '$(man8)/transit-relay.8' '$(probe_entry)' '$(man1)/transit-relay-probe.1' \
		'$(munin)/$(notdir $(munin_plugin))'
	rm -rf '$(share)'

# All modules and the status page in one file that Python runs: a zip archive after a #! line
# (PEP 441). All entries have the same fixed time, so the same sources make the same file, byte for
# byte.
define onefile_text
import os.path, sys, zipfile
main = b"import sys\n\nimport transit_relay\n\nsys.exit(transit_relay.main())\n"
texts = {os.path.basename(path): open(path, "rb").read() for path in sys.argv[2:]}
texts["__main__.py"] = main
with open(sys.argv[1], "wb") as file:
    file.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(texts.items()):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
endef

onefile: export onefile_text := $(onefile_text)
onefile: ## build/transit-relay.pyz, one file to copy: the relay with WebSocket, --status and --forward
	@mkdir -p build
	@'$(PYTHON)' -c "$$onefile_text" build/transit-relay.pyz $(sources) $(parts)
	@chmod 755 build/transit-relay.pyz
	@ls -l build/transit-relay.pyz

# The source archive. hatchling packs every file that .gitignore does not exclude. In a git repository
# the names of the files are compared with those of the committed files.
sdist_venv = build/venv-sdist

sdist: $(sdist_venv)/made ## build dist/transit_relay-VERSION.tar.gz, with every committed file
	@rm -rf dist
	@$(sdist_venv)/bin/python -m build --sdist . >build/sdist.log 2>&1 \
		|| { cat build/sdist.log; exit 1; }
	@[ ! -e .git ] || { \
		export LC_ALL=C; \
		git -c core.quotePath=no ls-files | sort >build/committed; \
		tar -tzf dist/*.tar.gz | sed -n 's,^[^/]*/\(.*[^/]\)$$,\1,p' \
			| grep -vx PKG-INFO | sort >build/packed; \
		diff -U0 --label committed --label 'in the source archive' build/committed build/packed; \
	}
	@ls -l dist/*.tar.gz

$(sdist_venv)/made: Makefile
	'$(PYTHON)' -m venv --clear $(sdist_venv)
	$(sdist_venv)/bin/pip install -qq build
	@touch $@

check-sdist: sdist ## unpack the source archive in an empty folder and run the tests there
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 1' INT TERM && \
	tar -xzf dist/*.tar.gz --strip-components=1 --directory="$$folder" && \
	env -u PYTHONPATH $(MAKE) --no-print-directory --directory="$$folder" test

# dpkg-buildpackage needs ./debian, so the package is built in an exported copy of the commit. The
# umask and the flags of this make must not affect it. Its Python is Debian's.
deb = build/deb

deb: ## build the Debian package and its source from the last commit, in build/deb
	@rm -rf '$(deb)' && mkdir -p '$(deb)'
	@umask 022 && set -e; \
	version=$$(git show HEAD:transit_relay.py | sed -n 's/^__version__ = "\(.*\)"$$/\1/p'); \
	name=transit-relay-$$version; \
	orig=transit-relay_$$version.orig.tar.xz; \
	git -c tar.umask=0022 archive --prefix="$$name/" HEAD | xz -T1 >"$(deb)/$$orig"; \
	cd '$(deb)'; \
	tar --no-same-permissions --no-same-owner -xf "$$orig"; \
	cd "$$name"; \
	cp -r packaging/debian debian; \
	changes=$$(dpkg-parsechangelog -S Version); \
	[ "$${changes%-*}" = "$$version" ] || { \
		echo "transit_relay.py is $$version, packaging/debian/changelog $$changes" >&2; exit 1; }; \
	env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL PATH=/usr/sbin:/usr/bin:/sbin:/bin \
		dpkg-buildpackage -us -uc

clean: ## remove everything that these targets, pip and Python have created here
	rm -rf build dist .venv
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
