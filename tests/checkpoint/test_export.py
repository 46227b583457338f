"""Exports in the eyes of the programs that they are made for, and what stands beside the weights."""

import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import load_file
from tiny_runs import TINY, TOKENIZER, Run, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralForCausalLM
from transformers.utils import logging as transformers_logging

from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.export import FORMATS, export_checkpoint
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.safetensors_file import TensorEntry
from minilora.checkpoint.save import save_hf, save_mistral
from minilora.checkpoint.write import verify_manifest
from minilora.cli import main
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.lora import add_lora
from minilora.tokenizer import load_tokenizer

transformers_logging.disable_progress_bar()
F32, BF16 = torch.float32, torch.bfloat16
V1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
SIZES = replace(TINY, dim=64, hidden_dim=128)  # rows that are whole blocks: bitsandbytes' CPU code errs on others
HELLO = [{"role": "user", "content": "a in"}, {"role": "assistant", "content": "on"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint with a tokenizer and a card. Do not change it."""
    folder = tmp_path_factory.mktemp("export") / "source"
    save_hf(tiny_model(config=SIZES), folder, dtype=F32, tokenizer=TOKENIZER)
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-4.0\n---\n# Source\n")
    return folder


def tokens() -> torch.Tensor:
    """(2, 30): longer than the window of 12."""
    return torch.randint(0, SIZES.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("dtype", [None, BF16])
def test_hf_gives_transformers_the_same_logits(base: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    said, notes = export_checkpoint(base, tmp_path / "out", "hf", dtype=dtype)
    assert (said, notes) == ("21 tensors reopened and compared: all equal", [])
    theirs, report = MistralForCausalLM.from_pretrained(tmp_path / "out", dtype=F32, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.dtype == F32
    ours = load_model(base, dtype=F32)
    if dtype is BF16:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
        for weight in ours.parameters():
            weight.data = weight.data.bfloat16().float()
    torch.testing.assert_close(logits(theirs.eval()), logits(ours), atol=1e-5, rtol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(HELLO, return_dict=True)["input_ids"]
        == (load_tokenizer(TOKENIZER).encode_chat(HELLO)[0])
    )


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and torch.compile's own
def test_bnb_4bit_gives_transformers_the_same_logits(base: Path, tmp_path: Path) -> None:
    _, notes = export_checkpoint(base, tmp_path / "out", "bnb-4bit")
    assert notes == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=F32)
    assert theirs.model.layers[0].mlp.up_proj.weight.quant_state.nested
    ours = load_model(base, quantize="nf4", dtype=F32)
    # In training mode: in evaluation it may repack the weights for the CPU and compute in bf16.
    torch.testing.assert_close(logits(theirs.train()), logits(ours), atol=1e-5, rtol=1e-5)


def test_mistral_s_own_layout(base: Path, tmp_path: Path) -> None:
    """Weights that come back, and a tokenizer that mistral-common knows by its name."""
    export_checkpoint(base, tmp_path / "out", "mistral")
    names = {"README.md", "consolidated.safetensors", "manifest.json", "minilora.json", "params.json"}
    assert set(os.listdir(tmp_path / "out")) == {*names, "tokenizer.model.v3"}
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out", dtype=F32)), logits(load_model(base, dtype=F32)), atol=0, rtol=0
    )
    theirs = MistralTokenizer.from_file(str(tmp_path / "out" / "tokenizer.model.v3"))
    messages = [UserMessage(content="a in"), AssistantMessage(content="on"), UserMessage(content="on")]
    ids = theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    assert ids == load_tokenizer(TOKENIZER).encode_chat([*HELLO, {"role": "user", "content": "on"}])[0]


@pytest.mark.parametrize("to", ["hf", "bnb-4bit", "gguf-q8_0"])
def test_mistral_s_own_layout_is_a_source_too(base: Path, tmp_path: Path, to: str) -> None:
    save_mistral(load_model(base, dtype=F32), tmp_path / "source", dtype=F32, tokenizer=TOKENIZER)
    export_checkpoint(tmp_path / "source", tmp_path / "out", to)
    export_checkpoint(base, tmp_path / "expected", to)
    for file in (*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "out").glob("tokenizer*")):
        assert file.read_bytes() == (tmp_path / "expected" / file.name).read_bytes()
    if to.startswith("gguf"):  # its name stands in it
        sizes = {f.stat().st_size for name in ("out", "expected") for f in (tmp_path / name).glob("*.gguf")}
        assert max(sizes) - min(sizes) <= 32


def test_the_card_s_code_runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for to in ("hf", "gguf-q8_0"):
        export_checkpoint(base, tmp_path / f"out-{to}", to)
        card = (tmp_path / f"out-{to}" / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, of its defaults
            exec(code, found := dict[str, Any]())
        assert isinstance(found["model"], MistralForCausalLM if to == "hf" else LlamaForCausalLM)
    assert capsys.readouterr().out.startswith("<s>[INST]")
    for line in re.findall(r"^minilora (.*)$", (tmp_path / "out-hf" / "README.md").read_text(), re.MULTILINE):
        assert main([word.strip('"') for word in line.split()]) == 0, line


@pytest.mark.parametrize("to", FORMATS)
def test_beside_the_weights(base: Path, tmp_path: Path, to: str) -> None:
    """What is known of the source goes on, and the licence of its card."""
    source = Path(shutil.copytree(base, tmp_path / "source"))
    known = {"format_version": 2, "base_path": "mistralai/Mistral-7B-v0.3", "metrics": {"after": {"loss": 1.5}}}
    (source / "minilora.json").write_text(json.dumps(known))
    export_checkpoint(source, tmp_path / "out", to)
    facts = json.loads((tmp_path / "out" / "minilora.json").read_text())
    assert known.items() <= facts.items()
    assert facts["export"] == {"to": to, "from": "source", "fingerprint": open_checkpoint(source).fingerprint()}
    assert facts["versions"].keys() >= {"minilora", "torch"}
    assert facts["license"] == "cc-by-4.0"
    card = (tmp_path / "out" / "README.md").read_text()
    for word in ('license: "cc-by-4.0"', "base_model: mistralai/Mistral-7B-v0.3\n", "# out\n", '"loss": 1.5', "v3"):
        assert word in card
    assert verify_manifest(tmp_path / "out")["files"].keys() == set(os.listdir(tmp_path / "out")) - {"manifest.json"}
    with pytest.raises(UserError, match="out: exists already; choose another name, or add --overwrite"):
        export_checkpoint(source, tmp_path / "out", to)
    export_checkpoint(source, tmp_path / "out", to, overwrite=True)
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"out: holds mine\.txt, which minilora did not write"):
        export_checkpoint(source, tmp_path / "out", to, overwrite=True)


@pytest.mark.parametrize("to", ["hf", "mistral", "bnb-4bit"])
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "norm.weight"])
def test_what_the_disk_did_not_keep_is_noticed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str
) -> None:
    """One bit of one weight, turned in the written file before it is read back."""
    read_bytes = TensorEntry.read_bytes
    keys = {name, f"model.{name}", name.replace("mlp.up_proj", "feed_forward.w3")}

    def turned(entry: TensorEntry, start: int, n_bytes: int) -> torch.Tensor:
        found = read_bytes(entry, start, n_bytes)
        if entry.key in keys and ".out.minilora-tmp" in str(entry.file):
            found[-1] ^= 1
        return found

    monkeypatch.setattr(TensorEntry, "read_bytes", turned)
    with pytest.raises(UserError, match=rf"out: not written: read back, {name} differs; export again, and report it"):
        export_checkpoint(base, tmp_path / "out", to)
    assert os.listdir(tmp_path) == []


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_the_source_s_own_tokenizer_files_are_kept(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    own = {"tokenizer_config.json": '{"mine": 1}', "special_tokens_map.json": "{}"}
    own |= {"added_tokens.json": '{"<mine>": 458}', "chat_template.jinja": "mine"}
    for name, text in own.items():
        (source / name).write_text(text)
    for to in ("hf", "bnb-4bit"):
        export_checkpoint(source, tmp_path / to, to)
        for name, text in own.items():
            assert (tmp_path / to / name).read_text() == text
    export_checkpoint(source, tmp_path / "mistral", "mistral")
    assert [f.name for f in (tmp_path / "mistral").glob("*token*")] == ["tokenizer.model.v3"]


@pytest.mark.parametrize("to", ["hf", "mistral", "bnb-4bit"])
def test_another_tokenizer_takes_the_place_of_all_of_them(base: Path, tmp_path: Path, to: str) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    (source / "tokenizer_config.json").write_text('{"mine": 1}')
    (source / "chat_template.jinja").write_text("mine")
    other = tmp_path / "other.model"
    other.write_bytes(TOKENIZER.read_bytes() + b"\xc0\x0c\x01")  # a field of its file that nobody knows
    export_checkpoint(source, tmp_path / "out", to, tokenizer=other)
    file = "tokenizer.model.v3" if to == "mistral" else "tokenizer.model"
    assert (tmp_path / "out" / file).read_bytes() == other.read_bytes()
    if to != "mistral":
        assert "chat_template" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_what_transformers_saved_keeps_its_template(base: Path, tmp_path: Path) -> None:
    """transformers 5 writes the template into a file of its own and takes it out of tokenizer_config.json."""
    export_checkpoint(base, tmp_path / "first", "hf")
    source = Path(shutil.copytree(base, tmp_path / "source"))
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(source)
    assert "chat_template" not in json.loads((source / "tokenizer_config.json").read_text())
    export_checkpoint(source, tmp_path / "hf", "hf")
    export_checkpoint(source, tmp_path / "bnb", "bnb-4bit")
    quantize_checkpoint(source, tmp_path / "nf4")
    for name in ("hf", "bnb", "nf4"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = theirs.apply_chat_template(HELLO, return_dict=True)["input_ids"]
        assert ids == load_tokenizer(TOKENIZER).encode_chat(HELLO)[0]


def test_no_older_template_overrides_the_one_that_is_written(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("mine")  # and no tokenizer_config.json
    for to in ("hf", "bnb-4bit"):
        export_checkpoint(source, tmp_path / to, to)
        rendered = AutoTokenizer.from_pretrained(tmp_path / to).apply_chat_template(HELLO, tokenize=False)
        assert rendered.startswith("<s>[INST]")


def test_a_model_tuned_with_the_old_spaces_keeps_its_template(tmp_path: Path) -> None:
    sizes = replace(TINY, vocab_size=32_000, n_layers=1)
    save_hf(tiny_model(config=sizes), tmp_path / "source", tokenizer=V1)
    facts = {"format_version": 2, "tokenizer": {"template": "v1-hf"}}
    (tmp_path / "source" / "minilora.json").write_text(json.dumps(facts))
    assert export_checkpoint(tmp_path / "source", tmp_path / "out", "hf")[1] == []
    rendered = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(HELLO, tokenize=False)
    assert rendered == "<s>[INST] a in [/INST]on</s>"
    assert "Chat template: v1-hf." in (tmp_path / "out" / "README.md").read_text()
    (note,) = export_checkpoint(tmp_path / "source", tmp_path / "mistral", "mistral")[1]  # which cannot say so
    assert note.startswith("mistral-common puts a space before each earlier answer, which this model (v1-hf) has never")
    assert f"- {note}\n" in (tmp_path / "mistral" / "README.md").read_text()


def test_a_template_of_the_base_s_own_is_kept_or_said_to_be_lost(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    (source / "tokenizer_config.json").write_text('{"chat_template": "<|im_start|>"}')
    told = "Mistral's chat template v3 is used, not the base's own: answers are worse, and may not stop, until it is "
    for to in FORMATS:
        _, notes = export_checkpoint(source, tmp_path / to, to)
        assert (f"{told}trained." in notes) == (to not in ("hf", "bnb-4bit"))
        assert (told in (tmp_path / to / "README.md").read_text()) == (to not in ("hf", "bnb-4bit"))
    assert f"{told}trained." in export_checkpoint(source, tmp_path / "other", "hf", tokenizer=TOKENIZER)[1]


def test_a_model_of_the_hub_is_what_its_export_was_made_from(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files lie in the library's cache, in a folder that is called by the commit."""
    commit = "a" * 40
    shutil.copytree(base, tmp_path / "snapshots" / commit)
    monkeypatch.setattr("minilora.hub._fetch", lambda *_: tmp_path / "snapshots" / commit)
    export_checkpoint("org/tiny", tmp_path / "out", "hf")
    facts = json.loads((tmp_path / "out" / "minilora.json").read_text())
    assert facts["base_path"] == facts["export"]["from"] == f"org/tiny@{commit}"
    assert "base_model: org/tiny\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_verb_s_remedy_is_a_flag_that_it_has(run: Any, base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source", ignore=shutil.ignore_patterns("tokenizer*")))
    to_gguf = ["export", source, tmp_path / "out", "--to", "gguf-f16"]
    assert "name one with --model.tokenizer" in run(*to_gguf)[2]
    assert run(*to_gguf, "--model.tokenizer", TOKENIZER)[0] == 0
    save_adapter(add_lora(load_model(source), LoraConfig(rank=2)), adapter := tmp_path / "adapter")
    to_peft = ["export", adapter, tmp_path / "peft", "--to", "peft", "--model.path", source]
    assert "name one with --model.tokenizer" in run(*to_peft)[2]
    assert run(*to_peft, "--model.tokenizer", TOKENIZER)[0] == 0


