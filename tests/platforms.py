#!/usr/bin/env python3
"""Same bits everywhere: builds run.c for every machine that the installed compilers and emulators allow, without
a warning, compares what it makes with tests/data/hashes.txt and runs tests/unit.c. Prints a table.

    python3 tests/platforms.py [PART OF A NAME]...    --write takes the first platform's hashes as the wanted ones

A row is a build, a column a file: logits of a checkpoint in each type, and what -m quantize writes; the last
says how the unit tests went, which one compiler a machine is enough for."""
import concurrent.futures
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(ROOT, "tests", "data")
HASHES = os.path.join(DATA, "hashes.txt")

MACHINES = [  # name, flags
    ("AVX-512", "-march=x86-64-v4 -mavx512vnni"),
    ("AVX-VNNI", "-march=x86-64-v3 -mavxvnni"),
    ("AVX2", "-march=x86-64-v3"),
    ("SSE2", "-march=x86-64"),
]
NEEDS = {  # what Linux must list of a processor that runs the build; an emulator has everything
    "AVX-512": "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx2 fma f16c bmi1 bmi2 movbe",
    "AVX-VNNI": "avx_vnni avx2 fma f16c bmi1 bmi2 movbe",
    "AVX2": "avx2 fma f16c bmi1 bmi2 movbe",
}
ARM = [("aarch64", "-march=armv8-a"), ("aarch64 dotprod", "-march=armv8.2-a+dotprod")]
# Name, compiler, machines, what starts the program, whether the unit tests are run. All but glibc's own are static, to
# run without its libraries.
COMPILERS = [
    ("gcc glibc", "gcc", [("native", "-march=native")] + MACHINES, "", True),
    ("clang glibc", "clang", MACHINES, "", False),
    ("clang 19", "clang-19", MACHINES, "", False),
    ("gcc musl", "musl-gcc -static", MACHINES, "", False),
    ("gcc glibc", "aarch64-linux-gnu-gcc -static", ARM, "qemu-aarch64", True),
    ("clang glibc", "clang --target=aarch64-linux-gnu -static", ARM, "qemu-aarch64", False),
    ("gcc glibc", "riscv64-linux-gnu-gcc -static", [("riscv64", "-march=rv64gc")], "qemu-riscv64", True),
]
CASES = [  # type, the source in tests/data
    ("f32", "stories260K/stories260K.bin"),
    ("f16", "llama2-gqa-f16"),
    ("bf16", "llama3-scaled-tied-bf16"),
    ("q8", "llama2-gqa-f16"),
    ("q4", "llama2-gqa-f16"),
]
COLUMNS = [kind + what for kind, _ in CASES for what in ([" file", ""] if kind[0] == "q" else [""])]


def must(command, **more):
    """Runs to the end without a word on standard error beginning 'run:', or says why not."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", **more)
    if done.returncode:
        raise RuntimeError("%s\n%s" % (" ".join(command), done.stdout[-2000:] or "status %d" % done.returncode))


def sources(place):
    """Every case's checkpoint and token ids."""
    made = {}
    for kind, source in CASES:
        path = os.path.join(DATA, source)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if folder == path:
            path = os.path.join(place, source + ".bin")
            if not os.path.exists(path):
                must([sys.executable, os.path.join(ROOT, "export.py"), folder, path])
        made[kind] = path, os.path.join(folder, "tokens.txt")
    return made


def build(place, programs, compiler, flags):
    os.makedirs(os.path.join(place, "tests"))
    for name in "run.c", "tests/unit.c":
        os.symlink(os.path.join(ROOT, name), os.path.join(place, name))
    must(["make", "-s", "-C", place, "-f", os.path.join(ROOT, "Makefile"), "CC=%s -Werror" % compiler,
          "NATIVE=" + flags] + programs)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def hashes(start, place, made):
    """Column by column, the hash of what this build makes."""
    start, got = start + [os.path.join(place, "run")], {}
    for kind, (model, ids) in made.items():
        if kind[0] == "q":
            out = os.path.join(place, kind + ".bin")
            must(start + [model, "-m", "quantize", "-q", kind, "-j", "2", "-o", out])
            model, got[kind + " file"] = out, digest(out)
        out = os.path.join(place, kind + ".logits")
        must(start + [model, "-m", "logits", "-f", ids, "-j", "2", "-o", out])
        got[kind] = digest(out)
    return got


def lacking(machine):
    """The instruction sets that a build for this machine needs and this processor does not have. Starting it and
    seeing it die would not do: that is also how a defect of the program ends."""
    with open("/proc/cpuinfo") as file:
        has = next((line.split() for line in file if line.startswith("flags")), [])
    return [name for name in NEEDS.get(machine, "").split() if name not in has]


def try_platform(place, machine, compiler, flags, starter, unit, made):
    """Its hashes, with "unit" where those tests passed; or why there are none, and whether that is a failure."""
    for tool in shlex.split(compiler)[0], starter:
        if tool and not shutil.which(tool):
            return None, "skipped: no " + tool, False
    try:
        build(place, ["run"] + ["tests/unit"] * unit, compiler, flags)
        start = [starter] * bool(starter)
        lacks = lacking(machine)
        if lacks:
            return None, "built, but this processor lacks " + " ".join(lacks), False
        if unit:
            must(start + [os.path.join(place, "tests", "unit")])
        return dict(hashes(start, place, made), **{"unit": "good"} if unit else {}), "", False
    except RuntimeError as why:
        missing = "--target" in compiler and "No such file" in str(why) or "file not found" in str(why)
        return None, ("skipped: no C library" if missing else "failed: %s" % why), not missing


def read_wanted():
    if not os.path.exists(HASHES):
        return {}
    with open(HASHES) as file:
        return {name: hash for hash, name in (line.rstrip("\n").split("  ") for line in file)}


def write_wanted(got):
    with open(HASHES, "w") as file:
        file.writelines("%s  %s\n" % (got[name], name) for name in COLUMNS)


def main(wanted_names):
    write = "--write" in wanted_names
    names = [name for name in wanted_names if name != "--write"]
    wanted, passed, failed = read_wanted(), 0, 0
    platforms = [("%-16s%s" % (machine, tools), machine, compiler, flags, starter, unit)
                 for tools, compiler, machines, starter, unit in COMPILERS for machine, flags in machines]
    print("%-30s%s" % ("", "".join("%-8s " % name for name in COLUMNS + ["unit"])))
    with tempfile.TemporaryDirectory(prefix="llama02-platforms-") as place, \
            concurrent.futures.ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        made = sources(place)
        jobs = [(p[0], pool.submit(try_platform, os.path.join(place, str(i)), *p[1:], made))
                for i, p in enumerate(reversed(platforms)) if all(name in p[0] for name in names)]
        for name, job in reversed(jobs):  # emulated ones, begun first, take longest
            got, why, bad = job.result()
            if got and write:
                write_wanted(got)
                wanted, write = got, False
            right = {column: got[column] == dict(wanted, unit="good").get(column) for column in got or {}}
            passed += sum(right.values())
            failed += len(right) - sum(right.values()) + bad
            cells = (right[c] and got[c][:8] or "DIFFERS" for c in right)
            print("%-30s%s" % (name, why or "".join("%-8s " % cell for cell in cells)), flush=True)
    print("%d passed, %d failed" % (passed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
