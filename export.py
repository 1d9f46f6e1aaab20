#!/usr/bin/env python3
"""export.py - turn published Llama checkpoints and tokenizers into the flat files that run.c maps.

    python3 export.py SOURCE OUT.bin [--type keep|f32|bf16|f16] [--chat FORMAT] [--context N]
    python3 export.py --random SHAPE OUT.bin [--type f32|bf16|f16|q8|q4]

SOURCE is a Hugging Face folder (config.json, *.safetensors), a Meta folder (params.json,
consolidated.*.pth), a llama2.c checkpoint, or a tokenizer alone (tokenizer.model, tokenizer.json,
llama2.c's tokenizer.bin): then OUT is the tokenizer file. A tokenizer found in a folder is written
beside OUT: NAME.bin gets NAME.tokenizer.bin. Both formats are described in the README.

What these files cannot say exactly is refused by name, because a model that is almost right looks
right for a thousand tokens. Nothing appears until it is complete. Needs Python 3.8, nothing else.

In reading order: the borders; the tokenizer file; tokenizers of others; numbers; tensors where they
lie; the model; checkpoints of others; random checkpoints; the command line.
"""
import argparse
import base64
import collections
import functools
import json
import math
import os
import pickletools
import random
import re
import signal
import stat
import struct
import sys
import unicodedata
import zipfile

# ------------------------------------------------------------------------------------------------
# 1. The borders: what comes in is checked, what goes out is whole

class Refused(Exception):
    """One line for the user: the file, what was found there and what was wanted."""

def refuse(where, text, *values):
    raise Refused("%s: %s" % (where, text % values if values else text))

def say(text):
    """One line on stderr. Names come from files: what would move a terminal's cursor does not."""
    text = "".join(c if c.isprintable() else "?" for c in text[:600])
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress bar
    print(clear + "export: " + text, file=sys.stderr)

# Files are written in blocks of this size, so that the page cache can hold them in its largest pages (Linux
# 6.18, ext4). On a virtual machine the first touch of 4 kB then costs 0.05 us, not 0.6, and a prompt of 512
# tokens to a 1.1B q8 model ran up to 1.6 times as fast.
BLOCK = 2 << 20

class Output:
    """Files that appear under their names when all are complete, and otherwise leave no trace."""

    def __init__(self):
        self.files = []
        self.names = []  # of each, while it is written and in the end

    def create(self, path):
        if os.path.lexists(path) and not os.path.isfile(path):
            refuse(path, "exists and is no regular file")
        partial = "%s.%d.partial" % (path, os.getpid())
        self.names.append((partial, path))  # before it is there: a signal may come at any point
        try:
            self.files.append(open(partial, "xb", BLOCK))
        except OSError as error:
            self.names.pop()  # it may be another's
            refuse(path, "cannot be written: %s", error.strerror)
        return self.files[-1]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            for file in self.files:
                file.close()
            if kind is None:
                for partial, path in self.names:
                    os.replace(partial, path)
        finally:
            for partial, _ in self.names:
                if os.path.lexists(partial):
                    os.unlink(partial)

def unique_keys(pairs):
    """A key that stands twice means different things to different readers, so it means nothing."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name = next(k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError("key %r stands twice" % name)
    return found

def parse_json(where, data):
    """The object in these bytes as Fields."""
    try:
        found = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except RecursionError:
        refuse(where, "JSON nested too deeply")
    except ValueError as error:  # bad UTF-8, bad JSON, endless digits, doubled keys
        refuse(where, "not valid JSON: %s", error)
    if not isinstance(found, dict):
        refuse(where, "a JSON %s where an object was wanted", type(found).__name__)
    return Fields(where, found)

SMALL = 1 << 28  # bytes; the largest tokenizer.json known has 33 million

def read_at(path, offset, size):
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        refuse(path, "became shorter while it was read")
    return data

def plain_size(path):
    """The size of a regular file; a pipe or a folder has none to check."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        refuse(path, "no regular file")
    return status.st_size

def read_small(path):
    """All of a file that has no business being large."""
    size = plain_size(path)
    if size > SMALL:
        refuse(path, "%d bytes, wanted at most %d", size, SMALL)
    return read_at(path, 0, size)

def read_json(path):
    return parse_json(path, read_small(path))

def read_json_beside(folder, name):
    """The file as Fields, or Fields without any when there is no such file."""
    path = os.path.join(folder, name)
    return read_json(path) if os.path.lexists(path) else Fields(path, {})

WANTED = object()

class Fields:
    """A JSON object whose values are checked as they are taken. null counts as absent."""

    def __init__(self, where, values):
        self.where, self.values = where, values

    def __contains__(self, key):
        return self.values.get(key) is not None

    def take(self, key, kinds, default, wanted):
        value = self.values.get(key)
        if value is None:
            if default is WANTED:
                refuse(self.where, "no %s", key)
            return default
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            refuse(self.where, "%s is a JSON %s, wanted %s", key, type(value).__name__, wanted)
        return value

    def integer(self, key, default=WANTED):
        return self.take(key, (int,), default, "a whole number")

    def count(self, key, default=WANTED):
        value = self.integer(key, default)
        if key in self and not 1 <= value < 2**31:
            refuse(self.where, "%s is %d, wanted 1 to 2147483647", key, value)
        return value

    def number(self, key, default=WANTED, most=1e38):
        """A number that is still positive and finite as f32."""
        value = self.take(key, (int, float), default, "a number")
        if key in self and not 1e-37 < value < most:  # NaN fails too
            refuse(self.where, "%s is %s, wanted a positive number below %g", key, value, most)
        return value

    def flag(self, key, default=False):
        return self.take(key, (bool,), default, "true or false")

    def text(self, key, default=WANTED):
        return self.take(key, (str,), default, "a string")

    def list(self, key, default=WANTED):
        return self.take(key, (list,), default, "a list")

    def object(self, key):
        return Fields("%s: %s" % (self.where, key), self.take(key, (dict,), {}, "an object"))

    def objects(self, key):
        """The objects of a list; an absent list has none."""
        for i, value in enumerate(self.list(key, [])):
            where = "%s: %s[%d]" % (self.where, key, i)
            if not isinstance(value, dict):
                refuse(where, "no object")
            yield Fields(where, value)

# ------------------------------------------------------------------------------------------------
# 2. The tokenizer file

SENTENCEPIECE, BYTE_LEVEL = 0, 1
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADD_BOS, DUMMY_PREFIX, WHOLE_PIECES, NFC = 1, 2, 4, 8
SPLITS = {"none": 0, "llama3": 1, "qwen2": 2, "gpt2": 3, "smollm": 4}
CHATS = {"none": 0, "llama2": 1, "llama3": 2, "chatml": 3, "mistral": 4, "zephyr": 5}
MOST_TOKENS = 1 << 24  # far above any vocabulary: an id must not become a list of any length
MOST_ENDS = 16
UNDERLINE = "\u2581"  # how SentencePiece writes a space

class Tokenizer:
    """What the file says, before it is bytes."""

    def __init__(self, where, kind):
        self.where, self.kind = where, kind
        self.pieces = []       # (bytes, score, type) by id
        self.ids = {}          # the name of a token, as its source writes it -> id
        self.owners = {}       # and back
        self.merges = []       # (left id, right id, id of both together), the first merges first
        self.flags, self.split, self.chat = 0, SPLITS["none"], CHATS["none"]
        self.bos, self.unknown, self.ends = -1, -1, []

    def place(self, number, name, piece):
        """The token of this id, which may lie beyond the vocabulary so far."""
        if not 0 <= number < MOST_TOKENS:
            refuse(self.where, "token %r has the id %d", name, number)
        self.pieces.extend([(b"", 0.0, UNUSED)] * (number + 1 - len(self.pieces)))
        known = self.ids.setdefault(name, number)
        if known != number or self.owners.setdefault(number, name) != name:
            refuse(self.where, "token %r has the ids %d and %d, or shares one", name, known, number)
        self.pieces[number] = piece

    def add(self, number, name, special):
        """A token from outside the vocabulary proper; one that is in it changes its type."""
        old = self.pieces[number][2] if 0 <= number < len(self.pieces) else UNUSED
        kind = old if old in (UNKNOWN, BYTE) else CONTROL if special else USER_DEFINED
        if not name:
            refuse(self.where, "added token %d is empty", number)
        if old != BYTE:
            self.place(number, name, (utf8(self.where, name), 0.0, kind))

    def control(self, name):
        """The id of the control token of this name, or None."""
        found = self.ids.get(name)
        return found if found is not None and self.pieces[found][2] == CONTROL else None

    def ends_with(self, where, number):
        if not 0 <= number < len(self.pieces):
            refuse(where, "end of text %d, wanted an id below %d", number, len(self.pieces))
        if number not in self.ends:
            self.ends.append(number)

def utf8(where, text):
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
        refuse(where, "token %r is no Unicode text", text)

def runs(value_of):
    """(first, value) for every run of code points that have the same value."""
    rows, last = [], None
    for point in range(0x110000):
        value = value_of(chr(point))
        if value != last:
            rows.append((point, value))
            last = value
    return rows

CLASSES = {"L": 1, "N": 2, "Z": 3}  # \p{L}, \p{N}, \s; every separator (\p{Z}) is white space
WHITE_CONTROLS = "\t\n\v\f\r\x85"   # and these are, although they are control characters

def class_of(character):
    kind = unicodedata.category(character)
    return CLASSES.get(kind[0], 3 if character in WHITE_CONTROLS else 0)

def compositions():
    """(whole, first, second) for every canonical decomposition of one step.

    Bit 31 of whole: NFC takes it apart and never makes it again."""
    rows = []
    for point in range(0x110000):
        parts = unicodedata.decomposition(chr(point))
        if not parts or parts.startswith("<"):  # <...> is a compatibility decomposition
            continue
        first, second = ([int(p, 16) for p in parts.split()] + [0])[:2]
        kept = unicodedata.normalize("NFC", chr(point)) == chr(point)
        rows.append((point | (not kept) << 31, first, second))
    return rows

