"""The command line: `minilora VERB`. Thin: each verb is told what to do, has it done, and prints what comes of it.

Exit status: 0 done, 1 failed with one line that says what to mend, 2 wrong usage, 129, 130 or 143 stopped by a signal.
Heavy modules are imported inside the verbs, so that help and usage errors come at once.
"""

import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from minilora import arguments
from minilora.arguments import Verb
from minilora.checkpoint import write
from minilora.checkpoint.json_file import to_json
from minilora.config import MISTRAL_7B, UNNAMED, BaseConfig, EvalConfig, Route, RunConfig, to_dict
from minilora.errors import UserError, is_out_of_memory, need_library, of_system, printable
from minilora.hub import local_folder
from minilora.recipes import recipe_names, summary
from minilora.report.console import Console, say, table, weights_bar
from minilora.train.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from minilora.base import Base
    from minilora.model import Mistral


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"minilora {version('minilora')}")
        return 0
    verb = VERBS.get(args[0])
    if verb is None:
        print(f"minilora: there is no verb {args[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    # On a busy machine, OpenMP's threads that spin between operations stop each other. On a quiet one, threads that
    # sleep instead are woken on one core.
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return exit_status(f"minilora {args[0]}", partial(verb, args[1:]))


def exit_status(name: str, work: Callable[[], object]) -> int:
    """Do the work of the command `name`: 0, or what it exits with after one line that says what is wrong. Bugs pass."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _warn([str(message)])  # without the line of code that warns
            work()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of our output has gone, as in `minilora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        said, status = str(error) or "stopped", 130
    except (UserError, Stopped) as error:
        said, status = str(error), getattr(error, "exit_status", 1)
    except (OSError, UnicodeError) as error:
        said, status = of_system(error), 1
    except (MemoryError, RuntimeError) as error:
        said, status = "out of memory; take a smaller model, fewer or shorter rows, or --model.quantize nf4", 1
        if str(error).startswith("Symlink loop"):  # what pathlib raises before Python 3.13
            said = f"{error}; name what it should lead to"
        elif isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
    print(f"{name}: {UserError(said)}", file=sys.stderr)  # what a file has named commands no terminal
    return status


def _overview() -> str:
    lines = [f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(["usage: minilora VERB ...   (minilora VERB --help explains each)", "", *lines])


def train(args: list[str]) -> None:
    """Fine-tune a model as a TOML file says: minilora train CONFIG.toml [--section.key value ...]"""
    parser = arguments.run_parser(train)
    parser.usage = "minilora train [CONFIG.toml] [--section.key value ...] [--resume | --overwrite] [--dry-run]"
    parser.add_argument("--list-recipes", action="store_true", help="show the recipes, with the memory each needs")
    parser.add_argument("--print-config", action="store_true", help="print the complete TOML file and exit")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in train.output, exactly")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    parser.add_argument("--dry-run", action="store_true", help="data, one step, save, reload, generate; keep nothing")
    config, parsed = arguments.parse_run(parser, args)
    if parsed.list_recipes:
        from minilora.memory import as_text
        from minilora.train.ledger import on_gpu

        for name in recipe_names():
            recipe, _ = arguments.parse_run(arguments.run_parser(train), ["--recipe", name])
            predicted = as_text(sum(on_gpu(recipe, MISTRAL_7B).values()))
            print(f"{name:18} {predicted:>8} predicted for a 7B  {summary(name)}")
    elif parsed.print_config:
        from minilora.train.run_folder import config_toml

        print(config_toml(config), end="")
    elif parsed.dry_run:
        from minilora.train.dry_run import dry_run
        from minilora.train.progress import ConsoleReporter

        dry_run(config, ConsoleReporter(_console()), parsed.resume, parsed.overwrite)
        print("dry run: config, data, shapes, one step, save, reload and generate all work; nothing was kept")
    else:
        _train(config, parsed.resume, parsed.overwrite)


def _train(config: RunConfig, resume: bool, overwrite: bool) -> None:
    from minilora.report.comparison import figures_of
    from minilora.report.page import write_report
    from minilora.train.loop import fine_tune
    from minilora.train.progress import ConsoleReporter

    console = _console()
    try:
        run = fine_tune(config, ConsoleReporter(console), resume, overwrite)
    except KeyboardInterrupt:  # before its steps, or after them
        begun = Path(config.train.output, "config.toml").exists()
        raise KeyboardInterrupt(f"{config.train.output}: stopped; go on with --resume" if begun else "") from None
    report = write_report(run.folder.path)
    measured = run.folder.read_json("summary.json")
    for name in ("before", "after", "test"):
        if measured[name]:
            say(console, f"{name:7}{figures_of(measured[name])}")
    say(console, f"done: {run.stopped_because}; report in {report}")


def _find(parsed: Namespace, adapter: str | None) -> "Base":
    if adapter is None:
        _refuse_idle(parsed, {"adapter_scaling": None, "force": False}, "without --adapter")
    from minilora.base import Base

    return Base.find(parsed.model, adapter, scaling=parsed.adapter_scaling, force=parsed.force)


def _loaded(base: "Base", *works: tuple[int, int, int | None]) -> "Mistral":
    """The model, if there is memory for it and these works, see `Base.check`. Told beside the output: what was
    overridden, device, base, ledger; once all is well, so that an error is one line."""
    from minilora.backend import told
    from minilora.memory import one_line

    predicted = base.check(*works)
    model = base.load()
    _warn(base.warnings)
    print(UserError(f"{told(base.device)}; base: {base.checkpoint.name}"), file=sys.stderr)
    print(one_line(predicted), file=sys.stderr)
    return model


def _console() -> Console:
    """A terminal's; for a file or a pipe, one wide enough for every table."""
    if not os.environ.get("COLUMNS", "").strip("0"):  # a width of 0 is not known
        os.environ.pop("COLUMNS", None)
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)


