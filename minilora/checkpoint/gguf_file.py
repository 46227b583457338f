"""GGUF, the one file that llama.cpp reads: sizes and tokenizer as keys, then the tensors.

    token_embd  blk.N.attn_q ... blk.N.ffn_down  output_norm  output      matrices F16 or Q8_0, norms F32
    Q8_0: blocks of 32 along a row, a scale d = max|x| / 127 in F16 and 32 bytes round(x / d)

A Mistral is of llama.cpp's architecture "llama", which turns interleaved pairs, as Mistral's own files have the rows
of W_q and W_k, and for which llama.cpp knows no sliding window: with one, W is written as the context's length, up to
which both see alike.
Source: `convert_hf_to_gguf.py` in https://github.com/ggml-org/llama.cpp, whose package `gguf` writes and reads here.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from minilora.checkpoint.chat_template import TEMPLATES, chat_template
from minilora.checkpoint.config_files import EndIds
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.gguf_header import read_gguf_header
from minilora.checkpoint.json_file import read_json, short
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.config import ModelConfig
from minilora.errors import UserError, need_library
from minilora.tokenizer import Tokenizer

GGUFKind = Literal["F16", "Q8_0"]
Piece = tuple[str, float, int]  # text, score, and GGUF's kind
Weights = Iterable[tuple[TensorSpec, Tensor]]  # in the order of `tensor_specs`, rows in our order
_TABLE = json.loads((TEMPLATES / "gguf.json").read_text("utf-8"))  # names of tensors and sizes, fixed keys
_FILE_TYPES = {"F16": 1, "Q8_0": 7}  # ggml's numbers of files that are mostly of the type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # kinds of pieces; 1 is a plain one
_Q8_BLOCK = 32


def gguf_name(spec: TensorSpec) -> str:
    """What GGUF calls the tensor."""
    layer, _, part = re.sub(r"^layers\.(\d+)\.", r"blk.\1.=", spec.module).rpartition("=")
    return f"{layer}{_TABLE['tensors'][part]}.weight"


def gguf_keys(config: ModelConfig, tokenizer: Tokenizer, kind: GGUFKind, name: str, eos: EndIds) -> dict[str, Any]:
    """All that the file says beside the tensors. name: of the model, for people; eos: as `read_eos` has it"""
    pieces, added = list(sentencepiece_pieces(tokenizer.path)), _added_pieces(tokenizer.path.parent)
    pieces += [added.get(i, (f"[PAD{i}]", -1e4, _UNUSED)) for i in range(len(pieces), config.vocab_size)]
    tokens, scores, kinds = map(list, zip(*pieces, strict=True))
    keys = {key: getattr(config, field) for key, field in _TABLE["sizes"].items()} | _TABLE["fixed"]
    of_tokenizer: dict[str, Any] = {"tokens": tokens, "scores": scores, "token_type": kinds}
    of_tokenizer |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos if isinstance(eos, int) else eos[0]}
    return {
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "llama.context_length": min(filter(None, (config.max_seq_len, *config.windows))),
        "tokenizer.chat_template": chat_template(tokenizer.template),
        **keys,
        **{f"tokenizer.ggml.{key}": value for key, value in of_tokenizer.items()},
    }


def sentencepiece_pieces(file: Path) -> Iterator[Piece]:
    """Each piece of a tokenizer.model, as llama.cpp's converter has them."""
    model = SentencePieceProcessor(model_file=str(file))
    kinds = (
        (_UNKNOWN, model.is_unknown), (_CONTROL, model.is_control), (_UNUSED, model.is_unused), (_BYTE, model.is_byte)
    )  # fmt: skip
    for i in range(model.vocab_size()):
        yield model.id_to_piece(i), model.get_score(i), next((kind for kind, is_it in kinds if is_it(i)), 1)


def _added_pieces(folder: Path) -> dict[int, Piece]:
    """Those that Hugging Face's file beside tokenizer.model adds to it, by id. What is not as it should be is none."""
    added: Any = {}
    with suppress(UserError):
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    pieces = added.items() if isinstance(added, dict) else ()
    known = ((int(i), p) for i, p in pieces if re.fullmatch("[0-9]{1,9}", i) and isinstance(p, dict))
    return {i: (_text(p.get("content")), -1e3, _CONTROL if p.get("special") else _USER_DEFINED) for i, p in known}


