#!/usr/bin/env python3
"""All tests: tests/unit, tests/test_export.py and tests/test_run.py, two at a time.

    python3 tests/test.py [PART OF A NAME]...

RUN, PORTABLE and UNIT name other builds of the programs, WRAP is put in front of every start of one:
    RUN=./run-debug python3 tests/test.py
    RUN=./run-portable WRAP="valgrind -q --error-exitcode=99" python3 tests/test.py
FULL=1 runs all of ../shared/reference as well. Silent but for what failed or was skipped."""
import concurrent.futures
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
UNIT = os.environ.get("UNIT", os.path.join(HERE, "unit"))
WORKERS = 2
LONGEST = "Tokenizers", "BadCheckpoint", "BadTokenizer"  # begun first, so that no worker waits for another at the end


def each_test(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from each_test(test)
        else:
            yield test


def python_jobs(wanted):
    """Names of the tests, one list for each class."""
    classes = {}
    for module in "test_run", "test_export":
        for test in each_test(unittest.defaultTestLoader.loadTestsFromName(module)):
            if any(part in test.id() for part in wanted or [""]):
                classes.setdefault(test.id().rsplit(".", 1)[0], []).append(test.id())
    return sorted(classes.values(), key=lambda names: names[0].split(".")[1] not in LONGEST)


def run_python(names):
    """Passed, failed, and what to say about those that failed or were skipped."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromNames(names).run(result)
    bad = result.failures + result.errors
    said = ["skipped: %s: %s" % (test.id(), why) for test, why in result.skipped]
    said += ["failed: %s\n%s" % (test.id(), indented(trace)) for test, trace in bad]
    failed = len({getattr(test, "test_case", test).id() for test, _ in bad})
    skipped = len({getattr(test, "test_case", test).id() for test, _ in result.skipped})
    return result.testsRun - failed - skipped, failed, said


def indented(text):
    return re.sub("(?m)^", "    ", text.rstrip())


def run_unit(wanted):
    """The same for the tests in C."""
    passed = failed = 0
    said = []
    for part in wanted or [""]:
        done = subprocess.run(shlex.split(os.environ.get("WRAP", "")) + [UNIT, part], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, errors="replace")
        *lines, last = done.stdout.splitlines() or [""]
        counts = re.fullmatch(r"(\d+) passed, (\d+) failed", last)
        if not counts:
            return passed, failed + 1, said + ["failed: %s ends with %r" % (UNIT, last)] + lines
        passed, failed = passed + int(counts[1]), failed + int(counts[2])
        said += ["failed: unit: " + line for line in lines]
    return passed, failed, said


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would run
    sys.path.insert(0, HERE)
    sys.dont_write_bytecode = True
    wanted = sys.argv[1:]
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="llama02-test-") as place:
        os.environ["TEST_PLACE"] = place
        with concurrent.futures.ProcessPoolExecutor(WORKERS) as pool:
            jobs = [pool.submit(run_unit, wanted)] + [pool.submit(run_python, names) for names in python_jobs(wanted)]
            for job in concurrent.futures.as_completed(jobs):
                try:
                    good, bad, said = job.result()
                except Exception:
                    good, bad, said = 0, 1, ["failed: " + traceback.format_exc()]
                passed, failed = passed + good, failed + bad
                for text in said:
                    print(text)
    print("%d passed, %d failed" % (passed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