def _warn(said: Sequence[str]) -> None:
    for warning in said:
        print(f"warning: {warning}", file=sys.stderr)


def data(args: list[str]) -> None:
    """Check data line by line and show what of them is trained on: minilora data check FILE... [--fix OUT.jsonl]"""
    parser = arguments.run_parser(data)
    parser.usage = "minilora data check [FILE ...] [--section.key value ...] [--fix OUT.jsonl] [--html OUT.html]"
    parser.add_argument("what", choices=["check"])
    parser.add_argument("files", metavar="FILE", nargs="*", help="training data; by default data.train")
    parser.add_argument("--fix", metavar="OUT.jsonl", help="write the training data without what is wrong in them")
    parser.add_argument("--html", metavar="OUT.html", help="write what is shown as a page, too")
    parser.add_argument("--show", type=NonNegativeInt, default=3, help="samples to show")
    config, parsed = arguments.parse_run(parser, args, file_first=False)
    if parsed.files:
        config = replace(config, data=replace(config.data, train=tuple(parsed.files)))

    from minilora.report.data_view import show_data
    from minilora.train.data_check import check_data, fix_data

    outs = [write.place(out) for out in (parsed.fix, parsed.html) if out]
    if len(outs) > len({*outs}):
        raise UserError(f"{parsed.fix}: --fix and --html both name it; name two files")
    for out in outs:
        write.check_new(out)
    checked, figures = check_data(config)
    show_data(checked, figures, parsed.show, _console(), parsed.html)
    if parsed.fix:
        print(fix_data(config, parsed.fix))
    else:
        checked.refuse_faults(listed="they stand above")


def evaluate(args: list[str]) -> None:
    """Perplexity and task metrics on held-out data: minilora evaluate FILE [--adapter FOLDER] [--model.path FOLDER]"""
    parser = arguments.verb_parser(evaluate)
    parser.add_argument("file", help="messages or text, as JSONL, CSV, Parquet or plain text")
    parser.add_class_arguments(EvalConfig, "eval", skip={"every", "patience", "samples", "general_tokens", "probes"})
    parser.add_argument("--out", help="also write each answer to this new file, a line of JSON each")
    arguments.add_length(parser, "fail")
    arguments.add_base(parser)
    parsed = arguments.parse(parser, args)

    from minilora.checkpoint.files import sha256_of
    from minilora.checkpoint.provenance import quantization
    from minilora.data.encode import encode_records
    from minilora.data.records import read_records
    from minilora.evaluate.measure import longest_prompt, measure
    from minilora.evaluate.metrics import check_libraries, score
    from minilora.report.page import write_report
    from minilora.train.looks import check_notable, note_look, run_tested_on

    limits, max_seq_len = replace(parsed.eval, samples=0), parsed.data.max_seq_len  # samples are for runs
    check_libraries(limits.metrics)
    if parsed.out:
        write.check_new(parsed.out)
    base = _find(parsed, parsed.adapter)
    samples = encode_records(read_records(parsed.file), base.tokenizer, max_seq_len, parsed.data.too_long)
    if run := run_tested_on(parsed.file, base.adapter or str(base.checkpoint.folder)):
        check_notable(run)
    row = min(max_seq_len, sum(sample.length for sample in samples))
    works: list[tuple[int, int, int | None]] = [(limits.batch_size, row, None)]
    if prompt := longest_prompt(samples, limits):
        works.append((limits.batch_size, prompt, limits.max_new_tokens))
    model = _loaded(base, *works)
    note = partial(print, file=sys.stderr, flush=True)
    result, answers = measure(model, base.tokenizer, samples, max_seq_len, limits, note)
    result["quantization"] = quantization(base.nf4_double_quant, base.dtype)
    result["target_tokens"] = sum(sample.n_targets for sample in samples)
    result |= {"answers": len(answers)} if answers else {}
    if run and (warning := note_look(run, shlex.join(["evaluate", *args]), sha256_of(parsed.file), result)):
        _warn([warning])
    print(to_json(result, indent=1), flush=True)
    if parsed.out:
        _, each = score(answers, limits.metrics)
        rows = [vars(answer) | figures for answer, figures in zip(answers, each, strict=True)]
        write.atomic_jsonl(parsed.out, rows)
    if run:
        write_report(run)