def pack_piece(piece):
    text, score, kind = piece
    return struct.pack("<fII", score, kind, len(text)) + text + bytes(-len(text) % 4)

def pack_rows(rows):
    flat = [number for row in rows for number in row]
    return struct.pack("<%dI" % len(flat), *flat)

def pack_tokenizer(t):
    """The tokenizer file, byte for byte."""
    if len(t.ends) > MOST_ENDS:
        refuse(t.where, "%d ends of text, wanted at most %d", len(t.ends), MOST_ENDS)
    tables = [t.merges,
              runs(class_of) if t.kind == BYTE_LEVEL and t.split else [],
              runs(unicodedata.combining) if t.flags & NFC else [],
              compositions() if t.flags & NFC else []]
    body = b"".join([pack_rows(rows) for rows in tables] + [pack_piece(p) for p in t.pieces])
    ends = t.ends + [0] * (MOST_ENDS - len(t.ends))
    return struct.pack(
        "<8s6I2iI16I4I124xQ", b"LLAMA02T", 1, t.kind, len(t.pieces), t.flags, t.split, t.chat,
        t.bos, t.unknown, len(t.ends), *ends, *[len(rows) for rows in tables],
        256 + len(body)) + body

# ------------------------------------------------------------------------------------------------
# 3. Tokenizers of others

def byte_of(name):
    """The byte that a token like <0x0A> stands for, or None."""
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    return int(found.group(1), 16) if found else None

def sentencepiece_bytes(where, name, kind):
    """What a SentencePiece token prints: U+2581 is a space, <0x0A> one byte."""
    if kind == UNUSED:
        return b""
    if kind == BYTE:
        if byte_of(name) is None:
            refuse(where, "byte token %r, wanted <0x00> to <0xFF>", name)
        return bytes([byte_of(name)])
    return utf8(where, name.replace(UNDERLINE, " ") if kind in (NORMAL, USER_DEFINED) else name)

def want_all_bytes(t):
    """Byte fallback promises that any text can be said."""
    found = {text for text, _, kind in t.pieces if kind == BYTE}
    if len(found) < 256:
        lacking = next(b for b in range(256) if bytes([b]) not in found)
        refuse(t.where, "byte fallback without a token for byte 0x%02X", lacking)

# SentencePiece's .model: a protobuf message. https://protobuf.dev/programming-guides/encoding/
VARINT, LENGTH = 0, 2     # wire types
FIXED = {1: 8, 5: 4}      # and those of a fixed size

def varint(where, data, at):
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value & 2**64 - 1, at
    refuse(where, "no SentencePiece model: a number is cut short at byte %d", at)

def parse_message(where, data):
    """Field number -> its values in order: an int for a varint, bytes for all else."""
    fields, at = collections.defaultdict(list), 0
    while at < len(data):
        key, at = varint(where, data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = varint(where, data, at)
        elif wire == LENGTH or wire in FIXED:
            size, at = varint(where, data, at) if wire == LENGTH else (FIXED[wire], at)
            value, at = data[at:at + size], at + size
        else:
            refuse(where, "no SentencePiece model: wire type %d at byte %d", wire, at)
        if at > len(data):
            refuse(where, "no SentencePiece model: field %d is cut short", key >> 3)
        fields[key >> 3].append(value)
    return fields

def last(where, message, number, default):
    """The value of a field; its type is that of the default."""
    value = message[number][-1] if message.get(number) else default
    if not isinstance(value, type(default)):
        refuse(where, "no SentencePiece model: field %d has the wrong type", number)
    return value - 2**64 if isinstance(value, int) and value >> 63 else value

MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}

def check_sentencepiece(where, trainer, normalizer):
    """Refuse what would split or change text in a way that run.c does not know."""
    model_type = last(where, trainer, 3, 1)
    if model_type != 2:
        refuse(where, "model type %s, wanted BPE", MODEL_TYPES.get(model_type, model_type))
    for message, number, default, wanted, name in [
            (trainer, 24, 0, 0, "treat_whitespace_as_suffix"), (trainer, 35, 0, 1, "byte_fallback"),
            (normalizer, 4, 1, 0, "remove_extra_whitespaces"),
            (normalizer, 5, 1, 1, "escape_whitespaces")]:
        if last(where, message, number, default) != wanted:
            refuse(where, "%s is %s", name, "false" if wanted else "true")
    if last(where, normalizer, 2, b"") or last(where, normalizer, 6, b""):
        name = last(where, normalizer, 1, b"").decode("utf-8", "replace")
        refuse(where, "normalizer %s, wanted identity", name or "without a name")

def read_sentencepiece(path):
    message = parse_message(path, read_small(path))
    trainer = parse_message(path, last(path, message, 2, b""))
    normalizer = parse_message(path, last(path, message, 3, b""))
    check_sentencepiece(path, trainer, normalizer)
    t = Tokenizer(path, SENTENCEPIECE)
    for number, data in enumerate(message[1]):
        piece = parse_message(path, data) if isinstance(data, bytes) else {}
        place_sentencepiece(t, number, piece)
    t.unknown, t.bos, end = (last(path, trainer, n, d) for n, d in ((40, 0), (41, 1), (42, 2)))
    for number in (t.unknown, t.bos, end):
        if not -1 <= number < len(t.pieces):
            refuse(path, "a special token has id %d, wanted below %d", number, len(t.pieces))
    t.flags = (last(path, normalizer, 3, 1) != 0) * DUMMY_PREFIX | (t.bos >= 0) * ADD_BOS
    t.ends = [end] if end >= 0 else []
    want_all_bytes(t)
    return t

def place_sentencepiece(t, number, message):
    try:
        name = last(t.where, message, 1, b"").decode("utf-8")
    except UnicodeDecodeError:
        refuse(t.where, "token %d is no UTF-8", number)
    data, kind = last(t.where, message, 2, bytes(4)), last(t.where, message, 3, NORMAL)
    score = struct.unpack("<f", data)[0] if len(data) == 4 else math.nan
    if not math.isfinite(score):
        refuse(t.where, "token %d has no finite score", number)
    if not NORMAL <= kind <= BYTE or not name:
        refuse(t.where, "token %d is %r of type %d", number, name, kind)
    t.place(number, name, (sentencepiece_bytes(t.where, name, kind), score, kind))

# llama2.c's tokenizer.bin

def is_llama2c_tokenizer(head):
    """Its first token, behind u32 longest, f32 score and u32 length, is <unk>."""
    return head[12:].lstrip(b"\n ").startswith(b"<unk>")

def read_llama2c_tokenizer(path):
    data, at = read_small(path), 4
    t = Tokenizer(path, SENTENCEPIECE)
    while at < len(data):
        score, size = struct.unpack_from("<fI", data, at) if at + 8 <= len(data) else (0, len(data))
        number, text, at = len(t.pieces), data[at + 8:at + 8 + size], at + 8 + size
        if at > len(data):
            refuse(path, "token %d is cut short", number)
        if not size or not math.isfinite(score):
            refuse(path, "token %d has the length %d and the score %s", number, size, score)
        t.pieces.append(llama2c_piece(number, text, score))
    t.flags, t.unknown, t.bos, t.ends = ADD_BOS | DUMMY_PREFIX, 0, 1, [2]
    want_all_bytes(t)
    return t

def llama2c_piece(number, text, score):
    """By position: <unk>, BOS, EOS (both between line feeds there), 256 bytes, then text."""
    if number < 3:
        return text.strip(b"\n"), score, UNKNOWN if number == 0 else CONTROL
    byte = byte_of(text.decode("latin-1")) if number < 259 else None
    return (text, score, NORMAL) if byte is None else (bytes([byte]), score, BYTE)

# tokenizer.json of Hugging Face's tokenizers library

