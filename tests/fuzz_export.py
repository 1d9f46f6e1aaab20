#!/usr/bin/env python3
"""Broken sources for export.py: it must convert or refuse with one line, in time, and leave nothing half done.

    python3 tests/fuzz_export.py [--seconds N] [--seed N]

A finding is printed with the seed that makes it again: --seed N --seconds 0 tries one source."""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.dont_write_bytecode = True
import test_export as made  # its builders of small sources

RUN = os.environ.get("RUN", os.path.join(made.ROOT, "run"))
MOST_SECONDS = 10  # for one source; honest ones of this size take milliseconds
ODD = [0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400, 0.0, -0.0, 1e-30, 1e30, 1e400, float("nan"), "",
       "\0", "\ud800", "a", "../x", "/etc/passwd", "F32", "llama3", "\u2581", True, False, None, [], {}, [[]], [0], {"a": {}}]


def hugging_face(dice):
    family, options = dice.choice([("LlamaForCausalLM", {}), ("MistralForCausalLM", {}),
                                   ("Qwen2ForCausalLM", dict(biases=True)), ("Qwen3ForCausalLM", dict(norms=True))])
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
    header, data = made.safetensors(made.tensors(dice.choice(["F32", "BF16", "F16"]), **options))
    header["__metadata__"] = {"format": "pt"}
    return {"config.json": made.config(family, vocab_size=10, rope_scaling=dice.choice([None, scaling])),
            "model.safetensors": (header, data)}


def shards(dice):
    entries = sorted(made.tensors().items())
    half = len(entries) // 2
    files = {"a.safetensors": entries[:half], "b.safetensors": entries[half:]}
    index = dict(weight_map={name: file for file, part in files.items() for name, _ in part})
    return {"config.json": made.config(), "model.safetensors.index.json": index,
            **{file: made.safetensors(dict(part)) for file, part in files.items()}}


def meta(dice):
    members = {}
    made.pth(made.meta_tensors(), change=members.update)
    return {"params.json": made.PARAMS, "consolidated.00.pth": dict(members)}


def tokenizers(dice):
    name, content = dice.choice([("tokenizer.json", made.spm_json()), ("tokenizer.json", made.byte_json()),
                                 ("tokenizer.model", made.sentencepiece())])
    return {name: content, "tokenizer_config.json": dict(bos_token="<s>", eos_token=dict(content="</s>"),
                                                         chat_template="[INST] <<SYS>>"),
            "generation_config.json": dict(eos_token_id=[2, 1])}


def llama2c(dice):
    c = (8, 12, 1, 2, 1, 10, 16)
    return {"model.bin": made.struct.pack("<7i", *c) + made.numbers(10 * 8 + 8 + 192 + 8 + 288 + 8, 1)}


# ------------------------------------------------------------------------------------------------
# Breaking

def broken_bytes(dice, data):
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = min(int(len(data) * dice.random() ** dice.choice([1, 4])), max(len(data) - 1, 0))  # often near the start
        size = dice.choice([1, 2, 4, 8, 32])
        how = dice.randrange(6)
        if how == 0:
            data[at:at + 1] = bytes([dice.randrange(256)])
        elif how == 1:
            data[at:at + size] = dice.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * size
        elif how == 2:
            del data[at:at + size]
        elif how == 3:
            data[at:at] = dice.randbytes(size)
        elif how == 4:
            del data[at:]
        else:
            data[at:at] = data[:at][-size:] * dice.choice([1, 3, 100])
    return bytes(data)