def generate(args: list[str]) -> None:
    """Answer a prompt: minilora generate PROMPT [--adapter FOLDER] [--model.path FOLDER]"""
    parser = arguments.verb_parser(generate)
    parser.add_argument("prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template")
    arguments.add_sampling(parser, max_new_tokens=128)
    arguments.add_base(parser)
    parsed = arguments.parse(parser, args)
    sampling = _sampling(parsed)

    from minilora.chat import answer_text

    base = _find(parsed, parsed.adapter)
    tokenizer = base.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(parsed.prompt)]
    if not parsed.raw:
        ids, _ = tokenizer.encode_chat([{"role": "user", "content": parsed.prompt}])
    model = _loaded(base, (1, len(ids), parsed.max_new_tokens))
    for piece in answer_text(model, tokenizer, ids, parsed.max_new_tokens, **sampling):
        print(piece, end="", flush=True)
    print()


def chat(args: list[str]) -> None:
    """Talk, a line a turn, until the input ends: minilora chat [--adapter FOLDER] [--model.path FOLDER]"""
    parser = arguments.verb_parser(chat)
    parser.add_argument("--system", help="what the model is told before the first turn")
    parser.add_argument("--max_tokens", type=PositiveInt, default=4096, help="of the conversation, looked back on")
    arguments.add_sampling(parser, max_new_tokens=512)
    arguments.add_base(parser)
    parsed = arguments.parse(parser, args)
    sampling = _sampling(parsed)

    from minilora.chat import converse

    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):
            import_module("readline")  # `input` edits lines by it

    def typed() -> Iterator[str]:
        with suppress(EOFError):
            while True:
                yield input(prompt)

    base = _find(parsed, parsed.adapter)
    limits = parsed.max_tokens, parsed.max_new_tokens
    model = _loaded(base, (1, *limits))
    answer, note = partial(print, end="", flush=True), partial(print, file=sys.stderr)
    converse(model, base.tokenizer, typed(), answer, note, parsed.system, *limits, **sampling)


def serve(args: list[str]) -> None:
    """Answer OpenAI's clients over HTTP, and on a page: minilora serve [--adapter FOLDER] [--model.path FOLDER]"""
    parser = arguments.verb_parser(serve)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=arguments.Port, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="of the model, as clients ask for it; by default its run's, or its folder's")
    parser.add_argument("--system", help="what the model is told where a conversation has no system text")
    parser.add_argument("--max_tokens", type=PositiveInt, default=4096, help="of a conversation and its answer")
    arguments.add_sampling(parser, max_new_tokens=512)
    arguments.add_base(parser)
    parsed = arguments.parse(parser, args)
    for library in ("starlette", "uvicorn"):
        need_library(library, "serve", "minilora serve")

    from minilora.serve.line import Line
    from minilora.serve.request import Offer
    from minilora.serve.server import listen, make_app, names_of, run

    with listen(parsed.host, int(parsed.port)) as listening:  # what is wrong with it is said before a model is loaded
        base = _find(parsed, parsed.adapter)
        limit = min(parsed.max_tokens, base.checkpoint.config.max_seq_len)
        folder = Path(os.path.abspath(base.adapter or ""))  # RUN/adapter has RUN's; where it lies is nobody's business
        of_adapter = folder.parent.name if folder.name == "adapter" else folder.name
        name = printable(parsed.name or (of_adapter if base.adapter else base.checkpoint.name))
        offer = Offer(name, base.tokenizer, limit, parsed.max_new_tokens, parsed.system, _sampling(parsed, fixed=False))
        offer.check_room()
        line = Line(_loaded(base, (1, limit, 1)), base.tokenizer)
        host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        hello = f"minilora {version('minilora')} serves {name}: {url} (a page), {url}/v1 (OpenAI's API)"
        run(make_app(line, offer, names_of(listening, host)), line, listening, hello)