def byte_alphabet():
    """The byte behind each character of byte-level BPE: printable Latin-1 stands for itself,
    the other 68 bytes for U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
BY_THREE = r"(?i:%s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" \
    r"|\s+(?!\S)|\s+" % CONTRACTIONS
SPLIT_REGEXES = {
    BY_THREE: "llama3",
    BY_THREE.replace("{1,3}", ""): "qwen2",
    r"%s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+" % CONTRACTIONS: "gpt2",
}

def steps(parent, key, inner):
    """The parts of a normalizer, pre-tokenizer or post-processor: none, one, or a Sequence."""
    step = parent.object(key)
    if not step.values:
        return []
    return list(step.objects(inner)) if step.text("type") == "Sequence" else [step]

def kinds(parts):
    return [part.text("type") for part in parts]

def want_plain_split(step):
    """The name of the rule in a Split step."""
    regex = step.object("pattern").text("Regex", "")
    if regex not in SPLIT_REGEXES:
        refuse(step.where, "unknown split rule %s", regex or step.object("pattern").values)
    if step.text("behavior") != "Isolated" or step.flag("invert"):
        refuse(step.where, "behavior %s, wanted Isolated", step.text("behavior"))
    return SPLIT_REGEXES[regex]

def split_rule(where, parts):
    """Which rule of run.c the pre-tokenizer is, by the steps it has."""
    names, level = kinds(parts), parts[-1]
    if level.flag("add_prefix_space", True):
        refuse(level.where, "add_prefix_space is true, wanted false")
    regex = level.flag("use_regex", True)
    if names == ["Split", "ByteLevel"] and not regex:
        return want_plain_split(parts[0])
    if names == ["ByteLevel"] and regex:
        return "gpt2"
    if names == ["Digits", "ByteLevel"] and regex and parts[0].flag("individual_digits"):
        return "smollm"
    refuse(where, "unknown pre-tokenizer %s", " + ".join(names))

def space_rule(data, normal, parts):
    """How a SentencePiece-like tokenizer.json makes U+2581 of spaces; True: one goes in front."""
    names = kinds(normal)
    if not parts and names in (["Prepend", "Replace"], ["Replace"]):
        replace = normal[-1]
        found = (replace.object("pattern").text("String", ""), replace.text("content"),
                 normal[0].text("prepend", UNDERLINE))
        if found != (" ", UNDERLINE, UNDERLINE):
            refuse(replace.where, "replaces or prepends %s", ", ".join(map(repr, found)))
        return len(names) == 2
    if not names and kinds(parts) == ["Metaspace"] and parts[0].text("replacement") == UNDERLINE:
        return metaspace_prefix(data, parts[0])
    refuse(data.where, "unknown normalizer %s and pre-tokenizer %s", names, kinds(parts))

def metaspace_prefix(data, step):
    """Split before every space is what plain BPE does only if no token has a space further in."""
    inner = any(UNDERLINE in name[1:] for name in data.object("model").object("vocab").values)
    if step.flag("split", True) and inner:
        refuse(step.where, "splits at every space, but tokens hold spaces inside")
    old = "always" if step.flag("add_prefix_space", True) else "never"
    scheme = step.text("prepend_scheme", old)
    if scheme not in ("always", "first", "never"):
        refuse(step.where, "prepend_scheme %s, wanted always, first or never", scheme)
    if scheme != "never":
        say("%s: text that begins with a space gets one more, as in SentencePiece" % data.where)
    return scheme != "never"

def check_bpe(model):
    if model.text("type", "BPE" if "merges" in model else "none") != "BPE":
        refuse(model.where, "type %s, wanted BPE", model.text("type", "none"))
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.values.get(key):
            refuse(model.where, "%s %r cannot be represented", key, model.values[key])

def place_vocabulary(t, vocab, unknown):
    """Every token of the model with the bytes it stands for."""
    alphabet = byte_alphabet()
    for name, number in vocab.values.items():
        if not isinstance(number, int) or isinstance(number, bool) or not name:
            refuse(vocab.where, "token %r has the id %r", name, number)
        kind = UNKNOWN if name == unknown else NORMAL
        if t.kind == SENTENCEPIECE:
            kind = BYTE if byte_of(name) is not None else kind
            text = sentencepiece_bytes(vocab.where, name, kind)
        else:
            text = bytes([alphabet[c] for c in name]) if alphabet.keys() >= set(name) else None
        t.place(number, name, (text, 0.0, kind))
    t.unknown = t.ids.get(unknown, -1)

def place_merges(t, model):
    """A pair that stands twice has the later rank, as in the library that made the file."""
    ranks = {}
    for rank, pair in enumerate(model.list("merges")):
        pair = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(pair, list) or [type(name) for name in pair] != [str, str]:
            refuse(model.where, "merge %d is %r, wanted two tokens", rank, pair)
        row = tuple(t.ids.get(name, -1) for name in (*pair, "".join(pair)))
        if -1 in row:
            refuse(model.where, "merge %d, %r, is not made of tokens", rank, pair)
        ranks[row] = rank
    if not ranks:
        refuse(model.where, "no merges")
    t.merges = sorted(ranks, key=ranks.get)

def place_added(t, data):
    """Special tokens are never read from text here; the others are, so they must mean the same.

    With a dummy prefix they would not: the library puts one behind every such token, too."""
    for token in data.objects("added_tokens"):
        name, special = token.text("content"), token.flag("special")
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token.flag(key)]
        odd += ["a prefix after it"] * bool(t.flags & DUMMY_PREFIX)
        if odd and not special:
            refuse(token.where, "%r in text with %s cannot be represented", name, odd)
        t.add(token.integer("id"), name, special)

def place_template(t, data):
    """BOS, where the post-processor puts one in front."""
    for step in steps(data, "post_processor", "processors"):
        if step.text("type") not in ("TemplateProcessing", "ByteLevel"):
            refuse(step.where, "unknown post-processor %s", step.text("type"))
        front = []
        for item in step.objects("single"):
            if "Sequence" in item:
                break
            front.append(item.object("SpecialToken").text("id"))
        if len(front) > 1 or any(name not in t.ids for name in front):
            refuse(step.where, "%s in front of text, wanted one token", front)
        if front:
            t.bos, t.flags = t.ids[front[0]], t.flags | ADD_BOS

def read_tokenizer_json(path):
    data = read_json(path)
    model = data.object("model")
    check_bpe(model)
    parts = steps(data, "pre_tokenizer", "pretokenizers")
    normal = steps(data, "normalizer", "normalizers")
    if "ByteLevel" in kinds(parts)[-1:]:
        t = byte_level(path, model, normal, parts)
    else:
        t = sentencepiece_like(data, model, normal, parts)
    place_vocabulary(t, model.object("vocab"), model.text("unk_token", None))
    place_merges(t, model)
    place_added(t, data)
    place_template(t, data)
    finish_pieces(t)
    return t

def byte_level(path, model, normal, parts):
    if kinds(normal) not in ([], ["NFC"]):
        refuse(path, "unknown normalizer %s", " + ".join(kinds(normal)))
    t = Tokenizer(path, BYTE_LEVEL)
    t.split = SPLITS[split_rule(path, parts)]
    t.flags = bool(normal) * NFC | model.flag("ignore_merges") * WHOLE_PIECES
    return t

def sentencepiece_like(data, model, normal, parts):
    if not model.flag("byte_fallback"):
        refuse(model.where, "byte_fallback is false and the pre-tokenizer is not ByteLevel")
    if model.flag("ignore_merges"):
        refuse(model.where, "ignore_merges with byte_fallback cannot be represented")
    t = Tokenizer(data.where, SENTENCEPIECE)
    t.flags = space_rule(data, normal, parts) * DUMMY_PREFIX
    return t

def finish_pieces(t):
    """Every token has its bytes by now, and every byte of a text a token."""
    for number, (text, _, kind) in enumerate(t.pieces):
        if text is None:
            refuse(t.where, "token %d is not in the byte-level alphabet", number)
    if t.kind == SENTENCEPIECE:
        want_all_bytes(t)
        return
    lacking = 256 - len({text for text, _, kind in t.pieces if len(text) == 1 and kind == NORMAL})
    if lacking:
        say("%s: %d of the 256 bytes have no token; text with them loses them" % (t.where, lacking))

# Llama 3's tokenizer.model: a line "base64 rank" for every token (tiktoken's format)

LLAMA3_NAMES = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
    finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id eot_id
    python_tag""".split() + ["reserved_special_token_%d" % i for i in range(3, 248)]  # 256 in all

def read_tiktoken(path):
    t = Tokenizer(path, BYTE_LEVEL)
    ranks = {}
    for number, line in enumerate(read_small(path).splitlines()):
        try:
            text, rank = line.split()
            text, rank = base64.b64decode(text, validate=True), int(rank)
        except ValueError:
            refuse(path, "line %d is not a base64 token and its rank", number + 1)
        if rank != number or not text or ranks.setdefault(text, rank) != rank:
            refuse(path, "line %d has rank %d, wanted %d and a new token", number + 1, rank, number)
        t.pieces.append((text, 0.0, NORMAL))
    t.merges = tiktoken_merges(ranks)
    for i, name in enumerate(LLAMA3_NAMES):
        t.add(len(ranks) + i, "<|%s|>" % name, True)
    t.flags, t.split, t.chat = ADD_BOS | WHOLE_PIECES, SPLITS["llama3"], CHATS["llama3"]
    t.bos = len(ranks)
    finish_pieces(t)
    return t

def tiktoken_merges(ranks):
    """Every way to make a token of two, lowest rank first: tiktoken merges whatever gives one."""
    rows = []
    for text, whole in ranks.items():
        for cut in range(1, len(text)):
            left, right = ranks.get(text[:cut]), ranks.get(text[cut:])
            if left is not None and right is not None:
                rows.append((whole, left, right))
    return [(left, right, whole) for whole, left, right in sorted(rows)]

# What lies beside a tokenizer: BOS, ends of text, the chat format

ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>")
CHAT_MARKS = [  # the first row whose marks all stand in the template
    ("llama3", ["<|start_header_id|>"]), ("chatml", ["<|im_start|>"]),
    ("llama2", ["[INST]", "<<SYS>>"]), ("mistral", ["[INST]"]),
    ("zephyr", ["<|user|>", "<|assistant|>"]),
]

def token_named(t, config, key):
    """The id of the token that tokenizer_config.json names: a string, or an object with content."""
    value = config.values.get(key)
    name = config.object(key).text("content") if isinstance(value, dict) else config.text(key, None)
    if name is not None and name not in t.ids:
        refuse(config.where, "%s %r is not in the vocabulary", key, name)
    return t.ids.get(name)

def add_tokens_beside(t, config, folder):
    """SentencePiece's own file does not know what was added to it later."""
    decoder = config.object("added_tokens_decoder")
    for key in decoder.values:
        token = decoder.object(key)
        if not re.fullmatch("[0-9]{1,8}", key):
            refuse(decoder.where, "%r is no id", key)
        t.add(int(key), token.text("content"), token.flag("special"))
    added = read_json_beside(folder, "added_tokens.json")
    for name in added.values:
        if t.ids.get(name) != added.integer(name):
            t.add(added.integer(name), name, True)

def choose_bos(t, config):
    """A byte-level tokenizer.json that puts BOS in front has decided. Otherwise add_bos_token
    decides, or the class: LlamaTokenizer rewrites its own file and adds BOS unless told not to."""
    in_front = bool(t.flags & ADD_BOS)
    llama = "Llama" in config.text("tokenizer_class", "")
    named = token_named(t, config, "bos_token")
    if named is not None and not in_front:
        t.bos = named
    if in_front and t.kind == BYTE_LEVEL and not llama:
        return
    wanted = config.flag("add_bos_token", llama or in_front) and t.bos >= 0
    t.flags = t.flags & ~ADD_BOS | wanted * ADD_BOS

