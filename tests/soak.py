#!/usr/bin/env python3
"""Chat and batch mode for a long time on random text: make soak

    python3 tests/soak.py [SECONDS] [chat] [batch]

SECONDS (600) for each of the two. RUN names another build of the program than ./run-debug. Fails when the program
ends early, says anything but what it should (a sanitizer's report, say), gives an answer too many, too few or out
of order, or when its memory grows. Ends with "N passed, N failed"."""
import codecs
import collections
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = os.path.abspath(os.environ.get("RUN", os.path.join(ROOT, "run-debug")))
MODEL = os.path.join(ROOT, "model.bin")
LONGEST = 100000  # bytes in a line
AHEAD = 32  # lines without an answer yet; more than batch mode takes at once
MOST_TOKENS = 6
CONTEXT = 80
# Kilobytes above the most of the warm-up: what an allocator keeps for each of its sizes.
# A quarter of it is what the least may rise above the most of the beginning: a leak has no ups and downs.
SLACK = 2048
# Without the sanitizer's quarantine of freed memory. It would hide what the program holds, and however small, each
# size of block once fills it, and the allocator keeps that room for the size: memory grows for hours.
SANITIZERS = {"ASAN_OPTIONS": "quarantine_size_mb=0:thread_local_quarantine_size_kb=0",
              "UBSAN_OPTIONS": "print_stacktrace=1"}

