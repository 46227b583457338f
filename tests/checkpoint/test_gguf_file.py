"""GGUF files, in the eyes of the package that owns the format, of transformers, and of the format's own arithmetic."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mistral_common
import numpy as np
import pytest
import torch
from disks import largest_file
from numpy.typing import NDArray
from tiny_checkpoints import edit_json
from tiny_runs import TINY, TOKENIZER, tiny_model
from transformers import AutoModelForCausalLM

from minilora.checkpoint.export import export_checkpoint
from minilora.checkpoint.gguf_file import gguf_keys, gguf_name, read_gguf
from minilora.checkpoint.load import load_model
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.save import save_hf
from minilora.config import MISTRAL_7B, ModelConfig
from minilora.errors import UserError
from minilora.tokenizer import load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
    "demo": TOKENIZER,
}
# Rows of 32 and 64 numbers, which Q8_0's blocks divide, and down_proj's of 96; no window that llama.cpp would not see.
SIZES = replace(TINY, hidden_dim=96, sliding_window=None, max_seq_len=64)


def saved(folder: Path, config: ModelConfig = SIZES) -> Path:
    save_hf(tiny_model(config=config), folder, dtype=torch.float32, tokenizer=TOKENIZER)
    return folder


def exported(base: Path, out: Path, to: str) -> Path:
    export_checkpoint(base, out, to)
    return out / f"model-{to.removeprefix('gguf-')}.gguf"


def as_llama_cpp_orders(rows: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """`LlamaModel.permute` of convert_hf_to_gguf.py, from the half-split rows of Hugging Face's layout."""
    shape = (n_heads, 2, rows.shape[0] // n_heads // 2, rows.shape[1])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def expected_tensors(base: Path) -> dict[str, NDArray[np.float32]]:
    """By GGUF's names, which the package's own table gives for Hugging Face's."""
    checkpoint, made = open_checkpoint(base), {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.config.n_layers)
    for spec in checkpoint.tensors():
        name, rows = names.get_name(spec.key("hf"), try_suffixes=(".weight",)), checkpoint.read(spec).numpy()
        heads = {"q_proj": checkpoint.config.n_heads, "k_proj": checkpoint.config.n_kv_heads}
        if n_heads := heads.get(spec.module.rpartition(".")[2]):
            rows = as_llama_cpp_orders(rows, n_heads)
        assert name is not None
        made[name] = rows
    return made


def q8_0(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """ggml's `quantize_row_q8_0_ref`: d = max|x| / 127 as F16, then 32 bytes round(x * 1/d), halves away from zero."""
    blocks = rows.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    packed = np.concatenate([d.astype(np.float16).view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=1)
    return packed.reshape(*rows.shape[:-1], -1)


@pytest.mark.parametrize("tied", [False, True])
def test_f16_holds_every_weight_under_its_name(tmp_path: Path, tied: bool) -> None:
    base = saved(tmp_path / "base", replace(SIZES, tied_embeddings=tied))
    reader = gguf.GGUFReader(exported(base, tmp_path / "out", "gguf-f16"))
    expected = expected_tensors(base)
    assert [tensor.name for tensor in reader.tensors] == list(expected)
    assert ("output.weight" in expected) is not tied
    for tensor in reader.tensors:
        rows = expected[tensor.name]
        assert tensor.tensor_type.name == ("F32" if rows.ndim == 1 else "F16")
        assert tuple(tensor.shape[::-1]) == rows.shape
        rounded = rows if rows.ndim == 1 else rows.astype(np.float16).astype(np.float32)
        assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), rounded), tensor.name


def test_q8_0_is_ggmls_own(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", replace(SIZES, hidden_dim=80))  # rows of down_proj, which 32 does not divide
    reader = gguf.GGUFReader(exported(base, tmp_path / "out", "gguf-q8_0"))
    kinds = set()
    for tensor in reader.tensors:
        rows = expected_tensors(base)[tensor.name]
        kinds.add((tensor.name.split(".")[-2], kind := tensor.tensor_type.name))
        got = gguf.dequantize(tensor.data, tensor.tensor_type)
        if kind == "Q8_0":
            assert np.array_equal(tensor.data, q8_0(rows)), tensor.name
            # Half a step d, and 127 times what d loses in F16, 11 bits of it.
            step = np.abs(rows.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
            assert (np.abs(got - rows).reshape(-1, 32) <= step * (0.5 + 127 * 2**-11) * 1.001).all()
    assert {kind for _, kind in kinds} == {"F32", "F16", "Q8_0"}
    assert ("ffn_down", "F16") in kinds


@pytest.mark.parametrize("to", ["gguf-f16", "gguf-q8_0"])
def test_transformers_computes_the_same_logits_from_it(tmp_path: Path, to: str) -> None:
    """It unpacks the file by its own code, the order of the rows included."""
    base = saved(tmp_path / "base")
    file = exported(base, tmp_path / "out", to)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = load_model(base, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                kind = gguf.GGMLQuantizationType[to.removeprefix("gguf-").upper()]
                weight.copy_(torch.tensor(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)))
        tokens = torch.randint(0, SIZES.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
        # Reordering a head's rows moves none between blocks, so both round the same numbers.
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", FILES)
def test_the_tokenizer_is_as_llama_cpps_converter_writes_it(tmp_path: Path, version: str) -> None:
    file = tmp_path / "tokenizer.model"
    shutil.copyfile(FILES[version], file)
    tokenizer = load_tokenizer(file)
    theirs = list(gguf.vocab.SentencePieceVocab(tmp_path).all_tokens())
    config = replace(MISTRAL_7B, vocab_size=len(theirs) + 3)
    keys = gguf_keys(config, tokenizer, "F16", "x", eos=2)
    held = {key: keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")}
    assert held["tokens"] == [text.decode() for text, _, _ in theirs] + [f"[PAD{len(theirs) + i}]" for i in range(3)]
    assert held["scores"] == [score for _, score, _ in theirs] + [-10000.0] * 3
    assert held["token_type"] == [int(kind) for _, _, kind in theirs] + [int(gguf.TokenType.UNUSED)] * 3
    constants = gguf.Keys.Tokenizer
    assert (keys[constants.MODEL], keys[constants.PRE]) == ("llama", "default")
    assert (keys[constants.BOS_ID], keys[constants.EOS_ID], keys[constants.UNK_ID]) == (1, 2, 0)
    assert (keys[constants.ADD_BOS], keys[constants.ADD_EOS], keys[constants.ADD_PREFIX]) == (True, False, True)
    assert "[INST]" in keys[constants.CHAT_TEMPLATE]


def test_tokens_that_were_added_and_the_end_that_was_set(tmp_path: Path) -> None:
    """As ChatML's, beside a tokenizer that does not know them."""
    base, n = saved(tmp_path / "base", replace(SIZES, vocab_size=SIZES.vocab_size + 3)), SIZES.vocab_size
    added = {"<|im_start|>": n, "<|im_end|>": n + 1}
    (base / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(i): {"content": text, "special": text == "<|im_end|>"} for text, i in added.items()}
    decoder |= {"1" * 5000: {"content": "x"}, "-1": {}, "no number": {}, str(n + 2): []}
    (base / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    edit_json(base / "generation_config.json", eos_token_id=[n + 1, 2])
    keys, _ = read_gguf(exported(base, tmp_path / "out", "gguf-f16"))
    theirs = list(gguf.vocab.SentencePieceVocab(base).all_tokens())
    assert keys["tokenizer.ggml.tokens"] == [*(text.decode() for text, _, _ in theirs), f"[PAD{n + 2}]"]
    assert keys["tokenizer.ggml.scores"] == [*(score for _, score, _ in theirs), -10000.0]
    kinds = [*[int(kind) for _, _, kind in theirs][:-1], int(gguf.TokenType.CONTROL), int(gguf.TokenType.UNUSED)]
    assert keys["tokenizer.ggml.token_type"] == kinds
    assert keys["tokenizer.ggml.eos_token_id"] == n + 1


def test_the_sizes_of_a_7b() -> None:
    """By the names that the package has for them."""
    keys = gguf_keys(MISTRAL_7B, load_tokenizer(FILES["v3"]), "Q8_0", "seven", eos=2)
    of_llm, of_attention, of_rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
    expected: dict[str, Any] = {
        of_llm.VOCAB_SIZE: 32768, of_llm.CONTEXT_LENGTH: 32768, of_llm.EMBEDDING_LENGTH: 4096, of_llm.BLOCK_COUNT: 32,
        of_llm.FEED_FORWARD_LENGTH: 14336, of_attention.HEAD_COUNT: 32, of_attention.HEAD_COUNT_KV: 8,
        of_attention.KEY_LENGTH: 128, of_attention.VALUE_LENGTH: 128, of_attention.LAYERNORM_RMS_EPS: 1e-5,
        of_rope.DIMENSION_COUNT: 128, of_rope.FREQ_BASE: 1e6,
    }  # fmt: skip
    assert {key.format(arch="llama"): value for key, value in expected.items()}.items() <= keys.items()
    assert (keys["general.file_type"], keys["general.name"]) == (gguf.LlamaFileType.MOSTLY_Q8_0, "seven")
    assert gguf_name(list(tensor_specs(MISTRAL_7B))[-4]) == "blk.31.ffn_up.weight"


@pytest.mark.parametrize("window", [24, (None, 24), None])
def test_a_window_is_the_context_that_llama_cpp_may_use(tmp_path: Path, window: Any) -> None:
    base = tmp_path / "base"
    config = replace(SIZES, sliding_window=window)
    save_hf(tiny_model(config=config), base, tokenizer=TOKENIZER)
    _, notes = export_checkpoint(base, tmp_path / "out", "gguf-f16")
    keys, _ = read_gguf(tmp_path / "out" / "model-f16.gguf")
    assert keys["llama.context_length"] == (64 if window is None else 24)
    assert [note.startswith("llama.cpp knows no sliding window for") for note in notes] == [True] * (window is not None)


def test_what_f16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model(config=SIZES)
    model.get_parameter("layers.1.mlp.up_proj.weight")[3, 5] = 7e4
    save_hf(model, tmp_path / "base", dtype=torch.float32, tokenizer=TOKENIZER)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight.*F16 cannot hold it; export to hf instead"):
        export_checkpoint(tmp_path / "base", tmp_path / "out", "gguf-f16")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_limit_of_the_files_size_among_the_tensors(tmp_path: Path, share: float) -> None:
    """Behind the header, where numpy's own way to write an array would not say why it could not."""
    base = saved(tmp_path / "base")
    file = exported(base, tmp_path / "whole", "gguf-f16")
    begin, size = gguf.GGUFReader(file).data_offset, file.stat().st_size
    shutil.rmtree(tmp_path / "whole")
    message = r"out: could not be written: .*\(ulimit -f\)"
    with largest_file(int(begin + share * (size - begin))), pytest.raises(UserError, match=message):
        export_checkpoint(base, tmp_path / "out", "gguf-f16")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("to", ["gguf-f16", "gguf-q8_0"])
@pytest.mark.parametrize("where", ["general.name", "blk.1.ffn_up.weight", "blk.0.attn_norm.weight"])
def test_a_flipped_bit_is_found_when_it_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, where: str
) -> None:
    """On the disk, between writing and reading."""
    base, close = saved(tmp_path / "base"), gguf.GGUFWriter.close

    def spoil(writer: gguf.GGUFWriter) -> None:
        close(writer)
        (file,) = tmp_path.glob(".out.*/model-*.gguf")
        reader = gguf.GGUFReader(file, "r+")
        if where == "general.name":
            reader.fields[where].parts[-1][0] ^= 1
        else:
            (tensor,) = (tensor for tensor in reader.tensors if tensor.name == where)
            tensor.data.view(np.uint8).reshape(-1)[-1] ^= 1

    monkeypatch.setattr(gguf.GGUFWriter, "close", spoil)
    with pytest.raises(UserError, match=rf"out/model-[^/]*\.gguf: {where} is not what was to be written; export"):
        export_checkpoint(base, tmp_path / "out", to)
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("n_bytes", [0, 3, 100, -7])
def test_half_a_file_is_one_line(tmp_path: Path, n_bytes: int) -> None:
    file = exported(saved(tmp_path / "base"), tmp_path / "out", "gguf-f16")
    file.write_bytes(file.read_bytes()[:n_bytes])
    with pytest.raises(UserError, match=r"^[^\n]*model-f16\.gguf: not a whole GGUF file: [^\n]*; export it again$"):
        read_gguf(file)
