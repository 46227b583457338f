"""What a base needs before it is loaded: its memory, its own tokenizer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mistral_common
import pytest
import torch
from tiny_runs import TINY, TOKENIZER, MakeConfig, Quiet, tiny_model

from minilora import base as base_module
from minilora.base import Base
from minilora.checkpoint.adapter import read_adapter, save_adapter
from minilora.checkpoint.save import save_hf
from minilora.cli import main
from minilora.config import UNNAMED, BaseConfig, LoraConfig, PrefixConfig
from minilora.errors import UserError
from minilora.evaluate.merge_audit import merge_with_audit
from minilora.generation import generate
from minilora.kv_cache import KVCache
from minilora.lora import add_lora
from minilora.memory import measure
from minilora.prefix import add_prefix
from minilora.train.loop import fine_tune


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_prediction_is_what_the_model_and_its_cache_take(tiny_base: Path, tmp_path: Path, quantize: str) -> None:
    config = BaseConfig(path=str(tiny_base), quantize=quantize, device="cpu", dtype="float32")  # type: ignore[arg-type]
    save_adapter(add_lora(Base.find(config).load(), LoraConfig(rank=4)), tmp_path / "adapter")
    found = Base.find(config, str(tmp_path / "adapter"))
    predicted, model = found.predict(2, 10, 6), found.load()
    held = measure(model)
    assert held["adapters"] > 0
    assert {owner: predicted[owner] for owner in held if held[owner]} == {o: n for o, n in held.items() if n}
    cache = KVCache(model.config, 2, 16, torch.float32, torch.device("cpu"))
    assert predicted["KV cache"] == sum(part.nbytes for part in (*cache.keys, *cache.values))
    assert generate(model, torch.ones(2, 10, dtype=torch.int64), 6).shape == (2, 16)


def test_on_a_gpu_answers_take_adapters_in_16_bits_as_well(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "has_flash_attention", lambda *_: True)
    save_adapter(add_lora(Base.find(BaseConfig(str(tiny_base))).load(), LoraConfig(rank=4)), tmp_path / "adapter")
    found = Base.find(BaseConfig(str(tiny_base), device="cpu"), str(tmp_path / "adapter"))
    on_gpu = replace(found, device=torch.device("cuda"), dtype=torch.bfloat16)
    answers, scores, in_32 = on_gpu.predict(1, 8, 4), on_gpu.predict(1, 8), replace(on_gpu, dtype=torch.float32)
    assert answers["adapters"] == 1.5 * scores["adapters"] == 1.5 * in_32.predict(1, 8, 4)["adapters"] > 0
    alone = replace(on_gpu, adapter=None, added=None).predict(1, 8, 4)
    assert "adapters" not in alone
    assert alone["KV cache"] == answers["KV cache"]


def test_scoring_needs_no_gradient_of_the_head(tiny_base: Path) -> None:
    """Also without an adapter, where nothing says that the weights do not learn."""
    found = Base.find(BaseConfig(path=str(tiny_base), quantize="nf4", device="cpu", dtype="float32"))
    config = found.checkpoint.config
    beyond = sum(n for owner, n in found.predict(1, 1).items() if owner in ("scratch", "logits", "final hidden"))
    assert 0 < beyond < 4 * config.dim * config.vocab_size


def test_scoring_sees_no_mask_of_all_tokens_but_under_a_prefix(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BaseConfig(path=str(tiny_base), quantize="nf4", device="cpu", dtype="float32")
    length, model = 20_000, add_prefix(Base.find(config).load(), PrefixConfig(2))
    save_adapter(model, tmp_path / "prefix")
    monkeypatch.setattr(base_module, "private_bytes", lambda: 0)
    assert sum(Base.find(config).predict(1, length).values()) < length**2 / 4
    assert sum(Base.find(config).predict(1, length, 10).values()) < length**2 / 4, "nor does a prompt alone"
    assert sum(Base.find(config).predict(2, length, 10).values()) > length**2
    assert sum(Base.find(config, str(tmp_path / "prefix")).predict(1, length).values()) > length**2


def test_what_does_not_fit_is_refused_before_it_is_loaded(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Base.find(BaseConfig(path=str(tiny_base), quantize="nf4", device="cpu"))
    monkeypatch.setattr(base_module, "private_bytes", lambda: 0)
    needed = sum(found.predict(1, 10, 6).values())
    assert needed > sum(found.predict(1, 1, None).values())
    monkeypatch.setattr(base_module, "free_bytes", lambda _: needed)
    assert sum(found.check((1, 1, None), (1, 10, 6)).values()) == needed  # of the larger
    monkeypatch.setattr(base_module, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"are needed, 0\.0 MB are free: ask for fewer or shorter"):
        found.check((1, 10, 6))


def test_the_command_line_tells_it(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--model.path", str(tiny_base), "--max_new_tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert told.startswith("device: cpu, ")
    assert "; base: tiny\n" in told
    assert "\nmemory: " in told
    assert "KV cache" in told


def test_an_adapter_brings_its_tokenizer(make_config: MakeConfig, tiny_base: Path, tmp_path: Path) -> None:
    """One that was named apart is found again, and another is refused."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*tokenizer*"))
    named = replace(make_config().model, path=str(bare), tokenizer=str(TOKENIZER))
    fine_tune(replace(make_config(), model=named), Quiet())
    adapter = str(tmp_path / "run" / "adapter")
    another = tmp_path / "tokenizer.model"
    another.write_bytes(TOKENIZER.read_bytes() + b"\xc0\x0c\x01")  # a field of its file that nobody knows
    assert Base.find(BaseConfig(path=UNNAMED), adapter).tokenizer.path == Path(TOKENIZER)
    with pytest.raises(UserError, match=r"trained with a tokenizer whose sha256 is .*; name the right one"):
        Base.find(BaseConfig(path=UNNAMED, tokenizer=str(another)), adapter)
    with pytest.raises(UserError, match=r"holds no tokenizer\.model; name one with --model\.tokenizer"):
        Base.find(BaseConfig(path=str(bare)))
    written = json.loads((tmp_path / "run" / "adapter" / "minilora.json").read_text())
    assert written["tokenizer_path"] == str(TOKENIZER)