def choose_ends(t, config, folder):
    """generation_config.json decides before config.json; the tokenizer's own ends come on top."""
    for name in ("generation_config.json", "config.json"):
        found = read_json_beside(folder, name)
        if "eos_token_id" in found:
            ids = found.take("eos_token_id", (int, list), None, "an id or a list of ids")
            for number in ids if isinstance(ids, list) else [ids]:
                if not isinstance(number, int) or isinstance(number, bool):
                    refuse(found.where, "eos_token_id %r, wanted an id", number)
                t.ends_with(found.where, number)
            break
    end = token_named(t, config, "eos_token")
    for number in [end, *map(t.control, ENDS)]:
        if number is not None:
            t.ends_with(config.where, number)

def chat_template(config, folder):
    """The model's own template, from any of the three places where it may stand; or None."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.lexists(path):
        return read_small(path).decode("utf-8", "replace")
    found = config.values.get("chat_template") or \
        read_json_beside(folder, "chat_template.json").values.get("chat_template")
    if isinstance(found, list):
        named = {f.text("name"): f.text("template") for f in config.objects("chat_template")}
        return named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None

def choose_chat(t, config, folder):
    template = chat_template(config, folder)
    for name, marks in CHAT_MARKS:
        if template and all(mark in template for mark in marks):
            t.chat = CHATS[name]
            return
    if template:
        say("%s: a chat template of no known format; choose one with --chat" % t.where)

def read_tokenizer(path):
    """The tokenizer in this file, with what the other files of its folder say about it."""
    folder = os.path.dirname(path) or "."
    head = read_at(path, 0, min(64, plain_size(path)))
    if is_llama2c_tokenizer(head):
        return read_llama2c_tokenizer(path)
    config = read_json_beside(folder, "tokenizer_config.json")
    if path.endswith(".json"):
        t = read_tokenizer_json(path)
    elif re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", head):
        t = read_tiktoken(path)
    else:
        t = read_sentencepiece(path)
        add_tokens_beside(t, config, folder)
    choose_bos(t, config)
    choose_ends(t, config, folder)
    choose_chat(t, config, folder)
    return t

# ------------------------------------------------------------------------------------------------
# 4. Numbers: f32, bf16 and f16, millions at a time
#
# The standard library has no arrays that calculate. But slices of bytes move whole columns of them,
# and one long integer is a row of 32-bit lanes that a handful of operations treat all at once, as
# long as no lane carries into the next.

SIZES = {"f32": 4, "bf16": 2, "f16": 2}
FORMATS = {"f32": "f", "f16": "e"}  # what struct calls them

class Unrepresentable(Exception):
    """A number that the wanted type has no place for."""

@functools.lru_cache(maxsize=64)
def lanes(value, n):
    """The same 32-bit value in each of n lanes."""
    return int.from_bytes(value.to_bytes(4, "little") * n, "little")

def split_sign(data):
    """Signs and magnitudes of f32 numbers, in lanes."""
    n = len(data) // 4
    x = int.from_bytes(data, "little")
    sign = x & lanes(0x80000000, n)
    return n, sign, x ^ sign

def reaches(magnitude, limit, n):
    """Whether any lane is limit or more: the sum then has its top bit set."""
    return magnitude + lanes(0x80000000 - limit, n) & lanes(0x80000000, n) != 0

def halves(lanes_of_four, n, first):
    """Two neighbouring bytes of each lane."""
    data = lanes_of_four.to_bytes(4 * n, "little")
    out = bytearray(2 * n)
    out[0::2], out[1::2] = data[first::4], data[first + 1::4]
    return out

def mend(out, data, odd, source, target):
    """Convert one by one what the lanes cannot; all of it where that is much."""
    a, b = SIZES[source], SIZES[target]
    if len(odd) > len(data) // a // 16:
        n = len(data) // a
        numbers = struct.unpack("<%d%s" % (n, FORMATS[source]), data)
        return struct.pack("<%d%s" % (n, FORMATS[target]), *numbers)
    one, other = struct.Struct("<" + FORMATS[source]), struct.Struct("<" + FORMATS[target])
    for i in odd:
        out[i * b:i * b + b] = other.pack(*one.unpack_from(data, i * a))
    return out

def same(data):
    return data

def widen_bf16(data):
    """bf16 is the upper half of a float."""
    out = bytearray(2 * len(data))
    out[2::4], out[3::4] = data[0::2], data[1::2]
    return out

def narrow_bf16(data):
    """To nearest, ties to even: add just under half a unit, and the last bit that stays."""
    n, sign, x = split_sign(data)
    x += lanes(0x7FFF, n) + (x >> 16 & lanes(1, n))
    if reaches(x, 0x7F800000, n):
        raise Unrepresentable("a number that is infinite, NaN or too large for bf16")
    return halves(x | sign, n, 2)

F16_ODD = re.compile(rb"[\x00-\x03\x80-\x83\x7c-\x7f\xfc-\xff]")  # upper byte: exponent 0 or 31
F32_TINY = re.compile(rb"[\x00-\x38\x80-\xb8]")                   # upper byte: below 2**-13

def widen_f16(data):
    """Normal numbers: the exponent gets 8 bits, so its bias grows by 112; 13 more bits follow."""
    n = len(data) // 2
    spread = bytearray(4 * n)
    spread[0::4], spread[1::4] = data[0::2], data[1::2]
    x = int.from_bytes(spread, "little")
    x = ((x & lanes(0x7FFF, n)) << 13) + lanes(112 << 23, n) | (x & lanes(0x8000, n)) << 16
    odd = [found.start() for found in F16_ODD.finditer(data[1::2])]
    return mend(bytearray(x.to_bytes(4 * n, "little")), data, odd, "f16", "f32")

def narrow_f16(data):
    """The way back, rounded as for bf16. A guard in the top bit spares tiny numbers a borrow."""
    n, sign, x = split_sign(data)
    x += lanes(0xFFF, n) + (x >> 13 & lanes(1, n))
    if reaches(x, 0x47800000, n):  # 65536
        raise Unrepresentable("a number too large for f16, whose largest is 65504")
    x = x + lanes(0x80000000 - (112 << 23), n) >> 13 & lanes(0x7FFF, n)
    odd = [found.start() for found in F32_TINY.finditer(data[3::4])]
    return mend(halves(x | sign >> 16, n, 0), data, odd, "f32", "f16")

WIDEN = {"f32": same, "bf16": widen_bf16, "f16": widen_f16}
NARROW = {"f32": same, "bf16": narrow_bf16, "f16": narrow_f16}

def convert(data, source, target):
    return data if source == target else NARROW[target](WIDEN[source](data))

# ------------------------------------------------------------------------------------------------
# 5. Tensors where they lie

CHUNK = 1 << 20  # bytes read at once: memory stays small whatever the model

Stretch = collections.namedtuple("Stretch", "path offset size")  # of a file, row after row

class Tensor:
    """Numbers of one type, in stretches that stand one after the other or, beside, side by side."""

    def __init__(self, name, kind, shape, stretches, beside=False):
        self.name, self.kind, self.shape = name, kind, tuple(shape)
        self.stretches, self.beside = stretches, beside

    def chunks(self):
        """The bytes in row order."""
        if self.beside:
            yield from self.chunks_beside()
            return
        for path, offset, size in self.stretches:
            for at in range(0, size, CHUNK):
                yield read_at(path, offset + at, min(CHUNK, size - at))

    def chunks_beside(self):
        rows = self.shape[0]
        widths = [stretch.size // rows for stretch in self.stretches]
        row, step = sum(widths), max(1, CHUNK // sum(widths))
        for first in range(0, rows, step):
            n, column = min(step, rows - first), 0
            block = bytearray(n * row)
            for (path, offset, _), width in zip(self.stretches, widths):
                part = read_at(path, offset + first * width, n * width)
                for i in range(n):
                    start = i * row + column
                    block[start:start + width] = part[i * width:(i + 1) * width]
                column += width
            yield block

    def converted(self, kind):
        for chunk in self.chunks():
            try:
                yield convert(chunk, self.kind, kind)
            except Unrepresentable as error:
                refuse(self.stretches[0].path, "%s holds %s", self.name, error)

    def equals(self, other):
        return (self.kind, self.shape) == (other.kind, other.shape) and \
            all(a == b for a, b in zip(self.chunks(), other.chunks()))

def join(where, name, parts, shape):
    """One tensor of this shape out of the parts that a model-parallel checkpoint cut it into.

    Equal parts of the full shape are copies (norms). The full shape tells rows from columns."""
    first, shapes = parts[0], [part.shape for part in parts]
    for part in parts:
        if part.kind not in SIZES or part.kind != first.kind:
            refuse(where, "%s has the type %s, wanted f32, bf16 or f16", name, part.kind)
    if all(s == shape for s in shapes) and (len(shape) == 1 or len(parts) == 1):
        if not all(part.equals(first) for part in parts[1:]):
            refuse(where, "%s differs between the parts", name)
        return first
    stretches = [part.stretches[0] for part in parts]
    if len(shape) == 2 and all(len(s) == 2 for s in shapes):
        rows, columns = sum(s[0] for s in shapes), sum(s[1] for s in shapes)
        if rows == shape[0] and all(s[1] == shape[1] for s in shapes):
            return Tensor(name, first.kind, shape, stretches)
        if columns == shape[1] and all(s[0] == shape[0] for s in shapes):
            return Tensor(name, first.kind, shape, stretches, beside=True)
    found = " + ".join(sorted({"x".join(map(str, s)) or "a scalar" for s in shapes}))
    refuse(where, "%s has the shape %s, wanted %s", name, found, "x".join(map(str, shape)))

# ------------------------------------------------------------------------------------------------
# 6. The model and its file

TYPES = {"f32": 0, "bf16": 1, "f16": 2, "q8": 3, "q4": 4}
TIED, BIASES, HEAD_NORMS, NEIGHBOURS, INTERLEAVED = 1, 2, 4, 8, 16
ALIGN = 64
NO_SCALING = (0, 0.0, 0.0, 0.0, 0)

Config = collections.namedtuple("Config", """
    dim hidden layers heads kv_heads head_dim vocab context
    window flags eps theta scaling""")

# Every tensor once, in the order of the file. Extents: D dim, F hidden, V vocabulary, H one head,
# Q all query heads, K all key heads. A slot with a flag exists only in models that have the flag.
Slot = collections.namedtuple("Slot", "name shape hugging_face meta flag")
EMBEDDING = Slot("embedding", "VD", "model.embed_tokens.weight", "tok_embeddings.weight", 0)
FINAL_NORM = Slot("final_norm", "D", "model.norm.weight", "norm.weight", 0)
CLASSIFIER = Slot("classifier", "VD", "lm_head.weight", "output.weight", 0)
LAYER = [
    Slot("attention_norm", "D", "input_layernorm.weight", "attention_norm.weight", 0),
    Slot("wq", "QD", "self_attn.q_proj.weight", "attention.wq.weight", 0),
    Slot("wk", "KD", "self_attn.k_proj.weight", "attention.wk.weight", 0),
    Slot("wv", "KD", "self_attn.v_proj.weight", "attention.wv.weight", 0),
    Slot("bq", "Q", "self_attn.q_proj.bias", "", BIASES),
    Slot("bk", "K", "self_attn.k_proj.bias", "", BIASES),
    Slot("bv", "K", "self_attn.v_proj.bias", "", BIASES),
    Slot("q_norm", "H", "self_attn.q_norm.weight", "", HEAD_NORMS),
    Slot("k_norm", "H", "self_attn.k_norm.weight", "", HEAD_NORMS),
    Slot("wo", "DQ", "self_attn.o_proj.weight", "attention.wo.weight", 0),
    Slot("ffn_norm", "D", "post_attention_layernorm.weight", "ffn_norm.weight", 0),
    Slot("w1", "FD", "mlp.gate_proj.weight", "feed_forward.w1.weight", 0),
    Slot("w3", "FD", "mlp.up_proj.weight", "feed_forward.w3.weight", 0),
    Slot("w2", "DF", "mlp.down_proj.weight", "feed_forward.w2.weight", 0),
]

def layout(c):
    """(slot, layer) of every tensor of the file in order; the layer is None outside the layers."""
    yield EMBEDDING, None
    for layer in range(c.layers):
        for slot in LAYER:
            if slot.flag & c.flags == slot.flag:
                yield slot, layer
    yield FINAL_NORM, None
    if not c.flags & TIED:
        yield CLASSIFIER, None

def shape_of(c, slot):
    extent = {"D": c.dim, "F": c.hidden, "V": c.vocab, "H": c.head_dim,
              "Q": c.heads * c.head_dim, "K": c.kv_heads * c.head_dim}
    return tuple(extent[letter] for letter in slot.shape)

MOST_LAYERS = 4096  # the deepest known has 126

def check_config(where, c):
    """What every model must satisfy, wherever its numbers come from."""
    for field in Config._fields[:8]:
        if not 1 <= getattr(c, field) < 2**31:
            refuse(where, "%s is %d, wanted 1 to 2147483647", field, getattr(c, field))
    if c.heads % c.kv_heads:
        refuse(where, "%d heads are no multiple of %d key/value heads", c.heads, c.kv_heads)
    if c.head_dim % 2:
        refuse(where, "head_dim is %d, wanted an even number: RoPE turns pairs", c.head_dim)
    if c.layers > MOST_LAYERS:
        refuse(where, "%d layers, wanted at most %d", c.layers, MOST_LAYERS)

Model = collections.namedtuple("Model", "config tensors")  # tensors: (slot name, layer) -> Tensor

def natural_type(model):
    """The type that holds all matrices exactly: f16 has more bits than bf16, but less range."""
    kinds = {tensor.kind for tensor in model.tensors.values() if len(tensor.shape) == 2}
    return kinds.pop() if len(kinds) == 1 else "f32"

def aligned(n):
    return -(-n // ALIGN) * ALIGN

PANEL, GROUP = 16, 32  # rows that are stored together, columns that share a scale

def panel_sizes(columns, kind):
    """Groups in a row, bytes of weights and bytes of scales of one panel."""
    groups = -(-columns // GROUP)
    return groups, groups * ALIGN * (8 if kind == "q8" else 4), aligned(groups * PANEL * 2)

def stored_size(shape, kind):
    if len(shape) == 1:
        return 4 * shape[0]
    if kind in SIZES:
        return shape[0] * shape[1] * SIZES[kind]
    return -(-shape[0] // PANEL) * sum(panel_sizes(shape[1], kind)[1:])

def file_size(c, kind):
    at = 256
    for slot, _ in layout(c):
        at = aligned(at) + stored_size(shape_of(c, slot), kind)
    return at

def pack_header(c, kind):
    flags = c.flags | INTERLEAVED * (kind not in SIZES)
    return struct.pack("<8s12I2fI3fI164xQ", b"LLAMA02", 1, TYPES[kind], *c[:8], c.window, flags,
                       c.eps, c.theta, *c.scaling, file_size(c, kind))

class Progress:
    """How much of a file is written, for a person who waits; silent in a pipe."""

    def __init__(self, total):
        self.total, self.shown = total, -1
        self.on = sys.stderr.isatty()

    def reach(self, at):
        percent = 100 * at // self.total
        if self.on and percent != self.shown:
            self.shown = percent
            print("\r%-40s %3d %% of %d MB" % ("#" * (percent * 40 // 100), percent,
                                            self.total // 10**6), end="", file=sys.stderr)
            print("", end="\n" if percent == 100 else "", file=sys.stderr, flush=True)

def model_pieces(c, kind, contents):
    """The whole file, piece by piece. contents(slot, layer, kind) yields the bytes of one tensor."""
    at = 256
    yield pack_header(c, kind)
    for slot, layer in layout(c):
        shape = shape_of(c, slot)
        yield bytes(aligned(at) - at)
        at, done = aligned(at), 0
        for chunk in contents(slot, layer, kind if len(shape) == 2 else "f32"):
            done += memoryview(chunk).nbytes
            yield chunk
        assert done == stored_size(shape, kind)
        at += done

def write_model(output, path, c, kind, contents):
    file, at, progress = output.create(path), 0, Progress(file_size(c, kind))
    for piece in model_pieces(c, kind, contents):
        rest = memoryview(piece).cast("B")
        while rest:  # nothing that is written crosses the end of a block, so that whole ones leave
            part, rest = rest[:BLOCK - at % BLOCK], rest[BLOCK - at % BLOCK:]
            at += file.write(part)
        progress.reach(at)

# ------------------------------------------------------------------------------------------------
# 7. Checkpoints of others

IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs")  # they follow from the config

def gather(where, c, found, name_of):
    """Every tensor that the config promises, with its shape, and no other. Empties found."""
    tensors = {}
    for slot, layer in layout(c):
        name = name_of(slot, layer)
        if name not in found:
            refuse(where, "no tensor %s", name)
        tensors[slot.name, layer] = join(where, name, found.pop(name), shape_of(c, slot))
    for name in found:
        if not IGNORED.fullmatch(name):
            refuse(where, "tensor %s has no place in this architecture", name)
    return tensors

# Hugging Face: config.json and safetensors

DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
          "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8}
HEADER_LIMIT = 100_000_000  # the safetensors library's own
MOST_DIMENSIONS = 8

def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

def read_safetensors(path):
    """Name -> Tensor. A JSON header says where each lies; together they fill the file exactly."""
    size = plain_size(path)
    length = struct.unpack("<Q", read_at(path, 0, 8))[0] if size >= 8 else size
    if length > size - 8:
        refuse(path, "header of %d bytes in a file of %d", length, size)
    if length > HEADER_LIMIT:
        refuse(path, "header of %d bytes, wanted at most %d", length, HEADER_LIMIT)
    header = parse_json(path, read_at(path, 8, length))
    header.values.pop("__metadata__", None)
    base, tensors, end = 8 + length, {}, 0
    entries = [(header.object(name), name) for name in header.values]
    spans = sorted((checked_span(entry), name, entry) for entry, name in entries)
    for (begin, stop), name, entry in spans:
        if begin != end:
            refuse(path, "tensor %s begins at %d, wanted %d: hole or overlap", name, begin, end)
        end = stop
        kind = entry.text("dtype")
        kind = kind.lower() if kind.lower() in SIZES else kind
        stretch = Stretch(path, base + begin, stop - begin)
        tensors[name] = Tensor(name, kind, entry.list("shape"), [stretch])
    if base + end != size:
        refuse(path, "tensors end at byte %d of %d", base + end, size)
    return tensors

def checked_span(entry):
    """The offsets of one tensor, which agree with its dtype and shape."""
    dtype, shape, offsets = entry.text("dtype"), entry.list("shape"), entry.list("data_offsets")
    if dtype not in DTYPES:
        refuse(entry.where, "unknown dtype %s", dtype)
    if len(shape) > MOST_DIMENSIONS or not all(map(is_count, shape)):
        refuse(entry.where, "shape %s", shape)
    if len(offsets) != 2 or not all(map(is_count, offsets)) or offsets[0] > offsets[1]:
        refuse(entry.where, "data_offsets %s", offsets)
    wanted = math.prod(shape) * DTYPES[dtype]
    found = offsets[1] - offsets[0]
    if found != wanted:
        refuse(entry.where, "%d bytes, wanted %d for %s %s", found, wanted, dtype, shape)
    return tuple(offsets)

def shard_path(folder, index, name):
    """A shard lies in the folder itself, or behind a link in the blobs of Hugging Face's cache."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+", name) or not name.isprintable():
        refuse(index.where, "shard %r, wanted the name of a file in this folder", name)
    path = os.path.join(folder, name)
    homes = [os.path.realpath(folder), os.path.realpath(os.path.join(folder, "../../blobs"))]
    if os.path.dirname(os.path.realpath(path)) not in homes:
        refuse(index.where, "shard %s is a link out of the folder", name)
    if not os.path.exists(path):
        refuse(index.where, "shard %s is not there", name)
    return path

