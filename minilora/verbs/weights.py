"""The verbs of weights as they lie on a disk: written in another form, merged with an adapter, looked at."""

from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from minilora import arguments
from minilora.arguments import refuse_idle
from minilora.config import UNNAMED, BaseConfig, Route
from minilora.errors import UserError
from minilora.hub import local_folder
from minilora.verbs import terminal


def quantize(args: list[str]) -> None:
    """Write a checkpoint in NF4, which transformers and bitsandbytes load, too: minilora quantize MODEL OUT"""
    parser = arguments.verb_parser(quantize)
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face's layout or Mistral's own, or demo")
    parser.add_argument("out", metavar="OUT", help="the new folder, in Hugging Face's layout")
    parser.add_argument("--double_quant", type=bool, default=True, help="also store each block's absmax in 8 bits")
    arguments.add_dtype(parser, "of what stays plain, and what the rest is dequantized to; auto is MODEL's own")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parsed = arguments.parse(parser, args)

    from minilora.checkpoint.quantize import quantize_checkpoint

    local_folder(parsed.model)  # what the hub has is fetched here, where a signal stops it at once
    with terminal.progress(parsed.out) as progress:
        quantize_checkpoint(
            parsed.model, parsed.out, double_quant=parsed.double_quant, dtype=arguments.dtype(parsed),
            overwrite=parsed.overwrite, progress=progress,
        )  # fmt: skip
    print(f"written to {parsed.out}")


def merge(args: list[str]) -> None:
    """Write base plus adapter as one model, once an audit passed: minilora merge ADAPTER [OUT] --text FILE"""
    parser = arguments.verb_parser(merge)
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the new folder; without it every way is only measured")
    onto = "B A is added to the weights it was trained beside (NF4, dequantized), to the original ones, or requantized:"
    parser.add_argument("--onto", type=Route, default="trained", help=f"{onto} as trained, and the sum in NF4 again")
    parser.add_argument("--text", help="held-out data to compare on; by default the run's own validation file")
    parser.add_argument("--audit_tokens", type=PositiveInt, default=4096, help="target tokens of it to compare on")
    arguments.add_length(parser, "truncate")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    arguments.add_model(parser)
    arguments.add_adapter(parser, also="; write what the audit refuses")
    parsed = arguments.parse(parser, args)
    if parsed.out is None:
        refuse_idle(parsed, {"onto": "trained", "overwrite": False}, "without OUT")

    from minilora.evaluate.merge_audit import audit_routes, held_out, merge_with_audit
    from minilora.report.console import table

    base, max_seq_len = arguments.find_base(parsed), parsed.data.max_seq_len
    adapter = base.read_adapter()
    samples = held_out(base, adapter, parsed.text, max_seq_len, parsed.data.too_long, parsed.audit_tokens)
    with terminal.progress(parsed.out or parsed.adapter) as progress:
        if parsed.out is None:
            audit = audit_routes(base, adapter, samples, max_seq_len, progress)
        else:
            audit = merge_with_audit(
                base, adapter, Path(parsed.out), samples, max_seq_len, route=parsed.onto, overwrite=parsed.overwrite,
                force=parsed.force, progress=progress,
            )  # fmt: skip
    terminal.warn(base.warnings)
    print(f"against the trained model, on {audit.base.n_tokens:,} target tokens; KL in nats a token:")
    terminal.console().print(table(audit.COLUMNS, audit.rows()))
    if parsed.out is not None:
        if not audit.passed(parsed.onto):
            terminal.warn([f"--force overrode the audit: {audit.text(parsed.onto)}"])
        print(f"written to {parsed.out}")


