# Two commands for newcomers, on a fresh Debian with Rust, make and gcc: `make demo` and `make test`.
# Each installs what it lacks (as root, with apt-get) and puts everything else under target/.
# For a machine that is to keep it: `make`, then `make install` as root.

CARGO  ?= cargo
TARGET := x86_64-unknown-linux-gnu
OUT    := target/$(TARGET)/debug

# Static, so that the same binaries run here and in a virtual machine with a kernel that has nft's queue statement.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS := -C target-feature=+crt-static
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := $(CURDIR)/tests/vm/runner
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUNNER := $(CURDIR)/tests/vm/runner

# Without both, for what is only to run here.
FOR_HERE := env -u CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS -u CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER

# Where `make install` puts things. DESTDIR stages them elsewhere, and then nothing of this machine is touched. Debian's own
# packages have their zsh completions in /usr/share/zsh/vendor-completions; its fish looks below /usr/local only where
# XDG_DATA_DIRS says so, and always in /etc/fish/completions.
PREFIX      ?= /usr/local
BINDIR      ?= $(PREFIX)/bin
LIBEXECDIR  ?= $(PREFIX)/libexec/knockq
UNITDIR     ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
MANDIR      ?= $(PREFIX)/share/man
BASHCOMPDIR ?= $(PREFIX)/share/bash-completion/completions
ZSHCOMPDIR  ?= $(PREFIX)/share/zsh/site-functions
FISHCOMPDIR ?= $(PREFIX)/share/fish/vendor_completions.d
BINARY      ?= target/release/knockq

.PHONY: all install uninstall manual demo test test-faults test-kernels test-newer-kernel test-musl bench fuzz fuzz-coverage coverage check clean
all:
	$(FOR_HERE) $(CARGO) build --release

# The binary with the one capability that clients need, the daemon's two accounts, the units, which it does not enable, the
# manual pages, and the completions of three shells.
install uninstall:
	@BINARY='$(BINARY)' DESTDIR='$(DESTDIR)' BINDIR='$(BINDIR)' LIBEXECDIR='$(LIBEXECDIR)' UNITDIR='$(UNITDIR)' SYSUSERSDIR='$(SYSUSERSDIR)' \
		MANDIR='$(MANDIR)' BASHCOMPDIR='$(BASHCOMPDIR)' ZSHCOMPDIR='$(ZSHCOMPDIR)' FISHCOMPDIR='$(FISHCOMPDIR)' dist/$@

# dist/man and dist/completions anew, from the command line's definitions and from docs/: after a change of either.
manual:
	@$(CARGO) build --quiet --target $(TARGET) --example manual
	@$(OUT)/examples/manual

# A knock opens a real gated port on a real kernel, shown step by step, and the door closes.
demo:
	@echo "building; the first time this takes a minute or two"
	@$(CARGO) build --quiet --target $(TARGET) --bins --example demo
	@tests/vm/runner $(OUT)/examples/demo

# Everything: unit, vectors, properties, in memory, command line, end to end on real kernels.
test:
	@tests/all

# End to end on the kernel and with the nft of each Debian suite; docs/kernels.md has what came of it. SUITES="bullseye sid" does
# two of them. It goes on over one that fails, and fails in the end.
SUITES := bullseye bookworm trixie sid
test-kernels:
	@SUITES='$(SUITES)' TARGET=$(TARGET) tests/vm/kernels

# End to end once more on the next Debian's kernel, which has tables that nobody else can flush (Linux 6.9), and with this
# one's nft, which cannot say so, as on a host with a backported kernel.
test-newer-kernel:
	KERNEL_SUITE=trixie RUST_TEST_THREADS=4 $(CARGO) test --target $(TARGET) --test end_to_end -- $(TESTS)

# End to end with the other C library, which makes other system calls, as far as either has a part in it; on the running kernel if
# that can be (tests/vm/README.md). TESTS="table:: owned::" runs those alone.
MUSL_TESTS := client:: confinement:: control:: daemon:: owned:: persona:: proxy:: reload:: store:: watch:: faults::crash faults::disk
test-musl:
	rustup target add x86_64-unknown-linux-musl
	KNOCKQ_VM=stand-in RUST_TEST_THREADS=$${RUST_TEST_THREADS:-10} $(CARGO) test --target x86_64-unknown-linux-musl --test end_to_end -- \
		$(or $(TESTS),$(MUSL_TESTS))

# What docs/faults.md says, as far as it is about faults alone. `make test` runs it too.
test-faults:
	$(CARGO) test --target $(TARGET) --lib --test damaged_store --test clock
	RUST_TEST_THREADS=4 $(CARGO) test --target $(TARGET) --test end_to_end -- faults::

# The table of docs/performance.md, from the binary that `cargo build --release` makes; needs root and a quiet machine.
# QUICK=1 does a little of each; ONLY=cpu does one, or several in quotes. The files lie under target/, on a real disk.
# VM=1 measures in the machine of the tests: ten times slower, but its kernel has netem and nft's queue statement.
bench:
	@mkdir -p target/tmp
	@$(if $(VM),KNOCKQ_VM=always,$(FOR_HERE) TMPDIR=$(CURDIR)/target/tmp) $(if $(QUICK),QUICK=1) \
		$(CARGO) bench --quiet $(if $(VM),--target $(TARGET)) --bench figures -- $(ONLY)

# Which lines the tests run.
coverage:
	@tests/coverage

# Hostile bytes for whatever reads any: each target for SECONDS, two at a time, or those that TARGETS names. docs/fuzzing.md
# says what they hold. What they find lies in target/fuzz/, and the next run goes on from there.
SECONDS := 20
fuzz:
	@fuzz/run $(SECONDS) $(TARGETS)

# Which lines the inputs reach that `make fuzz` has found; needs rustup's component llvm-tools.
fuzz-coverage:
	@fuzz/coverage

# What a reviewer's machine checks before it runs the tests.
check:
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(CARGO) metadata --quiet --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
	$(CARGO) clippy --target $(TARGET) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --quiet --target $(TARGET) --no-deps --document-private-items

clean:
	$(CARGO) clean
