# Everything a newcomer, a developer and CI need. `make` alone lists the targets.
#
# One profile (release) serves build, tests and benchmarks: RocksDB takes a quarter of an hour to
# compile, and cargo would compile it once per profile. The build lives outside the tree, in the
# user's cache, so that a fresh checkout does not compile it again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

XDG_CACHE_HOME ?= $(HOME)/.cache
export XDG_CACHE_HOME
CARGO_TARGET_DIR ?= $(XDG_CACHE_HOME)/hindsight/target
export CARGO_TARGET_DIR
export CARGO_TERM_PROGRESS_WHEN ?= never

CARGO := cargo
XTASK := $(CARGO) run --quiet --release -p xtask --

# $(call section,TITLE): a line that can be found again in an hour of output.
define section
	@printf '\n==== %s ====\n' '$(1)'
endef

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

.PHONY: deps
deps: ## Install what is missing (Debian; needs root or sudo only if something is)
	@tools/xtask/deps.sh

# Cargo tells a crate of one checkout from that of another by paths inside the checkout and by the ages of
# files, so a newer build of another checkout would pass for this one's. What both share is the dependencies.
CHECKOUT := $(CARGO_TARGET_DIR)/checkout

.PHONY: own-target
own-target: deps
	@if [ "$$(cat $(CHECKOUT) 2>/dev/null)" != "$(CURDIR)" ]; then \
		members=$$($(CARGO) tree --quiet --workspace --depth 0 --prefix none | awk 'NF {print "-p " $$1}' | sort -u); \
		$(CARGO) clean --quiet --release $$members; \
		mkdir -p $(CARGO_TARGET_DIR); echo "$(CURDIR)" >$(CHECKOUT); \
	fi

.PHONY: build
build: own-target ## Build everything; cdpd and cdp-tool land in $CARGO_TARGET_DIR/release
	$(call section,build)
	$(CARGO) build --release --workspace
	$(CARGO) build --release -p vhost-blk --examples

.PHONY: demo
demo: build ## A guided tour in a virtual machine, under two minutes once built (KEEP=1 keeps its files)
	@$(XTASK) demo

.PHONY: fmt
fmt: ## Format the sources
	$(CARGO) fmt --all

.PHONY: lint
lint: own-target ## Formatting, clippy with warnings as errors, and this project's own rules
	$(call section,format)
	$(CARGO) fmt --all --check
	$(call section,clippy)
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	$(call section,tidy)
	$(XTASK) tidy

.PHONY: test
test: lint build ## What CI runs: lint, unit, property, model and crash tests, then end to end under QEMU
	$(call section,unit property model and crash tests; fuzzers for a minute each)
	NBD_FUZZ_SECONDS=60 INSTANT_FUZZ_SECONDS=60 MIGRATION_FUZZ_SECONDS=60 $(CARGO) test --release --workspace --exclude e2e
	$(call section,end-to-end tests under QEMU)
	$(CARGO) test --release -p e2e

.PHONY: test-long
test-long: build ## Tests that take longer (marked #[ignore]), many seeds, planted bugs: before a release
	$(call section,long tests)
	$(CARGO) test --release --workspace -- --ignored
	$(call section,many seeds of the model and crash tests)
	CRASH_SEEDS=60 MODEL_RUNS=4 $(CARGO) test --release -p cdp-store --test it
	$(call section,planted bugs)
	$(XTASK) mutants

# The file system that is measured, and the writes that recovery is measured after (44 GB for ten million).
BENCH_DIR ?= /var/tmp
BENCH_WRITES ?= 10000000
BENCH_REPORTS := $(CARGO_TARGET_DIR)/bench

.PHONY: bench
bench: build ## Benchmarks beside other servers: two hours, QUICK=1 ten minutes, LONG=1 most of a day; to $CARGO_TARGET_DIR/bench
	$(call section,benchmarks)
	$(XTASK) bench --dir $(BENCH_DIR) --reports $(BENCH_REPORTS) --writes $(BENCH_WRITES) $(if $(QUICK),--quick) $(if $(LONG),--long)

.PHONY: audit
audit: deps ## Licences, bans and sources of all dependencies; advisories if their database can be had
	$(call section,audit)
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	cargo deny check licenses bans sources
	@if cargo deny fetch db; then cargo deny check advisories; \
	else echo 'audit: the advisory database is out of reach: advisories were NOT checked'; fi

.PHONY: doc
doc: deps ## API documentation, broken links as errors
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --release --workspace --no-deps

.PHONY: clean
clean: ## Remove the build (the guests' kernel and root file system stay in the cache)
	$(CARGO) clean