def _sampling(parsed: Namespace, fixed: bool = True) -> dict[str, Any]:
    """How tokens are drawn, as `generation.stream` takes it; fixed: no request may ask for another temperature."""
    if parsed.temperature == 0 and fixed:
        _refuse_idle(parsed, {"top_k": None, "top_p": 1.0, "seed": None}, "at --temperature 0")
    return {name: getattr(parsed, name) for name in ("temperature", "top_k", "top_p", "seed")}


def merge(args: list[str]) -> None:
    """Write base plus adapter as one model, once an audit passed: minilora merge ADAPTER [OUT] --text FILE"""
    parser = arguments.verb_parser(merge)
    parser.add_argument("adapter_folder", metavar="ADAPTER")
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
        _refuse_idle(parsed, {"onto": "trained", "overwrite": False}, "without OUT")

    from minilora.evaluate.merge_audit import audit_routes, held_out, merge_with_audit

    base, max_seq_len = _find(parsed, parsed.adapter_folder), parsed.data.max_seq_len
    adapter = base.read_adapter()
    samples = held_out(base, adapter, parsed.text, max_seq_len, parsed.data.too_long, parsed.audit_tokens)
    with _progress(parsed.out or parsed.adapter_folder) as progress:
        if parsed.out is None:
            audit = audit_routes(base, adapter, samples, max_seq_len, progress)
        else:
            audit = merge_with_audit(
                base, adapter, Path(parsed.out), samples, max_seq_len, route=parsed.onto, overwrite=parsed.overwrite,
                force=parsed.force, progress=progress,
            )  # fmt: skip
    _warn(base.warnings)
    print(f"against the trained model, on {audit.base.n_tokens:,} target tokens; KL in nats a token:")
    _console().print(table(audit.COLUMNS, audit.rows()))
    if parsed.out is not None:
        if not audit.passed(parsed.onto):
            _warn([f"--force overrode the audit: {audit.text(parsed.onto)}"])
        print(f"written to {parsed.out}")


def _refuse_idle(parsed: Namespace, defaults: Mapping[str, Any], where: str) -> None:
    """Raise UserError for an option that was given though it does nothing there."""
    for name, default in defaults.items():
        if parsed[name] != default:
            raise UserError(f"--{name} does nothing {where}; leave it out")


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
    with _progress(parsed.out) as progress:
        quantize_checkpoint(
            parsed.model, parsed.out, double_quant=parsed.double_quant, dtype=_dtype(parsed.dtype),
            overwrite=parsed.overwrite, progress=progress,
        )  # fmt: skip
    print(f"written to {parsed.out}")


def export(args: list[str]) -> None:
    """Write a model or adapter in another format, reopened and compared: minilora export FROM OUT --to FORMAT"""
    of_model, of_adapter = ("hf", "mistral", "bnb-4bit", "gguf-f16", "gguf-q8_0"), ("peft", "mistral-finetune")
    parser = arguments.verb_parser(export)
    parser.add_argument("source", metavar="FROM", help="a model's folder in either layout, plain or in NF4, or demo")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--to", required=True, choices=of_model + of_adapter, help="the last two: FROM is an adapter")
    arguments.add_dtype(parser, "of the weights, for hf and mistral; for bnb-4bit as in quantize; auto is FROM's own")
    parser.add_argument("--model.tokenizer", help="file or folder of the tokenizer, where it does not lie with FROM")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--model.path", default=UNNAMED, help="of an adapter that does not say where its base lies")
    arguments.add_adapter(parser)
    parsed = arguments.parse(parser, args)
    if parsed.to in of_adapter:
        _export_adapter(parsed)
        return
    _refuse_idle(parsed, {"model.path": UNNAMED, "adapter_scaling": None, "force": False}, f"with --to {parsed.to}")

    from minilora.checkpoint.export import export_checkpoint

    local_folder(parsed.source)  # as in quantize
    with _progress(parsed.out) as progress:
        compared, notes = export_checkpoint(
            parsed.source, parsed.out, parsed.to, dtype=_dtype(parsed.dtype), tokenizer=parsed.model.tokenizer,
            overwrite=parsed.overwrite, progress=progress,
        )  # fmt: skip
    _warn(notes)
    print(f"{compared}\nwritten to {parsed.out}")


