# Shoal: `make demo` boots a guest, `make test` runs every test; each is enough by itself on a fresh machine.
# The work is done by cargo and by the scripts in scripts/; this file only names it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := build/bin
IMAGES := build/images

## help          list the targets
.PHONY: help
help:
	@echo "Shoal: microVMs on one host. Targets:"
	@sed -n 's/^## \(.*\)/  \1/p' $(MAKEFILE_LIST)

## deps          check for missing packages and tools; install them as root, else print the line to type
.PHONY: deps
deps:
	@scripts/deps.sh

## build         all programs, static, into build/bin
.PHONY: build
build: deps
	@scripts/build.sh

## images        guest kernel, root file system and probe guests, into build/images (the kernel is cached)
.PHONY: images
images: build
	@scripts/images.sh

## demo          boot a guest over HTTP on a Unix socket: its console, its boot timeline, its memory
.PHONY: demo
demo: images
	@scripts/demo.sh

## test          every test: units, /dev/kvm, Linux guests in the lab, the jail, policies, fuzz targets for a few seconds
.PHONY: test
test: images
	@scripts/test.sh

## test-jail     try to break out of the jail, one line for each attempt
.PHONY: test-jail
test-jail: build
	@scripts/test-jail.sh

## lint          rustfmt and clippy, warnings denied
.PHONY: lint
lint:
	@scripts/deps.sh --lint
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

## fuzz          the fuzz targets, SECONDS each (60)
.PHONY: fuzz
fuzz: deps
	@scripts/fuzz.sh $${SECONDS_EACH:-60}

## bench         every benchmark that this machine can run, QEMU beside, and their page: build/bench/report.html
.PHONY: bench
bench: build
	@scripts/deps.sh --bench
	@scripts/images.sh --reference
	@$(BIN)/shoal-perf all --out build/bench --label "$$(git rev-parse --short HEAD 2>/dev/null)" \
	    --history perf-tests/results

## bench-check   the deterministic figures against perf-tests/baselines; fails when one grew, and names what grew
.PHONY: bench-check
bench-check: build
	@scripts/images.sh --reference
	@$(BIN)/shoal-perf check perf-tests/baselines/*.json

## clean         remove build/ and target/ (the kernel's cache stays)
.PHONY: clean
clean:
	rm -rf build target fuzz/target