def export(args: list[str]) -> None:
    """Write a model or adapter in another format, reopened and compared: minilora export FROM OUT --to FORMAT"""
    of_model, of_adapter = ("hf", "mistral", "bnb-4bit", "gguf-f16", "gguf-q8_0"), ("peft", "mistral-finetune")
    parser = arguments.verb_parser(export)
    parser.add_argument("from", metavar="FROM", help="a model's folder in either layout, plain or in NF4, or demo")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--to", required=True, choices=of_model + of_adapter, help="the last two: FROM is an adapter")
    arguments.add_dtype(parser, "of the weights, for hf and mistral; for bnb-4bit as in quantize; auto is FROM's own")
    parser.add_argument(
        "--model.tokenizer", help="file or folder of the tokenizer, where it does not lie with FROM, or its base"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--model.path", default=UNNAMED, help="of an adapter that does not say where its base lies")
    arguments.add_adapter(parser)
    parsed = arguments.parse(parser, args)
    if parsed.to in of_adapter:
        _export_adapter(parsed)
        return
    refuse_idle(parsed, {"model.path": UNNAMED, "adapter_scaling": None, "force": False}, f"with --to {parsed.to}")

    from minilora.checkpoint.export import export_checkpoint

    local_folder(parsed["from"])  # as in quantize
    with terminal.progress(parsed.out) as progress:
        compared, notes = export_checkpoint(
            parsed["from"], parsed.out, parsed.to, dtype=arguments.dtype(parsed), tokenizer=parsed.model.tokenizer,
            overwrite=parsed.overwrite, progress=progress,
        )  # fmt: skip
    terminal.warn(notes)
    print(f"{compared}\nwritten to {parsed.out}")


def _export_adapter(parsed: Namespace) -> None:
    refuse_idle(parsed, {"dtype": "auto"}, f"with --to {parsed.to}")

    from minilora.base import Base
    from minilora.checkpoint import adapter, mistral_adapter, write

    on = BaseConfig(parsed.model.path, parsed.model.tokenizer)
    base = Base.find(on, parsed["from"], scaling=parsed.adapter_scaling, force=parsed.force)
    assert base.adapter is not None
    write.check_target(parsed.out, parsed.overwrite, [base.adapter, base.checkpoint.folder])
    save = adapter.save_peft_adapter if parsed.to == "peft" else mistral_adapter.save_mistral_adapter
    saved = base.read_adapter()
    save(saved, base.checkpoint.config, parsed.out, overwrite=parsed.overwrite)
    terminal.warn(base.warnings)
    print(f"{len(saved.tensors)} tensors reopened and compared: all equal\nwritten to {parsed.out}")


def inspect(args: list[str]) -> None:
    """What a model, adapter, run, GGUF file or tokenizer is, and whether it would load: minilora inspect PATH"""
    parser = arguments.verb_parser(inspect)
    parser.add_argument("path", metavar="PATH", help="a folder or a file, or demo")
    parser.add_argument("--checksum", action="store_true", help="sha256 of every file, held against manifest.json")
    parser.add_argument("--model.path", default=UNNAMED, help="of an adapter that does not say where its base lies")
    parser.add_argument("--model.tokenizer", help="of an adapter, where its base has none")
    arguments.add_scaling(parser)
    parser.add_argument("--json", action="store_true", help="print one object of JSON")
    parsed = arguments.parse(parser, args)

    from minilora.checkpoint.json_file import to_json
    from minilora.report.facts import gather
    from minilora.report.inspect import show_facts

    base = BaseConfig(parsed.model.path, parsed.model.tokenizer)
    facts = gather(parsed.path, base=base, scaling=parsed.adapter_scaling, checksum=parsed.checksum)
    if parsed.json:
        print(to_json(facts, indent=1))
    else:
        show_facts(facts, terminal.console())
    if facts["reason"]:
        raise UserError(f"{parsed.path}: would not load: {facts['reason'].removeprefix(f'{parsed.path}: ')}")


def explain(args: list[str]) -> None:
    """One block of weights through NF4 and one layer through QLoRA, in numbers, by the code that trains."""
    parser = arguments.verb_parser(explain)
    parser.add_argument("--weights", type=list[float], help="the numbers of the block, such as [0.1,-0.2]")
    parser.add_argument("--tensor", help="take the block from this tensor of --model.path, such as model.norm.weight")
    parser.add_argument("--block", type=NonNegativeInt, default=0, help="which block of the tensor")
    parser.add_argument("--seed", type=arguments.Seed, default=0, help="of a random block, where neither is given")
    parser.add_argument("--model.path", default="demo")
    parsed = arguments.parse(parser, args)
    if parsed.tensor is None:
        refuse_idle(parsed, {"model.path": "demo"}, "without --tensor")

    from minilora.report import explain as numbers

    weight, name = numbers.weight_of(parsed.weights, parsed.tensor, parsed.model.path)
    numbers.explain(weight, name=name, block=parsed.block, seed=parsed.seed, console=terminal.console())
