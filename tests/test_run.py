#!/usr/bin/env python3
"""Promises of run: reference logits and the command line. From the root: python3 tests/test.py

tests/data holds small copies of reference cases; small hostile files are made here. RUN, PORTABLE and
WRAP are described in test.py. FULL=1 takes all of ../shared/reference, every row and every line."""
import array
import atexit
import functools
import json
import math
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unicodedata
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(ROOT, "tests", "data")
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
RUN = os.path.abspath(os.environ.get("RUN", os.path.join(ROOT, "run")))
PORTABLE = os.path.abspath(os.environ.get("PORTABLE", os.path.join(ROOT, "run-portable")))
WRAP = shlex.split(os.environ.get("WRAP", ""))
FULL = bool(os.environ.get("FULL")) and os.path.isdir(os.path.join(SHARED, "reference"))
MOST_SECONDS = 600 if WRAP else 120  # for a start that hangs; nothing is timed

CASES = ["llama2-gqa-f16", "llama2-gqa-bf16", "llama2-gqa-meta-2", "llama3-scaled-tied-bf16",
         "llama3-scaled-v5config", "mistral-window-bf16", "qwen2-bias-tied-f32", "qwen3-qknorm-headdim-bf16"]
if FULL:
    CASES += ["llama2-mha-f32", "llama2-mha-meta-1"]