WORDS = "once upon a time there was little dog who said \"hi\" to the cat, mouse; and they \\ played 42 \t".split(" ")
ODD = [b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf0\x9f\xa6\x99", b"\xf0\x9f", b"\0", b"\r", b"\x1b[2J", b"\x7f",
       "\u2581é\u4e2d\u0301".encode(), b"[INST]", b"</s>", b"<s>", b"<0x0A>"]


def random_line(dice):
    """Words, bytes, both, nothing, or far too much; never a line feed."""
    kind = dice.random()
    if kind < 0.1:
        return b""
    length = dice.randrange(LONGEST) if kind > 0.99 else dice.randrange(1, 400) if kind > 0.9 else dice.randrange(1, 60)
    if dice.random() < 0.4:
        return dice.randbytes(length).replace(b"\n", b" ")
    parts = [dice.choice(ODD) if dice.random() < 0.1 else dice.choice(WORDS).encode() + b" " for _ in range(length)]
    return b"".join(parts)[:length]


def hardest_lines():
    """What takes the most memory comes first, so that nothing after it needs more: a full context for each prompt that
    batch mode takes at once, as the pages of a cache are only there once they were written, and the longest lines."""
    full = [b"a " * (CONTEXT - 5)] * 8
    return full + 2 * [b"\xff" * LONGEST, b"\1" * LONGEST, bytes(range(11, 256)) * (LONGEST // 245),
                       b"a " * (LONGEST // 2)]


def one_by_one(error):
    return "\ufffd", error.start + 1


codecs.register_error("one by one", one_by_one)


class Soak:
    """A program with a thread for each of its pipes, so that neither side ever waits for the other in a circle."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen([RUN, MODEL, "-n", str(MOST_TOKENS), "-j", "1", "-s", "1", *arguments],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=dict(os.environ, **SANITIZERS))
        self.ending, self.sent, self.answers = threading.Event(), 0, 0
        self.bad = []     # what went wrong
        self.threads = [threading.Thread(target=self.guarded, args=(work,), daemon=True)
                        for work in (self.write, self.read_out, self.read_err)]

    def guarded(self, work):
        try:
            work()
        except BrokenPipeError:
            self.bad.append("it left while there was more to read")
        except Exception as why:
            self.bad.append("%s: %r" % (work.__name__, why))

    def write(self):
        dice = random.Random(1)
        with self.process.stdin as pipe:
            for line in hardest_lines():
                self.send(pipe, line)
            while not self.ending.is_set():
                self.send(pipe, random_line(dice))

    def send(self, pipe, line):
        while self.wanted() - self.answers >= AHEAD and not self.ending.is_set():
            time.sleep(0.001)
        if not self.ending.is_set():
            self.expect(line)
            pipe.write(line + b"\n")
            pipe.flush()

    def read_out(self):
        for line in self.process.stdout:
            self.take(line)

    def read_err(self):
        for line in self.process.stderr:
            if not re.fullmatch(self.says, line.rstrip(b"\n")):
                self.bad.append("on standard error: " + line[:300].decode(errors="replace").rstrip())
            self.hear(line)

    def hear(self, line):
        pass

    def memory(self, field):
        """VmRSS, what is resident now, or VmHWM, the most that ever was: kilobytes, 0 when it has ended."""
        try:
            with open("/proc/%d/status" % self.process.pid) as file:
                return int(re.search(field + r":\s*(\d+)", file.read())[1])
        except (OSError, TypeError):
            return 0

    def watch(self, seconds):
        """Resident memory, ten times a second, and the most that was during the warm-up."""
        begin, peak, samples = time.monotonic(), 0, []
        while time.monotonic() - begin < seconds and not self.bad:
            if self.process.poll() is not None:
                self.bad.append("it ended early")
            elif self.answers < len(hardest_lines()) + 20 or time.monotonic() - begin < seconds / 10:
                peak = self.memory("VmHWM")
            else:
                samples.append(self.memory("VmRSS"))
            time.sleep(0.1)
        return peak, samples or [peak]

    def run(self, seconds):
        """The figures; what went wrong is in `bad`."""
        for thread in self.threads:
            thread.start()
        peak, samples = self.watch(seconds)
        self.ending.set()
        try:
            status = self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = "none: it did not end with its input"
        for thread in self.threads:
            thread.join(10)
        if status != 0:
            self.bad.append("status %s" % status)
        third = len(samples) // 3 + 1
        early, late = samples[:third], samples[-third:]
        if max(samples) > peak + SLACK or min(late) > max(early) + SLACK // 4:
            self.bad.append("memory grew")
        self.finish()
        return "%d lines, %d answers in %d s; resident kB: at most %d in the warm-up, %d to %d in the first third " \
               "after it, %d to %d in the last" % (self.sent, self.answers, seconds, peak, min(early), max(early),
                                                   min(late), max(late))

    def finish(self):
        if not self.bad and self.answers != self.wanted():
            self.bad.append("%d answers, wanted %d" % (self.answers, self.wanted()))


class Chat(Soak):
    """Every line that is not empty is a turn; -v says one line for each."""
    says = rb"fed( \d+)+|the context of \d+ is full(: beginning again)?|the message has \d+ tokens"

    def __init__(self):
        self.turns = 0
        super().__init__("-m", "chat", "-x", "llama2", "-v", "-y", "Tell a story.", "-c", str(CONTEXT))

    def expect(self, line):
        self.sent += 1
        self.turns += line.rstrip(b"\r") != b""

    def take(self, line):
        pass

    def hear(self, line):
        self.answers += line.startswith(b"fed ")

    def wanted(self):
        return self.turns


class Batch(Soak):
    """Every line has one answer, in order."""
    says = rb"generated \d+ tokens in .*"

    def __init__(self):
        self.prompts = collections.deque()
        super().__init__("-b", "-", "-c", str(CONTEXT))

    def expect(self, line):
        self.sent += 1
        self.prompts.append(line)

    def take(self, line):
        said, prompt = json.loads(line), self.prompts.popleft().decode("utf-8", "one by one")
        if said["prompt"] != prompt:
            raise ValueError("answer %d is to %r, wanted %r" % (self.answers, said["prompt"][:100], prompt[:100]))
        if list(said) != ["prompt", "text", "tokens", "stop"] or not 0 <= said["tokens"] <= MOST_TOKENS \
                or said["stop"] not in ("end", "limit", "context"):
            raise ValueError("answer %d: %r" % (self.answers, line[:300]))
        self.answers += 1

    def wanted(self):
        return self.sent


def main(arguments):
    seconds = float(next((a for a in arguments if a.replace(".", "", 1).isdigit()), 600))
    kinds = [kind for kind in (Chat, Batch) if kind.__name__.lower() in arguments] or [Chat, Batch]
    failed = 0
    for kind in kinds:
        soak = kind()
        figures = soak.run(seconds)
        print("%s: %s" % (kind.__name__.lower(), figures), flush=True)
        for what in soak.bad[:20]:
            print("failed: " + what)
        failed += bool(soak.bad)
    print("%d passed, %d failed" % (len(kinds) - failed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
