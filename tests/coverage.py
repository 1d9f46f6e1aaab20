#!/usr/bin/env python3
"""Which lines of run.c the tests run: make coverage. Prints the uncovered ones and their share, by gcc's gcov."""
import gzip
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = {"run": "run.c", "unit": "tests/unit.c"}


def build(place, name, source):
    """With what `make` passes on in RULES and NATIVE; O1, as unoptimised vector code is very slow."""
    out = os.path.join(place, name, name)
    os.mkdir(os.path.dirname(out))
    flags = os.environ["FLAGS"].split()
    subprocess.run(["gcc", *flags, "-O1", "-g", "--coverage", "-fprofile-update=prefer-atomic", "-o", out,
                    source, "-lm", "-lpthread"], cwd=ROOT, check=True)
    return out


def counts(place, name):
    """How often each line of run.c was run in one program."""
    folder = os.path.join(place, name)
    notes = [file for file in os.listdir(folder) if file.endswith(".gcda")]
    subprocess.run(["gcov", "--json-format", "--preserve-paths", *notes], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)
    found = {}
    for file in os.listdir(folder):
        if file.endswith(".gcov.json.gz"):
            with gzip.open(os.path.join(folder, file)) as content:
                for source in json.load(content)["files"]:
                    if os.path.basename(source["file"]) == "run.c":
                        for line in source["lines"]:
                            number = line["line_number"]
                            found[number] = found.get(number, 0) + line["count"]
    return found


def main():
    with open(os.path.join(ROOT, "run.c")) as file:
        text = file.read().split("\n")
    os.umask(0)  # counts are written by nobody too, as whom root has some tests run
    with tempfile.TemporaryDirectory(prefix="llama02-coverage-") as place:
        os.chmod(place, 0o777)
        programs = {name: build(place, name, source) for name, source in PROGRAMS.items()}
        tests = subprocess.run([sys.executable, "tests/test.py"], cwd=ROOT,
                               env=dict(os.environ, RUN=programs["run"], UNIT=programs["unit"]))
        total = {}
        for name in PROGRAMS:
            for line, count in counts(place, name).items():
                total[line] = total.get(line, 0) + count
    for line in sorted(line for line, count in total.items() if count == 0):
        print("run.c:%d: %s" % (line, text[line - 1].strip()))
    covered = sum(count > 0 for count in total.values())
    print("%d of %d lines of run.c covered, %.1f %%" % (covered, len(total), 100 * covered / len(total)))
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
