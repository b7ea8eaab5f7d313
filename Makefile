# Each rule installs the missing programs that it needs (tools/setup), so a fresh checkout needs no other step.

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
# The sources of the Debian package.
SOURCES = debian etc man docs completions fleet tools vmd vmctl Makefile README.md CHANGELOG.md LICENSE vm.conf.example

PYTHON  = .venv/bin/python
SECONDS = 30
SEQUENCES = 10000
SEED    = $(shell date +%s)
# Not empty on a host whose KVM interprets guest kernels.  No stock kernel boots there, so `run` boots a guest of ours.
SOFTWARE_KVM = $(wildcard /sys/module/kvm_pvm)

.PHONY: help run test test-deep coverage soak bench fuzz mutants install uninstall deb clean need-root

help:
	@echo 'make run         start the daemon with one VM, and open a shell in it'
	@echo 'make test        run all tests except the long ones (as root)'
	@echo 'make test-deep   run all tests'
	@echo 'make coverage    show which statements tests reach: make test, all (TIER=deep) or some (TESTS=tests/unit)'
	@echo 'make soak        run any number of random sequences: SEQUENCES=10000 of each kind, from SEED=1 on'
	@echo 'make bench       compare with QEMU, and print one table (ROWS=net: a part of it)'
	@echo 'make fuzz        fuzz all parsers, guided by coverage, SECONDS=30 for each'
	@echo 'make mutants     change the code at random, and count the changes that tests notice: MODULE=vmd/vm/bus.py'
	@echo 'make install     install to PREFIX=$(PREFIX), below DESTDIR'
	@echo 'make uninstall   remove the files that make install has installed'
	@echo 'make deb         build a Debian package in $(DEB)'
	@echo 'make clean       remove the files that these rules have left in this checkout'

run:
	@tools/setup packages run venv user
	@$(if $(SOFTWARE_KVM),$(MAKE) -s -C guests OUT=$(CURDIR)/build/guests)
	@$(PYTHON) -m tools.run

# Both processes of the tests and the emulated machine load the same modules.  To compile them in each takes a minute.
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

# Without MODULE it changes all modules, which takes hours.  SAMPLE=300 tries 300 changes of all modules.
mutants: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m mutants $(MODULE) $(if $(COUNT),--count $(COUNT)) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(filter command,$(firstword $(origin SEED))),--seed $(SEED))

bench: need-root
	@tools/setup packages test venv user
	@$(PYTHON) -m bench $(ROWS)

need-root:
	@test "$$(id -u)" = 0 || { echo 'make: this needs root (namespaces, /dev/kvm, network interfaces):' \
	    'sudo make $(MAKECMDGOALS)' >&2; exit 1; }

# With DESTDIR nothing outside it is read or written.  That is for packages.
install:
	@$(if $(DESTDIR),,tools/setup modules user)
	@"$$(tools/setup interpreter)" -I tools/install.py install $(PLACES)

uninstall:
	@"$$(tools/setup interpreter)" -I tools/install.py uninstall $(PLACES)

# dpkg-buildpackage writes beside its directory, so it builds a copy.  tools/setup has installed what it would check.
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
