#!/usr/bin/env python3
"""Chat and batch with random text for a long time: nothing may break, and memory may not grow.

    make debug && python3 tests/soak.py [SECONDS]     half of it each; RUN=, MODEL= for others"""
import os
import random
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = os.environ.get("RUN", os.path.join(ROOT, "run-debug"))
MODEL = os.environ.get("MODEL", os.path.join(ROOT, "model.bin"))
MODES = {"chat": ["-m", "chat", "-x", "llama2", "-c", "200", "-n", "40"], "batch": ["-b", "-", "-n", "24", "-c", "200"]}
MOST_GROWTH = 4 << 10  # KB


def lines(dice):
    """Text of every kind, without end."""
    words = "the Once upon a time, girl's 42 \u00e9\u4e2d\U0001f600 \u2581 <s> [INST] \t {}".split(" ")
    while True:
        kind, n = dice.randrange(4), int(10 ** dice.uniform(0, 2.5))
        if kind == 0:
            yield bytes(b for b in dice.randbytes(n) if b != 10)
        else:
            yield " ".join(dice.choice(words) for _ in range(n)).encode()


def resident(pid):
    """Memory that is the process's own, in KB."""
    with open("/proc/%d/status" % pid) as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1])


def soak(mode, seconds, seed=1):
    """Growth of the memory from the first third to the end, lines sent, and the exit status."""
    environment = dict(os.environ, ASAN_OPTIONS="quarantine_size_mb=8:malloc_context_size=2")
    child = subprocess.Popen([RUN, MODEL, "-s", "1", *MODES[mode]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, env=environment)
    said = []
    reader = threading.Thread(target=lambda: said.append(child.stderr.read()))
    reader.start()
    begin, early, peak, sent = time.time(), None, 0, 0
    for line in lines(random.Random(seed)):
        try:
            child.stdin.write(line + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            break
        sent, now = sent + 1, time.time() - begin
        peak = max(peak, resident(child.pid))
        early = peak if now < seconds / 3 or early is None else early
        if now > seconds:
            break
    try:
        child.stdin.close()
    except BrokenPipeError:
        pass
    status = child.wait()
    reader.join()
    return peak - early, sent, status, said[0].decode(errors="replace")


def main(seconds):
    failed = 0
    for mode in MODES:
        growth, sent, status, said = soak(mode, seconds / len(MODES))
        good = status == 0 and growth <= MOST_GROWTH
        failed += not good
        print("soak %s: %d lines in %.0f s, %d KB of growth, status %d" % (mode, sent, seconds / 2, growth, status))
        if not good:
            print(said[-2000:])
    print("%d passed, %d failed" % (len(MODES) - failed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 60))
