#!/usr/bin/env python3
"""Promises of export.py, one a test. From the root of the repository: python3 tests/test_export.py

Every input is made here, byte by byte, and every output is read here by the README's tables, so
nothing of export.py checks itself. Where ../shared/reference exists, real cases follow."""
import contextlib
import importlib.util
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import unittest
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(ROOT, "export.py")
REFERENCE = os.path.join(os.path.dirname(ROOT), "shared", "reference")

sys.dont_write_bytecode = True  # the repository stays as it is
spec = importlib.util.spec_from_file_location("export", PROGRAM)
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)

# ------------------------------------------------------------------------------------------------
# Making what others publish

SIZE = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


def numbers(count, seed, dtype="F32"):
    """Values that every float type holds exactly, as bytes: eighths from -8 to 8."""
    values = [((i * 37 + seed * 11) % 129 - 64) / 8 for i in range(count)]
    if dtype == "BF16":
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    return struct.pack("<%d%s" % (count, {"F32": "f", "F16": "e", "I64": "q"}[dtype]),
                       *(map(int, values) if dtype == "I64" else values))


def config(family="LlamaForCausalLM", **changes):
    base = dict(architectures=[family], hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=10, rms_norm_eps=1e-5,
                max_position_embeddings=64, tie_word_embeddings=False)
    if family == "MistralForCausalLM":
        base["sliding_window"] = None
    base.update(changes)
    return {k: v for k, v in base.items() if v != "absent"}


def shapes(biases=False, norms=False, tied=False, layers=2, vocab=10):
    """Name -> shape of the tensors of config()."""
    out = {"model.embed_tokens.weight": (vocab, 8)}
    for i in range(layers):
        layer = "model.layers.%d." % i
        out.update({layer + "input_layernorm.weight": (8,), layer + "self_attn.q_proj.weight": (8, 8),
                    layer + "self_attn.k_proj.weight": (4, 8), layer + "self_attn.v_proj.weight": (4, 8)})
        if biases:
            out.update({layer + "self_attn.%s_proj.bias" % k: (n,) for k, n in (("q", 8), ("k", 4), ("v", 4))})
        if norms:
            out.update({layer + "self_attn.%s_norm.weight" % k: (4,) for k in "qk"})
        out.update({layer + "self_attn.o_proj.weight": (8, 8),
                    layer + "post_attention_layernorm.weight": (8,), layer + "mlp.gate_proj.weight": (12, 8),
                    layer + "mlp.up_proj.weight": (12, 8), layer + "mlp.down_proj.weight": (8, 12)})
    out["model.norm.weight"] = (8,)
    if not tied:
        out["lm_head.weight"] = (vocab, 8)
    return out


def product(shape):
    total = 1
    for n in shape:
        total *= n
    return total


def tensors(dtype="F32", **options):
    """Name -> (dtype, shape, bytes), in the order of the flat file."""
    return {name: (dtype, shape, numbers(product(shape), seed, dtype))
            for seed, (name, shape) in enumerate(shapes(**options).items())}


def safetensors(entries):
    header, data = {}, b""
    for name, (dtype, shape, content) in sorted(entries.items()):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return header, data


def pack_safetensors(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def pickle_of(entries, storage_of, extra=b""):
    """data.pkl as torch.save writes it: entries is name -> (dtype, shape)."""
    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def number(n):
        return b"J" + struct.pack("<i", n)

    out = b"\x80\x02}("
    for name, (dtype, shape) in entries.items():
        strides = [product(shape[i + 1:]) for i in range(len(shape))]
        kind = {"F32": "Float", "BF16": "BFloat16", "F16": "Half", "F64": "Double"}[dtype]
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\n" + kind.encode() + b"Storage\n" + text(storage_of[name])
        out += text("cpu") + number(product(shape)) + b"tQ" + number(0)
        out += b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + extra + b"u."


def pth(entries, compression=zipfile.ZIP_STORED, pickle=None, change=None):
    """A .pth file: entries is name -> (dtype, shape, bytes)."""
    keys = {name: str(i) for i, name in enumerate(entries)}
    members = {"archive/data.pkl": pickle if pickle is not None else
               pickle_of({n: e[:2] for n, e in entries.items()}, keys),
               "archive/byteorder": b"little"}
    members.update({"archive/data/" + keys[n]: e[2] for n, e in entries.items()})
    if change:
        change(members)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


META = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight", "input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}


def meta_name(name):
    for theirs, meta in META.items():
        name = name.replace(theirs, meta)
    return name.replace("model.layers", "layers")


def meta_tensors(dtype="BF16"):
    return {meta_name(name): entry for name, entry in tensors(dtype).items()}


PARAMS = dict(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, norm_eps=1e-5, vocab_size=-1)


def varint(n):
    n, out = n % 2**64, b""
    while n > 127:
        n, out = n >> 7, out + bytes([n & 127 | 128])
    return out + bytes([n])


def field(number, value):
    """One field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(words=(("\u2581", -2.0, 1), ("a", -3.0, 1), ("\u2581a", -1.0, 1)), trainer=(), normalizer=()):
    """A tokenizer.model as Llama 2's is configured, with these words behind the 256 bytes."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [("<0x%02X>" % b, 0.0, 6) for b in range(256)] + list(words)
    out = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
                   for text, score, kind in pieces)
    trained = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2, **dict(trainer)}
    normal = {1: b"identity", 3: 1, 4: 0, 5: 1, **dict(normalizer)}
    return out + field(2, b"".join(field(*item) for item in trained.items())) + \
        field(3, b"".join(field(*item) for item in normal.items()))


def special(number, text, is_special=True, **more):
    return dict(id=number, content=text, special=is_special, single_word=False, lstrip=False, rstrip=False,
                normalized=False, **more)


def spm_json(**changes):
    """A tokenizer.json like Llama 2's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{"<0x%02X>" % b: 3 + b for b in range(256)},
             "\u2581": 259, "a": 260, "\u2581a": 261}
    model = dict(type="BPE", byte_fallback=True, unk_token="<unk>", vocab=vocab, merges=["\u2581 a"])
    model.update(changes.pop("model", {}))
    normalizer = dict(type="Sequence", normalizers=[
        dict(type="Prepend", prepend="\u2581"), dict(type="Replace", pattern=dict(String=" "), content="\u2581")])
    return dict(dict(added_tokens=[special(1, "<s>"), special(2, "</s>")], normalizer=normalizer,
                     pre_tokenizer=None, model=model), **changes)


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_characters():
    """GPT-2's alphabet: character of each byte."""
    out, extra = {}, 256
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255:
            out[b] = chr(b)
        else:
            out[b], extra = chr(extra), extra + 1
    return out


def splitting(regex):
    return dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False),
        dict(type="ByteLevel", add_prefix_space=False, use_regex=False)])