STORY = b"""Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, \
she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


def scratch():
    """A folder for what many tests share, gone in the end."""
    if "TEST_PLACE" not in os.environ:
        os.environ["TEST_PLACE"] = tempfile.mkdtemp(prefix="llama02-test-")
        atexit.register(shutil.rmtree, os.environ["TEST_PLACE"])
    return os.environ["TEST_PLACE"]


def reference(name):
    """A reference case: the whole one with FULL, else the small copy."""
    return os.path.join(SHARED, "reference", name) if FULL else os.path.join(DATA, name)


STORIES = os.path.join(DATA, "stories260K", "stories260K.bin")
TOK512 = os.path.join(DATA, "stories260K", "tok512.bin")
LLAMA2 = os.path.join(ROOT, "tokenizer.bin")
MODEL = os.path.join(ROOT, "model.bin")
TALE = os.path.join(DATA, "story.txt")


def read(path):
    with open(path, "rb") as file:
        return file.read()


def read_ids(path):
    return [int(word) for word in read(path).split()]


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)
    return path


# ------------------------------------------------------------------------------------------------
# Making checkpoints and tokenizers, by the tables of the README

FIELDS = dict(version=8, type=12, dim=16, hidden_dim=20, n_layers=24, n_heads=28, n_kv_heads=32, head_dim=36,
              vocab_size=40, max_seq_len=44, sliding_window=48, flags=52, norm_eps=56, rope_theta=60, rope_scaling=64,
              factor=68, low_freq_factor=72, high_freq_factor=76, original_context=80)
REAL = {"norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
TINY = dict(version=1, type=0, dim=8, hidden_dim=12, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=300,
            max_seq_len=64, norm_eps=1e-5, rope_theta=1e4)
DIMENSIONS = [name for name, at in FIELDS.items() if 16 <= at < 48]
TIED, BIASES, HEAD_NORMS = 1, 2, 4


def number(name, value):
    if name in REAL:
        return struct.pack("<f", value)
    return struct.pack("<I", value % 2**32)


def shapes(c):
    """(rows, columns) of every tensor of our format, in order."""
    heads, kv, flags = c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"], c.get("flags", 0)
    layer = [(1, c["dim"]), (heads, c["dim"]), (kv, c["dim"]), (kv, c["dim"])]
    layer += [(1, heads), (1, kv), (1, kv)] if flags & BIASES else []
    layer += [(1, c["head_dim"])] * 2 if flags & HEAD_NORMS else []
    layer += [(c["dim"], heads), (1, c["dim"]), (c["hidden_dim"], c["dim"]), (c["hidden_dim"], c["dim"]),
              (c["dim"], c["hidden_dim"])]
    ends = [(1, c["dim"])] + ([] if flags & TIED else [(c["vocab_size"], c["dim"])])
    return [(c["vocab_size"], c["dim"])] + c["n_layers"] * layer + ends


def up(n, unit):
    return -(-n // unit) * unit


def size_of(rows, columns, kind):
    groups = up(columns, 32) // 32
    if kind > 2 and rows > 1:
        return up(rows, 16) // 16 * (groups * (512 if kind == 3 else 256) + up(groups * 32, 64))
    return rows * columns * (2 if kind in (1, 2) and rows > 1 else 4)


def header(size, fields):
    out = bytearray(256)
    out[:8] = b"LLAMA02\0"
    for name, value in fields.items():
        out[FIELDS[name]:FIELDS[name] + 4] = number(name, value)
    out[248:] = struct.pack("<Q", size)
    return bytes(out)


def checkpoint(fill=None, **changes):
    """Our format in memory; `fill` gives n bytes of weights, small random f32 otherwise."""
    c = {**TINY, **changes}
    dice = random.Random(1)
    fill = fill or (lambda n: array.array("f", (dice.uniform(-1, 1) for _ in range(n // 4))).tobytes())
    body = b""
    for rows, columns in shapes(c):
        body += bytes(up(len(body), 64) - len(body))
        body += fill(size_of(rows, columns, c["type"]))
    return header(256 + len(body), c) + body


def changed(content, at, new):
    """The same bytes but for those at a place, or those of a field of the header."""
    if isinstance(at, str):
        at, new = FIELDS[at], number(at, new)
    return content[:at] + new + content[at + len(new):]


def sized(content):
    """The same file with its real size in the header."""
    return changed(content, 248, struct.pack("<Q", len(content)))


def legacy(tables=True, version=0, source=STORIES):
    """llama2.c's file, from one of version 0 with the tables, in another of its forms."""
    content = read(source)
    dim, hidden, layers, heads, kv_heads, vocab, context = c = struct.unpack("<7i", content[:28])
    kv, at, parts = dim // heads * kv_heads, 28, {}
    assert vocab > 0
    for name, size in (("embedding", vocab * dim), ("att", layers * dim), ("wq", layers * dim * dim),
                       ("wk", layers * kv * dim), ("wv", layers * kv * dim), ("wo", layers * dim * dim),
                       ("ffn", layers * dim), ("w1", layers * hidden * dim), ("w2", layers * hidden * dim),
                       ("w3", layers * hidden * dim), ("norm", dim)):
        parts[name] = content[at:at + 4 * size]
        at += 4 * size
    assert len(content) == at + 4 * context * (dim // heads)
    if version == 0:
        return content if tables else content[:at]
    order = "att ffn norm embedding wq wk wv wo w1 w2 w3".split()
    head = struct.pack("<Ii7iB", 0x616b3432, 1, *c, 1)
    return head + bytes(256 - len(head)) + b"".join(parts[name] for name in order)


BYTES = [b"<0x%02X>" % i for i in range(256)]


def legacy_tokenizer(words, scores=None, longest=27):
    """llama2.c's tokenizer: three control tokens, the bytes, and words."""
    out = struct.pack("<I", longest)
    for i, word in enumerate([b"<unk>", b"\n<s>\n", b"\n</s>\n"] + BYTES + list(words)):
        score = scores[i - 259] if scores and i >= 259 else 0.0
        out += struct.pack("<fI", score, len(word)) + word
    return out


PLAIN = [(0.0, 2, b"<unk>"), (0.0, 3, b"<s>"), (0.0, 3, b"</s>")] + [(0.0, 6, bytes([i])) for i in range(256)]


def tokenizer(tokens=None, merges=(), **changes):
    """Our format: tokens are (score, type, bytes)."""
    tokens = PLAIN + [(-1.0, 1, b" "), (-2.0, 1, b"a"), (-3.0, 1, b" a")] if tokens is None else tokens
    fields = dict(version=1, kind=0, n_tokens=len(tokens), flags=3, rule=0, chat=0, bos=1, unknown=0, n_ends=1, end=2,
                  n_merges=len(merges), classes=0, marks=0, compositions=0)
    fields.update(changes)
    body = b"".join(struct.pack("<3I", *merge) for merge in merges)
    for score, kind, text in tokens:
        body += struct.pack("<fII", score, kind, len(text)) + text + bytes(up(len(text), 4) - len(text))
    f = {name: value % 2**32 for name, value in fields.items()}
    head = b"LLAMA02T" + struct.pack("<10I", *(f[n] for n in "version kind n_tokens flags rule chat bos unknown n_ends "
                                               "end".split())) + bytes(60)
    head += struct.pack("<4I", f["n_merges"], f["classes"], f["marks"], f["compositions"]) + bytes(124)
    return head + struct.pack("<Q", 256 + len(body)) + body


# ------------------------------------------------------------------------------------------------
# Starting programs

class Done:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


def command(*arguments, program=RUN):
    return WRAP + [program] + [str(a) for a in arguments]


def start(*arguments, program=RUN, stdin=b"", **more):
    done = subprocess.run(command(*arguments, program=program), input=stdin, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=MOST_SECONDS, **more)
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


@functools.lru_cache(None)
def portable_runs():
    return os.path.exists(PORTABLE) and start("--version", program=PORTABLE).status == 0


class Case(unittest.TestCase):
    maxDiff = 1000

    def setUp(self):
        place = tempfile.TemporaryDirectory(dir=scratch())
        self.addCleanup(place.cleanup)
        self.place = place.name

    def path(self, name):
        return os.path.join(self.place, name)

    def write(self, name, content):
        return write(self.path(name), content)

    def ok(self, *arguments, **more):
        """What stands on standard output after a run without complaint."""
        done = start(*arguments, **more)
        self.assertEqual(done.status, 0, done.err)
        self.assertNotIn("run: ", done.err)
        return done.out

    def refused(self, *arguments, wanted=(), status=1, **more):
        """A start that ends with one line, which holds all of `wanted`."""
        done = start(*arguments, **more)
        self.assertEqual(done.status, status, (arguments, done.err))
        self.assertRegex(done.err, r"\Arun: [^\n]*\n\Z", arguments)
        for text in [wanted] if isinstance(wanted, str) else wanted:
            self.assertIn(text, done.err, arguments)

    def bad_model(self, content, *wanted):
        """A checkpoint that is refused by name."""
        path = self.write("bad.bin", content)
        self.refused(path, "-m", "logits", stdin=b"1", wanted=(path,) + wanted)

    def bad_tokenizer(self, content, *wanted, vocab=300, model=None):
        model = model or self.write("model.bin", checkpoint(vocab_size=vocab))
        path = self.write("bad.tok", content)
        self.refused(model, "-z", path, "-m", "tokens", "-i", "a", wanted=(path,) + wanted)

    def tiny(self, **changes):
        """A tiny model and a tokenizer that it finds."""
        content = changes.pop("tokenizer", None) or tokenizer()
        self.write("tiny.tokenizer.bin", content)
        return self.write("tiny.bin", checkpoint(**changes))

    def always(self, id, **changes):
        """The same, but with -t 0 its next token is always this one: all weights are 1, its row of the classifier 2."""
        model = self.tiny(fill=lambda n: struct.pack("<f", 1) * (n // 4), **changes)
        row = TINY["dim"] * 4
        at = os.path.getsize(model) - row * (changes["vocab_size"] - id)  # the classifier is last
        return write(model, changed(read(model), at, struct.pack("<f", 2) * TINY["dim"]))


def exported(source, name):
    """Made by export.py once for all tests."""
    out = os.path.join(scratch(), name)
    if not os.path.exists(out):
        subprocess.run([sys.executable, os.path.join(ROOT, "export.py"), source, out], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=MOST_SECONDS)
    return out


def model_of(case):
    return STORIES if case == "stories260K" else exported(reference(case), case + ".bin")


def logits_of(model, ids, *options, program=RUN):
    """Rows of the logits of ids, written to a file with -o."""
    with tempfile.TemporaryDirectory(dir=scratch()) as place:
        words, out = os.path.join(place, "ids"), os.path.join(place, "logits")
        write(words, b" ".join(b"%d" % i for i in ids))
        done = start(model, "-m", "logits", "-f", words, "-o", out, *options, program=program)
        if done.status:
            raise AssertionError("%s: %s" % (model, done.err))
        return read(out)


def floats(data):
    return array.array("f", data)


# ------------------------------------------------------------------------------------------------
# Reference logits

class Reference(Case):
    def check(self, case):
        folder = reference(case)
        ids = read_ids(os.path.join(folder, "tokens.txt"))
        got = floats(logits_of(model_of(case), ids))
        wanted = floats(read(os.path.join(folder, "logits.bin")))
        rows = os.path.join(folder, "rows.txt")
        rows = read_ids(rows) if os.path.exists(rows) else range(len(ids))
        vocab = len(got) // len(ids)
        self.assertEqual((len(got), len(wanted)), (len(ids) * vocab, len(rows) * vocab))
        for i, row in enumerate(rows):
            there = wanted[i * vocab:(i + 1) * vocab]
            off = max(abs(a - b) for a, b in zip(got[row * vocab:(row + 1) * vocab], there))
            self.assertLess(off / max(map(abs, there)), 2e-5, (case, "token", row))

    def test_logits_are_those_of_float64(self):
        for case in CASES + ["stories260K"]:
            with self.subTest(case):
                self.check(case)

    def test_the_likeliest_continuation_is_the_reference(self):
        for case in CASES:
            path = os.path.join(reference(case), "greedy.txt")
            if not os.path.exists(path):
                continue
            with self.subTest(case):
                ids = read_ids(path)
                got = floats(logits_of(model_of(case), ids))
                vocab = len(got) // len(ids)
                rows = [got[i * vocab:(i + 1) * vocab] for i in range(7, len(ids) - 1)]
                self.assertEqual([row.index(max(row)) for row in rows], ids[8:])

    def test_stories260K_tells_its_story(self):
        self.assertEqual(self.ok(STORIES, "-z", TOK512, "-t", 0, "-n", 200), STORY + b"\n")

    @unittest.skipUnless(FULL, "wants FULL=1 and ../shared/reference")
    def test_stories260K_tells_it_from_its_hugging_face_folder_too(self):
        model = exported(reference("stories260K"), "stories260K-hf.bin")
        self.assertEqual(self.ok(model, "-z", TOK512, "-t", 0, "-n", 200), STORY + b"\n")

    @unittest.skipUnless(FULL and os.path.isdir(os.path.join(SHARED, "stories")), "wants FULL=1 and ../shared/stories")
    def test_the_default_model_tells_a_story(self):
        model = exported(os.path.join(SHARED, "stories"), "stories.bin")
        story = self.ok(model, "-z", LLAMA2, "-t", 0, "-n", 40, "-i", "Once upon a time")
        self.assertTrue(story.startswith(b"Once upon a time") and len(story.split()) > 25, story)

    def test_the_same_seed_tells_the_same_story_with_any_threads(self):
        told = {self.ok(STORIES, "-z", TOK512, "-s", 42, "-n", 60, "-j", j) for j in (1, 2, 5)}
        self.assertEqual(len(told), 1)
        self.assertNotIn(self.ok(STORIES, "-z", TOK512, "-s", 43, "-n", 60), told)


class Llama2c(Case):
    def test_all_forms_of_its_file_give_the_same_logits(self):
        ids = read_ids(os.path.join(DATA, "stories260K", "tokens.txt"))[:40]
        wanted = logits_of(STORIES, ids)
        for name, content in (("tables", legacy()), ("bare", legacy(tables=False)), ("v1", legacy(version=1))):
            self.assertEqual(logits_of(self.write(name, content), ids), wanted, name)

    def test_a_classifier_of_its_own_is_read_from_the_end(self):
        ids = [1, 5, 9]
        for version in 0, 1:
            content = legacy(version=version, tables=False)
            embedding = read(STORIES)[28:28 + 512 * 64 * 4]
            if version == 0:
                content = changed(content, 20, struct.pack("<i", -512)) + embedding
            else:
                content = changed(content, 36, b"\0") + embedding
            own = logits_of(self.write("own", content), ids)
            self.assertEqual(own, logits_of(STORIES, ids))
            self.bad_model(content[:-1], "bytes")
            self.bad_model(content + b"\0", "bytes")


class SameBits(Case):
    """Threads, batches and instruction sets do not change a bit of any logit."""

    def model(self, kind):
        source = model_of("llama2-gqa-f16" if kind in ("f16", "q8", "q4") else
                          "llama2-gqa-bf16" if kind == "bf16" else "stories260K")
        return self.quantized(source, kind) if kind[0] == "q" else source

    def quantized(self, source, kind, program=RUN, *options):
        out = self.path("%s.bin" % kind)
        self.ok(source, "-m", "quantize", "-q", kind, "-o", out, *options, program=program)
        return out

    def ids(self, model):
        vocab, context = struct.unpack("<II", read(model)[40:48]) if model != STORIES else (512, 512)
        dice = random.Random(2)
        return [dice.randrange(vocab) for _ in range(min(300, context))]  # past a block of attention if it can

    def check(self, kind):
        model = self.model(kind)
        ids = self.ids(model)
        wanted = logits_of(model, ids, "-j", 1)
        for options in (("-j", 2), ("-j", 5), ("-w", 1), ("-w", 7, "-j", 5), ("-w", 33), ()):
            self.assertTrue(logits_of(model, ids, *options) == wanted, (kind, options))
        return model, ids, wanted

    def check_portable(self, kind):
        if not portable_runs():
            self.skipTest("%s does not run on this machine" % PORTABLE)
        model = self.model(kind)
        ids = self.ids(model)
        for options in ((), ("-w", 1), ("-j", 3, "-w", 7)):
            self.assertTrue(logits_of(model, ids, *options, program=PORTABLE) == logits_of(model, ids), (kind, options))

    def test_f32(self): self.check("f32")
    def test_bf16(self): self.check("bf16")
    def test_f16(self): self.check("f16")
    def test_q8(self): self.check("q8")
    def test_q4(self): self.check("q4")
    def test_f32_portable(self): self.check_portable("f32")
    def test_bf16_portable(self): self.check_portable("bf16")
    def test_f16_portable(self): self.check_portable("f16")
    def test_q8_portable(self): self.check_portable("q8")
    def test_q4_portable(self): self.check_portable("q4")

    def test_quantizing_writes_the_same_file_with_any_threads(self):
        for kind in "q8", "q4":
            one = read(self.quantized(STORIES, kind, RUN, "-j", 1))
            self.assertEqual(read(self.quantized(STORIES, kind, RUN, "-j", 5)), one)
            if portable_runs():
                self.assertEqual(read(self.quantized(STORIES, kind, PORTABLE)), one)


class Quantize(Case):
    def quantize(self, source, kind, *options):
        out = self.path(kind + ".bin")
        done = start(source, "-m", "quantize", "-q", kind, "-o", out, *options)
        self.assertEqual(done.status, 0, done.err)
        return out, done.err

    def test_every_type_becomes_every_quantized_type_of_the_size_its_shapes_want(self):
        for source in "stories260K", "llama2-gqa-bf16", "qwen2-bias-tied-f32", "qwen3-qknorm-headdim-bf16":
            for kind, number in (("q8", 3), ("q4", 4)):
                out = read(self.quantize(model_of(source), kind)[0])
                c = {name: struct.unpack("<I", out[at:at + 4])[0] for name, at in FIELDS.items()}
                size = 256
                for rows, columns in shapes(c):
                    size = up(size, 64) + size_of(rows, columns, number)
                self.assertEqual((c["type"], len(out), struct.unpack("<Q", out[248:256])[0]), (number, size, size))

    def test_the_error_is_small_and_said_with_v(self):
        for kind, most in (("q8", 0.008), ("q4", 0.1)):
            said = self.quantize(STORIES, kind, "-v")[1]
            errors = [float(line.split()[-1]) for line in said.splitlines() if "error" in line]
            self.assertEqual(len(errors), 8, said)
            self.assertTrue(all(0 < e < most for e in errors), said)

    def test_a_quantized_model_still_tells_the_beginning_of_the_story(self):
        out, _ = self.quantize(STORIES, "q8")
        self.assertTrue(self.ok(out, "-z", TOK512, "-t", 0, "-n", 20).startswith(b"Once upon a time, there was"))

    def test_q8_becomes_q4_and_q4_nothing(self):
        q8, _ = self.quantize(STORIES, "q8")
        q4, _ = self.quantize(q8, "q4")
        self.refused(q4, "-m", "quantize", "-q", "q8", "-o", self.path("no"), wanted=(q4, "q4"))
        self.assertEqual(sorted(os.listdir(self.place)), ["q4.bin", "q8.bin"])

    def test_what_is_missing_is_said(self):
        for options in (("-q", "q8"), ("-o", self.path("x"))):
            self.refused(STORIES, "-m", "quantize", *options, wanted=("-q", "-o"))
        self.refused(STORIES, "-m", "quantize", "-q", "q5", "-o", self.path("x"), wanted=("q5",))
        self.assertEqual(os.listdir(self.place), [])

    def test_weights_that_are_no_numbers_are_refused_and_nothing_is_left(self):
        for bad in (b"\0\0\xc0\x7f", b"\0\0\x80\x7f"):
            model = self.write("bad.bin", checkpoint(fill=lambda n: bad * (n // 4)))
            self.refused(model, "-m", "quantize", "-q", "q8", "-o", self.path("x"), wanted=(model, "embedding"))
            self.assertEqual(os.listdir(self.place), ["bad.bin"])


# ------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizers(Case):
    def lines(self, name):
        path = os.path.join(reference("tokenizers"), name)
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        return lines[::12] if WRAP else lines

    def big_model(self):
        """A model with room for any of these vocabularies."""
        small = dict(dim=2, head_dim=2, flags=TIED, fill=bytes)
        return self.write("big.bin", checkpoint(vocab_size=32000, max_seq_len=2048, **small))

    def check(self, tokenizer, name, text_changes=False):
        model = self.big_model()
        for line in self.lines(name):
            text = line["text"].encode()
            ids = [int(word) for word in self.ok(model, "-z", tokenizer, "-m", "tokens", "-i", "-", stdin=text).split()]
            self.assertEqual(ids, line["ids"], line["text"])
            if text and "\u2581" not in line["text"] and not text_changes:
                back = self.ok(model, "-z", tokenizer, "-n", 0, "-t", 0, "-i", "-", stdin=text)
                self.assertEqual(back, text + b"\n")

    def exported(self, name):
        return exported(os.path.join(reference("tokenizers"), name), name.replace("/", "-") + ".tokenizer.bin")

    def test_llama_2(self):
        self.check(LLAMA2, "llama2-32k.jsonl")

    def test_a_sentencepiece_model(self):
        self.check(self.exported("spm-2k.model"), "spm-2k.jsonl")

    def test_the_same_as_json_with_merges(self):
        self.check(self.exported("llama2-json-2k/tokenizer.json"), "spm-2k.jsonl")

    def test_llama_3(self):
        self.check(self.exported("llama3-2k/tokenizer.json"), "llama3-2k/ids.jsonl")

    def test_qwen2(self):
        self.check(self.exported("qwen2-2k/tokenizer.json"), "qwen2-2k/ids.jsonl", text_changes=True)

    def test_smollm(self):
        self.check(self.exported("smollm-2k/tokenizer.json"), "smollm-2k/ids.jsonl")

    def test_any_bytes_go_round_unchanged(self):
        dice = random.Random(3)
        texts = [bytes(range(256)), bytes(255 - i for i in range(256)), b"\0", b"\0\0a\0", b"\xff" * 5, b"\xf0\x9f\xa6",
                 "a\U0001f999\ud7ff\ue000\U0010ffff".encode(), b"\xed\xa0\x80", b"\xc0\xaf", b" ", b"\n", b"  a  "]
        texts += [bytes(dice.randrange(256) for _ in range(60)) for _ in range(5)]
        model = self.big_model()
        for tokenizer in LLAMA2, self.exported("llama3-2k/tokenizer.json"):
            for text in texts:
                path = self.write("text", text)
                self.assertEqual(self.ok(model, "-z", tokenizer, "-n", 0, "-t", 0, "-f", path), text + b"\n")

    def encoded(self, text, tokenizer=LLAMA2):
        return self.ok(self.big_model(), "-z", tokenizer, "-m", "tokens", "-i", "-", stdin=text)

    def test_text_is_brought_to_nfc_where_the_tokenizer_says_so(self):
        dice = random.Random(7)
        letters = "aAoUe\u1100\u1161\u11a8\uac00\u0915\u4e2d\u212b\u2126"
        letters += "\u0300\u0301\u0308\u0315\u0323\u0327\u093c" * 3
        texts = ["".join(dice.choice(letters) for _ in range(40)) for _ in range(4 if WRAP else 40)]
        qwen = self.exported("qwen2-2k/tokenizer.json")
        for text in texts + ["e\u0315\u0300\u0323x", "\u1100\u1161\u11a8", "\u0344", "\u0958"]:
            nfc = unicodedata.normalize("NFC", text)
            self.assertEqual(self.encoded(text.encode(), qwen), self.encoded(nfc.encode(), qwen), ascii(text))
            back = self.ok(self.big_model(), "-z", qwen, "-n", 0, "-t", 0, "-i", "-", stdin=text.encode())
            self.assertEqual(back, nfc.encode() + b"\n", ascii(text))

    def test_user_defined_tokens_are_found_first_and_the_longest_of_them(self):
        words = PLAIN + [(0.0, 4, b"<a>"), (0.0, 4, b"<a><b>"), (-1.0, 1, b" "), (-1.0, 1, b"x"), (9.0, 1, b"x<")]
        model = self.tiny(tokenizer=tokenizer(words))
        for text, ids in (("x<a>x", [261, 262, 259, 262]), ("x<a><b>", [261, 262, 260]), ("<b>", [261, 63, 101, 65]),
                          ("<a><a><b><a", [261, 259, 260, 63, 100])):
            self.assertEqual([int(i) for i in self.ok(model, "-m", "tokens", "-i", text).split()], ids, text)

    def test_a_megabyte_is_encoded(self):
        text = (b"The quick brown fox, who is 42, jumps over the lazy dog's back. " * 17000)[:1 << 20]
        self.assertGreater(len(self.encoded(text).split()), 200000)

    def test_a_megabyte_of_one_letter_is_encoded(self):
        for letter in b"a", b" ", "é".encode():
            self.encoded(letter * (1 << 20))


# ------------------------------------------------------------------------------------------------
# The command line

LETTERS = "ifomzntpklrscjyxbqdw"  # of options with a value


class CommandLine(Case):
    def test_the_prompt_is_the_same_from_each_place(self):
        model = [STORIES, "-z", TOK512, "-t", 0, "-n", 10]
        wanted = self.ok(*model, "-i", "Lily and Tom")
        self.assertTrue(wanted.startswith(b"Lily and Tom"))
        self.assertEqual(self.ok(*model, "-i", "-", stdin=b"Lily and Tom"), wanted)
        self.assertEqual(self.ok(*model, "-f", self.write("p", b"Lily and Tom")), wanted)
        self.assertEqual(self.ok(*model, "-f", "-", stdin=b"Lily and Tom"), wanted)

    def test_o_holds_what_would_stand_on_standard_output(self):
        model = [STORIES, "-z", TOK512, "-t", 0, "-n", 10]
        self.assertEqual(self.ok(*model, "-o", self.path("out")), b"")
        self.assertEqual(read(self.path("out")), self.ok(*model))
        self.assertEqual(self.ok(*model, "-o", "-"), self.ok(*model))
        self.assertEqual(os.listdir(self.place), ["out"])

    def test_n_counts_generated_tokens(self):
        for n in 0, 1, 7:
            done = start(STORIES, "-z", TOK512, "-t", 0, "-n", n, "-i", "Once upon")
            self.assertRegex(done.err, r"(?m)^generated %d tokens" % n)

    def test_speed_stands_on_standard_error_prompt_and_generation_apart(self):
        done = start(STORIES, "-z", TOK512, "-t", 0, "-n", 3)
        self.assertRegex(done.err, r"prompt 1 tokens in .* tokens/s\ngenerated 3 tokens in .* tokens/s\n\Z")

    def test_the_seed_is_said_when_none_was_given(self):
        done = start(STORIES, "-z", TOK512, "-n", 20)
        seed = done.err.splitlines()[0]
        self.assertRegex(seed, r"\Aseed \d+\Z")
        self.assertEqual(self.ok(STORIES, "-z", TOK512, "-n", 20, "-s", seed.split()[1]), done.out)
        self.assertNotIn("seed", start(STORIES, "-z", TOK512, "-n", 1, "-s", 0).err)

    def test_the_context_is_the_bound_and_its_end_is_said(self):
        done = start(STORIES, "-z", TOK512, "-t", 0, "-n", 1000, "-c", 20)
        self.assertEqual(done.status, 0)
        self.assertIn("context of 20", done.err)
        self.assertEqual(done.out[:-1], STORY[:len(done.out) - 1])

    def test_a_prompt_longer_than_the_context_is_refused(self):
        model = [STORIES, "-z", TOK512, "-t", 0, "-i"]
        self.refused(*model, "Once upon a time there was", "-c", 4, wanted=("prompt", "4"))
        self.refused(*model, "-", stdin=b"a b " * 300000, wanted=("prompt", "512"))
        ids = self.write("ids", b"1 " * 513)
        self.refused(STORIES, "-m", "logits", "-f", ids, wanted=("513", "512"))
        self.refused(STORIES, "-m", "logits", "-f", ids, "-c", 513, wanted=("-c", "513", "512"))

    def test_a_prompt_that_just_fits_is_answered(self):
        self.assertEqual(self.ok(STORIES, "-z", TOK512, "-t", 0, "-n", 1, "-c", 1), STORY[:4] + b"\n")

    def test_logits_are_the_same_on_standard_output_and_in_a_file(self):
        self.assertEqual(self.ok(STORIES, "-m", "logits", stdin=b"1 5\n\t9 "), logits_of(STORIES, [1, 5, 9]))

    def test_ids_that_are_none_are_refused_with_their_place(self):
        for ids, wanted in ((b"1 2 x", "byte 4"), (b"512", "0 to 511"), (b"-1", "0 to 511"), (b"1.5", "1.5"),
                            (b"9" * 40, "0 to 511"), (b"", "no token"), (b" \n", "no token"), (b"1,2", "1,2"),
                            (b"0x1", "0x1"), (b"1\0 2", "token")):
            path = self.write("ids", ids)
            self.refused(STORIES, "-m", "logits", "-f", path, wanted=(path, wanted))

    def test_text_of_a_file_in_a_message_cannot_move_the_cursor(self):
        done = start(STORIES, "-m", "logits", "-f", self.write("ids", b"\x1b[2J\x07"))
        self.assertEqual(done.status, 1)
        self.assertRegex(done.err, r"\A[^\x00-\x09\x0b-\x1f\x7f]*\Z")

    def test_info_says_what_the_file_holds(self):
        said = self.ok(STORIES, "-z", TOK512, "-m", "info")
        for text in (b"llama2.c, version 0", b"f32", b"dim", b"64", b"512", b"MB", b"tok512.bin"):
            self.assertIn(text, said)

    def test_info_counts_the_memory_of_the_context_that_is_asked_for(self):
        def state(*options):
            said = self.ok(STORIES, "-z", TOK512, "-m", "info", *options).decode()
            return float(said.split("\nstate ")[1].split()[0])
        self.assertLess(state("-c", 8), state())
        self.assertEqual(state("-c", 100000), state())

    def test_info_of_a_model_without_a_tokenizer_still_says_it(self):
        model = self.write("m.bin", checkpoint(vocab_size=77))
        done = start(model, "-m", "info", cwd=self.place)
        self.assertIn(b"vocab_size", done.out)
        self.assertIn(b"77", done.out)

    def test_help_is_complete_and_one_screen(self):
        page = self.ok("-h").decode()
        self.assertEqual(self.ok("--help").decode(), page)
        self.assertLess(page.count("\n"), 55)
        for mode in "generate chat batch perplexity score logits tokens info quantize bench".split():
            self.assertRegex(page, r"(?m)^  %s  *\w" % mode)
        for letter in LETTERS + "vh":
            self.assertRegex(page, r"(?m)^  -%s .*\w" % letter)
        self.assertRegex(self.ok("--version"), rb"LLaMA-02 \d")

    def test_bench_prints_name_value_unit(self):
        model = self.write("m.bin", checkpoint(dim=64, vocab_size=600))
        for line in self.ok(model, "-m", "bench", "-c", 16, "-d", 8).decode().splitlines():
            self.assertRegex(line, r"\A[\w-]+ [\d.]+ [\w/%]+\Z")

    def test_bench_measures_deeper_than_its_prompt(self):
        model = self.write("m.bin", checkpoint(dim=64, vocab_size=600, max_seq_len=700))
        said = self.ok(model, "-m", "bench", "-d", 600).decode()
        self.assertRegex(said, r"(?m)^depth 600 tokens\ndecode-deep [\d.]+ tokens/s\ndecode-deep-share [\d.]+ %$")

    def test_bench_of_a_model_too_small_to_measure_with_is_refused(self):
        model = self.write("m.bin", checkpoint())
        self.refused(model, "-m", "bench", wanted=(model, "too small"))

    def test_the_tokenizer_is_found_beside_the_model_by_name_then_by_place_then_here(self):
        model = self.write("m.bin", checkpoint())
        os.mkdir(self.path("here"))
        self.refused(model, "-t", 0, cwd=self.path("here"), wanted=("no tokenizer", model, "-z"))
        for id, name in enumerate(("here/tokenizer.bin", "tokenizer.bin", "m.tokenizer.bin"), 259):
            words = [(0.0, 1, b" x" if i == id else b"word %d" % i) for i in range(259, 300)]
            self.write(name, tokenizer(PLAIN + words))
            ids = self.ok(model, "-m", "tokens", "-i", "x", cwd=self.path("here"))
            self.assertEqual(ids, b"%d\n" % id, name)

    def test_a_tokenizer_that_only_lies_here_must_have_the_models_size(self):
        os.mkdir(self.path("here"))
        self.write("here/tokenizer.bin", tokenizer())
        model = self.write("m.bin", checkpoint())
        self.refused(model, "-t", 0, cwd=self.path("here"), wanted=("tokenizer.bin", "262", "300", "-z"))


class Machine(Case):
    """What the system grants, and what it refuses."""

    def threads(self, script=""):
        """Threads that info says, after a script in a place where /sys/fs/cgroup is a folder of our own."""
        start = ["unshare", "-m", "sh", "-ec", script + 'exec "$@"', "-"] if script else []
        done = subprocess.run(start + command(MODEL, "-m", "info"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=MOST_SECONDS)
        self.assertEqual(done.returncode, 0, done.stderr)
        return int(re.search(rb"(?m)^threads (\d+)$", done.stdout)[1])

    def test_no_more_threads_than_the_control_group_pays_for(self):
        mount = "mount -t tmpfs none /sys/fs/cgroup; cd /sys/fs/cgroup; "
        if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-ec", mount],
                                                         stderr=subprocess.DEVNULL).returncode:
            self.skipTest("no control groups can be made up here")
        cores = self.threads(mount + "true; ")
        for quota, wanted in (("100000 100000", 1), ("50000 100000", 1), ("110000 100000", min(2, cores)),
                              ("max 100000", cores), ("what is this", cores), ("", cores), ("100000 0", cores)):
            self.assertEqual(self.threads(mount + "echo '%s' > cpu.max; " % quota), wanted, quota)
        for quota, wanted in ((100000, 1), (-1, cores)):  # version 1
            script = "mkdir cpu; echo %d > cpu/cpu.cfs_quota_us; echo 100000 > cpu/cpu.cfs_period_us; " % quota
            self.assertEqual(self.threads(mount + script), wanted, quota)

    def test_threads_that_cannot_be_started_are_said(self):
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        if hard != resource.RLIM_INFINITY or WRAP:
            self.skipTest("the size of stacks is limited here")
        self.refused(STORIES, "-z", TOK512, "-t", 0, "-j", 300, wanted=("thread", "300", "-j"), preexec_fn=lambda:
                     resource.setrlimit(resource.RLIMIT_STACK, (1 << 44, hard)))  # each stack of this size


class Measuring(Case):
    """perplexity and score against the logits."""
    text = b"Once upon a time, there was a little girl who liked to sing."

    def wanted(self, context=512):
        """Natural logarithms of the probabilities of the text's tokens, in windows that begin with BOS."""
        ids = [int(i) for i in self.ok(STORIES, "-z", TOK512, "-m", "tokens", "-i", self.text.decode()).split()]
        out = []
        for at in range(0, len(ids), context - 1):
            window = [1] + ids[at:at + context - 1]
            got = floats(logits_of(STORIES, window))
            for i, id in enumerate(window[1:]):
                row = got[i * 512:(i + 1) * 512]
                out.append(row[id] - max(row) - math.log(sum(math.exp(x - max(row)) for x in row)))
        return out

    def perplexity(self, *options):
        said = self.ok(STORIES, "-z", TOK512, "-m", "perplexity", "-i", "-", *options, stdin=self.text).split()
        return float(said[1]), float(said[said.index(b"perplexity") + 1]), int(said[-1])

    def test_perplexity_is_that_of_the_logits_in_windows_of_the_context(self):
        for context in 512, 8, 2:
            wanted = self.wanted(context)
            nats, perplexity, tokens = self.perplexity("-c", context)
            self.assertEqual(tokens, len(wanted))
            self.assertAlmostEqual(nats, -sum(wanted) / tokens, 4)
            self.assertAlmostEqual(perplexity / math.exp(nats), 1, 3)

    def test_a_context_with_no_room_for_a_token_is_refused(self):
        for mode in "perplexity", "score":
            self.refused(STORIES, "-z", TOK512, "-m", mode, "-i", "-", "-c", 1, stdin=self.text)

    def test_a_text_too_short_to_score_is_refused(self):
        for text in b"", b"a":
            self.refused(STORIES, "-z", TOK512, "-m", "perplexity", "-i", "-", stdin=text, wanted="too few")

    def test_score_has_a_line_for_each_token(self):
        lines = self.ok(STORIES, "-z", TOK512, "-m", "score", "-i", "-", stdin=self.text).splitlines()
        wanted = self.wanted()
        self.assertEqual(len(lines), len(wanted))
        for line, score in zip(lines, wanted):
            id, text, said, rank, *others = line.split(b"\t")
            self.assertAlmostEqual(float(said), score, 3)
            self.assertEqual((len(others), int(rank) == 1), (6, text == others[0]))


class Foreseen(Case):
    """Mean negative log-likelihoods of tests/data/story.txt, which fills several windows, against values from a
    float64 implementation in numpy that shares no code with run.c: the same ids, windows of the context that each
    begin with BOS, everything else (RMSNorm, rotation, softmax, products, sums) in double. Perplexity is exp of them.

    STORIES260K and UNQUANTIZED use the f32 and f16 weights as they were trained, DEQUANTIZED the products of the
    integers and scales that stand in model.bin. ROUNDED also rounds what run rounds in a q8 model: keys and values to
    f16, and activations, 32 at a time, to whole numbers, none larger than 127, of the least scale of four bits that
    allows it. That is done with the scale's inverse in float32: one number on the other side of a half changes all."""
    STORIES260K, UNQUANTIZED, DEQUANTIZED = 2.478582251, 3.000011790, 3.000536123
    ROUNDED = 0.091570676  # of "Once upon a time"

    def nats(self, model, *options):
        said = self.ok(model, "-m", "perplexity", *options).split()
        self.assertEqual(said[0], b"nats")
        self.assertLess(abs(float(said[said.index(b"perplexity") + 1]) - math.exp(float(said[1]))), 1e-4)
        return float(said[1]), int(said[-1])

    def test_float_weights_foresee_a_text_as_float64_does(self):
        nats, tokens = self.nats(STORIES, "-z", TOK512, "-f", TALE)
        self.assertEqual(tokens, 1567)  # windows of 511, 511, 511 and 34
        self.assertLess(abs(nats / self.STORIES260K - 1), 1e-6)  # the last digit printed is 0.4e-6 of it

    @unittest.skipUnless(FULL and os.path.isdir(os.path.join(SHARED, "stories")), "wants FULL=1 and ../shared/stories")
    def test_f16_weights_of_the_shipped_model_do_too(self):
        model = exported(os.path.join(SHARED, "stories"), "stories.bin")
        nats, tokens = self.nats(model, "-z", LLAMA2, "-f", TALE)
        self.assertEqual(tokens, 835)
        self.assertLess(abs(nats / self.UNQUANTIZED - 1), 1e-5)  # promised for logits: 2e-5 of the largest

    def test_q8_foresees_a_text_as_the_weights_it_was_made_from(self):
        """Rounded activations move the score of one token by 0.020 nats (standard deviation, measured against
        DEQUANTIZED), rounded weights and activations by 0.026, in both directions: the mean of 835 by 0.0007 and
        0.0009. Three times that is 0.07 % and 0.09 % of 3 nats."""
        nats, tokens = self.nats(MODEL, "-f", TALE)
        self.assertEqual(tokens, 835)  # windows of 511 and 324
        self.assertLess(abs(nats / self.DEQUANTIZED - 1), 0.0007)
        self.assertLess(abs(nats / self.UNQUANTIZED - 1), 0.0009)

    def test_q8_rounds_nothing_else_than_activations_keys_and_values(self):
        """A few tokens only: with more, a number that falls on the other side of a half changes all after it."""
        self.assertLess(abs(self.nats(MODEL, "-i", "Once upon a time")[0] - self.ROUNDED), 2e-6)


class Batch(Case):
    def complete(self, lines, *options):
        """What batch mode says to lines, as objects."""
        said = self.ok(STORIES, "-z", TOK512, "-m", "batch", "-b", "-", *options, stdin=b"".join(lines))
        return [json.loads(line) for line in said.splitlines()]

    def test_each_line_has_the_answer_that_it_has_alone_in_order(self):
        prompts = ["Once upon", "Lily", "", "The dog said \"hi\"", "a \\ b", "One day, a very big cat sat on a", "é",
                   "Tom", "x"]
        for options in (("-t", 0), ("-s", 7), ("-t", 0, "-w", 1), ("-s", 7, "-w", 3, "-j", 2)):
            done = self.complete([p.encode() + b"\n" for p in prompts], "-n", 12, *options)
            self.assertEqual([d["prompt"] for d in done], prompts)
            for d in done:
                alone = self.ok(STORIES, "-z", TOK512, "-n", 12, "-i", d["prompt"], *options[:2]).decode()
                self.assertEqual(d["prompt"] + d["text"] + "\n", alone)
                self.assertEqual((d["tokens"], d["stop"]), (12, "limit"))

    def test_an_answer_is_seen_before_the_next_line_is_asked_for(self):
        process = subprocess.Popen(command(STORIES, "-z", TOK512, "-b", "-", "-w", 1, "-n", 3, "-t", 0),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            for line in b"Once\n", b"Lily\n":
                process.stdin.write(line)
                process.stdin.flush()
                self.assertTrue(select.select([process.stdout], [], [], MOST_SECONDS)[0], "no answer")
                self.assertEqual(json.loads(process.stdout.readline())["prompt"], line.decode().strip())
        finally:
            process.kill()
            process.communicate()

    def test_why_it_stopped_is_said(self):
        done = self.complete([b"a\n", b"b c d e f g h i j k\n"], "-n", 3, "-t", 0, "-c", 6)
        self.assertEqual([d["stop"] for d in done], ["limit", "context"])

    def test_a_context_that_fills_up_on_the_way_ends_that_line_alone(self):
        done = self.complete([b"a b c\n", b"\n"], "-n", 6, "-t", 0, "-c", 6)
        self.assertEqual([d["stop"] for d in done], ["context", "limit"])
        self.assertTrue(0 < done[0]["tokens"] < 6, done)

    def test_a_token_that_ends_a_text_ends_its_line(self):
        model = self.always(2, vocab_size=262)  # </s>
        said = self.ok(model, "-b", "-", "-n", 5, "-t", 0, stdin=b"a\nb\n")
        self.assertEqual([json.loads(line)["stop"] for line in said.splitlines()], ["end", "end"])

    def test_no_tokens_wanted_are_no_tokens(self):
        done = self.complete([b"a\n", b"\n", b"b"], "-n", 0)
        self.assertEqual([(d["prompt"], d["text"], d["tokens"], d["stop"]) for d in done],
                         [(prompt, "", 0, "limit") for prompt in ("a", "", "b")])

    def test_what_is_no_text_is_json_all_the_same(self):
        done = self.complete([b"a\tb\x01\x7f\n", b"\xff\xf0\x9f\n", b"\0\n", b"\r\n", b"no end"], "-n", 2, "-t", 0)
        self.assertEqual([d["prompt"] for d in done][:3], ["a\tb\x01\x7f", "\ufffd\ufffd\ufffd", "\0"])
        self.assertEqual(len(done), 5)

    def test_a_prompt_longer_than_the_context_stops_at_once_and_the_others_go_on(self):
        done = self.complete([b"a " * 1000 + b"\n", b"b\n"], "-n", 2, "-t", 0)
        self.assertEqual([(d["tokens"], d["stop"]) for d in done], [(0, "context"), (2, "limit")])

    def test_no_lines_have_no_answers(self):
        self.assertEqual(self.complete([]), [])

    def test_a_file_that_is_not_there_is_one_line(self):
        none = self.path("none")
        self.refused(STORIES, "-z", TOK512, "-t", 0, "-b", none, wanted=(none, "No such file"))


class Chat(Case):
    def model(self, format):
        names = [b"<|im_start|>", b"<|im_end|>", b"[INST]", b"[/INST]"] + [
            b"<|%s|>" % n for n in (b"begin_of_text", b"eot_id", b"start_header_id", b"end_header_id")]
        words = tokenizer(PLAIN + [(0.0, 3, name) for name in names], chat=format)
        return self.tiny(tokenizer=words, vocab_size=267, max_seq_len=400)

    def test_a_pipe_gets_one_answer_for_each_line_and_the_end_of_input_ends_it(self):
        for format in range(1, 6):
            for n in 0, 5:
                said = self.ok(self.model(format), "-m", "chat", "-s", 1, "-n", n, "-y", "Be.", "-p", 1,
                               stdin=b"Hello\n\nWho?\nlast")
                self.assertGreaterEqual(said.count(b"\n"), 3)
                self.assertTrue(n > 0 or said == b"\n\n\n", said)

    def test_the_first_message_may_be_an_option(self):
        model = [self.model(3), "-m", "chat", "-t", 0, "-n", 4]
        self.assertEqual(self.ok(*model, "-i", " Hello "), self.ok(*model, stdin=b" Hello \n"))

    def test_without_a_format_it_asks_for_one(self):
        self.refused(self.model(0), "-m", "chat", "-t", 0, wanted="-x")
        self.refused(self.model(1), "-m", "chat", "-t", 0, "-x", "klingon", wanted=("-x", "klingon"))
        self.refused(STORIES, "-z", TOK512, "-m", "chat", "-t", 0, "-x", "chatml", stdin=b"hi\n", wanted="<|im_start|>")

    def test_a_full_context_begins_again_and_a_message_too_long_is_said(self):
        lines = b"hello there\n" * 10 + b"x" * 5000 + b"\nhi\n"
        done = start(self.model(1), "-m", "chat", "-s", 1, "-n", 20, "-c", 60, stdin=lines)
        self.assertEqual(done.status, 0, done.err)
        self.assertIn("full: beginning again", done.err)
        self.assertIn("the message has", done.err)


class ChatFormats(Case):
    """The ids that each format feeds for two turns, with and without a system prompt: written down from
    the templates that the models publish (chat_template of Llama-2-7b-chat-hf, Meta-Llama-3-8B-Instruct,
    Qwen2 and SmolLM Instruct, Mistral-7B-Instruct-v0.1, zephyr-7b-beta), segment by segment."""
    SYSTEM, FIRST, SECOND = "You are terse.", "Hi there", "Bye"
    LLAMA2 = ("1 518 25580 29962 3532 14816 29903 6778 13 3492 526 1935 344 29889 13 29966 829 14816 29903 6778 13 13 "
              "18567 727 518 29914 25580 29962", "1 518 25580 29962 6324 727 518 29914 25580 29962",
              "2 1 518 25580 29962 2648 29872 518 29914 25580 29962")
    MISTRAL = ("1 518 25580 29962 887 526 1935 344 29889 13 13 18567 727 518 29914 25580 29962",
               "1 518 25580 29962 6324 727 518 29914 25580 29962", "2 518 25580 29962 2648 29872 518 29914 25580 29962")
    ZEPHYR = ("529 29989 5205 29989 29958 13 3492 526 1935 344 29889 2 29871 13 29966 29989 1792 29989 29958 13 18567 "
              "727 2 29871 13 29966 29989 465 22137 29989 29958 13",
              "529 29989 1792 29989 29958 13 18567 727 2 29871 13 29966 29989 465 22137 29989 29958 13",
              "2 29871 13 29966 29989 1792 29989 29958 13 2059 29872 2 29871 13 29966 29989 465 22137 29989 29958 13")
    LLAMA3 = ("2000 2002 1959 348 906 2003 198 198 533 474 257 279 377 13 2004 2002 650 279 2003 198 198 1211 399 2004 "
              "2002 1784 657 693 2003 198 198", "2000 2002 650 279 2003 198 198 1211 399 2004 2002 1784 657 693 2003 198 198",
              "2004 2002 650 279 2003 198 198 33 88 68 2004 2002 1784 657 693 2003 198 198")
    QWEN = ("2001 1959 348 906 198 533 474 257 279 377 13 2002 198 2001 650 279 198 1211 399 2002 198 2001 1784 657 693 "
            "198", "2001 650 279 198 1211 399 2002 198 2001 1784 657 693 198",
            "2002 198 2001 650 279 198 33 88 68 2002 198 2001 1784 657 693 198")
    SMOLLM = tuple(ids.replace("1959", "1951").replace("1784", "1783") for ids in QWEN)

    def fed(self, form, vocabulary, size, *more):
        model = self.write("m.bin", checkpoint(vocab_size=size, max_seq_len=128))
        done = start(model, "-z", vocabulary, "-m", "chat", "-x", form, "-n", 0, "-v", *more,
                     stdin=b"%s\n%s\n" % (self.FIRST.encode(), self.SECOND.encode()))
        self.assertEqual(done.status, 0, done.err)
        return [line[4:] for line in done.err.splitlines() if line.startswith("fed ")]

    def test_turns_are_fed_as_the_published_templates_say(self):
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        small = os.path.join(DATA, "tokenizers")
        for form, source, size, (system, first, second) in (
                ("llama2", None, 32000, self.LLAMA2), ("mistral", None, 32000, self.MISTRAL),
                ("zephyr", None, 32000, self.ZEPHYR), ("llama3", "llama3-2k", 2005, self.LLAMA3),
                ("chatml", "qwen2-2k", 2003, self.QWEN), ("chatml", "smollm-2k", 2003, self.SMOLLM)):
            with self.subTest(form=form, source=source):
                vocabulary = os.path.join(root, "tokenizer.bin")
                if source:
                    vocabulary = exported(os.path.join(small, source, "tokenizer.json"), source + ".tok")
                self.assertEqual(self.fed(form, vocabulary, size, "-y", self.SYSTEM), [system, second])
                self.assertEqual(self.fed(form, vocabulary, size), [first, second])

    def test_mistral_with_tokens_of_its_own_uses_them(self):
        words = [(0.0, 6, bytes([b])) for b in range(256)]
        control = [(0.0, 3, name) for name in (b"<s>", b"</s>", b"[INST]", b"[/INST]")]
        vocabulary = self.write("t", tokenizer(words + control, chat=4, bos=256, n_ends=1, end=257, flags=1))
        model = self.write("m.bin", checkpoint(vocab_size=260, max_seq_len=64))
        done = start(model, "-z", vocabulary, "-m", "chat", "-n", 0, "-v", stdin=b"ab\nc\n")
        self.assertIn("fed 256 258 97 98 259\n", done.err)
        self.assertIn("fed 257 258 99 259\n", done.err)


class Terminal(Case):
    """Chat as a person has it, through a pseudo-terminal."""

    def open(self, *arguments):
        pid, fd = pty.fork()
        if pid == 0:
            os.execvp(command(*arguments)[0], command(*arguments))
        self.addCleanup(os.close, fd)
        self.before = termios.tcgetattr(fd)
        self.pid, self.fd, self.seen = pid, fd, b""

    def end(self):
        """The status with which the program ends, soon."""
        for _ in range(MOST_SECONDS * 20):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.fail("it did not end after %r" % self.seen[-200:])

    def wait_for(self, text):
        """Read on until text comes, and return what came before it."""
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], MOST_SECONDS)
            self.assertTrue(ready, "%r did not come after %r" % (text, self.seen[-200:]))
            self.seen += os.read(self.fd, 4096)
        before, self.seen = self.seen.split(text, 1)
        return before

    WORDS = tokenizer(PLAIN + [(0.0, 3, b"<|im_start|>"), (0.0, 3, b"<|im_end|>")], chat=3)

    def test_turns_and_the_end_of_input(self):
        model = self.tiny(tokenizer=self.WORDS, vocab_size=261, max_seq_len=1 << 20)
        self.open(model, "-m", "chat", "-s", 1, "-n", 10)
        for line in b"one\n", b"two\n":
            self.wait_for(b"> ")
            os.write(self.fd, line)
        self.wait_for(b"> ")
        os.write(self.fd, b"\x04")
        self.assertEqual(self.end(), 0)
        self.assertEqual(termios.tcgetattr(self.fd), self.before)

    def interrupted(self):
        """A chat that was interrupted in two answers, each of which would last for minutes, and asks again."""
        model = self.always(3 + ord("x"), tokenizer=self.WORDS, vocab_size=261, max_seq_len=1 << 20)
        self.open(model, "-m", "chat", "-t", 0, "-n", 1000000)
        for line in b"go\n", b"again\n":
            self.wait_for(b"> ")
            os.write(self.fd, line)
            self.wait_for(b"xxxxxxxxxx")
            os.write(self.fd, b"\x03")
        self.wait_for(b"> ")

    def test_ctrl_c_ends_an_answer_and_the_end_of_input_the_chat(self):
        self.interrupted()
        os.write(self.fd, b"\x04")
        self.assertEqual(self.end(), 0)
        self.assertEqual(termios.tcgetattr(self.fd), self.before)

    def test_ctrl_c_where_no_answer_is_written_ends_the_chat(self):
        self.interrupted()
        os.write(self.fd, b"\x03")
        self.assertEqual(os.WTERMSIG(self.end()), signal.SIGINT)
        self.assertEqual(termios.tcgetattr(self.fd), self.before)

    def rest(self):
        """All that comes until the program ends, which must be well."""
        while True:
            self.assertTrue(select.select([self.fd], [], [], MOST_SECONDS)[0], self.seen[-200:])
            try:
                part = os.read(self.fd, 4096)
            except OSError:
                part = b""
            if not part:
                self.assertEqual(self.end(), 0, self.seen)
                return self.seen
            self.seen += part

    def test_score_shows_the_text_on_grounds_of_its_surprise(self):
        text = "Once upon a time, zebras quit"
        self.open(STORIES, "-z", TOK512, "-m", "score", "-i", text)
        shown = re.findall(rb"\x1b\[30;48;5;(\d+)m([^\x1b]*)\x1b\[0m", self.rest())
        self.assertEqual(b"".join(part for _, part in shown).strip(), text.encode())
        lines = self.ok(STORIES, "-z", TOK512, "-m", "score", "-i", text).splitlines()
        scores = [float(line.split(b"\t")[2]) for line in lines]
        grounds = [ground for _, (ground, _) in sorted(zip(scores, shown))]
        self.assertEqual(sorted(grounds, key=[b"196", b"209", b"222", b"230", b"255"].index), grounds)
        self.assertGreater(len(set(grounds)), 2)

    def test_a_long_job_shows_how_far_it_is(self):
        model = Outputs.big(self)
        self.open(model, "-m", "quantize", "-q", "q4", "-j", 1, "-o", self.path("out"))
        before = self.wait_for(b"quantizing: ")
        percent = self.wait_for(b" %")
        self.assertEqual(before, b"\r")
        self.assertLess(int(percent), 90, "all of it is one matrix")
        os.write(self.fd, b"\x03")
        self.assertEqual(os.WTERMSIG(self.end()), signal.SIGINT)
        self.assertEqual(os.listdir(self.place), ["big.bin"])


class WrongUsage(Case):
    def misused(self, *arguments, wanted=()):
        self.refused(*arguments, status=2, wanted=wanted)

    def test_no_model_or_two(self):
        self.misused(wanted="no model")
        self.misused("-n", "3", wanted="no model")
        self.misused("a", "b", wanted=("'a'", "'b'"))

    def test_unknown_letters_and_modes(self):
        for bad in "-Z", "--", "-nn", "-n3", "--help-me", "-?", "-\u00e9":
            self.misused(STORIES, bad, "3", wanted=(bad,))
        self.misused(STORIES, "-m", "sing", wanted="sing")
        self.misused(STORIES, "-m", "", wanted="''")

    def test_missing_values(self):
        for letter in LETTERS:
            self.misused(STORIES, "-" + letter, wanted=("-" + letter, "value"))

    def test_numbers_out_of_bounds_or_with_anything_behind(self):
        bad = {"n": "-1 1.5 x 1x 9999999999999999999999 0x1 1e2 nan", "t": "nan -1 inf 1e999 x 0.5x 1001",
               "p": "2 -0.1 nan x inf", "s": "-1 x 1.5 99999999999999999999", "c": "0 -5 x 1e1", "j": "0 -1 5000 x",
               "k": "-1 x 1.5", "l": "-1 2 nan", "r": "0 -1 nan inf", "d": "-1 x", "w": "0 -1 x"}
        for letter, values in bad.items():
            for value in values.split() + ["", " 1", "1 "]:
                self.misused(STORIES, "-" + letter, value, wanted=("-" + letter + " ", "'%s'" % value))

    def test_a_seed_of_0_is_a_seed(self):
        told = {self.ok(STORIES, "-z", TOK512, "-s", s, "-n", 30) for s in (0, 0, 1)}
        self.assertEqual(len(told), 2)


class Outputs(Case):
    """A file takes its name when it is complete; nothing else stays behind."""
    model = [STORIES, "-z", TOK512, "-t", 0, "-n", 5]

    def big(self):
        """A sparse checkpoint that takes a while to quantize."""
        c = {**TINY, "dim": 512, "n_heads": 1, "head_dim": 512, "hidden_dim": 512, "vocab_size": 1 << 19, "flags": TIED}
        size = 256
        for rows, columns in shapes(c):
            size = up(size, 64) + size_of(rows, columns, 0)
        path = self.write("big.bin", header(size, c))
        os.truncate(path, size)
        return path

    def wait(self, process, came):
        """Until something has come, the process has ended or time is over."""
        for _ in range(200 * MOST_SECONDS):
            if came() or process.poll() is not None:
                break
            time.sleep(0.005)

    def opened(self, process, path):
        """Wait until the process has mapped the file."""
        if os.path.exists("/proc/self/maps"):
            self.wait(process, lambda: path.encode() in read("/proc/%d/maps" % process.pid))
        else:
            time.sleep(2)

    def test_an_existing_file_is_replaced_only_when_the_new_one_is_complete(self):
        out = self.write("out", b"old")
        self.refused(STORIES, "-m", "logits", "-f", self.write("ids", b"1 x"), "-o", out)
        self.assertEqual(read(out), b"old")
        self.assertEqual(sorted(os.listdir(self.place)), ["ids", "out"])
        self.ok(STORIES, "-m", "logits", "-f", self.write("ids", b"1"), "-o", out)
        self.assertEqual(len(read(out)), 4 * 512)

    def test_every_failure_after_the_start_leaves_nothing(self):
        many = self.write("many", b"1 " * 600)
        for arguments in ((STORIES, "-m", "logits", "-f", many), (STORIES, "-m", "logits", "-f", self.path("none")),
                          (*self.model, "-c", 9999), (*self.model, "-i", "a b c d e f", "-c", 2),
                          (STORIES, "-z", self.path("none"), "-t", 0), (*self.model, "-f", self.path("none")),
                          (STORIES, "-m", "quantize", "-q", "q9")):
            self.refused(*arguments, "-o", self.path("out"))
            self.assertEqual(os.listdir(self.place), ["many"], arguments)

    def test_a_full_disk_is_one_line(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        for mode in (["-m", "logits"], ["-m", "tokens", "-z", TOK512, "-i", "a"], ["-m", "info", "-z", TOK512],
                     self.model[1:], ["-m", "quantize", "-q", "q8"]):
            done = start(STORIES, *mode, "-o", "/dev/full", stdin=b"1")
            self.assertEqual(done.status, 1, (mode, done.err))
            self.assertRegex(done.err, r"(?m)^run: /dev/full: .*No space left on device$", mode)

    def test_standard_output_that_is_full_is_one_line(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        for mode in (["-m", "logits"], ["-m", "tokens", "-z", TOK512, "-i", "a"], ["-m", "info", "-z", TOK512],
                     self.model[1:], ["-h"], ["--version"]):
            with open("/dev/full", "wb") as full:
                done = subprocess.run(command(STORIES, *mode), input=b"1", stdout=full, stderr=subprocess.PIPE,
                                      timeout=MOST_SECONDS)
            self.assertEqual(done.returncode, 1, (mode, done.stderr))
            self.assertRegex(done.stderr, rb"(?m)^run: .*No space left on device$", mode)

    def test_a_disk_that_fills_up_leaves_no_part(self):
        def small_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
        out = self.path("out")
        self.refused(STORIES, "-m", "quantize", "-q", "q8", "-o", out, wanted=(out, "File too large"),
                     preexec_fn=small_files)
        self.assertEqual(os.listdir(self.place), [])

    def test_a_limit_on_the_size_of_files_is_a_line_too_not_a_signal(self):
        out = self.path("out")
        self.refused(STORIES, "-m", "quantize", "-q", "q8", "-o", out, wanted=(out, "File too large"),
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)))
        self.assertEqual(os.listdir(self.place), [])

    def test_a_folder_that_cannot_be_written_is_one_line(self):
        out = self.path("none/out")
        self.refused(*self.model, "-o", out, wanted=(out, "No such file"))
        self.refused(*self.model, "-o", self.place, wanted=(self.place, "directory"))

    def test_what_it_may_not_touch_is_one_line(self):
        place = tempfile.mkdtemp(dir="/tmp")  # root runs it as nobody, who cannot enter the folders of the tests
        self.addCleanup(shutil.rmtree, place)
        nobody = dict(user=65534, group=65534, extra_groups=[]) if os.getuid() == 0 else {}
        def at(name):
            return os.path.join(place, name)
        for source, name, mode in ((RUN, "run", 0o555), (STORIES, "m.bin", 0o644), (TOK512, "t.bin", 0o644),
                                   (STORIES, "secret.bin", 0), (TOK512, "secret.tok", 0)):
            os.chmod(shutil.copy(source, at(name)), mode)
        os.chmod(place, 0o555)
        self.addCleanup(os.chmod, place, 0o755)
        def refused(model, *options, wanted):
            self.refused(at(model), "-t", 0, "-n", 5, *options, wanted=(wanted, "Permission denied"),
                         program=at("run"), cwd=place, **nobody)
        refused("m.bin", "-z", at("t.bin"), "-o", at("out"), wanted=at("out"))
        refused("m.bin", "-z", at("t.bin"), "-o", at("m.bin"), wanted=at("m.bin"))
        refused("m.bin", "-z", at("t.bin"), "-f", at("secret.tok"), wanted=at("secret.tok"))
        refused("m.bin", "-z", at("t.bin"), "-b", at("secret.tok"), wanted=at("secret.tok"))
        refused("m.bin", "-z", at("secret.tok"), wanted=at("secret.tok"))
        refused("secret.bin", "-z", at("t.bin"), wanted=at("secret.bin"))
        self.assertEqual(sorted(os.listdir(place)), ["m.bin", "run", "secret.bin", "secret.tok", "t.bin"])

    def test_a_folder_that_is_gone_in_the_end_is_one_line(self):
        os.mkdir(self.path("gone"))
        out = self.path("gone/out")
        process = subprocess.Popen(command(STORIES, "-m", "logits", "-o", out), stdin=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.opened(process, STORIES)
        time.sleep(0.3)
        shutil.rmtree(self.path("gone"))
        said = process.communicate(b"1 2 3", timeout=MOST_SECONDS)[1].decode()
        self.assertEqual(process.returncode, 1, said)
        self.assertRegex(said, r"\Arun: [^\n]*gone/out[^\n]*No such file[^\n]*\n\Z")

    def test_long_results_on_a_full_disk_are_one_line(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        many = self.write("many", b"one two three " * 300)
        for mode in (["-m", "tokens", "-f", many], ["-m", "score", "-f", many], ["-b", many], ["-m", "bench"]):
            done = start(STORIES, "-z", TOK512, *mode, "-o", "/dev/full")
            self.assertEqual(done.status, 1, (mode, done.err))
            self.assertRegex(done.err, r"(?m)^run: /dev/full: .*No space left on device$", mode)

    def test_a_reader_that_leaves_ends_it_quietly(self):
        out, into = os.pipe()
        process = subprocess.Popen(command(STORIES, "-z", TOK512, "-t", 0, "-n", 400), stdin=subprocess.DEVNULL,
                                   stdout=into, stderr=subprocess.PIPE)
        os.close(into)
        os.read(out, 10)
        os.close(out)
        said = process.communicate(timeout=MOST_SECONDS)[1]
        self.assertIn(process.returncode, (0, -signal.SIGPIPE, 128 + signal.SIGPIPE))
        self.assertNotIn(b"run: ", said)

    def test_ctrl_c_while_a_file_is_written_leaves_nothing(self):
        model = self.big()
        process = subprocess.Popen(command(model, "-m", "quantize", "-q", "q4", "-j", 1, "-o", self.path("out")),
                                   stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.opened(process, model)
        time.sleep(0.1)
        self.assertIsNone(process.poll(), "it ended too early to be interrupted")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=MOST_SECONDS)
        self.assertIn(process.returncode, (-signal.SIGINT, 130, 1))
        self.assertEqual(os.listdir(self.place), ["big.bin"])

    def interrupted(self, *arguments):
        """Ctrl-C while it waits for standard input."""
        process = subprocess.Popen(command(*arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.opened(process, arguments[0])
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(MOST_SECONDS if WRAP else 10)
        except subprocess.TimeoutExpired:
            process.kill()
            self.fail("it went on waiting for standard input")
        finally:
            process.communicate()

    def test_ctrl_c_ends_a_wait_for_standard_input_and_leaves_nothing(self):
        self.interrupted(STORIES, "-m", "logits", "-f", "-", "-o", self.path("out"))
        self.interrupted(STORIES, "-z", TOK512, "-i", "-", "-o", self.path("out"))
        self.assertEqual(os.listdir(self.place), [])

    def test_a_file_that_shrinks_while_mapped_ends_with_a_message(self):
        for more in ((), ("-o", self.path("out"))):
            model = self.write("m.bin", read(STORIES))
            process = subprocess.Popen(command(model, "-m", "logits", *more), stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.opened(process, model)
            os.truncate(model, 4096)
            said = process.communicate(b"1 2 3", timeout=MOST_SECONDS)[1]
            self.assertEqual(process.returncode, 1, said)
            self.assertRegex(said, rb"\Arun: [^\n]*shorter[^\n]*\n\Z")
            self.assertEqual(os.listdir(self.place), ["m.bin"])

    def test_the_model_cannot_be_its_own_output(self):
        model = self.write("m.bin", read(STORIES))
        start(model, "-m", "quantize", "-q", "q8", "-o", model)
        content = read(model)
        self.assertTrue(content == read(STORIES) or content[:8] == b"LLAMA02\0", "it is neither old nor new")
        self.ok(model, "-m", "logits", stdin=b"1")


# ------------------------------------------------------------------------------------------------
# Bad input, entry by entry

class BadCheckpoint(Case):
    def test_what_is_no_file(self):
        fifo = self.path("fifo")
        os.mkfifo(fifo)
        for path, wanted in ((self.place, "regular"), (fifo, "regular"), ("/dev/null", "regular"),
                             (self.path("none"), "No such file"), (self.write("empty", b""), "empty")):
            self.refused(path, "-t", 0, wanted=(path, wanted))

    def test_a_failure_says_nothing_else(self):
        self.refused(self.path("none"), wanted="No such file")

    def test_a_header_cut_short(self):
        content = checkpoint()
        for n in 1, 4, 7, 27, 28, 100, 255:
            self.bad_model(content[:n], "a" if n < 8 else "header")
            self.bad_model(legacy(version=1)[:n], "" if n < 8 else "header")
            self.bad_model(legacy()[:n])
        self.bad_model(content[:256], "bytes")
        self.bad_model(sized(content[:256]), "bytes")

    def test_what_is_something_else(self):
        rest = bytes(300)
        for begin, wanted in ((b"GGUF\3\0\0\0", "GGUF"), (b"PK\3\4\x14\0\0\0", "zip"),
                              (b"ak42\0\0\0\1", "byte-swapped"), (b"LLAMA02T", "tokenizer")):
            self.bad_model(begin + rest, wanted)
        for begin in (b"LLAMA03\0", b"LLAMA02 ", b"\x7fELF", b"\0\0\0\0", b'{"__metadata__"', b"\x93NUMPY", b"tjgg",
                      b"\xff" * 8):
            self.bad_model(begin + rest, "not a checkpoint")

    def test_versions_that_are_not_known(self):
        for version in 0, 2, -1, 1 << 24, 1 << 31:
            self.bad_model(changed(checkpoint(), "version", version), "version", str(version % 2**32))
        for version, wanted in ((0, "version"), (2, "int8"), (3, "version"), (1 << 24, "version")):
            self.bad_model(changed(legacy(version=1), 4, struct.pack("<I", version)), wanted)

    def test_a_file_of_another_size(self):
        content = checkpoint()
        for bad in (content[:-1], content + b"\0", content[:-64], content + bytes(64)):
            self.bad_model(bad, "bytes", str(len(bad)))
            self.bad_model(sized(bad), "bytes", str(len(bad)))
        for size in 0, 1, len(content) - 1, 1 << 63, 2**64 - 1:
            self.bad_model(changed(content, 248, struct.pack("<Q", size)), "bytes", str(size))
        for version in 0, 1:
            content = legacy(version=version)
            for bad in (content[:-1], content + b"\0"):
                self.bad_model(bad, "bytes", str(len(bad)))

    def test_every_dimension_0_negative_and_huge(self):
        for name in DIMENSIONS:
            for value in 0, -1, -2**31, 2**31 - 1, 1 << 28:
                self.bad_model(changed(checkpoint(), name, value), name)

    def test_every_dimension_of_llama2c_0_negative_and_huge(self):
        names = "dim hidden_dim n_layers n_heads n_kv_heads vocab_size max_seq_len".split()
        for version, first in ((0, 0), (1, 8)):
            for i, name in enumerate(names):
                for value in 0, -1, -2**31, 2**31 - 1, 1 << 28:
                    if not (version == 0 and name == "vocab_size" and value == -1):
                        bad = changed(legacy(version=version), first + 4 * i, struct.pack("<i", value))
                        self.bad_model(bad, name.split("_")[0])

    def test_dimensions_that_do_not_go_together(self):
        self.bad_model(checkpoint(n_heads=3, n_kv_heads=2), "n_heads", "n_kv_heads")
        self.bad_model(checkpoint(n_heads=1, n_kv_heads=2), "n_heads", "n_kv_heads")
        self.bad_model(checkpoint(head_dim=3), "head_dim", "3")
        for version, first in ((0, 0), (1, 8)):
            content = changed(legacy(version=version), first + 12, struct.pack("<i", 7))  # heads of 64
            self.bad_model(content, "dim 64", "7")
        self.bad_model(changed(changed(checkpoint(), "n_heads", 1 << 14), "head_dim", 1 << 12), "n_heads", "head_dim")

    def test_shapes_whose_product_overflows(self):
        huge = dict(dim=1 << 20, hidden_dim=1 << 22, n_layers=1 << 14, n_heads=1 << 10, n_kv_heads=1 << 10,
                    head_dim=1 << 12, vocab_size=1 << 23, max_seq_len=1 << 26)
        for kind in range(5):
            self.bad_model(header(256, {**TINY, **huge, "type": kind}), "bytes")
            self.bad_model(header(1 << 20, {**TINY, **huge, "type": kind}) + bytes((1 << 20) - 256), "bytes")
        version_0 = struct.pack("<7i", 1 << 20, 1 << 22, 1 << 14, 1 << 10, 1, 1 << 23, 1 << 26)
        self.bad_model(version_0 + bytes(1000), "bytes")
        for layers in 2, 1 << 14:
            self.bad_model(changed(checkpoint(), "n_layers", layers), "bytes")

    def test_extents_just_one_off_do_not_fit_the_file(self):
        for name in "dim", "hidden_dim", "n_layers", "vocab_size":
            for off in 1, 1000:
                self.bad_model(changed(checkpoint(), name, TINY[name] + off), "bytes")

    def test_numbers_that_are_none(self):
        nan, infinite = float("nan"), float("inf")
        for name in "norm_eps", "rope_theta":
            for value in nan, infinite, -infinite, -1.0:
                self.bad_model(changed(checkpoint(), name, value), name)
        self.bad_model(changed(checkpoint(), "rope_theta", 0.0), "rope_theta")
        llama3 = dict(rope_scaling=2, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
        for name in "factor", "low_freq_factor", "high_freq_factor":
            for value in nan, infinite, -1.0:
                self.bad_model(checkpoint(**{**llama3, name: value}), name)
        self.bad_model(checkpoint(**{**llama3, "factor": 0.0}), "factor")
        self.bad_model(checkpoint(**{**llama3, "low_freq_factor": 4.0}), "low_freq_factor")
        self.bad_model(checkpoint(**{**llama3, "original_context": 0}), "original_context")
        self.bad_model(checkpoint(rope_scaling=1, factor=nan), "factor")
        for value in 3, -1:
            self.bad_model(checkpoint(rope_scaling=value), "rope_scaling")

    def test_types_flags_windows_and_what_must_be_zero(self):
        for value in 5, -1:
            self.bad_model(changed(checkpoint(), "type", value), "type")
        for value in 16, 1 << 31:
            self.bad_model(changed(checkpoint(), "flags", value), "flags")
        self.bad_model(changed(checkpoint(type=3), "flags", 32), "flags")
        self.bad_model(changed(checkpoint(), "sliding_window", -1), "sliding_window")
        for at in 84, 150, 247:
            self.bad_model(changed(checkpoint(), at, b"\1"), "zero")

    def test_random_changes_of_the_header_never_end_in_a_signal(self):
        dice = random.Random(4)
        for source in checkpoint(), legacy(version=1), legacy(tables=False):
            for _ in range(5 if WRAP else 60):
                at = dice.randrange(84)
                bad = changed(source, at, bytes(dice.choice((0, 1, 127, 128, 255)) for _ in range(dice.choice((1, 4)))))
                done = start(self.write("bad.bin", bad), "-m", "logits", stdin=b"1 2")
                self.assertIn(done.status, (0, 1), (at, done.err))
                self.assertEqual(done.status, done.err.count("\n"), done.err)

    def test_a_context_too_large_for_memory_says_what_helps(self):
        c = {**TINY, "n_layers": 512, "n_heads": 1, "n_kv_heads": 1, "head_dim": 1 << 11, "dim": 2, "vocab_size": 262,
             "max_seq_len": 1 << 26}
        size = 256
        for rows, columns in shapes(c):
            size = up(size, 64) + size_of(rows, columns, 0)
        path = self.write("big.bin", header(size, c))
        os.truncate(path, size)
        write(self.path("big.tokenizer.bin"), tokenizer())
        self.refused(path, "-t", 0, "-i", "a", "-n", 1000000000, wanted=("MB", "-c"))
        self.assertEqual(self.ok(path, "-t", 0, "-i", "a", "-n", 2, "-c", 8)[:1], b"a")

    def test_weights_that_are_no_numbers_still_choose_a_token(self):
        for bad in b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f":
            model = self.tiny(vocab_size=262, fill=lambda n: bad * (n // 4))
            for options in (("-t", 0), ("-s", 1), ("-s", 1, "-p", 0), ("-s", 1, "-k", 5),
                            ("-s", 1, "-l", 0.1, "-r", 1.3)):
                self.ok(model, "-i", "a", "-n", 20, *options)

    def test_quantized_panels_of_any_bytes_are_run(self):
        dice = random.Random(5)
        for kind, flags in (3, 0), (4, 0), (3, 16), (4, 16):
            model = self.tiny(type=kind, flags=flags, vocab_size=262, fill=dice.randbytes)
            for options in (("-t", 0), ("-s", 1)):
                self.ok(model, "-i", "a", "-n", 20, *options)


class BadTokenizer(Case):
    def test_a_vocabulary_that_is_not_the_models(self):
        self.bad_tokenizer(tokenizer(), "262", "261", vocab=261)
        words = legacy_tokenizer([b"a"])
        self.bad_tokenizer(words, "token", vocab=261)
        self.bad_tokenizer(words, "token", vocab=259)
        self.bad_tokenizer(read(TOK512), "token", vocab=511)
        self.bad_tokenizer(read(LLAMA2), "token", model=STORIES)
        self.ok(self.tiny(vocab_size=400), "-m", "tokens", "-i", "a")

    def test_lengths_of_0_negative_huge_and_past_the_end(self):
        good = tokenizer()
        last = len(good) - 16 - 4  # the length of the last token, " a"
        self.assertEqual(good[last + 12:last + 16], struct.pack("<I", 2))
        for n in 0, 5, 6, 1000, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4:
            self.bad_tokenizer(changed(good, last + 12, struct.pack("<I", n)), "token 261")
        good = legacy_tokenizer([b"ab"])
        for n in 0, 1, 3, 1000, 2**31 - 1, 2**31, 2**32 - 1:
            self.bad_tokenizer(changed(good, len(good) - 6, struct.pack("<I", n)), "token", vocab=260)

    def test_a_longest_length_too_small_does_no_harm(self):
        model = self.write("m.bin", checkpoint(vocab_size=261))
        for longest in 0, 1, 2**32 - 1:
            path = self.write("t", legacy_tokenizer([b" ", b"abcdefghij" * 20], longest=longest))
            self.ok(model, "-z", path, "-m", "tokens", "-i", "abcdefghij" * 20)

    def test_scores_that_are_no_numbers(self):
        nan = float("nan")
        self.bad_tokenizer(tokenizer(PLAIN + [(nan, 1, b"a")]), "token 259", "score")
        self.bad_tokenizer(legacy_tokenizer([b"a"], [nan]), "token 259", "score", vocab=260)
        infinite = tokenizer(PLAIN + [(float("inf"), 1, b"a"), (float("-inf"), 1, b"b"), (0.0, 1, b"ab")])
        self.assertEqual(self.ok(self.tiny(tokenizer=infinite), "-m", "tokens", "-i", "ab").split()[-1], b"261")

    def test_no_token_for_a_space_or_a_byte_or_anything(self):
        few = [(0.0, 2, b"<unk>"), (0.0, 3, b"<s>"), (0.0, 3, b"</s>"), (0.0, 1, b"x")]
        self.bad_tokenizer(tokenizer(few), "no token for byte 0")
        self.bad_tokenizer(tokenizer(PLAIN[:-1]), "no token for byte 255")
        self.assertEqual(self.ok(self.tiny(), "-m", "tokens", "-i", "b c"), b"259\n101\n259\n102\n")
        none = tokenizer([(0.0, 1, b"x")], kind=1, flags=0, bos=-1, unknown=-1, n_ends=0, end=0)
        self.assertEqual(self.ok(self.tiny(tokenizer=none), "-m", "tokens", "-i", "yx\xff"), b"0\n")
        self.refused(self.tiny(tokenizer=none), "-t", 0, "-i", "y", wanted="nothing to begin with")

    def test_fewer_tokens_than_bytes(self):
        words = b"<unk>", b"<s>", b"</s>", BYTES[0], b"a"
        few = struct.pack("<I", 9) + b"".join(struct.pack("<fI", 0.0, len(w)) + w for w in words)
        self.bad_tokenizer(few, "no token for byte 1", vocab=5)
        for vocab in 1, 2:
            words = struct.pack("<I", 9) + (struct.pack("<fI", 0.0, 1) + b"a") * vocab
            self.bad_tokenizer(words, "BOS" if vocab == 1 else "ends a text", vocab=vocab)

    def test_tokens_that_are_there_twice(self):
        twice = tokenizer(PLAIN + [(0.0, 1, b"a"), (5.0, 1, b"a"), (0.0, 6, b"a")])
        self.ok(self.tiny(tokenizer=twice), "-m", "tokens", "-i", "aa")

    def test_ids_out_of_range(self):
        for name in "bos", "unknown":
            for value in -2, 262, 2**31 - 1, -2**31:
                self.bad_tokenizer(tokenizer(**{name: value}), "BOS" if name == "bos" else name, str(value))
        for value in -1, 262, 2**31 - 1:
            self.bad_tokenizer(tokenizer(end=value), "ends a text", str(value))
        for value in 17, 2**32 - 1:
            self.bad_tokenizer(tokenizer(n_ends=value), "end a text", str(value))

    def test_fields_of_the_header(self):
        for changes, wanted in ((dict(version=0), "version"), (dict(version=2), "version"), (dict(kind=2), "kind"),
                                (dict(flags=16), "flags"), (dict(kind=1, rule=5), "split rule"),
                                (dict(rule=1), "split rule"), (dict(chat=99), "chat"), (dict(n_tokens=0), "tokens"),
                                (dict(n_tokens=300), "token"), (dict(kind=1, rule=1), "characters"),
                                (dict(flags=8), "characters"), (dict(n_merges=1), ""), (dict(n_merges=2**32 - 1), ""),
                                (dict(classes=2**32 - 1), ""), (dict(marks=2**31), ""), (dict(compositions=2**30), "")):
            self.bad_tokenizer(tokenizer(**changes), wanted)
        self.bad_tokenizer(changed(tokenizer(), 124, b"\1"), "zero")
        for rows in ((1, 0), (0, 4), (0, 9)), ((0, 0), (5, 1), (5, 0)), ((0, 0), (0x110000, 1)), ((0, 0), (9, 4)):
            table = b"".join(struct.pack("<II", *row) for row in rows)
            bad = tokenizer(kind=1, rule=1, classes=len(rows))
            bad = bad[:256] + table + bad[256:]
            self.bad_tokenizer(sized(bad), "table of characters")
        self.bad_tokenizer(changed(tokenizer(), 48, b"\1"), "")  # an end beyond n_ends

    def test_compositions_of_what_are_no_characters(self):
        for row in (0x110000, 0x41, 0x300), (0xc0, 0x110000, 0x300), (0xc0, 0x41, 2**32 - 1):
            bad = tokenizer(flags=3 | 8, kind=1, rule=0, classes=1, marks=1, compositions=1)
            table = struct.pack("<II", 0, 0) + struct.pack("<II", 0, 0) + struct.pack("<III", *row)
            self.bad_tokenizer(sized(bad[:256] + table + bad[256:]), "composition")

    def test_types_and_merges_that_do_not_fit(self):
        for kind, text in ((0, b"a"), (7, b"a"), (6, b"ab"), (5, b"a"), (4, b"a" * 256), (1, b"")):
            self.bad_tokenizer(tokenizer(PLAIN + [(0.0, kind, text)]), "token 259")
        words = PLAIN + [(0.0, 1, b"a"), (0.0, 1, b"b"), (0.0, 1, b"ab")]
        self.ok(self.tiny(tokenizer=tokenizer(words, [(259, 260, 261)])), "-m", "tokens", "-i", "ab")
        for merge in ((259, 260, 262), (260, 259, 261), (259, 259, 261), (2**32 - 1, 260, 261), (261, 1, 261),
                      (1, 2, 0)):
            self.bad_tokenizer(tokenizer(words, [merge]), "merge 0")

    def test_a_file_of_another_size_or_kind(self):
        good = tokenizer()
        for bad in (good[:-1], good + b"\0", good[:255], good[:8], good[:100]):
            self.bad_tokenizer(bad, "")
        for bad in (good[:-4], good + bytes(4)):
            self.bad_tokenizer(changed(bad, 248, struct.pack("<Q", len(bad))), "token")
        self.bad_tokenizer(b"", "empty")
        self.bad_tokenizer(b"abc", "bytes")
        self.bad_tokenizer(b"{" + b" " * 1000, "token")
        self.bad_tokenizer(checkpoint(), "")
        model = self.write("m.bin", checkpoint())
        self.refused(model, "-z", self.place, "-m", "tokens", wanted=(self.place, "regular"))
        self.refused(model, "-z", self.path("none"), "-m", "tokens", wanted=(self.path("none"), "No such file"))

    def test_random_changes_never_end_in_a_signal(self):
        dice = random.Random(6)
        model = self.write("m.bin", checkpoint(vocab_size=512))
        words = PLAIN + [(0.0, 1, b"a"), (0.0, 1, b"b"), (0.0, 1, b"ab")]
        for source in read(TOK512), tokenizer(words, [(259, 260, 261)]):
            for _ in range(5 if WRAP else 100):
                at = dice.randrange(len(source))
                odd = bytes(dice.choice((0, 1, 127, 128, 255)) for _ in range(min(4, len(source) - at)))
                bad = changed(source, at, odd)
                done = start(model, "-z", self.write("bad", bad), "-t", 0, "-n", 3, "-i", "ab abba \xe9")
                self.assertIn(done.status, (0, 1), (at, done.err))
                if done.status:
                    self.assertRegex(done.err, r"\Arun: [^\n]*\n\Z")

    def test_escape_sequences_in_tokens_do_not_reach_a_terminal(self):
        words = tokenizer(PLAIN + [(0.0, 1, b"x\x1b[2J\x1b]0;gone\x07")])
        model = self.always(259, tokenizer=words, vocab_size=260)
        self.assertIn(b"x\x1b", self.ok(model, "-t", 0, "-n", 1))
        main, sub = pty.openpty()
        process = subprocess.Popen(command(model, "-t", 0, "-n", 1), stdin=subprocess.DEVNULL, stdout=sub,
                                   stderr=subprocess.DEVNULL)
        os.close(sub)
        shown = b""
        while select.select([main], [], [], MOST_SECONDS)[0]:
            try:
                part = os.read(main, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        os.close(main)
        process.wait(MOST_SECONDS)
        self.assertIn(b"x", shown)
        self.assertNotIn(b"\x1b", shown)


class BadPrompt(Case):
    def test_bytes_that_are_no_text(self):
        for text in b"\xff\xfe", b"\0", b"a\0b", b"\xf0\x9f", b"\x80" * 100:
            out = self.ok(STORIES, "-z", TOK512, "-t", 0, "-n", 3, "-i", "-", stdin=text)
            self.assertEqual(out[:len(text)], text)

    def test_an_empty_prompt_is_none(self):
        wanted = self.ok(STORIES, "-z", TOK512, "-t", 0, "-n", 5)
        for arguments in (("-i", ""), ("-i", "-"), ("-f", self.write("empty", b"")), ("-f", "-"), ("-f", "/dev/null")):
            self.assertEqual(self.ok(STORIES, "-z", TOK512, "-t", 0, "-n", 5, *arguments), wanted)

    def test_a_prompt_of_megabytes_is_refused_by_its_length(self):
        self.refused(STORIES, "-z", TOK512, "-t", 0, "-i", "-", stdin=b"word " * 1000000, wanted="prompt")

    def test_files_that_cannot_be_read(self):
        for path, wanted in ((self.path("none"), "No such file"), (self.place, "directory")):
            self.refused(STORIES, "-z", TOK512, "-t", 0, "-f", path, wanted=(path, wanted))
            self.refused(STORIES, "-m", "logits", "-f", path, wanted=(path, wanted))

    def test_standard_input_that_is_closed(self):
        done = subprocess.run(command(STORIES, "-m", "logits"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              preexec_fn=lambda: os.close(0), timeout=MOST_SECONDS)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, rb"\Arun: [^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
