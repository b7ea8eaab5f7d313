# Every rule installs what it needs and is missing (tools/setup), so a fresh checkout needs no other step.

PREFIX  = /usr/local
DESTDIR =

BIN     = $(PREFIX)/bin
SBIN    = $(PREFIX)/sbin
LIBRARY = $(PREFIX)/lib/vmd
MAN     = $(PREFIX)/share/man
EXAMPLE = $(PREFIX)/share/doc/vmd
UNITS   = $(PREFIX)/lib/systemd/system
USERS   = $(PREFIX)/lib/sysusers.d
BASH    = $(PREFIX)/share/bash-completion/completions
ZSH     = $(PREFIX)/share/zsh/site-functions
FISH    = $(PREFIX)/share/fish/vendor_completions.d
# Pacemaker looks for agents below /usr only.
OCF     = $(PREFIX)/lib/ocf/resource.d/vmd
ANSIBLE = $(PREFIX)/share/ansible/collections/ansible_collections/vmd/vmd
DEB     = build/deb
PLACES  = '$(DESTDIR)' 'library=$(LIBRARY)' 'sbin=$(SBIN)' 'bin=$(BIN)' 'man=$(MAN)' 'doc=$(EXAMPLE)' \
    'units=$(UNITS)' 'sysusers=$(USERS)' 'bash=$(BASH)' 'zsh=$(ZSH)' 'fish=$(FISH)' \
    'ocf=$(OCF)' 'ansible=$(ANSIBLE)'
# What a package is made from.
SOURCES = debian etc man docs completions fleet tools vmd vmctl Makefile README.md CHANGELOG.md LICENSE vm.conf.example

PYTHON  = .venv/bin/python
SECONDS = 30
SEQUENCES = 10000
SEED    = $(shell date +%s)
# Set where KVM interprets guest kernels: no stock kernel boots there, so the demonstration guest is ours.
SOFTWARE_KVM = $(wildcard /sys/module/kvm_pvm)

.PHONY: help run test test-deep coverage soak bench fuzz mutants install uninstall deb clean need-root

help:
	@echo 'make run         start the daemon with one VM, and end at a shell in it'
	@echo 'make test        all tests but the long ones (as root)'
	@echo 'make test-deep   all tests'
	@echo 'make coverage    which statements the tests reach: those of make test, of all with TIER=deep, or of TESTS=tests/unit'
	@echo 'make soak        endurance without limit: SEQUENCES=10000 of each kind, from SEED on'
	@echo 'make bench       compare with QEMU; prints one table (ROWS=net: a part of it)'
	@echo 'make fuzz        coverage-guided fuzzing of all parsers, SECONDS=30 for each'
	@echo 'make mutants     changes the code at random and counts what the tests notice: MODULE=vmd/vm/bus.py COUNT=10 SEED=1'
	@echo 'make install     to PREFIX=$(PREFIX), below DESTDIR'
	@echo 'make uninstall   removes what make install has installed'
	@echo 'make deb         a Debian package, into $(DEB)'
	@echo 'make clean       remove what the rules above left in this checkout'

run:
	@tools/setup packages run venv user
	@$(if $(SOFTWARE_KVM),$(MAKE) -s -C guests OUT=$(CURDIR)/build/guests)
	@$(PYTHON) -m tools.run

# Both processes of the tests and the emulated machine load the same modules, which takes a minute if each compiles them.
test test-deep: export PYTHONDONTWRITEBYTECODE =

test: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m pytest --two

test-deep: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m pytest --deep --two

coverage: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m tools.coverage --two $(if $(filter deep,$(TIER)),--deep) $(TESTS)

soak: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m pytest --soak --sequences $(SEQUENCES) --seed $(SEED)

fuzz: need-root
	@tools/setup packages test venv user fuzzer
	@$(PYTHON) -m fuzz $(SECONDS)

# Without MODULE all modules, which takes hours.
mutants: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m mutants $(MODULE) $(if $(COUNT),--count $(COUNT)) $(if $(filter command,$(firstword $(origin SEED))),--seed $(SEED))

bench: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m bench $(ROWS)

need-root:
	@test "$$(id -u)" = 0 || { echo 'make: this needs root (namespaces, /dev/kvm, network interfaces):' \
	    'sudo make $(MAKECMDGOALS)' >&2; exit 1; }

# With DESTDIR nothing outside it is touched or looked for: that is for packages.
install:
	@$(if $(DESTDIR),,tools/setup modules user)
	@"$$(tools/setup interpreter)" -I tools/install.py install $(PLACES)

uninstall:
	@"$$(tools/setup interpreter)" -I tools/install.py uninstall $(PLACES)

# The build is dpkg-buildpackage's, which writes beside its directory.  What it would check, tools/setup has installed.
deb:
	@tools/setup packages deb
	@rm -rf '$(DEB)'
	@mkdir -p '$(DEB)/vmd'
	@cp -R $(SOURCES) '$(DEB)/vmd'
	@cd '$(DEB)/vmd' && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps >../log 2>&1 || { cat ../log >&2; exit 1; }
	@rm -rf '$(DEB)/vmd'
	@ls '$(DEB)'/*.deb

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