def test_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source", ignore=shutil.ignore_patterns("tokenizer*")))
    for to in ("hf", "mistral", "bnb-4bit"):
        export_checkpoint(source, tmp_path / to, to)
        assert "- No tokenizer lies with it.\n" in (tmp_path / to / "README.md").read_text()
    with pytest.raises(
        UserError, match=r"holds no tokenizer\.model, which GGUF needs; name one with --model\.tokenizer"
    ):
        export_checkpoint(source, tmp_path / "gguf", "gguf-f16")
    with pytest.raises(
        UserError, match=r"vocabulary has 458; take the tokenizer that came .* with --model\.tokenizer$"
    ):
        export_checkpoint(source, tmp_path / "gguf", "gguf-f16", tokenizer=V1)
    export_checkpoint(source, tmp_path / "gguf", "gguf-f16", tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, 7),
        ({"eos_token_id": [2, 457]}, None, [2, 457]),
        ({"eos_token_id": 2}, {"eos_token_id": [7]}, 7),
        ({"eos_token_id": 7}, {}, 7),
        ({"eos_token_id": 7}, {"eos_token_id": 458}, 7),  # the vocabulary has 458
        ({"eos_token_id": None}, None, 2),
        ({"eos_token_id": -1}, {"eos_token_id": [2, True]}, 2),
        ({"eos_token_id": []}, {"eos_token_id": "</s>"}, 2),
        ({}, [], 2),
    ],
)
def test_where_answers_end_is_what_the_source_says(
    base: Path, tmp_path: Path, config: dict[str, Any], generation: Any, expected: int | list[int]
) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source", ignore=shutil.ignore_patterns("generation_config.json")))
    own = json.loads((source / "config.json").read_text())
    own.pop("eos_token_id")
    (source / "config.json").write_text(json.dumps(own | config))
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    export_checkpoint(source, tmp_path / "hf", "hf")
    quantize_checkpoint(source, tmp_path / "nf4")
    for name in ("hf", "nf4"):
        for file in ("config.json", "generation_config.json"):
            written = json.loads((tmp_path / name / file).read_text())
            assert (written["bos_token_id"], written["eos_token_id"]) == (1, expected)
    assert MistralForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == expected


