# make            ./run for this machine
# make portable   ./run-portable for any x86-64 of the last ten years (v3), or any 64-bit Arm
# make debug      ./run-debug with address and undefined-behaviour sanitizers
# make test       everything that tests/ promises, in under two minutes
# make fuzz       broken input for FUZZ_SECONDS=60 in all; wants clang
# make soak       chat and batch on random text for SOAK_SECONDS=600 each, with the sanitizers
# make coverage   which lines of run.c the tests do not run; wants gcc
# make clean

CC     ?= cc
# No option may reorder sums or fuse multiply-adds: the bits of the logits are a promise.
CFLAGS ?= -O3
RULES   = -std=gnu11 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wshadow
LIBS    = -lm -lpthread

MACHINE := $(shell uname -m)
ifneq (,$(filter x86_64 amd64,$(MACHINE)))
NATIVE   = -march=native
PORTABLE = -march=x86-64-v3
else ifneq (,$(filter aarch64 arm64,$(MACHINE)))
NATIVE   = -mcpu=native
PORTABLE = -march=armv8-a
endif

run: run.c
	$(CC) $(RULES) $(CFLAGS) $(NATIVE) -o $@ run.c $(LIBS)

portable: run-portable
run-portable: run.c
	$(CC) $(RULES) $(CFLAGS) $(PORTABLE) -o $@ run.c $(LIBS)

SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
debug: run-debug
run-debug: run.c
	$(CC) $(RULES) -O1 -g $(NATIVE) $(SANITIZE) -o $@ run.c $(LIBS)

tests/unit: tests/unit.c run.c
	$(CC) $(RULES) -Wno-unused-function $(CFLAGS) $(NATIVE) -o $@ tests/unit.c $(LIBS)

# The same two with sanitizers: of threads, and of the rest.
run-threads: run.c
	$(CC) $(RULES) -O1 -g $(NATIVE) -fsanitize=thread -o $@ run.c $(LIBS)
tests/unit-debug: tests/unit.c run.c
	$(CC) $(RULES) -Wno-unused-function -O1 -g $(NATIVE) $(SANITIZE) -o $@ tests/unit.c $(LIBS)

test: run run-portable tests/unit
	python3 tests/test.py

FUZZER = -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all
tests/fuzz: tests/fuzz.c run.c
	clang $(RULES) -Wno-unused-function -O1 -g $(PORTABLE) $(FUZZER) -o $@ tests/fuzz.c $(LIBS)

fuzz: run tests/fuzz
	tests/fuzz.sh

soak: run-debug
	python3 tests/soak.py $(or $(SOAK_SECONDS),600)

coverage: run-portable
	FLAGS="$(RULES) -Wno-unused-function $(NATIVE)" python3 tests/coverage.py

clean:
	rm -f run run-portable run-debug run-threads tests/unit tests/unit-debug tests/fuzz

help:
	@sed -n '/^$$/q;s/^# //p' Makefile

.PHONY: portable debug test fuzz soak coverage clean help
