"""Files spoilt on purpose: along their own structure, so that a lie gets past the parser, or blindly, byte by byte.

A folder in memory is {name: bytes of a file, text that a link leads to, or None for a folder}. `mutated` draws one to
four mutations of it from a `random.Random`, so a case is a function of its number. Some change the layout and not the
meaning, as spaces in JSON do: who refuses those is wrong, too.
"""

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

from minilora.checkpoint.json_file import MAX_BYTES

Folder = dict[str, bytes | str | None]
Draw = random.Random
MANIFEST = "manifest.json"
_STATE = "quant_state.bitsandbytes__nf4"
_DEEP = 100_000

_NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 255, 256, 0.5, -0.0, 1.0, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**30, 10**400, 1e-300, 1e-6, 1e30, 3.5e38, 1e308, nan, inf, -inf,
)  # fmt: skip
_TEXTS = (
    "", "x", "0", "4096", "nan", "..", "../x", "/etc/hostname", "a\0b", "\ud800", "\x1b[2J", "line\nline", "\u2028",
    "é" * 300, "x" * 100_000, "model.safetensors", "F32", "F64", "BF16", "F16", "U8", "I8", "I32", "F8_E4M3", "F31",
    "float16", "bfloat16", "float32", "int8", "nf4", "fp4", "none", "LORA", "PREFIX_TUNING", "IA3", "llama", "mistral",
    "ministral", "ministral3", "mixtral", "gelu", "default", "yarn", "linear", "full_attention", "sliding_attention",
    "user", "assistant", "system", "tool", "(x+x+)+y", "(", r".*_proj", "all-linear", "lm_head", "embed_tokens",
    "[INST]", "</s>", "<s>", "\N{REPLACEMENT CHARACTER}", "\U0001f600",
)  # fmt: skip
_KEYS = (
    "moe", "vision_config", "yarn", "rope_scaling", "quantization_config", "quantization", "layer_types", "bias",
    "num_local_experts", "layers_to_transform", "modules_to_save", "rank_pattern", "weight", "weights", "tools",
    "history", "prefix", "text", "messages", "tool_calls", "system_prompt", "__metadata__", "_sliding_window", "lora",
    "sliding_window", "tie_word_embeddings", "attention_bias", "nested_offset", "format_version", "files", "\0", "",
)  # fmt: skip


@dataclass(frozen=True)
class Mutated:
    """labels: what was done, in order; harmless: the meaning is still that of the folder it was made from."""

    folder: Folder
    labels: tuple[str, ...]
    harmless: bool


def mutated(draw: Draw, folder: Mapping[str, bytes | str | None], donors: list[bytes], seals: bool = True) -> Mutated:
    """One to four mutations; files of `donors` are what splices are cut from.

    seals: a manifest is made to fit the spoilt files in most cases: it keeps out accidents, not enemies
    """
    spoilt, labels, harmless = dict(folder), list[str](), True
    for _ in range(draw.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        if draw.random() < 0.08:
            labels.append(_spoil_folder(draw, spoilt))
            harmless = False
            continue
        name = draw.choice(sorted(name for name, held in spoilt.items() if isinstance(held, bytes)) or [""])
        if not name:
            continue
        before = spoilt[name]
        assert isinstance(before, bytes)
        after, label, same = _spoil_file(draw, name, before, donors)
        spoilt[name], harmless = after, harmless and (same or after == before)
        labels.append(f"{name}: {label}")
    if MANIFEST in folder and spoilt.get(MANIFEST) == folder[MANIFEST] and seals and draw.random() < 0.8:
        spoilt[MANIFEST] = sealed(spoilt)
        labels.append("manifest made to fit")
    elif MANIFEST in folder:
        harmless = False
    return Mutated(spoilt, tuple(labels), harmless)


def sealed(folder: Mapping[str, bytes | str | None]) -> bytes:
    """A manifest of the files as they are, like that of minilora.checkpoint.write."""
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in sorted(folder.items())
        if isinstance(data, bytes) and name != MANIFEST
    }
    return json.dumps({"format_version": 1, "files": listed}, indent=2).encode()