def broken_value(dice, value):
    """JSON with one value, key or element changed, somewhere in its depth."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key, out = dice.choice(list(value)), dict(value)
        how = dice.randrange(8)
        if how == 0:
            del out[key]
        elif how == 1:
            out[dice.choice(list(value)) + dice.choice(["", "x", "_"])] = dice.choice([dice.choice(ODD), out[key]])
        else:
            out[key] = broken_value(dice, out[key])
        return out
    if isinstance(value, list) and value and dice.random() < 0.9:
        at, out = dice.randrange(len(value)), list(value)
        how = dice.randrange(8)
        if how == 0:
            del out[at]
        elif how == 1:
            out.insert(at, dice.choice([dice.choice(ODD), out[at]]))
        else:
            out[at] = broken_value(dice, out[at])
        return out
    if isinstance(value, int) and dice.random() < 0.5:
        return value + dice.choice([-1, 1, 2, 64, -64, 2**32])
    if isinstance(value, str) and value and dice.random() < 0.3:
        at = dice.randrange(len(value))
        return value[:at] + dice.choice(["", "\0", "\u2581", "(", "\\p{L}", value]) + value[at + 1:]
    return dice.choice(ODD)


def pack(dice, content, broken):
    """A file's bytes; what it is made of is changed first, or the bytes after."""
    inside = broken and dice.random() < 0.7
    if isinstance(content, tuple):
        header, data = content
        data = made.pack_safetensors(broken_value(dice, header) if inside else header, data)
    elif isinstance(content, dict) and "archive/data.pkl" in content:
        name = dice.choice(["archive/data.pkl"] * 4 + list(content))
        changes = {name: broken_bytes(dice, content[name])} if inside else {}
        data = made.pth({}, change=lambda members: (members.clear(), members.update(content), members.update(changes)))
    elif isinstance(content, dict):
        data = json.dumps(broken_value(dice, content) if inside else content).encode("utf-8", "surrogatepass")
    else:
        inside, data = False, content
    return broken_bytes(dice, data) if broken and not inside else data


def make(folder, seed):
    """A broken source, and what to call it with."""
    dice = random.Random(seed)
    files = dice.choice([hugging_face, shards, meta, tokenizers, llama2c])(dice)
    if dice.random() < 0.2:
        files.update(tokenizers(dice))
    victim = dice.choice(list(files))
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(pack(dice, content, name == victim))
    alone = [name for name in files if len(files) == 1 or (name.startswith("tokenizer.") and dice.random() < 0.8)]
    options = dice.choice([[], [], ["--type", "f16"], ["--type", "bf16"], ["--type", "f32"], ["--context", "9"]])
    return os.path.join(folder, alone[0]) if alone else folder, options


# ------------------------------------------------------------------------------------------------
# Trying

class TooLong(BaseException):
    pass


def expire(*_):
    raise TooLong


def accepted(out):
    """What run says against a model that was made, if anything."""
    with open(out, "rb") as file:
        if file.read(8) != b"LLAMA02\0":
            return ""
    done = subprocess.run([RUN, out, "-m", "logits"], input=b"1 0", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return "" if done.returncode == 0 else "run refuses it: %s" % done.stderr.decode(errors="replace")


def attempt(place, seed):
    """(converted, what is wrong)."""
    source, result = os.path.join(place, "source"), os.path.join(place, "result")
    for folder in source, result:
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
    path, options = make(source, seed)
    out = os.path.join(result, "out.bin")
    signal.alarm(MOST_SECONDS)
    try:
        status, said = made.Case.run_main(None, path, out, *options)
    except TooLong:
        return False, "took more than %d s" % MOST_SECONDS
    except BaseException:
        return False, traceback.format_exc()
    finally:
        signal.alarm(0)
    left = os.listdir(result)
    if status == 0 and "out.bin" in left:
        return True, accepted(out) if seed % 16 == 0 else ""
    lines = said.splitlines()
    if status != 1 or left or not 1 <= len(lines) <= 3 or not all(line.startswith("export: ") for line in lines):
        return False, "status %s, files %s, said %r" % (status, left, said)
    return False, ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()) * 10**6)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, expire)
    begin, tried, converted, findings = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="llama02-fuzz-") as place:
        while tried == 0 or time.time() - begin < options.seconds:
            good, wrong = attempt(place, options.seed + tried)
            if wrong:
                print("finding: tests/fuzz_export.py --seconds 0 --seed %d\n%s" % (options.seed + tried, wrong))
            tried, converted, findings = tried + 1, converted + good, findings + bool(wrong)
    print("fuzz export: %d sources in %.0f s, %d converted, %d findings" % (tried, options.seconds, converted, findings))
    return findings > 0


if __name__ == "__main__":
    sys.exit(main())