def read_shards(folder):
    """All tensors of a Hugging Face folder."""
    index_path = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    if not os.path.lexists(index_path):
        if not os.path.lexists(single):
            refuse(folder, "neither model.safetensors nor model.safetensors.index.json is there")
        return read_safetensors(single)
    index = read_json(index_path)
    home, tensors = index.object("weight_map").values, {}
    if not home:
        refuse(index_path, "no weight_map")
    shards = sorted({shard_path(folder, index, name) for name in home.values()})
    for path in shards:
        for name, tensor in read_safetensors(path).items():
            if home.get(name) != os.path.basename(path):
                refuse(path, "tensor %s, which the index sees in %s", name, home.get(name))
            tensors[name] = tensor
    for name in home:
        if name not in tensors:
            refuse(index_path, "tensor %s is not in %s", name, home[name])
    return tensors

# What transformers takes for a key that config.json leaves out; null there means None, not this.
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
WINDOW_OFF = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8,
                           **WINDOW_OFF, "use_sliding_window": True, "max_window_layers": 0},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, **WINDOW_OFF},
    "Qwen3ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32,
                         "head_dim": 128, **WINDOW_OFF},
}

def read_config(path):
    """config.json with the defaults of its family filled in."""
    config = read_json(path)
    names = config.list("architectures")
    family = next((family for family in FAMILIES if names == [family]), None)
    if family is None:
        refuse(path, "architecture %s, wanted one of %s", names, ", ".join(FAMILIES))
    config.values = {**COMMON, **FAMILIES[family], **config.values}
    for key in ("quantization_config", "compression_config"):
        if key in config:
            refuse(path, "%s: quantized checkpoints cannot be represented", key)
    if config.text("hidden_act") != "silu":
        refuse(path, "activation %s, wanted silu", config.text("hidden_act"))
    if config.flag("mlp_bias"):
        refuse(path, "mlp_bias cannot be represented")
    return family, config