def write(folder: Mapping[str, bytes | str | None], at: Path) -> None:
    """Put the folder on the disk, at a place where there is nothing yet."""
    at.mkdir()
    for name, held in folder.items():
        file = at / name
        if isinstance(held, bytes):
            file.write_bytes(held)
        elif held is None:
            file.mkdir()
        else:
            file.symlink_to(held)


def _spoil_folder(draw: Draw, folder: Folder) -> str:
    """Files that are gone, swapped, or no files; in place. What was done."""
    names = sorted(folder)
    if not names:
        return "nothing left"
    name, other = draw.choice(names), draw.choice(names)
    kind = draw.choice(("gone", "empty", "a folder", "a link", "swapped", "copied", "one more", "renamed"))
    if kind == "gone":
        del folder[name]
    elif kind == "empty":
        folder[name] = b""
    elif kind == "a folder":
        folder[name] = None
    elif kind == "a link":
        folder[name] = draw.choice(("nothing", name, "/dev/zero", "/etc/hostname", "..", other))
    elif kind == "swapped":
        folder[name], folder[other] = folder[other], folder[name]
    elif kind == "copied":
        folder[name] = folder[other]
    elif kind == "one more":
        folder[draw.choice(("extra.safetensors", "consolidated.safetensors", "tekken.json", "x" * 255))] = folder[name]
    else:
        folder[draw.choice((name[:99].upper() + "_", "é" + name[:99]))] = folder.pop(name)
    return f"{name}: {kind}"


def _spoil_file(draw: Draw, name: str, data: bytes, donors: list[bytes]) -> tuple[bytes, str, bool]:
    """New bytes, what was done, and whether they still mean the same."""
    kind = next((spoil for ending, spoil in _BY_ENDING.items() if name.endswith(ending)), None)
    if kind is None or draw.random() < 0.25:
        return _blind(draw, data, donors)
    try:
        return kind(draw, data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):  # spoilt before
        return _blind(draw, data, donors)


# -- bytes -------------------------------------------------------------------------------------------------------------


