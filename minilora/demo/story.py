"""The demo: a tiny Mistral that has read how words sound is taught by QLoRA to answer questions about it.

    ledger -> what the base can -> QLoRA on 2,000 chats -> what the tuned model can -> what it forgot -> merge -> report

The base has read raw lines such as `"mistral" ˈmɪstɹəl` and has never seen a chat. The chats ask only about words that
it has read, so they bring out what it knows; the 300 test words stand in neither. The ceiling is what the base itself
can on them when it is asked in its own raw form.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilora.base import Base
from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.config import MISTRAL_7B, BaseConfig, DataConfig, EvalConfig, LoraConfig, RunConfig, TrainConfig
from minilora.data.encode import read_samples
from minilora.demo.phonemes import DATA, phoneme_errors, raw_prompt
from minilora.errors import UserError
from minilora.evaluate.answers import Answer, answer_samples
from minilora.evaluate.merge_audit import MergeAudit, merge_with_audit
from minilora.generation import answer
from minilora.memory import measure as measured_bytes
from minilora.memory_at_rest import predict, storage_of
from minilora.model import Mistral
from minilora.report.console import Console, Table, say, table
from minilora.report.page import write_report
from minilora.tokenizer import Tokenizer, load_tokenizer
from minilora.toml import config_toml
from minilora.train.loop import fine_tune
from minilora.train.progress import ConsoleReporter
from minilora.train.run_folder import LOCK, RUN_BYTES, hold
from minilora.train.setup import Run
from minilora.train.signals import Stopped

LONGEST_ANSWER = 32  # tokens; the longest word of the test has 22
BATCH = 100
Score = dict[str, float]  # "exact_match", the share that is right; "phoneme_error_rate", edits per expected phoneme


def demo_config(output: Path, seed: int) -> RunConfig:
    """The run of the demo; its config.toml runs again with `minilora train`."""
    return RunConfig(
        model=BaseConfig(path="demo", dtype="float32"),
        lora=LoraConfig(rank=16, alpha=32),
        data=DataConfig(
            train=str(DATA / "chat_train.jsonl"),
            validation=str(DATA / "chat_validation.jsonl"),
            general=str(DATA / "heldout.jsonl"),  # the base's own lines: what it forgets
            max_seq_len=256,
        ),
        train=TrainConfig(
            output=str(output), seed=seed, epochs=3, batch_size=8, lr=3e-3, warmup_steps=10, checkpoint_every=50
        ),
        eval=EvalConfig(every=25, batch_size=BATCH, answers=0, samples=5, max_new_tokens=LONGEST_ANSWER),
    )


def comparison_config() -> RunConfig:
    """What `minilora compare` begins from where nothing is named: the demo, shorter, with lines to remember by."""
    config = demo_config(Path("runs/compare"), seed=0)
    return replace(
        config,
        data=replace(config.data, test=str(DATA / "chat_test.jsonl"), replay_from=str(DATA / "replay.jsonl")),
        train=replace(config.train, epochs=1),
        eval=replace(config.eval, answers=100, samples=0),
    )


def tell(output: Path, seed: int, console: Console) -> None:
    """Run the demo into the folder `output`; an old demo there is replaced."""
    refuse_other_run(output)
    hold(output, "demo", "--output").close()  # a folder that cannot be had is told before anything is computed
    config = demo_config(output, seed)
    base = open_checkpoint("demo")
    tokenizer = load_tokenizer("demo")
    chats = read_samples(DATA / "chat_test.jsonl", tokenizer, max_seq_len=256)
    console.rule("Memory at rest")
    console.print(memory_table(base, config.lora))

    console.rule("The base, before")
    model = load_model("demo", quantize="nf4", dtype=torch.float32)
    predicted = predict(base.config, torch.float32, True, None)
    console.print(
        f"Loaded in NF4, embeddings and head in float32: {sum(measured_bytes(model).values()) / 1e6:.2f} MB of tensors "
        f"(predicted {sum(predicted.values()) / 1e6:.2f})."
    )
    console.print(f"Asking {len(chats)} test words, in chat and raw ...")
    asked = answer_samples(model, tokenizer, chats, LONGEST_ANSWER, BATCH)
    before = score(asked)
    ceiling = {
        "nf4": score(ask_raw(model, tokenizer, asked)),
        "unquantized": score(ask_raw(load_model("demo", dtype=torch.float32), tokenizer, asked)),
    }
    console.print(
        f"Asked in chat, it answers {before['exact_match']:.1%} of {len(chats)} test words; asked in its own raw form, "
        f"{ceiling['nf4']['exact_match']:.1%} ({ceiling['unquantized']['exact_match']:.1%} before it was quantized)."
    )

    console.rule("QLoRA")
    try:
        run = fine_tune(config, ConsoleReporter(console), overwrite=True)
    except Stopped as stopped:
        go_on = f"minilora train {output / 'config.toml'} --resume trains on, without the demo's test words and merge"
        raise Stopped(f"{output}: stopped, saved; {go_on}", stopped.exit_status - 128) from None

    console.rule("After")
    after = score(answer_samples(run.model, tokenizer, chats, LONGEST_ANSWER, BATCH))
    tuned = Base.find(replace(config.model, quantize="auto"), str(output / "adapter"))
    audit = merge_with_audit(
        tuned, tuned.read_adapter(), output / "merged", run.validation, config.data.max_seq_len, overwrite=True
    )
    write_summary(run, before, after, ceiling, audit)
    report = write_report(output)
    console.print(result_table(run.folder.read_json("summary.json"), ceiling["nf4"]))
    console.print(samples_table(run))
    console.print(f"Merge check: {audit.text('trained')}", highlight=False)
    say(console, f"adapter (PEFT layout)  {output / 'adapter'}")
    say(console, f"merged model           {output / 'merged'}")
    say(console, f"all figures            {output / 'summary.json'}")
    say(console, f"report                 {report}")


def refuse_other_run(output: Path) -> None:
    """Raise UserError if the folder holds anything but an old demo: that alone may be replaced unasked."""
    if output.is_dir() and {child.name for child in output.iterdir()} - {LOCK} and not _is_demo(output):
        raise UserError(f"{output} holds something other than a demo; name another folder with --output")


def _is_demo(folder: Path) -> bool:
    """By the ceiling, which no other run measures; one that was stopped before its report, by its configuration."""
    if (summary := folder / "summary.json").is_file() and (folder / "report.html").is_file():
        return "ceiling" in read_json(summary, RUN_BYTES)
    config = folder / "config.toml"
    return config.is_file() and _key_lines(config.read_text()) == _key_lines(config_toml(demo_config(folder, seed=0)))


def _key_lines(toml: str) -> list[str]:
    """But for those of what each demo is told anew."""
    return [line for line in toml.splitlines() if not line.startswith(("output = ", "seed = "))]


def score(answers: Sequence[Answer]) -> Score:
    """The score of IPA answers."""
    edits, phonemes = zip(*(phoneme_errors(a.given.strip(), a.expected) for a in answers), strict=True)
    right = sum(a.exact for a in answers) / len(answers)
    return {"exact_match": right, "phoneme_error_rate": sum(edits) / sum(phonemes)}


def ask_raw(model: Mistral, tokenizer: Tokenizer, asked: Sequence[Answer]) -> list[Answer]:
    """The words that were asked in chat in the base's own form: it goes on with the line that begins `"word" `."""
    prompts = [raw_prompt(a.prompt.split('"')[1]) for a in asked]
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    given = answer(model, ids, LONGEST_ANSWER, tokenizer.eos_id, BATCH)
    return [replace(a, given=tokenizer.decode(row)) for a, row in zip(asked, given, strict=True)]