def test_an_adapter_brings_its_template(make_config: MakeConfig, tmp_path: Path) -> None:
    """Trained with Hugging Face's old spaces, it is answered with them, without being told again."""
    v1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    model = tiny_model(config=replace(TINY, vocab_size=32_000))
    save_hf(model, tmp_path / "v1", dtype=torch.float32, tokenizer=v1)
    config = make_config(model__path=str(tmp_path / "v1"), model__old_hf_spaces=True)
    run = fine_tune(config, Quiet())
    assert run.tokenizer.template == "v1-hf"
    adapter = run.folder.path / "adapter"
    assert json.loads((adapter / "minilora.json").read_text())["tokenizer"]["template"] == "v1-hf"
    found = Base.find(BaseConfig(path=UNNAMED), str(adapter)).tokenizer
    hello = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hi"}]
    assert found.encode_chat(hello)[0][-2:] == [23809, 2]
    assert Base.find(BaseConfig(path=str(tmp_path / "v1"))).tokenizer.encode_chat(hello)[0][-2:] == [15359, 2]

    base = Base.find(BaseConfig(path=UNNAMED, device="cpu"), str(adapter))
    read = read_adapter(adapter, base.checkpoint.config)
    merge_with_audit(base, read, tmp_path / "merged", run.train[:1], 64, force=True)
    shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("minilora.json", "manifest.json"))
    named = BaseConfig(path=str(tmp_path / "v1"), device="cpu", quantize="nf4", old_hf_spaces=True)
    bare = Base.find(named, str(tmp_path / "bare"))
    merge_with_audit(bare, bare.read_adapter(), tmp_path / "of_bare", run.train[:1], 64, force=True)
    of_all = make_config(config, train__strategy="full", train__output=str(tmp_path / "full"))
    full = fine_tune(of_all, Quiet()).folder.path / "model"
    for learnt in (tmp_path / "merged", tmp_path / "of_bare", full):  # what they learnt is said beside them
        assert Base.find(BaseConfig(path=str(learnt))).tokenizer.encode_chat(hello)[0][-2:] == [23809, 2]
        on = make_config(model__path=str(learnt), train__output=str(tmp_path / f"on-{learnt.name}"), train__max_steps=1)
        assert fine_tune(on, Quiet()).tokenizer.template == "v1-hf"

    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain, ignore=shutil.ignore_patterns("manifest.json"))
    written = (plain / "minilora.json").read_text()
    (plain / "minilora.json").write_text(written.replace('"v1-hf"', '"v1"'))
    with pytest.raises(UserError, match=r"whose template is 'v1', but here it is 'v1-hf'; mend --model\.old_hf_spaces"):
        Base.find(BaseConfig(path=UNNAMED, old_hf_spaces=True), str(plain))


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_absmax_is_in_8_bits_unless_run_or_user_say_no(
    make_config: MakeConfig, tmp_path: Path, trained: bool, asked: bool
) -> None:
    fine_tune(make_config(model__double_quant=trained, train__max_steps=1), Quiet())
    base = Base.find(BaseConfig(path=UNNAMED, double_quant=asked, device="cpu"), str(tmp_path / "run" / "adapter"))
    assert (base.quantize, base.double_quant) == ("nf4", trained and asked)
    assert [told for told in base.warnings if "double_quant" in told] == [
        f"{tmp_path}/run/adapter: trained on a base stored with double_quant True, here it is False; "
        "expect slightly other answers"
    ] * (trained and not asked)