def _text(content: object) -> str:
    return str(content).encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written


def write_gguf(file: Path, keys: dict[str, Any], config: ModelConfig, weights: Weights, kind: GGUFKind) -> None:
    """Write the file, a tensor at a time. Raises UserError for a number that F16 cannot hold, by name and index."""
    import gguf

    with closing(gguf.GGUFWriter(file, "llama")) as writer:
        add: dict[type, Callable[[str, Any], None]] = {bool: writer.add_bool, int: writer.add_uint32}
        add |= {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        for key, value in keys.items():
            add[type(value)](key, value)
        for spec in tensor_specs(config):
            as_type = gguf.GGMLQuantizationType[_type(spec, kind)]
            block, n_bytes = gguf.GGML_QUANT_SIZES[as_type]
            n_bytes *= prod(spec.shape) // block
            writer.add_tensor_info(gguf_name(spec), spec.shape, np.dtype(np.float32), n_bytes, raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for spec, weight in weights:
            refuse_not_finite(weight.half(), spec.name, "F16 cannot hold it; export to hf instead")
            writer.write_tensor_data(_quantized(spec, weight, kind).view(_Rows))


class _Rows(np.ndarray[Any, np.dtype[Any]]):
    """An array that says why it could not be written: numpy's own `tofile` raises an OSError without its number."""

    def tofile(self, fid: Any, *_: Any, **__: Any) -> None:
        fid.write(np.ascontiguousarray(self).data)


def compare_gguf(file: Path, keys: dict[str, Any], config: ModelConfig, weights: Weights, kind: GGUFKind) -> None:
    """Read the file back. Raises UserError for the first key or tensor that is not what `write_gguf` was given."""
    import gguf

    held, lines = read_gguf(file)
    wrong = [k for k, v in keys.items() if held.get(k) != (np.float32(v) if isinstance(v, float) else v)]
    if [line[:3] for line in lines] != [(gguf_name(s), s.shape, _type(s, kind)) for s in tensor_specs(config)]:
        wrong.append("the list of tensors")
    for stored, (spec, weight) in zip(gguf.GGUFReader(file).tensors, weights, strict=True):
        if not np.array_equal(stored.data, _quantized(spec, weight, kind)):
            wrong.append(gguf_name(spec))
    if wrong:
        raise UserError(f"{file}: {wrong[0]} is not what was to be written; export again, and report it")


def read_gguf(file: Path) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], str, int]]]:
    """The keys of any GGUF file, and of each tensor its name, shape, type and bytes. Raises UserError."""
    need_library("gguf", "gguf", "a GGUF file")
    import gguf

    tensors = dict[str, tuple[str, tuple[int, ...], str, int]]()
    try:
        keys, lines = read_gguf_header(file)
        for name, shape, number, begin in lines:
            kind = gguf.GGMLQuantizationType(number)
            block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            n_bytes *= prod(shape) // block
            if (shape or (1,))[-1] % block or name in tensors:
                raise ValueError(f"{short(name)} stands twice, or its rows are no whole blocks")
            if begin + n_bytes > file.stat().st_size:
                raise ValueError(f"it ends before {short(name)} does")
            tensors[name] = name, shape, kind.name, n_bytes
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole GGUF file: {error}; export it again") from None
    return keys, list(tensors.values())


def _quantized(spec: TensorSpec, weight: Tensor, kind: GGUFKind) -> Any:
    """The array that the file has of a weight whose rows are in our order."""
    import gguf

    rows = spec.to_layout(weight, "mistral").float().numpy()
    return gguf.quantize(rows, gguf.GGMLQuantizationType[_type(spec, kind)])


def _type(spec: TensorSpec, kind: GGUFKind) -> str:
    """As llama.cpp's converter chooses: norms stay F32, and rows that blocks do not divide F16."""
    return "F32" if len(spec.shape) == 1 else "F16" if spec.shape[-1] % _Q8_BLOCK else kind
