# SPDX-License-Identifier: Apache-2.0
.PHONY: help setup setup-tests demo test test-fault test-new-qemu lint clean

help:
	@echo 'make setup   install what is missing, make .venv (Debian 12 or newer, root or sudo)'
	@echo 'make demo    a real VM: full and incremental backup, a disaster, a restore'
	@echo 'make test    all tests, on two cores'
	@echo 'make test-fault'
	@echo '             the faults alone: everything is killed, cut, filled up or lied to; a table at the end'
	@echo 'make test-new-qemu'
	@echo '             all tests against a newer QEMU, unpacked into .cache (root or sudo; see docs/testing.md)'
	@echo 'make lint    ruff and mypy'
	@echo 'make clean   remove everything that was made here'

setup:
	@scripts/setup

demo: setup
	@.venv/bin/python -m demo

# The S3 server of the tests is installed for them only: 61 MB of packages.
setup-tests:
	@scripts/setup --tests

# An idle worker takes tests from the other one: guests, the slow tests, boot on both cores at once.
test: setup-tests
	@.venv/bin/python -m pytest -n 2 --dist worksteal --color=no $(ARGS)

test-fault: setup-tests
	@.venv/bin/python -m pytest -n 2 --dist worksteal --color=no tests/fault $(ARGS)

test-new-qemu: setup-tests
	@bin=$$(scripts/newer-qemu) && PATH="$$bin:$$PATH" \
		.venv/bin/python -m pytest -n 2 --dist worksteal --color=no $(ARGS)

lint: setup
	.venv/bin/ruff check --quiet .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy --no-color-output

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