def test_the_tokenizer_of_another_model_is_refused(tiny_base: Path) -> None:
    other = str(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
    with pytest.raises(UserError, match="v1: a v1 tokenizer of 32,000 pieces, but the model's vocabulary has 458; t"):
        Base.find(BaseConfig(path=str(tiny_base), tokenizer=other))


def test_a_base_tuned_with_another_template_is_told_until_it_has_learnt_ours(
    make_config: MakeConfig, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chatml = tmp_path / "chatml"
    shutil.copytree(tiny_base, chatml)
    (chatml / "tokenizer_config.json").write_text('{"chat_template": "<|im_start|>"}')
    (chatml / "generation_config.json").write_text('{"eos_token_id": [2, 300]}')
    config = BaseConfig(path=str(chatml), device="cpu")
    until = "answers are worse, and may not stop, until it is trained"
    told = f"Mistral's chat template v3 is used, not the base's own: {until}"
    assert Base.find(config).warnings == (told,)
    main(["generate", "red", "--model.path", str(chatml), "--max_new_tokens", "1"])
    assert f"warning: {told}\n" in capsys.readouterr().err

    quiet = Quiet()
    run = fine_tune(make_config(model__path=str(chatml), train__max_steps=1), quiet)
    assert quiet.said.count(f"warning: {told}") == 1
    adapter = run.folder.path / "adapter"
    found = Base.find(config, str(adapter))
    assert not any(told in text for text in found.warnings)
    again = Quiet()
    fine_tune(
        make_config(train__adapter=str(adapter), model__path=str(chatml), train__output=str(tmp_path / "on")), again
    )
    assert not any(told in text for text in again.said)

    shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("minilora.json", "manifest.json"))
    bare = Base.find(replace(config, quantize="nf4"), str(tmp_path / "bare"))
    assert bare.warnings == (told,)
    for base, name, ends in ((found, "merged", 2), (bare, "of_bare", [2, 300])):
        merge_with_audit(base, base.read_adapter(), tmp_path / name, run.train[:1], 64, force=True)
        assert (f"- {told}.\n" in (tmp_path / name / "README.md").read_text()) == (base is bare)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == ends
        assert Base.find(BaseConfig(path=str(tmp_path / name), device="cpu")).warnings == ()