def _blind(draw: Draw, data: bytes, donors: list[bytes]) -> tuple[bytes, str, bool]:
    """Bits, bytes and pieces, without knowing what they are."""
    made, n = bytearray(data), len(data)
    a = draw.randrange(min(n, 200) if draw.random() < 0.3 else n) if n else 0
    b = min(n, a + draw.choice((1, 2, 4, 8, 16, 100, 1000)))
    kinds = (
        "bits",
        "bytes",
        "cut short",
        "inserted",
        "deleted",
        "doubled",
        "spliced",
        "zeros",
        "ones",
        "number",
        "tail",
    )
    kind = draw.choice(kinds)
    if kind == "bits":
        for at in draw.choices(range(n), k=draw.randint(1, 8)) if n else ():
            made[at] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        made[a:b] = draw.randbytes(b - a)
    elif kind == "cut short":
        del made[a:]
    elif kind == "inserted":
        made[a:a] = draw.choice((draw.randbytes(b - a), b"\0" * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b'"'))
    elif kind == "deleted":
        del made[a:b]
    elif kind == "doubled":
        made[a:a] = data[a:b] * draw.choice((1, 2, 50))
    elif kind == "spliced":
        donor = draw.choice(donors)
        at = draw.randrange(len(donor)) if donor else 0
        made[a:b] = donor[at : at + draw.choice((8, 100, 2000))]
    elif kind in ("zeros", "ones"):
        made[a:b] = (b"\0" if kind == "zeros" else b"\xff") * (b - a)
    elif kind == "number":  # a length or a count may lie here
        size, value = draw.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
        top = 2 ** (8 * size)
        number = draw.choice((0, 1, n, n + 1, top - 1, top // 2, top // 2 - 1, top // 16, 100_000_000)) % top
        made[a : a + size] = struct.pack(f"<{value}", number)
    else:
        made += draw.choice((b"\0", b" ", b"\n", draw.randbytes(100)))
    return bytes(made), f"{kind} at {a}", False


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json(draw: Draw, data: bytes) -> tuple[bytes, str, bool]:
    """A file that holds one JSON value."""
    if draw.random() < 0.005:
        n = draw.choice((MAX_BYTES // 3 - 10, MAX_BYTES // 2))
        return b'{"a": [' + b"[]," * n + b"0]}", f"{n:,} lists", False
    value = json.loads(data)
    if draw.random() < 0.1:
        return _relaid(draw, value), "laid out otherwise", True
    value, raw, label = _spoil_value(draw, value)
    text = json.dumps(value)
    for mark, stands in raw.items():
        text = text.replace(f'"{mark}"', stands)
    return text.encode(), label, False


def _relaid(draw: Draw, value: Any) -> bytes:
    """The same value in other spaces, escapes and order of keys."""
    if isinstance(value, dict) and draw.random() < 0.5:
        value = dict(draw.sample(list(value.items()), len(value)))
    text = json.dumps(value, indent=draw.choice((None, 0, 3)), ensure_ascii=draw.random() < 0.5)
    return (draw.choice(("", " ", "\n\t")) + text + draw.choice(("", "\n", "  \r\n"))).encode()


def _spoil_value(draw: Draw, value: Any) -> tuple[Any, dict[str, str], str]:
    """The value spoilt, in place where that goes; what stands for strings of it in its text; what was done."""
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return draw.choice((None, [], {}, 7, "x", [value], nan)), {}, "another whole"
    holder, key = draw.choice(places)
    old, where = holder[key], str(key)[:40]
    kind = draw.choice(
        ("wild", "wild", "wild", "gone", "renamed", "added", "swapped", "retyped", "shifted", "raw", "list")
    )
    if kind == "wild":
        holder[key] = _wild(draw)
    elif kind == "gone":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[_new_key(draw, str(key))] = holder.pop(key)
    elif kind == "added" and isinstance(holder, dict):
        holder[draw.choice(_KEYS)] = draw.choice((_wild(draw), old))
    elif kind == "swapped":
        other, at = draw.choice(places)
        holder[key], other[at] = other[at], old
    elif kind == "retyped":
        holder[key] = draw.choice(([old], {"x": old}, str(old), bool(old), None, [old, old]))
        if isinstance(old, int | float) and abs(old) < 1e300:
            holder[key] = draw.choice((float(old), old + 0.5, str(old), bool(old), [old]))
    elif kind == "shifted" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1024))
    elif kind == "list" and isinstance(old, list):
        holder[key] = draw.choice(
            (old[:-1], old + old, old[::-1], old * 500, [*old, _wild(draw)], draw.sample(old, len(old)))
        )
    else:
        kind, holder[key] = "raw", "@raw@"
        stands = draw.choice(
            (
                "[" * _DEEP, "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "9" * 5000, "1e999",
                "-Infinity", "01", "+1", "'x'", "0x10", "tru", "1,", '"\\x"', '"\t"', "/*x*/ 1", "", '"a" "b"',
                f'1, "{where}": 1', '{"a": 1, "a": 2}', '"\\ud800"', "[1,,2]", "[" + "{}," * 2000 + "1]",
            )
        )  # fmt: skip
        return value, {"@raw@": stands}, f"{where} is {stands[:20]}"
    return value, {}, f"{where} {kind}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each holder and key of what lies in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _wild(draw: Draw) -> Any:
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(_NUMBERS)
    if kind < 0.8:
        return draw.choice(_TEXTS)
    if kind > 0.98:
        names = [draw.choice((f"layers.{i}", rf"(x{i}|y)\.q_proj", f"{i}.*")) for i in range(draw.choice((100, 5000)))]
        return draw.choice((names, dict.fromkeys(names, 2), [None] * 20_000, [names[0]] * 5000))
    return draw.choice((None, True, False, [], {}, [[]], [None], {"": None}, [1, 2], [-1], {"a": [{}]}))


def _new_key(draw: Draw, key: str) -> str:
    return draw.choice((draw.choice(_KEYS), draw.choice(_TEXTS), f"{key}x", key.upper(), f" {key}", f"{key}\0"))


def _json_lines(draw: Draw, data: bytes) -> tuple[bytes, str, bool]:
    """A file of JSON values, a line each."""
    lines = data.splitlines()
    at = draw.randrange(len(lines))
    kind = draw.choice(("value", "value", "value", "value", "order", "ends", "blank", "mark", "doubled", "long"))
    if kind == "value":
        lines[at], label, same = _json(draw, lines[at])
        lines[at] = lines[at].replace(b"\n", b" ").replace(b"\r", b" ")
        return b"\n".join(lines) + b"\n", f"line {at + 1}: {label}", same
    if kind == "order":
        draw.shuffle(lines)
    elif kind == "ends":
        return b"\r\n".join(lines), "CRLF", True
    elif kind == "blank":
        lines[at:at] = draw.choice(([b""], [b" \t"], [b""] * 1000))
        return b"\n".join(lines), "blank lines", True
    elif kind == "mark":
        return b"\xef\xbb\xbf" + data, "a byte order mark", True
    elif kind == "doubled":
        lines[at:at] = [lines[at]] * draw.choice((1, 5))
    else:
        lines[at] = json.dumps({"text": draw.choice(("word ", "é", "x", "\0", "\n", '"')) * 10_000}).encode()
    return b"\n".join(lines) + b"\n", f"lines: {kind}", False


# -- safetensors -------------------------------------------------------------------------------------------------------


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body. Raises ValueError and struct.error for what has none."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, data[8 + length :]


def join_safetensors(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A file of the format. length: what it claims of its header; None is the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _safetensors(draw: Draw, data: bytes) -> tuple[bytes, str, bool]:
    header, body = split_safetensors(data)
    keys = [key for key, line in header.items() if key != "__metadata__" and isinstance(line, dict)]
    kind = draw.choice(("json", "length", "line", "line", "line", "numbers", "numbers", "tensor", "state", "layout"))
    if kind == "json":
        text, label, _ = _json(draw, json.dumps(header).encode())
        return join_safetensors(text, body), f"header: {label}", False
    if kind == "length":
        true = len(data) - 8 - len(body)
        length = draw.choice((0, 1, true - 1, true + 1, len(data), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)) % 2**64
        return struct.pack("<Q", length) + data[8:], f"header length {length}", False
    if kind == "layout":
        meta = {} if draw.random() < 0.5 else {"__metadata__": {"format": "pt", "x": "y"}}
        lines = {key: header[key] for key in draw.sample(keys, len(keys))}
        text = json.dumps(meta | lines).encode() + b" " * draw.choice((0, 1, 100))
        return join_safetensors(text, body), "header laid out otherwise", True
    key = draw.choice(keys)
    line, (begin, end) = header[key], header[key]["data_offsets"]
    if kind == "line":
        return join_safetensors(header, body), f"{key}: {_spoil_line(draw, header, key)}", False
    if kind == "numbers":
        return join_safetensors(header, _spoil_numbers(draw, body, line)), f"{key}: other numbers", False
    if kind == "state":
        states = [key for key in keys if key.endswith(_STATE)]
        key = draw.choice(states)  # IndexError, where there is none: bytes are spoilt then
        begin, end = header[key]["data_offsets"]
        new, label, same = _json(draw, body[begin:end])
    else:
        new, label, same = draw.choice((b"", draw.randbytes(7), body[begin:end] * 2)), "tensor replaced", False
    header[key]["shape"] = [len(new)] if kind == "state" else draw.choice(([len(new)], line["shape"]))
    return _with_tensor(header, body, key, new), f"{key}: {label}", same


def _with_tensor(header: dict[str, Any], body: bytes, key: str, new: bytes) -> bytes:
    """The file with other bytes for one tensor, all offsets moved to fit."""
    begin, end = header[key]["data_offsets"]
    moved = len(new) - (end - begin)
    for other, line in header.items():
        if other != "__metadata__" and line["data_offsets"][0] >= end:
            line["data_offsets"] = [at + moved for at in line["data_offsets"]]
    header[key]["data_offsets"] = [begin, begin + len(new)]
    return join_safetensors(header, body[:begin] + new + body[end:])


def _spoil_line(draw: Draw, header: dict[str, Any], key: str) -> str:
    """One tensor's line of a header spoilt, in place. What was done."""
    line, keys = header[key], [key for key in header if key != "__metadata__"]
    shape, (begin, end) = list(line["shape"]), line["data_offsets"]
    kind = draw.choice(("dtype", "shape", "offsets", "name", "swapped", "twin", "empty", "gone"))
    if kind == "dtype":
        line["dtype"] = draw.choice(
            ("F64", "F32", "F16", "BF16", "I8", "U8", "I16", "I64", "BOOL", "F8_E4M3", "F31", 3)
        )
    elif kind == "shape":
        line["shape"] = draw.choice(
            (
                [2**62, 4], [2**32, 2**32], [2**63], [10**400], [-1], [True], [1.0], [0], [], [1] * 9, "4",
                [*shape, 1], [1, *shape], shape[::-1], [n + 1 for n in shape],
            )
        )  # fmt: skip
    elif kind == "offsets":
        line["data_offsets"] = draw.choice(
            (
                [end, begin], [begin + 1, end + 1], [begin, end + 4], [begin - 1, end], [-4, end], [0, 2**63], [begin],
                [0.0, 4],
            )
        )  # fmt: skip
    elif kind == "name":
        header[draw.choice((_new_key(draw, key), key.replace("0", "1"), key.removeprefix("model.")))] = header.pop(key)
    elif kind == "swapped":
        other = draw.choice(keys)
        header[key], header[other] = header[other], line
    elif kind == "twin":
        header[f"{key}.twin"] = dict(line)
    elif kind == "empty":
        header[draw.choice(_TEXTS)] = {"dtype": "F32", "shape": [0], "data_offsets": [begin, begin]}
    else:
        del header[key]
    return kind


def _spoil_numbers(draw: Draw, body: bytes, line: Mapping[str, Any]) -> bytes:
    """Some numbers of a tensor that are extreme or no numbers, or single bits."""
    made, (begin, end) = bytearray(body), line["data_offsets"]
    odd: dict[str, tuple[bytes, ...]] = {  # NaN, infinity, the largest, the smallest
        "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0"),
        "BF16": (b"\xc0\xff", b"\x80\x7f", b"\x7f\x7f", b"\1\0"),
        "F16": (b"\1\xfe", b"\0\x7c", b"\xff\x7b", b"\1\0"),
    }
    values = odd.get(line["dtype"], (b"\0", b"\xff", b"\x80"))
    for _ in range(draw.randint(1, 3)):
        at = begin + draw.randrange(max(1, end - begin)) // len(values[0]) * len(values[0])
        if draw.random() < 0.5:
            made[at : at + len(values[0])] = draw.choice(values)
        elif at < len(made):
            made[at] ^= 1 << draw.randrange(8)
    return bytes(made[: len(body)])


# -- other formats -----------------------------------------------------------------------------------------------------


def _toml(draw: Draw, data: bytes) -> tuple[bytes, str, bool]:
    """Values, keys, sections and lines of a TOML file."""
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    key, equals, _ = lines[at].partition(" = ")
    kind = draw.choice(("value", "value", "value", "value", "key", "gone", "doubled", "section", "text", "deep"))
    if kind in ("value", "key") and not equals:
        kind = "doubled"
    if kind == "value":
        value = draw.choice(
            (json.dumps(_wild(draw)), "nan", "-inf", "1979-05-27", "''", "{a = 1}", "[[1], 'x']", "0x_1")
        )
        lines[at] = f"{key} = {value}"
    elif kind == "key":
        lines[at] = f"{draw.choice((key.upper(), key + '.x', '', '.', json.dumps(_new_key(draw, key))))}{equals}1"
    elif kind == "gone":
        del lines[at]
    elif kind == "doubled":
        lines[at:at] = [lines[at]]
    elif kind == "section":
        lines[at:at] = [draw.choice(("[train]", "[[model]]", "[nothing]", "[", "[model.path]", "[lora.rank_pattern]"))]
    elif kind == "text":
        lines[at] += draw.choice(("\0", "\x7f", " # é", "'", '"""', "\ud800x", " = 1", "\x1b[2J"))
    else:
        lines[at] = f"{key or 'x'} = {'[' * _DEEP}"
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"line {at + 1}: {kind}", False


def _csv(draw: Draw, data: bytes) -> tuple[bytes, str, bool]:
    """Lines, quotes and cells of a CSV file."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    kind = draw.choice(("quote", "comma", "NUL", "cell", "header", "ends", "gone", "doubled", "blank"))
    cut = draw.randrange(len(lines[at]) + 1)
    if kind == "ends":
        return b"".join(line.rstrip(b"\r\n") + b"\r\n" for line in lines), "CRLF", b'"' not in data
    new = {"quote": b'"', "comma": b",", "NUL": b"\0", "cell": b"x" * 200_000, "blank": b"\n\n"}
    if kind in new:
        lines[at] = lines[at][:cut] + new[kind] + lines[at][cut:]
    elif kind == "header":
        lines[0] = draw.choice(
            (b"prompt,prompt\n", b"\n", b"a\n", b"prompt,response," + b"," * 5000 + b"\n", lines[at])
        )
    elif kind == "gone":
        del lines[at]
    else:
        lines[at:at] = [lines[at]] * 3
    return b"".join(lines), f"line {at + 1}: {kind}", False


def _protobuf(draw: Draw, data: bytes) -> tuple[bytes, str, bool]:
    """The fields of a message, at the top or one level below: dropped, doubled, changed, put elsewhere."""
    fields = list(protobuf_fields(data))
    at = draw.choice((draw.randrange(len(fields)), draw.randrange(len(fields) - 1, len(fields)), draw.randrange(12)))
    number, kind, value = fields[at]
    what = draw.choice(("inside", "inside", "inside", "gone", "doubled", "number", "value"))
    if what == "inside" and isinstance(value, bytes) and len(inner := list(protobuf_fields(value))) > 0:
        i = draw.randrange(len(inner))
        inner[i] = _spoil_field(draw, *inner[i])
        fields[at] = number, kind, join_protobuf(inner)
    elif what == "gone":
        del fields[at]
    elif what == "doubled":
        fields[at:at] = [fields[at]] * draw.choice((1, 3, 1000))
    elif what == "number":
        fields[at] = draw.choice((1, 2, 3, 4, 5, 10, 2**20)), kind, value
    else:
        fields[at] = _spoil_field(draw, number, kind, value)
    return join_protobuf(fields), f"field {at}: {what}", False


Field = tuple[int, int, bytes | int]


def _spoil_field(draw: Draw, number: int, kind: int, value: bytes | int) -> Field:
    if isinstance(value, int):
        return number, kind, draw.choice((0, 1, 2, 3, 4, 5, 6, 7, value ^ 1, 2**31 - 1, 2**32, 2**63, 2**64 - 1))
    if kind == 5:
        return number, kind, draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", draw.randbytes(4)))
    texts = (
        b"",
        b"\0",
        b"\xff",
        b"[INST]",
        b"</s>",
        "▁".encode(),
        b"<0x41>",
        b"<0xZZ>",
        b"x" * 100_000,
        draw.randbytes(9),
    )
    return number, kind, draw.choice((*texts, value + b"x", value[:-1]))


def protobuf_fields(data: bytes) -> Iterator[Field]:
    """Number, wire kind and value of each field. Raises ValueError and IndexError for what is no message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, value = tag & 7, b""
        if kind == 0:
            number, at = _varint(data, at)
            yield tag >> 3, kind, number
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("a group")
        value, at = data[at : at + size], at + size
        if len(value) < size:
            raise ValueError("cut short")
        yield tag >> 3, kind, value


def join_protobuf(fields: list[Field]) -> bytes:
    """The message of such fields."""
    made = bytearray()
    for number, kind, value in fields:
        made += _as_varint(number << 3 | kind)
        if isinstance(value, int):
            made += _as_varint(value)
        else:
            made += (_as_varint(len(value)) if kind == 2 else b"") + value
    return bytes(made)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value, shift, at = value | (data[at] & 0x7F) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _as_varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


_BY_ENDING: dict[str, Callable[[Draw, bytes], tuple[bytes, str, bool]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".safetensors": _safetensors,
    ".toml": _toml,
    ".csv": _csv,
    ".model": _protobuf,
}