def rope_of(config):
    """theta and scaling, from rope_parameters (new) or rope_theta and rope_scaling (old)."""
    rope = config.object("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    for values in (rope, config):
        if values.number("partial_rotary_factor", 1) != 1:
            refuse(values.where, "partial_rotary_factor cannot be represented")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if any(isinstance(value, dict) for value in rope.values.values()):
        refuse(rope.where, "one rope for each kind of layer cannot be represented")
    if kind == "default":
        return theta, NO_SCALING
    if kind == "linear":
        return theta, (1, rope.number("factor"), 0.0, 0.0, 0)
    if kind != "llama3":
        refuse(rope.where, "rope type %s, wanted default, linear or llama3", kind)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        refuse(rope.where, "low_freq_factor %s, wanted less than high_freq_factor %s", low, high)
    original = rope.count("original_max_position_embeddings")
    return theta, (2, rope.number("factor"), low, high, original)

def window_of(config, family, layers):
    """The sliding window, which all layers have or none."""
    window = 0
    if family != "LlamaForCausalLM" and config.flag("use_sliding_window"):
        window = config.count("sliding_window", 0)
    first = config.integer("max_window_layers", 0)
    kinds = config.list("layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if i < first else "sliding_attention" for i in (0, layers - 1)]
    elif len(kinds) != layers:
        refuse(config.where, "layer_types names %d layers of %d", len(kinds), layers)
    if not window or all(kind == "full_attention" for kind in kinds):
        return 0
    if any(kind != "sliding_attention" for kind in kinds):
        refuse(config.where, "a sliding window in some layers only cannot be represented")
    return window

def hugging_face_config(path):
    family, f = read_config(path)
    dim, heads = f.count("hidden_size"), f.count("num_attention_heads")
    layers = f.count("num_hidden_layers")
    if "head_dim" not in f and dim % heads:
        refuse(path, "hidden_size %d is no multiple of %d heads", dim, heads)
    theta, scaling = rope_of(f)
    biases = family == "Qwen2ForCausalLM" or f.flag("attention_bias")
    flags = f.flag("tie_word_embeddings") * TIED | biases * BIASES | \
        (family == "Qwen3ForCausalLM") * HEAD_NORMS
    return Config(
        dim=dim, hidden=f.count("intermediate_size"), layers=layers, heads=heads,
        kv_heads=f.count("num_key_value_heads", heads), head_dim=f.count("head_dim", dim // heads),
        vocab=f.count("vocab_size"), context=f.count("max_position_embeddings"),
        window=window_of(f, family, layers), flags=flags, eps=f.number("rms_norm_eps", most=1),
        theta=theta, scaling=scaling)

def hugging_face_name(slot, layer):
    return slot.hugging_face if layer is None else "model.layers.%d.%s" % (layer, slot.hugging_face)

def read_hugging_face(folder):
    path = os.path.join(folder, "config.json")
    c = hugging_face_config(path)
    check_config(path, c)
    found = {name: [tensor] for name, tensor in read_shards(folder).items()}
    head = found.pop(CLASSIFIER.hugging_face, None) if c.flags & TIED else None
    tensors = gather(folder, c, found, hugging_face_name)
    if head and not head[0].equals(tensors["embedding", None]):
        refuse(folder, "lm_head.weight differs from the embedding, but tie_word_embeddings is true")
    return Model(c, tensors)

# Meta: params.json and consolidated.NN.pth, a zip of one pickle and the bytes of each storage

STORAGES = {"torch FloatStorage": "f32", "torch HalfStorage": "f16",
            "torch BFloat16Storage": "bf16"}
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
ORDERED_DICT = "collections OrderedDict"
IMPORTS = {*STORAGES, REBUILD_TENSOR, REBUILD_PARAMETER, ORDERED_DICT}
Import = collections.namedtuple("Import", "name")  # never more than a name: nothing is imported
Storage = collections.namedtuple("Storage", "kind count stretch")
PICKLE_LIMIT = 1 << 26  # bytes of data.pkl; Llama 2 70B has 0.1 million

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

class Pickle:
    """The few steps of the pickle machine that a dictionary of tensors needs, and no other.

    pickle.Unpickler calls whatever the file names; here names stay names. open_storage(kind, key,
    count) finds the bytes of a storage."""

    def __init__(self, where, open_storage):
        self.where, self.open_storage = where, open_storage
        self.stack, self.marks, self.memo = [], [], {}

    def load(self, data):
        try:
            for opcode, value, _ in pickletools.genops(data):
                if not self.push(opcode.name, value) and not self.combine(opcode.name):
                    refuse(self.where, "pickle step %s, which no tensor needs", opcode.name)
            return self.stack.pop()
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            refuse(self.where, "data.pkl is no pickle of tensors")

    def push(self, step, value):
        """Steps that add to the stack or remember what is on it; False for any other step."""
        if step in LITERALS:
            self.stack.append(value)
        elif step in CONSTANTS:
            self.stack.append(CONSTANTS[step])
        elif step in EMPTY:
            self.stack.append(EMPTY[step]())
        elif step == "MARK":
            self.marks.append(len(self.stack))
        elif step in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = self.stack[-1]
        elif step == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif step in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        elif step == "GLOBAL":
            self.stack.append(self.name(value))
        else:
            return step in ("PROTO", "FRAME", "STOP")
        return True

    def combine(self, step):
        """Steps that make one thing of several; False for any other step."""
        pop = self.stack.pop
        if step in TUPLES:
            self.stack[-TUPLES[step]:] = [tuple(self.stack[-TUPLES[step]:])]
        elif step == "TUPLE":
            self.stack.append(tuple(self.above_mark()))
        elif step == "SETITEM":
            value, key = pop(), pop()
            self.fill([key, value])
        elif step == "SETITEMS":
            self.fill(self.above_mark())
        elif step == "STACK_GLOBAL":
            name, module = pop(), pop()
            self.stack.append(self.name(module + " " + name))
        elif step == "BINPERSID":
            self.stack.append(self.storage(*pop()))
        elif step == "REDUCE":
            arguments, function = pop(), pop()
            self.stack.append(self.call(function.name, arguments))
        elif step == "BUILD":
            pop()  # attributes of the dictionary (_metadata)
        else:
            return False
        return True

    def above_mark(self):
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def fill(self, items):
        for key, value in zip(items[0::2], items[1::2]):
            if not isinstance(key, str) or key in self.stack[-1]:
                refuse(self.where, "data.pkl has a key twice, or one that is no name")
            self.stack[-1][key] = value

    def name(self, name):
        if name not in IMPORTS:
            refuse(self.where, "pickle imports %s, wanted tensors only", name.replace(" ", "."))
        return Import(name)

    def storage(self, word, kind, key, _location, count):
        if word != "storage" or kind.name not in STORAGES or not is_count(count):
            refuse(self.where, "a storage of %s, wanted f32, bf16 or f16", kind.name)
        kind = STORAGES[kind.name]
        return Storage(kind, count, self.open_storage(key, count * SIZES[kind]))

    def call(self, function, arguments):
        if function == ORDERED_DICT and arguments == ():
            return {}
        if function == REBUILD_PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        if function == REBUILD_TENSOR:
            return self.tensor(*arguments[:4])
        refuse(self.where, "pickle calls %s in a way that no tensor needs", function)

    def tensor(self, storage, offset, shape, strides):
        """A tensor whose rows follow each other in its storage."""
        if len(shape) > MOST_DIMENSIONS or not all(map(is_count, (offset, *shape, *strides))):
            refuse(self.where, "a tensor with a bad shape or offset")
        wanted = [math.prod(shape[i + 1:]) for i in range(len(shape))]
        odd = [n > 1 and a != b for n, a, b in zip(shape, strides, wanted)]
        if any(odd) or len(strides) != len(shape):
            refuse(self.where, "a tensor of shape %s has strides %s", shape, strides)
        size, (path, start, _) = SIZES[storage.kind], storage.stretch
        if offset + math.prod(shape) > storage.count:
            refuse(self.where, "a tensor of shape %s leaves its storage of %d numbers",
                   shape, storage.count)
        stretch = Stretch(path, start + offset * size, math.prod(shape) * size)
        return Tensor("a tensor", storage.kind, shape, [stretch])

class Archive:
    """A .pth file: a zip whose members lie uncompressed, so that they can be read in place."""

    def __init__(self, path):
        self.path, self.size = path, plain_size(path)
        if read_at(path, 0, min(4, self.size)) != b"PK\3\4":
            refuse(path, "no zip: no .pth, or older than torch 1.6, then save it again with torch")
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError,
                struct.error) as error:
            refuse(path, "damaged zip: %s", error)
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members):
            refuse(path, "two members of the zip have the same name")
        pickles = [name for name in self.members if re.fullmatch("[^/]+/data[.]pkl", name)]
        if len(pickles) != 1:
            refuse(path, "%d members data.pkl, wanted one", len(pickles))
        self.prefix = pickles[0][:-len("data.pkl")]

    def stretch(self, name):
        """Where the bytes of a member lie: behind its local header, whose length only it knows."""
        member = self.members.get(self.prefix + name)
        if member is None:
            refuse(self.path, "no %s in the zip", self.prefix + name)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            refuse(self.path, "%s is compressed or encrypted, wanted it stored", name)
        if not 0 <= member.header_offset <= self.size - 30:
            refuse(self.path, "%s lies outside the file", name)
        local = read_at(self.path, member.header_offset, 30)
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", local, 26))
        if local[:4] != b"PK\3\4" or start + member.file_size > self.size:
            refuse(self.path, "%s lies outside the file", name)
        return Stretch(self.path, start, member.file_size)

    def read(self, name, limit):
        stretch = self.stretch(name)
        if stretch.size > limit:
            refuse(self.path, "%s has %d bytes, wanted at most %d", name, stretch.size, limit)
        return read_at(*stretch)

    def storage(self, key, size):
        stretch = self.stretch("data/" + key)
        if stretch.size != size:
            refuse(self.path, "storage %s has %d bytes, wanted %d", key, stretch.size, size)
        return stretch

def read_pth(path):
    """Name -> Tensor."""
    archive = Archive(path)
    if archive.prefix + "byteorder" in archive.members:
        if archive.read("byteorder", 16) != b"little":
            refuse(path, "byteorder is not little")
    found = Pickle(path, archive.storage).load(archive.read("data.pkl", PICKLE_LIMIT))
    if not isinstance(found, dict):
        refuse(path, "data.pkl holds no dictionary of tensors")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            refuse(path, "%s is no tensor", name)
        tensor.name = name
    return found

def read_parts(folder):
    """Name -> its Tensors, one for each model-parallel part."""
    names = sorted(n for n in os.listdir(folder) if re.fullmatch(r"consolidated\.[0-9]+\.pth", n))
    if [int(name.split(".")[1]) for name in names] != list(range(len(names))) or not names:
        refuse(folder, "found %s, wanted consolidated.00.pth and on without a gap", names)
    parts = [read_pth(os.path.join(folder, name)) for name in names]
    for name, part in zip(names, parts):
        if part.keys() != parts[0].keys():
            odd = min(part.keys() ^ parts[0].keys())
            refuse(os.path.join(folder, name), "tensor %s is not in every part", odd)
    return {name: [part[name] for part in parts] for name in parts[0]}

PARAMS = """dim n_layers n_heads n_kv_heads norm_eps vocab_size rope_theta hidden_dim head_dim
    sliding_window use_scaled_rope rope_scaling_factor multiple_of ffn_dim_multiplier
    max_batch_size max_seq_len""".split()

def meta_scaling(p):
    """Llama 3.1 stretches by 8, the small models of 3.2 by 32, and no file of theirs says so."""
    if not p.flag("use_scaled_rope"):
        return NO_SCALING
    factor = p.number("rope_scaling_factor", 32 if p.count("dim") < 4096 else 8)
    if "rope_scaling_factor" not in p:
        say("%s: use_scaled_rope without a factor, taking %d as Llama %s does"
            % (p.where, factor, "3.2" if factor == 32 else "3.1"))
    return 2, factor, 1.0, 4.0, 8192

CONTEXTS = {500000: 8192, 1000000: 16384}  # Llama 3, Code Llama

def meta_context(p):
    """params.json leaves the length of the context out; rope_theta tells the families apart."""
    known = CONTEXTS.get(p.number("rope_theta", 10000), 4096)
    context = 131072 if p.flag("use_scaled_rope") else known
    say("%s does not say the context, taking %d; --context N decides" % (p.where, context))
    return context

def rows_of(folder, parts, name, columns):
    """The rows of a matrix with this many columns, of which a part may hold some of either."""
    if name not in parts:
        refuse(folder, "no tensor %s", name)
    shapes = [part.shape for part in parts[name]]
    if any(len(shape) != 2 for shape in shapes):
        refuse(folder, "%s is no matrix", name)
    return sum(s[0] for s in shapes) if shapes[0][1] == columns else shapes[0][0]

def meta_config(folder, parts, context):
    p = read_json(os.path.join(folder, "params.json"))
    for key in p.values:
        if key not in PARAMS:
            refuse(p.where, "%s cannot be represented", key)
    dim, heads = p.count("dim"), p.count("n_heads")
    if dim % heads or p.count("head_dim", dim // heads) * heads != dim:
        refuse(p.where, "dim %d is not head_dim times %d heads", dim, heads)
    tied = CLASSIFIER.meta not in parts
    c = Config(
        dim=dim, hidden=rows_of(folder, parts, "layers.0.feed_forward.w1.weight", dim),
        layers=p.count("n_layers"), heads=heads, kv_heads=p.count("n_kv_heads", heads),
        head_dim=dim // heads, vocab=rows_of(folder, parts, EMBEDDING.meta, dim),
        context=context or meta_context(p), window=p.count("sliding_window", 0),
        flags=NEIGHBOURS | tied * TIED, eps=p.number("norm_eps", 1e-5, most=1),
        theta=p.number("rope_theta", 10000), scaling=meta_scaling(p))
    check_config(p.where, c)
    return c

def meta_name(slot, layer):
    return slot.meta if layer is None else "layers.%d.%s" % (layer, slot.meta)

def read_meta(folder, context):
    parts = read_parts(folder)
    c = meta_config(folder, parts, context)
    return Model(c, gather(folder, c, parts, meta_name))

# llama2.c: a header and f32 tensors, each kind for all layers before the next

NORMS = ["attention_norm", "ffn_norm", "final_norm"]
MATRICES = ["wq", "wk", "wv", "wo"]
ORDER_0 = ["embedding", "attention_norm", *MATRICES, "ffn_norm", "w1", "w2", "w3", "final_norm",
           "tables"]
ORDER_1 = [*NORMS, "embedding", *MATRICES, "w1", "w2", "w3"]
LLAMA2C_MAGIC = 0x616B3432

def llama2c_config(where, numbers, tied):
    dim, hidden, layers, heads, kv_heads, vocab, context = numbers
    if not 0 < heads <= dim or dim % heads:
        refuse(where, "dim %d is no multiple of %d heads", dim, heads)
    c = Config(dim, hidden, layers, heads, kv_heads, dim // heads, vocab, context, 0,
               NEIGHBOURS | bool(tied) * TIED, 1e-5, 10000.0, NO_SCALING)
    check_config(where, c)
    return c

def place_llama2c(path, c, at, order):
    """The tensors in this order from this offset on, and where they end."""
    slots = {slot.name: slot for slot in (EMBEDDING, FINAL_NORM, CLASSIFIER, *LAYER)}
    tensors = {}
    for name in order:
        if name == "tables":  # cosines and sines, which follow from the header
            at += c.context * c.head_dim * 4
            continue
        shape = shape_of(c, slots[name])
        for layer in range(c.layers) if slots[name] in LAYER else [None]:
            size = 4 * math.prod(shape)
            tensors[name, layer] = Tensor(name, "f32", shape, [Stretch(path, at, size)])
            at += size
    return tensors, at

def read_llama2c(path):
    size = plain_size(path)
    head = read_at(path, 0, min(256, size)).ljust(256, b"\0")
    magic, version = struct.unpack_from("<Ii", head)
    if magic == LLAMA2C_MAGIC:
        if version != 1:
            refuse(path, "version %d of llama2.c's format, wanted 0 or 1: write its float weights"
                   " and let run -m quantize make them small", version)
        numbers, tied, orders, at = struct.unpack_from("<7i", head, 8), head[36], [ORDER_1], 256
    else:
        numbers = struct.unpack_from("<7i", head)
        tied, at = numbers[5] > 0, 28
        numbers = (*numbers[:5], abs(numbers[5]), numbers[6])
        orders = [ORDER_0, ORDER_0[:-1]]  # some writers leave the tables out
    c = llama2c_config(path, numbers, tied)
    for order in orders:
        tensors, end = place_llama2c(path, c, at, order if tied else [*order, "classifier"])
        if end == size:
            return Model(c, tensors)
    refuse(path, "%d bytes, wanted %d for llama2.c's dimensions %s", size, end, numbers)

# ------------------------------------------------------------------------------------------------
# 8. Random checkpoints: for measuring speed without a download

SHAPES = {  # dim, hidden, layers, heads, kv_heads, vocab, context, tied
    "15m": (288, 768, 6, 6, 6, 32000, 256, 1),        # llama2.c's stories15M
    "110m": (768, 2048, 12, 12, 12, 32000, 1024, 1),  # llama2.c's stories110M
    "1.1b": (2048, 5632, 22, 32, 4, 32000, 2048, 0),  # TinyLlama
    "7b": (4096, 11008, 32, 32, 32, 32000, 4096, 0),  # Llama 2
}
SHAPE_KEYS = "dim hidden layers heads kv_heads vocab context tied head_dim".split()

def parse_shape(text):
    """A name of SHAPES, or dim=..,layers=.. with sensible values for what is left out."""
    if text in SHAPES:
        given = dict(zip(SHAPE_KEYS, SHAPES[text]))
    else:
        pairs = [re.fullmatch("([a-z_]+)=([0-9]{1,10})", item) for item in text.split(",")]
        if not all(pairs) or not all(pair.group(1) in SHAPE_KEYS for pair in pairs):
            refuse("--random " + text, "wanted %s, or KEY=NUMBER,.. with the keys %s",
                   ", ".join(SHAPES), ", ".join(SHAPE_KEYS))
        given = {pair.group(1): int(pair.group(2)) for pair in pairs}
    dim = given.get("dim", 512)
    heads = given.get("heads", max(1, dim // 64))
    c = Config(dim, given.get("hidden", -(-dim * 8 // 3 // 32) * 32), given.get("layers", 8), heads,
               given.get("kv_heads", heads), given.get("head_dim", dim // max(1, heads)),
               given.get("vocab", 32000), given.get("context", 2048), 0,
               TIED if given.get("tied") else 0, 1e-5, 10000.0, NO_SCALING)
    check_config("--random " + text, c)
    return c

# Period of the random numbers: prime, so no two rows of a matrix are alike before it is used up.
PERIOD = 1000003
SPREAD = 2.0**-13   # of a sum of four bytes, whose standard deviation is 148: weights have 0.018
MIDDLE = {"q8": 0x80, "q4": 0x88}       # the byte that stands for zero
STEP = {"q8": 2.0**-12, "q4": 2.0**-8}  # scale of a group: 0.018 too

def random_bytes(kind):
    """One period of weights as they are stored."""
    n = PERIOD
    noise = random.Random(n).getrandbits(32 * n).to_bytes(4 * n, "little")
    if kind in SIZES:
        sums = map(sum, zip(noise[0::4], noise[1::4], noise[2::4], noise[3::4]))
        data = struct.pack("<%df" % n, *[(total - 510) * SPREAD for total in sums])
        return convert(data, "f32", kind)
    if kind == "q8":
        return noise[:n].replace(b"\0", b"\x80")
    whole = bytes((b & 0xF0 or 0x80) | (b & 0x0F or 0x08) for b in range(256))  # -8 has no partner
    return noise[:n].translate(whole)

class Noise:
    """An endless stream of the same period of bytes."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, n):
        pieces = []
        while n > 0:
            piece = self.data[self.at:self.at + n]
            pieces.append(piece)
            n, self.at = n - len(piece), (self.at + len(piece)) % len(self.data)
        return b"".join(pieces)

    def chunks(self, size):
        while size > 0:
            yield self.take(min(size, CHUNK))
            size -= CHUNK

def zero_columns(panel, kind, columns):
    """Columns beyond the last are zero. Line i of a group holds, for row r at bytes 4r to 4r+3:
    q8 columns 4i to 4i+3; q4 columns 8i to 8i+3 in the low halves, the next 4 in the high ones."""
    groups, size, _ = panel_sizes(columns, kind)
    start, width = (groups - 1) * (size // groups), 4 if kind == "q8" else 8
    for column in range(columns - (groups - 1) * GROUP, GROUP):
        line, place = divmod(column, width)
        keep = 0 if kind == "q8" else 0x0F if place >= 4 else 0xF0
        for at in range(start + line * ALIGN + place % 4, start + (line + 1) * ALIGN, 4):
            panel[at] = panel[at] & keep | MIDDLE[kind] & ~keep

def panel_of(noise, kind, rows, columns):
    """The first rows of a panel random, the rest zero; before each two groups a line of scales."""
    groups, weights, _ = panel_sizes(columns, kind)
    panel = bytearray(noise.take(weights))
    if columns % GROUP:
        zero_columns(panel, kind, columns)
    for at in range(4 * rows, ALIGN):
        panel[at::ALIGN] = bytes([MIDDLE[kind]]) * (weights // ALIGN)
    scales = struct.pack("<e", STEP[kind]) * rows + bytes(2 * (PANEL - rows))
    parts, two = [], 2 * weights // groups
    for at in range(0, weights, two):
        whole = at + two <= weights
        parts += [scales, scales if whole else bytes(len(scales)), panel[at:at + two]]
    return b"".join(parts)

def random_contents(c, kind):
    noise = Noise(random_bytes(kind))

    def contents(slot, _layer, stored):
        shape = shape_of(c, slot)
        if len(shape) == 1:
            yield struct.pack("<f", 1.0) * shape[0]  # norms
        elif stored in SIZES:
            yield from noise.chunks(stored_size(shape, stored))
        else:
            for first in range(0, shape[0], PANEL):
                yield panel_of(noise, stored, min(PANEL, shape[0] - first), shape[1])

    return contents

# ------------------------------------------------------------------------------------------------
# 9. The command line

def find_tokenizer(folder):
    """SentencePiece's own file says more than its tokenizer.json, so it goes first."""
    names = [os.path.join(folder, name) for name in ("tokenizer.model", "tokenizer.json")]
    return next((path for path in names if os.path.lexists(path)), None)

def fit_vocabulary(t, c):
    """Some models have fewer rows than their tokenizer has tokens; only tokens that no text makes
    may go."""
    extra = t.pieces[c.vocab:]
    if not extra:
        return
    needed = max([t.bos, t.unknown, *t.ends])
    if needed >= c.vocab or any(kind not in (CONTROL, UNUSED) for _, _, kind in extra):
        refuse(t.where, "%d tokens for a model of %d", len(t.pieces), c.vocab)
    say("%s: %d special tokens beyond the model's %d are left out" % (t.where, len(extra), c.vocab))
    del t.pieces[c.vocab:]

def open_folder(folder, context):
    """(Model or None, Tokenizer or None)"""
    model, path = None, find_tokenizer(folder)
    if os.path.lexists(os.path.join(folder, "params.json")) and \
            not os.path.lexists(os.path.join(folder, "config.json")):
        path = path or find_tokenizer(os.path.join(folder, ".."))
        model = read_meta(folder, context)
    elif os.path.lexists(os.path.join(folder, "config.json")):
        model = read_hugging_face(folder)
    elif path is None:
        refuse(folder, "no config.json, params.json or tokenizer is there")
    return model, read_tokenizer(path) if path else None

NO_SOURCE = {  # beginnings of files that people try
    b"LLAMA02\0": "is a checkpoint of run already", b"LLAMA02T": "is a tokenizer of run already",
    b"GGUF": "is a GGUF file; export the folder that it was made from",
    b"PK\3\4": "is a zip; give the folder with params.json",
}

def open_file(path):
    """(Model or None, Tokenizer or None)"""
    size = plain_size(path)
    head = read_at(path, 0, min(size, 64))
    for start, what in NO_SOURCE.items():
        if head.startswith(start):
            refuse(path, what)
    if path.endswith(".safetensors"):
        refuse(path, "give the folder with its config.json")
    if path.endswith((".model", ".json")) or is_llama2c_tokenizer(head):
        return None, read_tokenizer(path)
    if size < 28:
        refuse(path, "%d bytes are neither a checkpoint nor a tokenizer", size)
    return read_llama2c(path), None

def beside(out):
    """NAME.tokenizer.bin for NAME.bin"""
    return (out[:-4] if out.endswith(".bin") else out) + ".tokenizer.bin"

def export(source, out, kind, chat, context):
    model, tokenizer = open_folder(source, context) if os.path.isdir(source) else open_file(source)
    read = {s.path for t in model.tensors.values() for s in t.stretches} if model else {source}
    if os.path.exists(out) and any(os.path.samefile(path, out) for path in read):
        refuse(out, "is the source")
    if tokenizer and chat:
        tokenizer.chat = CHATS[chat]
    with Output() as output:
        if model:
            c = model.config._replace(context=context or model.config.context)
            if tokenizer:
                fit_vocabulary(tokenizer, c)
            write_model(output, out, c, natural_type(model) if kind == "keep" else kind,
                        lambda slot, layer, k: model.tensors[slot.name, layer].converted(k))
        if tokenizer:
            output.create(beside(out) if model else out).write(pack_tokenizer(tokenizer))

def export_random(shape, out, kind):
    c = parse_shape(shape)
    with Output() as output:
        write_model(output, out, c, kind, random_contents(c, kind))

def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        usage="export.py SOURCE OUT.bin [options]\n"
              "       export.py --random SHAPE OUT.bin [options]",
        description=__doc__.split("\n\n")[2], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="SOURCE OUT.bin", help=argparse.SUPPRESS)
    parser.add_argument("--type", choices=["keep", *TYPES],
                        help="of the matrices (default keep; q8 and q4 only with --random)")
    parser.add_argument("--chat", choices=CHATS, help="chat format, not the model's")
    parser.add_argument("--context", type=int, metavar="N", help="positions, not the model's")
    parser.add_argument("--random", metavar="SHAPE",
                        help="random weights: %s, or dim=..,layers=..,.." % ", ".join(SHAPES))
    options = parser.parse_args(arguments)
    options.type = options.type or ("f32" if options.random else "keep")
    if len(options.paths) != (1 if options.random else 2):
        parser.error("wanted SOURCE and OUT.bin, or --random SHAPE and OUT.bin")
    if options.type in (["keep"] if options.random else ["q8", "q4"]):
        parser.error("--type %s does not go with this source" % options.type)
    if options.context is not None and not 1 <= options.context < 2**31:
        parser.error("--context wants 1 to 2147483647")
    return options

def main(arguments):
    options = parse_arguments(arguments)
    out = options.paths[-1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # partial files go too
    try:
        if options.random:
            export_random(options.random, out, options.type)
        else:
            export(options.paths[0], out, options.type, options.chat, options.context)
        return 0
    except Refused as error:
        say(str(error))
    except OSError as error:
        say("%s: %s" % (error.filename or out, error.strerror))
    except (MemoryError, RecursionError):
        say("%s: too large or too deeply nested for this machine" % options.paths[0])
    except KeyboardInterrupt:
        say("%s: interrupted, nothing written" % out)
        return 128 + signal.SIGINT
    return 1

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