# -- NF4, and what is refused ------------------------------------------------------------------------------------------


def test_of_rows_that_bitsandbytes_decodes_wrongly_is_told(tiny_base: Path, tmp_path: Path) -> None:
    _, notes = export_checkpoint(tiny_base, tmp_path / "out", "bnb-4bit")
    assert notes == ["With AVX512 bitsandbytes 0.50 decodes rows wrongly that are no multiple of 64."]


def test_what_was_in_nf4_becomes_plain(base: Path, tmp_path: Path) -> None:
    quantize_checkpoint(base, tmp_path / "nf4")
    _, notes = export_checkpoint(tmp_path / "nf4", tmp_path / "out", "hf")
    assert notes == ["The weights were in NF4: these are their dequantized values."]
    assert f"- {notes[0]}\n" in (tmp_path / "out" / "README.md").read_text()
    ours = load_model(tmp_path / "nf4", dtype=F32)
    torch.testing.assert_close(logits(load_model(tmp_path / "out", dtype=F32)), logits(ours), atol=1e-6, rtol=1e-6)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == F32
    with pytest.raises(UserError, match="nf4: is in NF4 already"):
        export_checkpoint(tmp_path / "nf4", tmp_path / "again", "bnb-4bit")


@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_changes_meanwhile_is_refused(base: Path, tmp_path: Path, to: str) -> None:
    source, spoilt = Path(shutil.copytree(base, tmp_path / "source")), list[int]()

    def progress(done: int, of: int) -> None:
        if done > of / 2 and not spoilt:
            spoilt.append(done)
            os.utime(source / "model.safetensors")

    with pytest.raises(UserError, match=r"source/model\.safetensors: changed while it was read; run this again"):
        export_checkpoint(source, tmp_path / "out", to, progress=progress)
    assert os.listdir(tmp_path) == ["source"]