def _export_adapter(parsed: Namespace) -> None:
    _refuse_idle(parsed, {"dtype": "auto", "model.tokenizer": None}, f"with --to {parsed.to}")

    from minilora.base import Base
    from minilora.checkpoint.adapter import save_peft_adapter
    from minilora.checkpoint.mistral_adapter import save_mistral_adapter

    base = Base.find(BaseConfig(parsed.model.path), parsed.source, scaling=parsed.adapter_scaling, force=parsed.force)
    write.check_target(parsed.out, parsed.overwrite, [parsed.source, base.checkpoint.folder])
    save = save_peft_adapter if parsed.to == "peft" else save_mistral_adapter
    adapter = base.read_adapter()
    save(adapter, base.checkpoint.config, parsed.out, overwrite=parsed.overwrite)
    _warn(base.warnings)
    print(f"{len(adapter.tensors)} tensors reopened and compared: all equal\nwritten to {parsed.out}")


def _dtype(name: str) -> Any:
    import torch

    return None if name == "auto" else getattr(torch, name)


@contextmanager
def _progress(out: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(weights done, weights in all), at which a signal stops the work."""
    with StopRequest() as stop, weights_bar(_console()) as bar:

        def progress(done: int, of: int) -> None:
            bar(done, of)
            stop.follow(f"{out}: stopped, nothing was written")

        yield progress


def inspect(args: list[str]) -> None:
    """What a model, adapter, run, GGUF file or tokenizer is, and whether it would load: minilora inspect PATH"""
    parser = arguments.verb_parser(inspect)
    parser.add_argument("path", metavar="PATH", help="a folder or a file, or demo")
    parser.add_argument("--checksum", action="store_true", help="sha256 of every file, held against manifest.json")
    parser.add_argument("--model.path", default=UNNAMED, help="of an adapter that does not say where its base lies")
    parser.add_argument("--json", action="store_true", help="print one object of JSON")
    parsed = arguments.parse(parser, args)

    from minilora.report.facts import gather
    from minilora.report.inspect import show_facts

    facts = gather(parsed.path, base=parsed.model.path, checksum=parsed.checksum)
    if parsed.json:
        print(to_json(facts, indent=1))
    else:
        show_facts(facts, _console())
    if facts["reason"]:
        raise UserError(f"{parsed.path}: would not load: {facts['reason'].removeprefix(f'{parsed.path}: ')}")


def explain(args: list[str]) -> None:
    """One block of weights through NF4 and one layer through QLoRA, in numbers, by the code that trains."""
    parser = arguments.verb_parser(explain)
    parser.add_argument("--weights", type=list[float], help="the numbers of the block, such as [0.1,-0.2]")
    parser.add_argument("--tensor", help="take the block from this tensor of --model.path, such as model.norm.weight")
    parser.add_argument("--block", type=int, default=0, help="which block of the tensor")
    parser.add_argument("--seed", type=arguments.Seed, default=0, help="of a random block, where neither is given")
    parser.add_argument("--model.path", default="demo")
    parsed = arguments.parse(parser, args)

    from minilora.report import explain as numbers

    weight, name = numbers.weight_of(parsed.weights, parsed.tensor, parsed.model.path)
    numbers.explain(weight, name=name, block=parsed.block, seed=parsed.seed, console=_console())


def verify(args: list[str]) -> None:
    """What a machine does, against what it should: minilora verify kernels | verify resume [CONFIG.toml]"""
    if args[:1] == ["resume"]:
        _verify_resume(args[1:])
        return
    parser = arguments.verb_parser(verify)
    kinds = "kernels: against definitions and float64; resume: a run against its twin (minilora verify resume --help)"
    parser.add_argument("what", choices=["kernels", "resume"], help=kinds)
    parser.add_argument("--model.device", default="auto", help="auto, cpu or cuda")
    parsed = arguments.parse(parser, args)
    if parsed.what == "resume":
        raise UserError("name resume first, then its options: minilora verify resume [CONFIG.toml] [--steps N]")

    if find_spec("triton") is None:
        raise UserError("Triton is not installed; there are no kernels to verify")

    from minilora.backend import pick_device
    from minilora.evaluate.kernel_check import check_kernels, refuse_failed
    from minilora.report.kernel_table import error_table, print_ways

    console, device = _console(), pick_device(parsed.model.device)
    print_ways(device, console)
    checks = list(check_kernels(device))
    console.print(error_table(checks))
    refuse_failed(checks)
    print(f"{len(checks)} checks passed")


def _verify_resume(args: list[str]) -> None:
    parser = arguments.run_parser(verify)
    parser.prog = "minilora verify resume"
    parser.usage = "minilora verify resume [CONFIG.toml] [--section.key value ...] [--steps N]"
    parser.add_argument("--steps", type=arguments.Steps, default=6, help="in their middle the run is interrupted")
    embedded = ["the demo's configuration"] if _demo_unless_named(parser, args) else []
    config, parsed = arguments.parse_run(parser, args)

    from minilora.train.twins import compare_twins

    named = " and ".join([*embedded, *map(str, parsed.config or [])]) or "a configuration"
    print(compare_twins(config, int(parsed.steps), partial(print, flush=True), named))


def compare(args: list[str]) -> None:
    """Strategies, or any keys, on the same data and seed, ranked on validation: minilora compare [CONFIG.toml]"""
    parser = arguments.run_parser(compare)
    parser.usage = "minilora compare [CONFIG.toml] [--section.key value ...] [--strategies ...] [--grid KEY=A,B ...]"
    parser.add_argument(
        "--strategies",
        help="a list of full,partial,lora,qlora,dora,prefix; all without a grid, else what the configuration says; "
        "full takes a tenth of its train.lr, prefix a hundred times as much, unless the grid names train.lr",
    )
    parser.add_argument("--grid", action="append", default=[], help="KEY=A,B: a run for each value, and for each pair")
    parser.add_argument("--shares", default="", help="such as 0.25,0.5: runs on less of the data, for a learning curve")
    parser.add_argument("--rank_by", default="loss", help="what of the validation: loss, or one of eval.metrics")
    parser.add_argument("--output", default="runs/compare", help="a folder with a run folder for each")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished, go on with the others")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a comparison")
    embedded = _demo_unless_named(parser, args)
    _, parsed = arguments.parse_run(parser, args)
    if any(arg.startswith("--train.output") for arg in args):
        raise UserError("--train.output: folders go by --output; drop it")

    from minilora.report.comparison import show
    from minilora.train import compare as runs

    def configured(changes: Mapping[str, str]) -> RunConfig:
        return arguments.parse_run(parser, [*args, *(f"--{key}={value}" for key, value in changes.items())])[0]

    console, output, words = _console(), Path(parsed.output), re.compile(r"[^][,\s]+").findall
    strategies = words(parsed.strategies or ("" if parsed.grid else ",".join(runs.STRATEGIES)))
    grid = parsed.grid or (["data.replay=0,0.2"] if embedded else [])
    shares = words(parsed.shares or ("0.25,0.5" if embedded else ""))
    variants = runs.all_variants(strategies, grid, shares, configured)
    result = runs.compare(variants, output, partial(say, console), parsed.rank_by, parsed.resume, parsed.overwrite)
    show(result, output, console)
    if failed := [row for row in result["rows"] if "failed" in row]:
        first = f"{failed[0]['name']}: {failed[0]['failed']}"
        raise UserError(f"{len(failed)} of {len(variants)} runs failed, the first, {first}")


def _demo_unless_named(parser: ArgumentParser, args: Sequence[str]) -> bool:
    """Begin from the demo's configuration where nothing names data; whether it does."""
    if arguments.names_data(parser, args):
        return False
    from minilora.demo.story import comparison_config

    for section, keys in to_dict(comparison_config()).items():
        parser.set_defaults({f"{section}.{key}": value for key, value in keys.items()})
    return True


def demo(args: list[str]) -> None:
    """The whole story with nothing downloaded: base, QLoRA, before and after, forgetting, report, merge check."""
    parser = arguments.verb_parser(demo)
    parser.add_argument("--output", default="runs/demo", help="the run folder; an old demo there is replaced")
    parser.add_argument("--seed", type=arguments.Seed, default=0)
    parsed = arguments.parse(parser, args)

    from minilora.demo.story import tell

    tell(Path(parsed.output), parsed.seed, _console())


ALL = (demo, train, data, compare, evaluate, generate, chat, serve, quantize, merge, export, inspect, explain, verify)
VERBS: dict[str, Verb] = {verb.__name__: verb for verb in ALL}
