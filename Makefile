# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0

.PHONY: help demo test lint bench test-vm man clean

PYTHON = .venv/bin/python
PYTEST = $(PYTHON) -m pytest

help:
	@echo "make demo      attach a disk image, back it up, map the backup, kill what serves it"
	@echo "make test      run all tests (needs root for the integration tests)"
	@echo "make lint      ruff and mypy --strict"
	@echo "make bench     measure against C, losetup and python3; prints a table of ratios"
	@echo "make test-vm   run the tests on Debian's stock kernel, with udevd, in a VM"
	@echo "make clean     remove .venv and all that was built"

# Each stamp names what its targets need: the Debian packages first, then the Python environment.
.venv/ready-%: tools/setup tools/debian-packages pyproject.toml tools/loopdev
	@tools/setup $*
	@touch $@

demo: .venv/ready-demo
	@$(PYTHON) tools/demo

test: .venv/ready-test
	@LOOPDEV_TEST_LOOP=$$(tools/can-loop) $(PYTEST) tests

lint: .venv/ready-lint
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: .venv/ready-bench
	@$(PYTHON) benchmarks

test-vm: .venv/ready-test
	@tools/test-vm

clean:
	rm -rf .venv build dist