def test_windows_that_only_mistral_s_layout_can_say(tmp_path: Path) -> None:
    save_mistral(
        tiny_model(config=replace(TINY, sliding_window=(8, 12))), tmp_path / "source", dtype=F32, tokenizer=TOKENIZER
    )
    export_checkpoint(tmp_path / "source", tmp_path / "out", "mistral")
    assert json.loads((tmp_path / "out" / "params.json").read_text())["sliding_window"] == [8, 12]
    for to in ("hf", "bnb-4bit"):
        with pytest.raises(UserError, match=r"has one size of window, and this model \[8, 12\]; write Mis"):
            export_checkpoint(tmp_path / "source", tmp_path / "out2", to)
    _, notes = export_checkpoint(tmp_path / "source", tmp_path / "gguf", "gguf-f16")
    assert "up to 8 tokens only" in notes[0]


def test_the_verb(run: Run, base: Path, tmp_path: Path) -> None:
    status, out, err = run("export", base, tmp_path / "out", "--to", "gguf-q8_0")
    assert status == 0, err
    assert out.splitlines()[-2:] == [
        "21 tensors, the tokenizer and its template read back and compared: all equal in Q8_0",
        f"written to {tmp_path / 'out'}",
    ]
    assert err == (
        "warning: llama.cpp knows no sliding window for the llama architecture, so its answers agree with the "
        "model's up to 12 tokens only; that is the file's context length\n"
    )
    wrong = run("export", base, tmp_path / "x", "--to", "gguf-f16", "--dtype", "bfloat16")
    assert wrong[::2] == (1, "minilora export: gguf-f16 says itself which dtype it has; leave --dtype out\n")
    assert "which it would be made from" in run("export", base, base.parent, "--to", "hf")[2]
    assert run("export", "demo", tmp_path / "demo", "--to", "hf", "--dtype", "float16")[0] == 0
    assert 'license: "apache-2.0"' in (tmp_path / "demo" / "README.md").read_text()
