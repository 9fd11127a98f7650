# SPDX-License-Identifier: Apache-2.0
.PHONY: help setup setup-tests demo test test-fault test-new-qemu soak mutants bench lint clean

help:
	@echo 'make setup   install what is missing, make .venv (Debian 12 or newer, root or sudo)'
	@echo 'make demo    a real VM: full and incremental backup, a disaster, a restore'
	@echo 'make test    all tests, three at a time'
	@echo 'make test-fault'
	@echo '             the faults alone: everything is killed, cut, filled up or lied to; a table at the end'
	@echo 'make test-new-qemu'
	@echo '             all tests against a newer QEMU, unpacked into .cache (root or sudo; see docs/testing.md)'
	@echo 'make soak SECONDS=600'
	@echo '             random lives of a domain against a model of its bytes; SEED=… lives one again'
	@echo 'make mutants changes decisions one by one and tells which no test noticed (a quarter of an hour)'
	@echo 'make bench   pullback against other programs, some hours on two cores; CASE=… SIZE=… ROUNDS=…'
	@echo 'make lint    ruff and mypy'
	@echo 'make clean   remove everything that was made here'

setup:
	@scripts/setup

demo: setup
	@.venv/bin/python -m demo

# The S3 server of the tests is installed for them only: 61 MB of packages.
setup-tests:
	@scripts/setup --tests

# Three on two cores: tests wait for guests and servers more than they compute. An idle worker takes from the others.
test: setup-tests
	@.venv/bin/python -m pytest -n 3 --dist worksteal --color=no $(ARGS)

test-fault: setup-tests
	@.venv/bin/python -m pytest -n 3 --dist worksteal --color=no tests/fault $(ARGS)

# mutmut stays out of .venv: no test needs it.
mutants: setup
	@.venv/bin/python -m pip install -q --upgrade --target .cache/mutmut 'mutmut>=3.8,<4'
	@PYTHONPATH=.cache/mutmut .venv/bin/python -m mutmut run --max-children 2 $(ARGS)
	@PYTHONPATH=.cache/mutmut .venv/bin/python -m mutmut results

test-new-qemu: setup-tests
	@bin=$$(scripts/newer-qemu) && PATH="$$bin:$$PATH" \
		.venv/bin/python -m pytest -n 3 --dist worksteal --color=no $(ARGS)

soak: setup-tests
	@PULLBACK_TEST_SECONDS=$(or $(SECONDS),600) PULLBACK_TEST_SEED=$(SEED) \
		.venv/bin/python -m pytest -s -q --color=no tests/property/test_backup_model.py $(ARGS)

# What pullback is compared with is installed for this only.
bench:
	@scripts/setup --bench
	@.venv/bin/python -m bench $(if $(CASE),--case '$(CASE)') $(if $(SIZE),--size '$(SIZE)') \
		$(if $(ROUNDS),--rounds '$(ROUNDS)') $(ARGS)

lint: setup
	.venv/bin/ruff check --quiet .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy --no-color-output

clean:
	rm -rf .venv .cache mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