def byte_json(**changes):
    """A byte-level tokenizer.json like Llama 3's."""
    characters = byte_characters()
    vocab = {characters[b]: b for b in range(256)}
    space = characters[32]
    vocab.update({space + "a": 256, "b" + "b": 257})
    model = dict(type="BPE", byte_fallback=False, ignore_merges=True, vocab=vocab,
                 merges=[[space, "a"], ["b", "b"]])
    model.update(changes.pop("model", {}))
    template = dict(type="TemplateProcessing", single=[
        dict(SpecialToken=dict(id="<|begin_of_text|>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))])
    return dict(dict(added_tokens=[special(258, "<|begin_of_text|>"), special(260, "<|eot_id|>"),
                                   special(261, "<tool>", False)],
                     normalizer=None, pre_tokenizer=splitting(LLAMA3), post_processor=template, model=model), **changes)


# ------------------------------------------------------------------------------------------------
# Reading what export.py writes, by the README's tables


class Flat:
    """A checkpoint taken apart."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = data = file.read()
        assert data[:8] == b"LLAMA02\0" and struct.unpack_from("<Q", data, 248)[0] == len(data)
        assert not any(data[84:248])
        (self.version, self.type, self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim,
         self.vocab, self.context, self.window, self.flags) = struct.unpack_from("<12I", data, 8)
        self.eps, self.theta = struct.unpack_from("<2f", data, 56)
        self.scaling = struct.unpack_from("<IfffI", data, 64)
        self.tensors = list(self.split())

    def split(self):
        """The bytes of each tensor in order; gaps are checked to be zero."""
        at = 256
        for shape in shapes(self.flags & 2, self.flags & 4, self.flags & 1, self.layers, self.vocab).values():
            start = -(-at // 64) * 64
            assert not any(self.data[at:start])
            width = 4 if len(shape) == 1 or self.type == 0 else 2
            at = start + product(shape) * width
            yield self.data[start:at]
        assert at == len(self.data)


class Pieces:
    """A tokenizer file taken apart."""

    def __init__(self, path):
        with open(path, "rb") as file:
            data = file.read()
        assert data[:8] == b"LLAMA02T" and struct.unpack_from("<Q", data, 248)[0] == len(data)
        (self.version, self.kind, count, self.flags, self.split, self.chat,
         self.bos, self.unknown, n_ends) = struct.unpack_from("<6I2iI", data, 8)
        ends = struct.unpack_from("<16I", data, 44)
        assert not any(ends[n_ends:]) and not any(data[124:248])
        self.ends, at, tables = list(ends[:n_ends]), 256, []
        for rows, width in zip(struct.unpack_from("<4I", data, 108), (3, 2, 2, 3)):
            flat = struct.unpack_from("<%dI" % (rows * width), data, at)
            tables.append([flat[i:i + width] for i in range(0, rows * width, width)])
            at += 4 * rows * width
        self.merges, self.classes, self.marks, self.compositions = tables
        self.tokens = []
        for _ in range(count):
            score, kind, size = struct.unpack_from("<fII", data, at)
            padded = -(-size // 4) * 4
            assert not any(data[at + 12 + size:at + 12 + padded])
            self.tokens.append((data[at + 12:at + 12 + size], score, kind))
            at += 12 + padded
        assert at == len(data)

    def class_of(self, character):
        return [value for first, value in self.classes if first <= ord(character)][-1]


class Case(unittest.TestCase):
    def setUp(self):
        self.place = tempfile.TemporaryDirectory()
        self.addCleanup(self.place.cleanup)
        self.out = os.path.join(self.place.name, "out", "model.bin")
        os.mkdir(os.path.dirname(self.out))

    def path(self, name):
        path = os.path.join(self.place.name, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def write(self, name, content):
        if isinstance(content, (dict, list)):
            content = json.dumps(content)
        with open(self.path(name), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        return self.path(name)

    def run_main(self, *arguments):
        """Exit status and what stood on stderr."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                status = export.main(list(arguments))
            except SystemExit as end:
                status = end.code
        return status, said.getvalue()

    def made(self):
        return sorted(os.listdir(os.path.dirname(self.out)))

    def export(self, source, *options):
        status, said = self.run_main(source, self.out, *options)
        self.assertEqual((status, said), (0, said))
        return said

    def refused(self, source, *wanted, options=()):
        """Status 1, one line that holds all of wanted, and no file."""
        status, said = self.run_main(source, self.out, *options)
        self.assertEqual(status, 1, said)
        lines = [line for line in said.splitlines() if "taking" not in line]
        self.assertEqual(len(lines), 1, said)
        self.assertTrue(said.startswith("export: "), said)
        for text in wanted:
            self.assertIn(text, said)
        self.assertEqual(self.made(), [])

    def hugging_face(self, settings=None, entries=None, name="model"):
        settings = settings or config()
        entries = tensors() if entries is None else entries
        self.write(name + "/config.json", settings)
        self.write(name + "/model.safetensors", pack_safetensors(*safetensors(entries)))
        return self.path(name)

    def meta(self, parts=None, **params):
        self.write("meta/params.json", {**PARAMS, **params})
        for i, part in enumerate(parts or [meta_tensors()]):
            self.write("meta/consolidated.%02d.pth" % i, part if isinstance(part, bytes) else pth(part))
        return self.path("meta")

    def tokenizer(self, content, name="tokenizer.json", **beside):
        for other, text in beside.items():
            self.write("tok/" + other + ".json", text)
        return self.write("tok/" + name, content)

    def pieces(self, *arguments, **beside):
        self.export(self.tokenizer(*arguments, **beside))
        return Pieces(self.out)


# ------------------------------------------------------------------------------------------------


class HuggingFace(Case):
    def test_the_header_holds_every_number_of_the_config(self):
        self.export(self.hugging_face(config(rope_theta=500000, max_position_embeddings=77)))
        flat = Flat(self.out)
        self.assertEqual((flat.version, flat.type, flat.dim, flat.hidden, flat.layers, flat.heads, flat.kv_heads,
                          flat.head_dim, flat.vocab, flat.context, flat.window, flat.flags),
                         (1, 0, 8, 12, 2, 2, 1, 4, 10, 77, 0, 0))
        self.assertEqual((flat.eps, flat.theta), (struct.unpack("<f", struct.pack("<f", 1e-5))[0], 500000))
        self.assertEqual(flat.scaling, (0, 0, 0, 0, 0))

    def test_tensors_stand_in_the_order_of_the_format_unchanged(self):
        for dtype, number in (("F32", 0), ("BF16", 1), ("F16", 2)):
            self.export(self.hugging_face(entries=tensors(dtype)))
            flat, source = Flat(self.out), tensors(dtype).values()
            self.assertEqual(flat.type, number)
            for seed, (got, (_, shape, content)) in enumerate(zip(flat.tensors, source)):
                self.assertEqual(got, content if len(shape) == 2 else numbers(product(shape), seed))

    def test_biases_and_head_norms_are_f32_in_their_places(self):
        for family, flag, extra in (("Qwen2ForCausalLM", 2, "biases"), ("Qwen3ForCausalLM", 4, "norms")):
            entries = tensors("BF16", **{extra: True})
            self.export(self.hugging_face(config(family), entries))
            flat = Flat(self.out)
            self.assertEqual(flat.flags, flag)
            for seed, (got, entry) in enumerate(zip(flat.tensors, entries.values())):
                self.assertEqual(got, entry[2] if len(entry[1]) == 2 else numbers(product(entry[1]), seed))

    def test_every_type_becomes_every_type_and_exact_values_survive(self):
        for dtype in ("F32", "BF16", "F16"):
            for kind, other in (("f32", "F32"), ("bf16", "BF16"), ("f16", "F16")):
                self.export(self.hugging_face(entries=tensors(dtype)), "--type", kind)
                self.assertEqual(Flat(self.out).tensors[0], numbers(80, 0, other))

    def test_mixed_types_become_the_one_that_holds_all(self):
        mixed = {**tensors("F16"), "lm_head.weight": tensors("BF16")["lm_head.weight"]}
        self.export(self.hugging_face(entries=mixed))
        self.assertEqual(Flat(self.out).type, 0)

    def test_shards_with_an_index_are_one_model(self):
        folder, entries = self.hugging_face(), tensors()
        os.unlink(folder + "/model.safetensors")
        home = {name: "model-0%d.safetensors" % (i % 2) for i, name in enumerate(entries)}
        for shard in set(home.values()):
            self.write("model/" + shard, pack_safetensors(*safetensors(
                {n: e for n, e in entries.items() if home[n] == shard})))
        self.write("model/model.safetensors.index.json", {"metadata": {}, "weight_map": home})
        self.export(folder)
        self.assertEqual(Flat(self.out).tensors, [entry[2] for entry in entries.values()])

    def test_a_tied_classifier_is_left_out(self):
        tied = config(tie_word_embeddings=True)
        self.export(self.hugging_face(tied, tensors(tied=True)))
        self.assertEqual(Flat(self.out).flags, 1)
        same = tensors()
        same["lm_head.weight"] = same["model.embed_tokens.weight"]
        self.export(self.hugging_face(tied, same))
        self.assertEqual((Flat(self.out).flags, len(Flat(self.out).tensors)), (1, 20))

    def test_a_tied_classifier_that_differs_is_refused(self):
        self.refused(self.hugging_face(config(tie_word_embeddings=True)), "lm_head.weight differs")

    def test_old_and_new_rope_settings_mean_the_same(self):
        llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
        for settings in (config(rope_theta=5e5, rope_scaling=dict(llama3, rope_type="llama3")),
                         config(rope_parameters=dict(llama3, rope_type="llama3", rope_theta=5e5))):
            self.export(self.hugging_face(settings))
            self.assertEqual((Flat(self.out).theta, Flat(self.out).scaling), (5e5, (2, 8, 1, 4, 64)))
        self.export(self.hugging_face(config(rope_scaling={"type": "linear", "factor": 2})))
        self.assertEqual(Flat(self.out).scaling, (1, 2, 0, 0, 0))

    def test_what_the_config_leaves_out_is_what_transformers_takes(self):
        self.export(self.hugging_face(config(rms_norm_eps="absent", head_dim="absent")))
        self.assertEqual((round(Flat(self.out).eps, 9), Flat(self.out).theta, Flat(self.out).head_dim), (1e-6, 1e4, 4))
        self.export(self.hugging_face(config("MistralForCausalLM", sliding_window="absent")))
        self.assertEqual(Flat(self.out).window, 4096)
        self.export(self.hugging_face(config("MistralForCausalLM", sliding_window=24)))
        self.assertEqual(Flat(self.out).window, 24)

    def test_a_missing_head_dim_of_qwen3_is_128(self):
        self.refused(self.hugging_face(config("Qwen3ForCausalLM", head_dim="absent"), tensors(norms=True)),
                     "q_proj.weight has the shape 8x8, wanted 256x8")

    def test_a_window_counts_only_where_all_layers_have_it(self):
        def window(**changes):
            settings = config("Qwen2ForCausalLM", sliding_window=16, **changes)
            return self.hugging_face(settings, tensors(biases=True))
        for changes, wanted in ((dict(use_sliding_window=False, max_window_layers=0), 0),
                                (dict(use_sliding_window=True, max_window_layers=0), 16),
                                (dict(use_sliding_window=True, max_window_layers=28), 0),
                                (dict(use_sliding_window=True, layer_types=["sliding_attention"] * 2), 16)):
            self.export(window(**changes))
            self.assertEqual(Flat(self.out).window, wanted)
        os.unlink(self.out)
        for changes in (dict(max_window_layers=1), dict(layer_types=["full_attention", "sliding_attention"])):
            self.refused(window(use_sliding_window=True, **changes), "config.json", "some layers only")

    def test_the_option_context_decides(self):
        self.export(self.hugging_face(), "--context", "33")
        self.assertEqual(Flat(self.out).context, 33)

    def test_tables_of_rotary_frequencies_are_ignored(self):
        entries = tensors()
        entries["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (2,), numbers(2, 0))
        self.export(self.hugging_face(entries=entries))


class Rounding(Case):
    def narrowed(self, kind, values):
        """Values as they stand in the file after going from f32 to kind."""
        entries = tensors()
        words = list(values) + [0] * (80 - len(values))
        entries["model.embed_tokens.weight"] = ("F32", (10, 8), struct.pack("<80I", *words))
        folder = self.hugging_face(entries=entries)
        self.export(folder, "--type", kind)
        return list(struct.unpack("<80H", Flat(self.out).tensors[0])[:len(values)])

    def test_bf16_rounds_to_nearest_and_ties_to_even(self):
        self.assertEqual(self.narrowed("bf16", [0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x00008001, 0x80000000]),
                         [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x0001, 0x8000])

    def test_f16_rounds_to_nearest_and_ties_to_even_down_to_its_smallest(self):
        values = [1 + 2**-11, 1 + 3 * 2**-11, -65519.0, 2**-24, 1.5 * 2**-24, 2**-25, 2.0**-14 * 1.9995, -0.0, 1e-30]
        words = struct.unpack("<9I", struct.pack("<9f", *values))
        self.assertEqual(self.narrowed("f16", words), [0x3C00, 0x3C02, 0xFBFF, 1, 2, 0, 0x07FF, 0x8000, 0])

    def test_all_65536_numbers_of_f16_become_the_same_f32(self):
        halves = struct.pack("<65536H", *range(65536))
        wanted = struct.pack("<65536f", *struct.unpack("<65536e", halves))
        ones = struct.pack("<60e", *[1.0] * 60)  # among ordinary numbers the odd ones go another way
        self.assertEqual(bytes(export.widen_f16(halves)), wanted)
        for i in range(0, 65536, 97):
            got = bytes(export.widen_f16(halves[2 * i:2 * i + 2] + ones))
            self.assertEqual(got[:4], wanted[4 * i:4 * i + 4])

    def test_what_does_not_fit_is_refused_by_the_name_of_the_tensor(self):
        for kind, value in (("f16", 65520.0), ("f16", float("inf")), ("bf16", float("nan")), ("f16", float("nan"))):
            entries = tensors()
            entries["lm_head.weight"] = ("F32", (10, 8), numbers(79, 1) + struct.pack("<f", value))
            self.refused(self.hugging_face(entries=entries), "lm_head.weight holds a number", options=["--type", kind])


class Meta(Case):
    def test_one_part_is_copied_and_its_pairs_are_neighbours(self):
        self.export(self.meta(rope_theta=1000000.0), "--context", "99")
        flat = Flat(self.out)
        self.assertEqual((flat.type, flat.flags, flat.hidden, flat.vocab, flat.context, flat.theta),
                         (1, 8, 12, 10, 99, 1e6))
        for seed, (got, (_, shape, content)) in enumerate(zip(flat.tensors, meta_tensors().values())):
            self.assertEqual(got, content if len(shape) == 2 else numbers(product(shape), seed))

    def cut(self, embedding_axis):
        """Two model-parallel parts of meta_tensors()."""
        parts = [{}, {}]
        for name, (dtype, shape, content) in meta_tensors().items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            axis = embedding_axis if "tok_" in name else axis
            for i, part in enumerate(parts):
                if len(shape) == 1:
                    part[name] = (dtype, shape, content)
                elif axis == 0:
                    half = len(content) // 2
                    part[name] = (dtype, (shape[0] // 2, shape[1]), content[i * half:(i + 1) * half])
                else:
                    row, half = shape[1] * 2, shape[1]
                    rows = [content[r * row + i * half:r * row + (i + 1) * half] for r in range(shape[0])]
                    part[name] = (dtype, (shape[0], shape[1] // 2), b"".join(rows))
        return parts

    def test_model_parallel_parts_are_joined_by_rows_and_by_columns(self):
        self.export(self.meta(), "--context", "99")
        whole = Flat(self.out).data
        for axis in (0, 1):  # Llama 3 cuts the embedding by rows, Llama 2 by columns
            self.export(self.meta(self.cut(axis)), "--context", "99")
            self.assertEqual(Flat(self.out).data, whole)

    def test_parts_that_do_not_fit_together_are_refused(self):
        parts = self.cut(0)
        del parts[1]["norm.weight"]
        self.refused(self.meta(parts), "consolidated.01.pth", "norm.weight is not in every part")
        folder = self.meta(self.cut(0))
        os.unlink(folder + "/consolidated.00.pth")
        self.refused(folder, "consolidated.01.pth", "without a gap")
        parts = self.cut(0)
        parts[1]["norm.weight"] = ("BF16", (8,), numbers(8, 99, "BF16"))
        self.refused(self.meta(parts), "norm.weight differs between the parts")

    def test_what_params_json_leaves_out_is_said(self):
        said = self.export(self.meta(use_scaled_rope=True, rope_theta=500000.0))
        self.assertIn("taking 131072", said)
        self.assertIn("taking 32 as Llama 3.2 does", said)
        self.assertEqual(Flat(self.out).scaling, (2, 32, 1, 4, 8192))
        self.assertIn("taking 8192", self.export(self.meta(rope_theta=500000.0)))
        self.assertIn("taking 4096", self.export(self.meta()))

    def test_a_model_without_output_has_a_tied_classifier(self):
        tied = meta_tensors()
        del tied["output.weight"]
        self.export(self.meta([tied]))
        self.assertEqual(Flat(self.out).flags, 9)

    def test_unknown_parameters_are_refused(self):
        self.refused(self.meta(moe={}), "params.json", "moe cannot be represented")


class HostilePickle(Case):
    def pickled(self, extra, data=None):
        entries = meta_tensors()
        keys = {name: str(i) for i, name in enumerate(entries)}
        text = data if data is not None else pickle_of({n: e[:2] for n, e in entries.items()}, keys, extra)
        return self.meta([pth(entries, pickle=text)])

    def test_an_import_of_anything_else_is_refused_and_nothing_runs(self):
        mark = self.path("ran")
        for extra in (b"X\1\0\0\0xcos\nsystem\n(X%s%stR" % (struct.pack("<I", 6 + len(mark)), b"touch " + mark.encode()),
                      b"X\1\0\0\0x\x8c\x08builtins\x8c\x04eval\x93)R"):
            self.refused(self.pickled(extra), "consolidated.00.pth", "pickle imports", "wanted tensors only")
        self.refused(self.pickled(b"X\1\0\0\0x(ios\nsystem\n"), "pickle step INST")
        self.assertFalse(os.path.exists(mark))

    def test_other_nonsense_in_a_pickle_is_one_line(self):
        for data in (b"", b"\x80\x02.", b"\x80\x02}(h\x07u.", b"\x80\x02Nt.", b"\x80\x02](((.", b"garbage",
                     b"\x80\x02J\1\0\0\0.", b"\x80\x02ctorch\nFloatStorage\n)R.", b"\x80\x02}X\1\0\0\0xNs.",
                     b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02}r\xff\xff\xff\x7f."):
            self.refused(self.pickled(b"", data), "meta")

    def test_a_tensor_that_leaves_its_storage_is_refused(self):
        entries = {"x": ("F32", (4,), bytes(16))}
        good = pickle_of({"x": ("F32", (4,))}, {"x": "0"})
        shape, stride = b"(J\4\0\0\0t", b"(J\1\0\0\0t"
        for old, new, wanted in ((b"tQJ\0\0\0\0", b"tQJ\1\0\0\0", "leaves its storage"),
                                 (b"tQJ\0\0\0\0", b"tQJ\xff\xff\xff\xff", "bad shape or offset"),
                                 (shape + stride, b"(J\2\0\0\0J\2\0\0\0t(J\1\0\0\0J\2\0\0\0t", "has strides"),
                                 (shape + stride, b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft(J\xff\xff\xff\x7fJ\1\0\0\0t",
                                  "leaves its storage"),
                                 (b"cpuJ\4\0\0\0", b"cpuJ\5\0\0\0", "storage 0 has 16 bytes, wanted 20"),
                                 (b"FloatStorage", b"DoubleStorage", "imports torch.DoubleStorage")):
            self.assertIn(old, good)
            self.refused(self.meta([pth(entries, pickle=good.replace(old, new))]), wanted)

    def test_a_zip_that_is_not_as_torch_writes_it_is_refused(self):
        entries = meta_tensors()
        for change, wanted in ((lambda m: m.pop("archive/data/3"), "no archive/data/3 in the zip"),
                               (lambda m: m.pop("archive/data.pkl"), "0 members data.pkl"),
                               (lambda m: m.update({"archive/byteorder": b"big"}), "byteorder is not little")):
            self.refused(self.meta([pth(entries, change=change)]), wanted)
        self.refused(self.meta([pth(entries, zipfile.ZIP_DEFLATED)]), "compressed or encrypted, wanted it stored")
        self.refused(self.meta([pth(entries)[:-30]]), "damaged zip")
        self.refused(self.meta([b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99)]), "older than torch 1.6")
        self.refused(self.meta([b""]), "no zip")


class Llama2c(Case):
    NUMBERS = (8, 12, 2, 2, 1, 10, 16)
    ORDER_0 = ["model.embed_tokens", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
               "post_attention_layernorm", "gate_proj", "down_proj", "up_proj", "model.norm"]
    ORDER_1 = ["input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_tokens", "q_proj", "k_proj",
               "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]

    def content(self, order, tied):
        entries = tensors(tied=tied)
        names = [n for word in order for n in entries if word in n]
        return b"".join(entries[n][2] for n in names), entries.get("lm_head.weight", ("", "", b""))[2]

    def check(self, file, tied):
        self.export(self.write("m.bin", file))
        flat = Flat(self.out)
        self.assertEqual((flat.flags, flat.type, flat.context, flat.head_dim, flat.theta), (8 + tied, 0, 16, 4, 1e4))
        self.assertEqual(flat.tensors, [e[2] for e in tensors(tied=tied).values()])

    def test_version_0_with_and_without_tables(self):
        for tied in (True, False):
            weights, classifier = self.content(self.ORDER_0, tied)
            dims = list(self.NUMBERS)
            dims[5] *= 1 if tied else -1
            for tables in (bytes(16 * 4 * 4), b""):
                self.check(struct.pack("<7i", *dims) + weights + tables + classifier, tied)

    def test_version_1(self):
        for tied in (True, False):
            weights, classifier = self.content(self.ORDER_1, tied)
            header = struct.pack("<Ii7iB", 0x616B3432, 1, *self.NUMBERS, tied).ljust(256, b"\0")
            self.check(header + weights + classifier, tied)

    def test_version_2_is_refused_with_what_to_do(self):
        file = struct.pack("<Ii7i", 0x616B3432, 2, *self.NUMBERS).ljust(999, b"\0")
        self.refused(self.write("m.bin", file), "version 2", "float weights", "quantize")

    def test_a_file_of_another_size_is_refused(self):
        file = struct.pack("<7i", *self.NUMBERS) + self.content(self.ORDER_0, True)[0]
        for change in (file[:-1], file + b"\0"):
            self.refused(self.write("m.bin", change), "bytes, wanted")
        for i, value in ((0, 0), (1, -1), (2, 0), (3, 3), (3, 0), (4, 0), (6, -5), (0, 2**31 - 1), (2, 2**31 - 1)):
            dims = list(self.NUMBERS)
            dims[i] = value
            self.refused(self.write("m.bin", struct.pack("<7i", *dims) + file[28:]), "m.bin: ")


class HostileConfig(Case):
    def test_what_run_cannot_represent_is_refused_by_name(self):
        for changes, wanted in (
                (dict(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"), (dict(architectures=[]), "architecture"),
                (dict(architectures=[["x"]]), "architecture"), (dict(architectures="absent"), "no architectures"),
                (dict(hidden_act="gelu"), "activation gelu"), (dict(mlp_bias=True), "mlp_bias"),
                (dict(quantization_config={"quant_method": "awq"}), "quantization_config"),
                (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
                (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "rope type yarn"),
                (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope type dynamic"),
                (dict(rope_parameters={"rope_type": "longrope"}), "rope type longrope"),
                (dict(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "each kind of layer")):
            self.refused(self.hugging_face(config(**changes)), "config.json", wanted)

    def test_numbers_that_no_model_has_are_refused(self):
        for changes in (dict(hidden_size=0), dict(hidden_size=-8), dict(hidden_size=True), dict(hidden_size=8.0),
                        dict(hidden_size="8"), dict(hidden_size=2**40), dict(vocab_size=10**30),
                        dict(hidden_size="absent"), dict(num_attention_heads=3, num_key_value_heads=2),
                        dict(num_attention_heads=3, head_dim="absent"), dict(head_dim=3), dict(num_hidden_layers=2**31 - 1),
                        dict(rms_norm_eps=float("nan")), dict(rms_norm_eps=0), dict(rms_norm_eps=float("inf")),
                        dict(rope_theta=-1.0), dict(rope_theta=10**400), dict(rope_theta=[]), dict(tie_word_embeddings=1),
                        dict(max_position_embeddings=0), dict(rope_scaling={"type": "linear", "factor": 0}),
                        dict(rope_scaling=7), dict(rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 4,
                                                                  "high_freq_factor": 4,
                                                                  "original_max_position_embeddings": 64})):
            self.refused(self.hugging_face(config(**changes)), "config.json")

    def test_json_that_is_no_object_is_refused(self):
        for text in ("", "[]", "3", "{", '{"a":1,"a":2}', "[" * 100000, '{"a":' * 100000, b"\xff\xfe{}", '{"a":' + "9" * 9999 + "}"):
            folder = self.hugging_face()
            self.write("model/config.json", text)
            self.refused(folder, "config.json")

    def test_a_bias_without_a_place_is_refused(self):
        entries = tensors(biases=True)
        self.export(self.hugging_face(config(attention_bias=True), entries))
        os.unlink(self.out)
        entries["model.layers.0.self_attn.o_proj.bias"] = ("F32", (8,), numbers(8, 0))
        self.refused(self.hugging_face(config(attention_bias=True), entries), "o_proj.bias has no place")

    def test_an_empty_folder_is_refused(self):
        os.mkdir(self.path("empty"))
        self.refused(self.path("empty"), "empty", "no config.json, params.json or tokenizer")
        self.refused(self.path("nowhere"), "nowhere", "No such file")


class HostileSafetensors(Case):
    def edited(self, edit=None, raw=None):
        """The model with its header changed, or with the whole file in place of it."""
        folder = self.hugging_face()
        header, data = safetensors(tensors())
        if edit:
            edit(header)
        self.write("model/model.safetensors", pack_safetensors(header, data) if raw is None else raw)
        return folder

    def test_a_header_longer_than_the_file_is_refused(self):
        for raw in (b"", b"1234567", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2**64 - 1) + b"{}"):
            self.refused(self.edited(raw=raw), "model.safetensors", "header of")

    def test_a_header_that_is_no_object_is_refused(self):
        for text in (b"[]", b"nonsense", b'{"a":1}', b'{"a":{},"a":{}}', b"[" * 99999, b"\xff"):
            self.refused(self.edited(raw=pack_safetensors(text, b"")), "model.safetensors")

    def test_offsets_that_overlap_leave_holes_or_the_file_are_refused(self):
        name = "model.norm.weight"
        for offsets, wanted in (([0, 32], "hole or overlap"), ([-4, 28], "data_offsets"), ([40, 8], "data_offsets"),
                                ([2**62, 2**62 + 32], "hole"), ([0, 2**64], "data_offsets"), ([0], "data_offsets"),
                                ([True, 33], "data_offsets"), ("x", "data_offsets"), ([0.0, 32.0], "data_offsets")):
            self.refused(self.edited(lambda h: h[name].update(data_offsets=offsets)), "model.safetensors", wanted)
        header, data = safetensors(tensors())
        for change in (data + bytes(4), data[:-4]):
            self.refused(self.edited(raw=pack_safetensors(header, change)), "tensors end at byte")

    def test_a_shape_that_does_not_match_its_bytes_is_refused(self):
        name = "model.norm.weight"
        for change in (dict(shape=[9]), dict(dtype="F16"), dict(dtype="X9"), dict(shape=[-8]), dict(shape=[True, 8]),
                       dict(shape=[2**40, 2**40]), dict(shape=8), dict(dtype=4), dict(shape=[1] * 9)):
            self.refused(self.edited(lambda h: h[name].update(change)), "model.safetensors", name)

    def test_missing_and_extra_tensors_are_refused_by_name(self):
        entries = tensors()
        entry = entries.pop("model.layers.1.mlp.up_proj.weight")
        self.refused(self.hugging_face(entries=entries), "no tensor model.layers.1.mlp.up_proj.weight")
        self.refused(self.hugging_face(entries={**tensors(), "adapter.lora": entry}), "adapter.lora has no place")

    def test_another_shape_or_dtype_is_refused_by_name(self):
        for name, entry, wanted in (("lm_head.weight", ("F32", (8, 10), bytes(320)), "8x10, wanted 10x8"),
                                    ("model.norm.weight", ("F32", (), bytes(4)), "a scalar, wanted 8"),
                                    ("lm_head.weight", ("I64", (10, 8), bytes(640)), "the type I64")):
            self.refused(self.hugging_face(entries={**tensors(), name: entry}), name, wanted)

    def index(self, home):
        folder = self.hugging_face()
        os.rename(folder + "/model.safetensors", folder + "/a.safetensors")
        self.write("model/model.safetensors.index.json", {"weight_map": home})
        return folder

    def test_a_shard_that_is_not_in_the_folder_is_refused(self):
        good = dict.fromkeys(tensors(), "a.safetensors")
        outside = self.write("outside.safetensors", pack_safetensors(*safetensors(tensors())))
        for shard in ("../outside.safetensors", outside, "..", "", "sub/a.safetensors", "..\\a", 5, None):
            self.refused(self.index({**good, "lm_head.weight": shard}), "index.json", "shard")
        folder = self.index({**good, "lm_head.weight": "b.safetensors"})
        self.refused(folder, "shard b.safetensors is not there")
        os.symlink(outside, folder + "/b.safetensors")
        self.refused(folder, "b.safetensors is a link out of the folder")

    def test_links_into_the_blobs_of_the_cache_are_followed(self):
        blob = self.write("cache/blobs/1234", pack_safetensors(*safetensors(tensors())))
        self.write("cache/snapshots/abc/config.json", config())
        self.write("cache/snapshots/abc/model.safetensors.index.json",
                   {"weight_map": dict.fromkeys(tensors(), "a.safetensors")})
        os.symlink(os.path.relpath(blob, self.path("cache/snapshots/abc")), self.path("cache/snapshots/abc/a.safetensors"))
        self.export(self.path("cache/snapshots/abc"))

    def test_an_index_that_does_not_match_its_shards_is_refused(self):
        good = dict.fromkeys(tensors(), "a.safetensors")
        self.refused(self.index({**good, "more": "a.safetensors"}), "tensor more is not in a.safetensors")
        del good["lm_head.weight"]
        self.refused(self.index(good), "tensor lm_head.weight, which the index")
        self.refused(self.index({}), "no weight_map")


class SentencePiece(Case):
    def test_a_model_file_becomes_kind_0_with_scores(self):
        t = self.pieces(sentencepiece(), "tokenizer.model")
        self.assertEqual((t.version, t.kind, t.flags, t.split, t.chat, t.bos, t.unknown, t.ends, t.merges, t.classes),
                         (1, 0, 3, 0, 0, 1, 0, [2], [], []))
        self.assertEqual(t.tokens[:4], [(b"<unk>", 0, 2), (b"<s>", 0, 3), (b"</s>", 0, 3), (b"\0", 0, 6)])
        self.assertEqual(t.tokens[258:], [(b"\xff", 0, 6), (b" ", -2, 1), (b"a", -3, 1), (b" a", -1, 1)])

    def test_what_splits_or_changes_text_otherwise_is_refused(self):
        for trainer, normalizer, wanted in (
                ({3: 1}, {}, "Unigram"), ({3: 4}, {}, "Char"), ({35: 0}, {}, "byte_fallback is false"),
                ({24: 1}, {}, "treat_whitespace_as_suffix is true"), ({}, {4: 1}, "remove_extra_whitespaces is true"),
                ({}, {5: 0}, "escape_whitespaces is false"), ({}, {1: b"nmt_nfkc", 2: b"xx"}, "normalizer nmt_nfkc"),
                ({41: 9999}, {}, "id 9999")):
            file = sentencepiece(trainer=trainer.items(), normalizer=normalizer.items())
            self.refused(self.tokenizer(file, "tokenizer.model"), "tokenizer.model", wanted)

    def test_no_dummy_prefix_and_no_bos_are_kept_so(self):
        t = self.pieces(sentencepiece(normalizer=[(3, 0)], trainer=[(41, -1)]), "tokenizer.model")
        self.assertEqual((t.flags, t.bos), (0, -1))

    def test_bytes_that_are_no_model_are_refused(self):
        good = sentencepiece()
        for file in (bytes(99), b"\xff" * 99, good[:-1], good + b"\x0b", good + field(1, 5), b"\x0a\xff\xff\xff\xff\x0f" + good,
                     sentencepiece([("x", float("nan"), 1)]), sentencepiece([("x", 0.0, 9)]), sentencepiece([("a", 0.0, 1)] * 2),
                     sentencepiece([("", 0.0, 1)]), sentencepiece([("<0xZZ>", 0.0, 6)]), good + field(1, field(1, b"\xff"))):
            self.refused(self.tokenizer(file, "tokenizer.model"), "tokenizer.model")

    def test_llama2c_tokenizers_are_read(self):
        names = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [b"<0x%02X>" % b for b in range(256)] + [b" ", b"a", b" a"]
        file = struct.pack("<I", 6) + b"".join(struct.pack("<fI", -i, len(n)) + n for i, n in enumerate(names))
        t = self.pieces(file, "tokenizer.bin")
        self.assertEqual((t.kind, t.flags, t.bos, t.unknown, t.ends), (0, 3, 1, 0, [2]))
        self.assertEqual(t.tokens[:4], [(b"<unk>", 0, 2), (b"<s>", -1, 3), (b"</s>", -2, 3), (b"\0", -3, 6)])
        self.assertEqual(t.tokens[-1], (b" a", -261, 1))
        os.unlink(self.out)
        for bad in (file[:-1], file + b"\0\0\0", file[:100]):
            self.refused(self.tokenizer(bad, "tokenizer.bin"), "tokenizer.bin")

    def test_tokens_added_later_extend_the_model_file(self):
        t = self.pieces(sentencepiece(), "tokenizer.model", tokenizer_config={
            "added_tokens_decoder": {"262": special(262, "<|im_start|>"), "264": special(264, "<tool>", False)},
            "add_bos_token": False}, added_tokens={"<|im_start|>": 262, "<|im_end|>": 265})
        self.assertEqual(t.tokens[262:], [(b"<|im_start|>", 0, 3), (b"", 0, 5), (b"<tool>", 0, 4), (b"<|im_end|>", 0, 3)])
        self.assertEqual((t.flags, t.bos, t.ends), (2, 1, [2, 265]))

    def test_a_sentencepiece_like_json_becomes_kind_0_with_merges(self):
        t = self.pieces(spm_json(), tokenizer_config={"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"},
                                                      "eos_token": "</s>"})
        self.assertEqual((t.kind, t.flags, t.bos, t.unknown, t.ends, t.merges), (0, 3, 1, 0, [2], [(259, 260, 261)]))
        self.assertEqual((t.tokens[0][2], t.tokens[13], t.tokens[261]), (2, (b"\n", 0, 6), (b" a", 0, 1)))

    def test_metaspace_says_whether_a_space_goes_in_front(self):
        for scheme, flags in (("first", 2), ("always", 2), ("never", 0)):
            step = dict(type="Metaspace", replacement="\u2581", prepend_scheme=scheme, split=False)
            self.assertEqual(self.pieces(spm_json(normalizer=None, pre_tokenizer=step)).flags, flags)


class ByteLevel(Case):
    def test_a_byte_level_json_becomes_kind_1_with_merges_and_classes(self):
        t = self.pieces(byte_json())
        self.assertEqual((t.kind, t.flags, t.split, t.bos, t.unknown, t.ends), (1, 5, 1, 258, -1, [260]))
        self.assertEqual(t.merges, [(32, 97, 256), (98, 98, 257)])
        self.assertEqual([text for text, _, _ in t.tokens[:256]], [bytes([b]) for b in range(256)])
        self.assertEqual(t.tokens[256:], [(b" a", 0, 1), (b"bb", 0, 1), (b"<|begin_of_text|>", 0, 3), (b"", 0, 5),
                                          (b"<|eot_id|>", 0, 3), (b"<tool>", 0, 4)])
        self.assertEqual((t.marks, t.compositions), ([], []))

    def test_classes_are_those_of_the_regex_engine(self):
        t = self.pieces(byte_json())
        self.assertEqual(t.classes[0], (0, 0))
        for character in map(chr, [*range(0x3000), 0x4E00, 0xAC00, 0x1D7CE, 0x10FFFF]):
            kind = unicodedata.category(character)[0]
            white = ord(character) in (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
                                       0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
            self.assertEqual(t.class_of(character), 3 if white else {"L": 1, "N": 2}.get(kind, 0), repr(character))

    def test_each_split_rule_is_recognised(self):
        level = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
        digits = dict(type="Digits", individual_digits=True)
        for step, number in ((splitting(LLAMA3), 1), (splitting(QWEN2), 2), (splitting(GPT2), 3), (level, 3),
                             (dict(type="Sequence", pretokenizers=[digits, level]), 4)):
            self.assertEqual(self.pieces(byte_json(pre_tokenizer=step)).split, number)

    def test_nfc_brings_its_tables(self):
        t = self.pieces(byte_json(normalizer={"type": "NFC"}))
        self.assertTrue(t.flags & 8)
        rows = {whole & 0x7FFFFFFF: (first, second, whole >> 31) for whole, first, second in t.compositions}
        self.assertEqual([row[0] & 0x7FFFFFFF for row in t.compositions], sorted(rows))
        self.assertEqual(rows[0xE9], (0x65, 0x301, 0))      # e acute
        self.assertEqual(rows[0x212B], (0xC5, 0, 1))        # Angstrom sign: a singleton
        self.assertEqual(rows[0x958], (0x915, 0x93C, 1))    # Devanagari qa: excluded
        self.assertEqual(rows[0x344], (0x308, 0x301, 1))    # begins with a mark
        self.assertNotIn(0xFB01, rows)                      # the ligature fi is compatibility only
        marks = dict(t.marks)
        self.assertEqual((marks[0x300], marks[0]), (230, 0))

    def test_every_other_tokenizer_is_refused_by_name(self):
        level = dict(type="ByteLevel", add_prefix_space=True, use_regex=True)
        for file, wanted in (
                (byte_json(model={"type": "Unigram"}), "Unigram"), (byte_json(model={"type": "WordPiece"}), "WordPiece"),
                (byte_json(model={"dropout": 0.1}), "dropout"), (byte_json(pre_tokenizer=splitting(r"\w+")), r"\w+"),
                (byte_json(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
                (byte_json(normalizer={"type": "NFKC"}), "NFKC"), (byte_json(pre_tokenizer=level), "add_prefix_space"),
                (byte_json(pre_tokenizer=dict(type="Whitespace")), "byte_fallback is false"),
                (byte_json(model={"merges": []}), "no merges"), (byte_json(model={"merges": [["a", "b"]]}), "merge 0"),
                (byte_json(model={"merges": [["a"]]}), "merge 0"), (byte_json(model={"merges": 3}), "merges"),
                (byte_json(model={"vocab": {"a": 2**31}}), "2147483648"), (byte_json(model={"vocab": {"a": -1}}), "-1"),
                (byte_json(model={"vocab": {"a": 1, "b": 1}}), "shares one"), (byte_json(model={"vocab": {"a": "1"}}), "'1'"),
                (byte_json(model={"vocab": {**byte_json()["model"]["vocab"], "\u4e00": 270}}), "byte-level alphabet"),
                (byte_json(added_tokens=[{**special(300, "<x>", False), "lstrip": True}]), "lstrip"),
                (byte_json(post_processor={"type": "BertProcessing"}), "BertProcessing"),
                (spm_json(model={"byte_fallback": False}), "byte_fallback is false"),
                (spm_json(normalizer={"type": "NFKC"}), "NFKC"), (spm_json(normalizer=None), "unknown normalizer"),
                (spm_json(model={"vocab": {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3}}, added_tokens=[]), "byte 0x00"),
                ("[]", "a JSON list"), ("{}", "type none, wanted BPE")):
            self.refused(self.tokenizer(file), "tokenizer.json", wanted)

    def test_ends_come_from_every_place_that_names_them(self):
        t = self.pieces(byte_json(), generation_config={"eos_token_id": [256, 260]}, config={"eos_token_id": 3},
                        tokenizer_config={"eos_token": "<tool>"})
        self.assertEqual(t.ends, [256, 260, 261])
        self.assertEqual(self.pieces(byte_json(), generation_config={}, config={"eos_token_id": 3}).ends, [3, 261, 260])

    def test_an_end_that_is_no_token_is_refused(self):
        for value in (99999, -1, "x", [None], True, 2.5):
            self.refused(self.tokenizer(byte_json(), generation_config={"eos_token_id": value}), "generation_config.json")
        self.refused(self.tokenizer(byte_json(), generation_config={}, tokenizer_config={"eos_token": "</nope>"}), "</nope>")

    def test_the_chat_format_is_recognised_by_its_marks(self):
        for text, number in (("<|start_header_id|>", 2), ("<|im_start|>", 3), ("[INST] <<SYS>>", 1), ("[INST]", 4),
                             ("<|user|> <|assistant|>", 5)):
            for template in (text, [{"name": "tool_use", "template": "?"}, {"name": "default", "template": text}]):
                self.assertEqual(self.pieces(byte_json(), tokenizer_config={"chat_template": template}).chat, number)
        self.write("tok/chat_template.jinja", "<|im_start|>")
        self.assertEqual(self.pieces(byte_json()).chat, 3)

    def test_a_chat_format_that_is_unknown_is_said_and_the_option_decides(self):
        path = self.tokenizer(byte_json(), tokenizer_config={"chat_template": "### Instruction"})
        self.assertIn("no known format", self.export(path))
        self.assertEqual(Pieces(self.out).chat, 0)
        self.export(path, "--chat", "zephyr")
        self.assertEqual(Pieces(self.out).chat, 5)

    def test_llama_3s_own_tokenizer_file_is_read(self):
        import base64
        words = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"bc"]
        text = "".join("%s %d\n" % (base64.b64encode(w).decode(), i) for i, w in enumerate(words))
        t = self.pieces(text, "tokenizer.model")
        self.assertEqual((t.kind, t.flags, t.split, t.chat, t.bos, len(t.tokens)), (1, 5, 1, 2, 259, 259 + 256))
        self.assertEqual(t.merges, [(97, 98, 256), (97, 258, 257), (256, 99, 257), (98, 99, 258)])
        names = {i: t.tokens[259 + i][0] for i in (0, 1, 6, 7, 8, 9, 255)}
        self.assertEqual(names, {0: b"<|begin_of_text|>", 1: b"<|end_of_text|>", 6: b"<|start_header_id|>",
                                 7: b"<|end_header_id|>", 8: b"<|eom_id|>", 9: b"<|eot_id|>",
                                 255: b"<|reserved_special_token_247|>"})
        self.assertEqual(t.ends, [259 + 1, 259 + 8, 259 + 9])


class Output(Case):
    def test_the_tokenizer_of_a_folder_is_written_beside_the_model(self):
        folder = self.hugging_face(config(vocab_size=262), tensors(vocab=262))
        self.write("model/tokenizer.json", spm_json())
        self.write("model/tokenizer.model", sentencepiece())
        self.export(folder)
        self.assertEqual(self.made(), ["model.bin", "model.tokenizer.bin"])
        self.assertEqual(Pieces(self.out[:-4] + ".tokenizer.bin").merges, [])  # from tokenizer.model

    def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(self):
        self.write("model/tokenizer.model", sentencepiece())
        self.refused(self.hugging_face(), "tokenizer.model", "262 tokens for a model of 10")

    def test_special_tokens_beyond_the_model_are_left_out(self):
        folder = self.hugging_face(config(vocab_size=262), tensors(vocab=262))
        self.write("model/tokenizer.model", sentencepiece())
        self.write("model/added_tokens.json", {"[PAD]": 262})
        self.assertIn("1 special tokens beyond the model's 262", self.export(folder))
        self.assertEqual(len(Pieces(self.out[:-4] + ".tokenizer.bin").tokens), 262)

    def test_a_metas_tokenizer_may_lie_in_the_folder_above(self):
        entries = {n: (d, (262, 8), numbers(262 * 8, 0, d)) if s == (10, 8) else (d, s, b)
                   for n, (d, s, b) in meta_tensors().items()}
        folder = self.meta([entries])
        self.write("tokenizer.model", sentencepiece())
        self.export(folder)
        self.assertEqual(self.made(), ["model.bin", "model.tokenizer.bin"])

    def test_an_error_leaves_the_old_file_as_it_was(self):
        self.write("out/model.bin", b"old")
        entries = tensors()
        entries["lm_head.weight"] = ("F32", (10, 8), struct.pack("<80f", *[1e9] * 80))
        status, _ = self.run_main(self.hugging_face(entries=entries), self.out, "--type", "f16")
        self.assertEqual((status, self.made()), (1, ["model.bin"]))
        with open(self.out, "rb") as file:
            self.assertEqual(file.read(), b"old")

    def test_the_source_is_never_overwritten(self):
        path = self.tokenizer(byte_json())
        status, said = self.run_main(path, path)
        self.assertEqual(status, 1)
        self.assertIn("is the source", said)
        folder = self.hugging_face()
        status, said = self.run_main(folder, folder + "/model.safetensors")
        self.assertEqual(status, 1)
        self.assertIn("is the source", said)

    def test_a_signal_leaves_no_trace(self):
        for number, wanted in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            process = subprocess.Popen([sys.executable, PROGRAM, "--random", "1.1b", self.out, "--type", "f32"],
                                       stderr=subprocess.PIPE)
            while not self.made():
                time.sleep(0.01)
            process.send_signal(number)
            said = process.communicate()[1].decode()
            self.assertEqual((process.returncode, self.made()), (wanted, []), said)
            self.assertNotIn("Traceback", said)

    def test_a_terminal_sees_progress_and_a_pipe_does_not(self):
        command = [sys.executable, PROGRAM, "--random", "dim=64,layers=2,vocab=999", self.out]
        self.assertEqual(subprocess.run(command, stderr=subprocess.PIPE).stderr, b"")
        ours, theirs = os.openpty()
        subprocess.run(command, stderr=theirs)
        self.assertIn(b"100 % of 0 MB", os.read(ours, 1 << 16))
        os.close(ours), os.close(theirs)

    def test_a_full_disk_is_one_line_and_no_file(self):
        limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); " \
            "sys.argv = sys.argv[1:]; exec(compile(open(sys.argv[0]).read(), 'export', 'exec'))"
        done = subprocess.run([sys.executable, "-c", limit, PROGRAM, "--random", "15m", self.out], stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, self.made()), (1, []))
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)

    def test_a_folder_that_is_not_there_is_one_line(self):
        status, said = self.run_main(self.hugging_face(), self.path("x/y")[:-1] + "z/model.bin")
        self.assertEqual((status, len(said.splitlines())), (1, 1))
        self.assertIn("z/model.bin", said)

    def test_other_files_are_refused_with_what_to_do(self):
        for start, wanted in ((b"GGUF", "GGUF"), (b"LLAMA02\0", "already"), (b"LLAMA02T", "already"), (b"PK\3\4", "zip"),
                              (b"", "neither")):
            self.refused(self.write("x", start.ljust(100 if start else 0, b"\0")), wanted)
        os.mkfifo(self.path("pipe"))
        self.refused(self.path("pipe"), "no regular file")

    def test_names_from_files_cannot_move_the_cursor(self):
        self.refused(self.hugging_face(entries={**tensors(), "\x1b[2J\nexport: fine": ("F32", (1,), bytes(4))}), "?[2J?export")

    def test_wrong_usage_is_status_2(self):
        for arguments in ([], ["only"], ["a", "b", "c"], ["a", "b", "--type", "q8"], ["a", "b", "--type", "q3"],
                          ["--random", "15m"], ["--random", "15m", "out", "--type", "keep"], ["a", "b", "--context", "0"]):
            self.assertEqual(self.run_main(*arguments)[0], 2)


class Random(Case):
    SHAPE = "dim=40,layers=2,heads=2,hidden=50,vocab=37,context=9"

    def random(self, kind, shape=SHAPE):
        status, said = self.run_main("--random", shape, self.out, "--type", kind)
        self.assertEqual((status, said), (0, ""))
        with open(self.out, "rb") as file:
            return file.read()

    def matrices(self, data, matrix_size):
        """(rows, columns, bytes) of every matrix of SHAPE, in a file whose matrices take so many bytes."""
        at, layer = 256, [(0, 40), (40, 40), (40, 40), (40, 40), (40, 40), (0, 40), (50, 40), (50, 40), (40, 50)]
        for rows, columns in [(37, 40)] + layer * 2 + [(0, 40), (37, 40)]:
            at = -(-at // 64) * 64
            size = matrix_size(rows, columns) if rows else 4 * columns
            if rows:
                yield rows, columns, data[at:at + size]
            else:
                self.assertEqual(data[at:at + size], struct.pack("<f", 1.0) * columns)
            at += size
        self.assertEqual(at, len(data))

    def test_float_weights_are_finite_small_and_repeatable(self):
        data = self.random("f32")
        self.assertEqual(data, self.random("f32"))
        self.assertEqual(struct.unpack_from("<12I", data, 8), (1, 0, 40, 50, 2, 2, 2, 20, 37, 9, 0, 0))
        values = [v for _, _, m in self.matrices(data, lambda r, c: 4 * r * c) for v in struct.unpack("<%df" % (len(m) // 4), m)]
        spread = (sum(v * v for v in values) / len(values)) ** 0.5
        self.assertTrue(0.01 < spread < 0.03 and abs(sum(values) / len(values)) < 0.002, spread)
        for kind in ("f16", "bf16"):
            list(self.matrices(self.random(kind), lambda r, c: 2 * r * c))

    def panels(self, kind):
        """Row by row the stored numbers and the scales of every quantized matrix."""
        lines = 8 if kind == "q8" else 4

        def size(rows, columns):
            groups = -(-columns // 32)
            return -(-rows // 16) * (groups * lines * 64 + -(-groups * 32 // 64) * 64)
        model = self.random(kind)
        self.assertEqual(struct.unpack_from("<I", model, 52), (16,))  # scales stand among the lines
        for rows, columns, data in self.matrices(model, size):
            groups = -(-columns // 32)
            panel = size(16, columns)
            for r in range(-(-rows // 16) * 16):
                start, lane = r // 16 * panel, r % 16
                weights, scales = [], []
                for g in range(groups):
                    at = start + (g * lines + g // 2 + 1) * 64
                    for c in range(32):
                        if kind == "q8":
                            weights.append(data[at + c // 4 * 64 + 4 * lane + c % 4] - 128)
                        else:
                            byte = data[at + c // 8 * 64 + 4 * lane + c % 4]
                            weights.append((byte >> 4 if c % 8 >= 4 else byte & 15) - 8)
                    line = start + g // 2 * (2 * lines + 1) * 64
                    scales += struct.unpack_from("<e", data, line + (g % 2 * 16 + lane) * 2)
                yield r < rows, columns, weights, scales

    def test_quantized_panels_hold_weights_of_the_same_spread_and_zero_padding(self):
        for kind in ("q8", "q4"):
            squares = count = 0
            for real, columns, weights, scales in self.panels(kind):
                if real:
                    values = [w * scales[i // 32] for i, w in enumerate(weights)]
                    squares, count = squares + sum(v * v for v in values), count + columns
                self.assertFalse(any(weights[columns:] if real else weights))
                self.assertEqual(any(scales), real)
            self.assertTrue(0.01 < (squares / count) ** 0.5 < 0.03)

    def test_named_shapes_are_those_of_the_published_models(self):
        self.assertEqual(struct.unpack_from("<8I", self.random("q4", "15m"), 16), (288, 768, 6, 6, 6, 48, 32000, 256))

    def test_shapes_that_cannot_be_are_refused(self):
        for shape in ("16m", "dim=0", "dim=9,heads=2,kv_heads=3", "dim=x", "layers=9999999999", "dim=8,dims=8", "heads=0"):
            status, said = self.run_main("--random", shape, self.out)
            self.assertEqual((status, len(said.splitlines()), self.made()), (1, 1, []), said)


@unittest.skipUnless(os.path.isdir(REFERENCE), "no ../shared/reference")
class Reference(Case):
    def test_every_reference_model_is_exported_to_the_size_of_its_tensors(self):
        for name in sorted(os.listdir(REFERENCE)):
            if name not in ("tokenizers", "README.md"):
                self.export(os.path.join(REFERENCE, name))

    def test_every_reference_tokenizer_is_exported(self):
        folder = os.path.join(REFERENCE, "tokenizers")
        for name in ("spm-2k.model", "llama2-json-2k", "llama3-2k", "qwen2-2k", "smollm-2k"):
            self.export(os.path.join(folder, name))
            self.assertGreater(len(Pieces(self.out).tokens), 1999)


if __name__ == "__main__":
    unittest.main()