def write_summary(run: Run, before: Score, after: Score, ceiling: dict[str, Score], audit: MergeAudit) -> None:
    """Put the demo's figures into the run's summary.json, beside the loop's own."""
    summary = run.folder.read_json("summary.json")
    for when, asked in (("before", before), ("after", after)):
        summary[when] |= asked | {"own_text_perplexity": summary["forgetting"][when]["perplexity"]}
    others = "exact match and phoneme error rate on the demo's test words, own text perplexity on the general text"
    summary["measured_on"] = f"the validation data; {others}"
    summary["ceiling"], summary["merge"] = ceiling, audit.to_dict("trained")
    summary["share_of_ceiling"] = after["exact_match"] / ceiling["nf4"]["exact_match"]
    run.folder.write_json("summary.json", summary)


def memory_table(base: Checkpoint, lora: LoraConfig) -> Table:
    """Predicted bytes of the weights, and of what training adapters adds, for the demo's base and for a real one."""
    rows = []
    for dtype, double_quant in ((torch.float32, None), *((torch.bfloat16, quant) for quant in (None, False, True))):
        row = [storage_of(dtype, double_quant)]
        for config, unit, name in ((base.config, 1e6, "MB"), (MISTRAL_7B, 1e9, "GB")):
            weights = sum(predict(config, dtype, double_quant, None).values())
            adapters = sum(predict(config, dtype, double_quant, lora).values()) - weights
            row += [f"{weights / unit:.2f} {name}", f"{adapters / unit:.2f} {name}"]
        rows.append(row)
    return table(("linear layers in", "demo: weights", "+ adapters", "7B: weights", "+ adapters"), rows)


def result_table(summary: dict[str, Any], ceiling: Score) -> Table:
    """Before, after, and the ceiling: the base asked in its raw form."""
    asked = (summary["before"], summary["after"], ceiling)
    rows = [
        ["exact match, test words", *(f"{figures['exact_match']:.1%}" for figures in asked)],
        ["phoneme error rate", *(f"{figures['phoneme_error_rate']:.1%}" for figures in asked)],
        ["perplexity of its own text", *(f"{figures['own_text_perplexity']:.3f}" for figures in asked[:2]), ""],
    ]
    return table(("", "before", "after", "ceiling: base, raw form"), rows)


def samples_table(run: Run) -> Table:
    """Five prompts before and after."""
    pairs = zip(run.after, run.before["answers"], strict=True)
    rows = [[text.strip()[:40] for text in (a.prompt, a.expected, b["given"], a.given)] for a, b in pairs]
    return table(("prompt", "expected", "before", "after"), rows)
