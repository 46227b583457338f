"""The verbs that train: a run, its data, runs compared, what this machine does against what it should, the demo."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from minilora import arguments
from minilora.config import MISTRAL_7B, RunConfig
from minilora.errors import UsageError, UserError
from minilora.recipes import recipe_names, summary
from minilora.toml import config_toml
from minilora.verbs import terminal


def train(args: list[str]) -> None:
    """Fine-tune a model as a TOML file says: minilora train CONFIG.toml [--section.key value ...]"""
    parser = arguments.run_parser(train, options="[--resume | --overwrite] [--dry-run]")
    parser.add_argument("--list-recipes", action="store_true", help="show the recipes, with the memory each needs")
    parser.add_argument("--print-config", action="store_true", help="print the complete TOML file and exit")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in train.output, exactly")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    parser.add_argument("--dry-run", action="store_true", help="data, one step, save, reload, generate; keep nothing")
    config, parsed = arguments.parse_run(parser, args)
    if parsed.list_recipes:
        from minilora.memory import as_text
        from minilora.train.ledger import predict_on_gpu

        for name in recipe_names():
            recipe, _ = arguments.parse_run(arguments.run_parser(train), ["--recipe", name])
            predicted = as_text(sum(predict_on_gpu(recipe, MISTRAL_7B).values()))
            print(f"{name:18} {predicted:>8} predicted for a 7B  {summary(name)}")
    elif parsed.print_config:
        print(config_toml(config), end="")
    elif parsed.dry_run:
        from minilora.train import dry_run, progress

        dry_run.dry_run(config, progress.ConsoleReporter(terminal.console()), parsed.resume, parsed.overwrite)
    else:
        _train(config, parsed.resume, parsed.overwrite)


def _train(config: RunConfig, resume: bool, overwrite: bool) -> None:
    from minilora.report import console, figures, page
    from minilora.train import loop, progress

    screen, settings = terminal.console(), Path(config.train.output, "config.toml")
    others = settings.stat().st_mtime_ns if overwrite and settings.exists() else None  # of the run that is to go
    try:
        run = loop.fine_tune(config, progress.ConsoleReporter(screen), resume, overwrite)
    except KeyboardInterrupt:  # before its steps, or after them
        begun = settings.exists() and settings.stat().st_mtime_ns != others
        raise KeyboardInterrupt(f"{config.train.output}: stopped; go on with --resume" if begun else "") from None
    report = page.write_report(run.folder.path)
    measured = run.folder.read_json("summary.json")
    for name in ("before", "after", "test"):
        if measured[name]:
            console.say(screen, f"{figures.label(name, config.train.adapter):7}{figures.figures_of(measured[name])}")
    console.say(screen, f"done: {run.stopped_because}; report in {report}")


def data(args: list[str]) -> None:
    """Check data line by line and show what of them is trained on: minilora data check FILE... [--fix OUT.jsonl]"""
    parser = arguments.run_parser(data, "check [FILE ...]", "[--fix OUT.jsonl] [--html OUT.html]")
    parser.add_argument("what", choices=["check"])
    parser.add_argument("files", metavar="FILE", nargs="*", help="training data; by default data.train")
    parser.add_argument("--fix", metavar="OUT.jsonl", help="write the training data without what is wrong in them")
    parser.add_argument("--html", metavar="OUT.html", help="write what is shown as a page, too")
    parser.add_argument("--show", type=NonNegativeInt, default=3, help="samples to show")
    config, parsed = arguments.parse_run(parser, args, file_first=False)
    if "" in parsed.files:  # what an unset variable gives
        raise UsageError("the name of a FILE is empty; name one, or leave it out for data.train")
    if parsed.files:
        config = replace(config, data=replace(config.data, train=tuple(parsed.files)))

    from minilora.checkpoint.write import check_new, place
    from minilora.data.files import reader
    from minilora.report.data_view import show_data
    from minilora.train.data_check import check_data, fix_data

    if parsed.fix and reader(parsed.fix):
        raise UsageError(
            f"{parsed.fix}: --fix writes JSONL, and by that name it would be read as something else; end it in .jsonl"
        )
    outs = [place(out) for out in (parsed.fix, parsed.html) if out]
    if len(outs) > len({*outs}):
        raise UsageError(f"{parsed.fix}: --fix and --html both name it; name two files")
    for out in outs:
        check_new(out)
    checked, figures = check_data(config)
    show_data(checked, figures, parsed.show, terminal.console(), parsed.html)
    if parsed.fix:
        print(fix_data(config, parsed.fix))
    else:
        checked.refuse_faults(listed="they stand above")


def compare(args: list[str]) -> None:
    """Strategies, or any keys, on the same data and seed, ranked on validation: minilora compare [CONFIG.toml]"""
    parser = arguments.run_parser(compare, options="[--strategies ...] [--grid KEY=A,B ...]")
    which = "a list of full,partial,lora,qlora,dora,prefix; all without a grid, else what the configuration says"
    sets = "full takes a tenth of adapters' train.lr, prefix a hundred times as much, unless the grid names train.lr; "
    sets += "partial takes train.layers 2, unless the configuration is of partial itself"
    parser.add_argument("--strategies", help=f"{which}; {sets}")
    parser.add_argument("--grid", action="append", default=[], help="KEY=A,B: a run for each value, and for each pair")
    parser.add_argument("--shares", default="", help="such as 0.25,0.5: runs on less of the data, for a learning curve")
    parser.add_argument("--rank_by", default="loss", help="what of the validation: loss, or one of eval.metrics")
    parser.add_argument("--output", default="runs/compare", help="a folder with a run folder for each")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished, go on with the others")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a comparison")
    args = [*args, *(embedded := arguments.begin_with_demo(parser, args))]
    config, parsed = arguments.parse_run(parser, args)
    if any(arg.startswith("--train.output") for arg in args):
        raise UsageError("--train.output: folders go by --output; drop it")

    from minilora.report import comparison, console
    from minilora.train import compare as runs

    def configured(changes: Mapping[str, str]) -> RunConfig:
        return arguments.parse_run(parser, [*args, *(f"--{key}={value}" for key, value in changes.items())])[0]

    screen, output, words = terminal.console(), Path(parsed.output), re.compile(r"[^][,\s]+").findall
    if embedded:
        console.say(screen, "no data.train is named: what is not given is the demo's, its data too")
    strategies = words(parsed.strategies or ("" if parsed.grid else ",".join(runs.STRATEGIES)))
    replays = config.data.replay or "--data.replay" in {arg.partition("=")[0] for arg in args}
    grid = parsed.grid or (["data.replay=0,0.2"] if embedded and not replays else [])
    shares = words(parsed.shares or ("0.25,0.5" if embedded else ""))
    variants = runs.all_variants(strategies, grid, shares, configured)
    say = partial(console.say, screen)
    result = runs.compare(variants, output, say, parsed.rank_by, parsed.resume, parsed.overwrite)
    comparison.show(result, output, screen)
    if failed := [row for row in result["rows"] if "failed" in row]:
        first = f"{failed[0]['name']}: {failed[0]['failed']}"
        raise UserError(f"{len(failed)} of {len(variants)} runs failed, the first, {first}")


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
        raise UsageError("name resume first, then its options: minilora verify resume [CONFIG.toml] [--steps N]")

    if find_spec("triton") is None:
        raise UserError("Triton is not installed; there are no kernels to verify")

    from minilora.backend import pick_device
    from minilora.evaluate.kernel_check import check_kernels, refuse_failed
    from minilora.report.kernel_table import error_table, print_ways

    console, device = terminal.console(), pick_device(parsed.model.device)
    print_ways(device, console)
    checks = list(check_kernels(device))
    console.print(error_table(checks))
    refuse_failed(checks)
    print(f"{len(checks)} checks passed")


def _verify_resume(args: list[str]) -> None:
    parser = arguments.run_parser(verify, "resume [CONFIG.toml]", "[--steps N]")
    parser.prog = "minilora verify resume"
    parser.add_argument("--steps", type=arguments.Steps, default=6, help="in their middle the run is interrupted")
    embedded = arguments.begin_with_demo(parser, args)
    config, parsed = arguments.parse_run(parser, [*args, *embedded])

    from minilora.train.twins import compare_twins

    names = [*(["the demo's configuration"] if embedded else []), *map(str, parsed.config or [])]
    named = " and ".join(names) or "a configuration"
    print(compare_twins(config, int(parsed.steps), partial(print, flush=True), named))


def demo(args: list[str]) -> None:
    """The whole story with nothing downloaded: base, QLoRA, before and after, forgetting, report, merge check."""
    parser = arguments.verb_parser(demo)
    parser.add_argument("--output", default="runs/demo", help="the run folder; an old demo there is replaced")
    parser.add_argument("--seed", type=arguments.Seed, default=0)
    parsed = arguments.parse(parser, args)

    from minilora.demo.story import tell

    tell(Path(parsed.output), parsed.seed, terminal.console())
