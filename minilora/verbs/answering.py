"""The verbs that use a base, with or without an adapter: figures on held-out data, answers, conversations, a server."""

import shlex
from dataclasses import replace
from functools import partial
from importlib.metadata import version

from jsonargparse.typing import PositiveInt

from minilora import arguments
from minilora.config import EvalConfig
from minilora.errors import UsageError, need_library, printable
from minilora.verbs import terminal


def evaluate(args: list[str]) -> None:
    """Perplexity and task metrics on held-out data: minilora evaluate FILE [--adapter FOLDER] [--model.path FOLDER]"""
    parser = arguments.verb_parser(evaluate)
    parser.add_argument("file", metavar="FILE", help="messages or text, as JSONL, CSV, Parquet or plain text")
    parser.add_class_arguments(EvalConfig, "eval", skip={"every", "patience", "samples", "general_tokens", "probes"})
    parser.add_argument("--out", help="also write each answer to this new file, a line of JSON each")
    arguments.add_length(parser, "fail")
    arguments.add_base(parser)
    parsed = arguments.parse(parser, args)

    from minilora.checkpoint import json_file, provenance, write
    from minilora.data.encode import read_samples
    from minilora.evaluate import measure, metrics
    from minilora.report import page
    from minilora.train import looks

    # Samples are for runs; answers are scored here, so that it is done once, of all and of each.
    limits, max_seq_len = replace(parsed.eval, samples=0, metrics=()), parsed.data.max_seq_len
    metrics.check_libraries(parsed.eval.metrics)
    if parsed.out:
        write.check_new(parsed.out)
    base = arguments.find_base(parsed)
    samples = read_samples(parsed.file, base.tokenizer, max_seq_len, parsed.data.too_long)
    if run := looks.run_tested_on(parsed.file, base.adapter or str(base.checkpoint.folder)):
        looks.check_notable(run)
    model = base.load_for(*measure.works(samples, max_seq_len, limits), say=terminal.note)
    result, answers = measure.measure(model, base.tokenizer, samples, max_seq_len, limits, terminal.note)
    figures, each = metrics.score(answers, parsed.eval.metrics)
    result |= figures | {"quantization": provenance.quantization(base.nf4_double_quant, base.dtype)}
    n_targets = sum(sample.n_targets for sample in samples)
    result |= {"target_tokens": n_targets} | ({"answers": len(answers)} if answers else {})
    if run and (warning := looks.note_look(run, shlex.join(["evaluate", *args]), result)):
        terminal.warn([warning])
    print(json_file.to_json(result, indent=1), flush=True)
    if parsed.out:
        write.atomic_jsonl(parsed.out, (vars(answer) | own for answer, own in zip(answers, each, strict=True)))
    if run:
        page.write_report(run)


def generate(args: list[str]) -> None:
    """Answer a prompt: minilora generate PROMPT [--adapter FOLDER] [--model.path FOLDER]"""
    parser = arguments.verb_parser(generate)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template")
    arguments.add_sampling(parser, max_new_tokens=128)
    arguments.add_base(parser)
    parsed = arguments.parse(parser, args)
    sampling = arguments.sampling(parsed)

    from minilora.chat import answer_text

    base = arguments.find_base(parsed)
    tokenizer = base.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(parsed.prompt)]
    if not parsed.raw:
        ids, _ = tokenizer.encode_chat([{"role": "user", "content": parsed.prompt}])
    model = base.load_for((1, len(ids), parsed.max_new_tokens), say=terminal.note)
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
    sampling = arguments.sampling(parsed)

    from minilora.chat import converse

    base = arguments.find_base(parsed)
    learnt = max(1, base.checkpoint.config.max_seq_len - parsed.max_new_tokens)
    limits = min(parsed.max_tokens, learnt), parsed.max_new_tokens
    model = base.load_for((1, *limits), say=terminal.note)
    answer, questions = partial(print, end="", flush=True), terminal.typed()
    converse(model, base.tokenizer, questions, answer, terminal.note, parsed.system, *limits, **sampling)


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
    if parsed.name is not None and not parsed.name.strip():
        raise UsageError("--name is blank; give the model a name, or leave it out")
    for library in ("starlette", "uvicorn"):
        need_library(library, "serve", "minilora serve")

    from minilora.serve import line, request, server

    # What is wrong with the address is said before a model is loaded.
    with server.listen(parsed.host, int(parsed.port)) as listening:
        base, sampling = arguments.find_base(parsed), arguments.sampling(parsed, fixed=False)
        limit = min(parsed.max_tokens, base.checkpoint.config.max_seq_len)
        name = printable(parsed.name or base.name)
        offer = request.Offer(name, base.tokenizer, limit, parsed.max_new_tokens, parsed.system, sampling)
        offer.check_room()
        asked = line.Line(base.load_for((1, limit, 1), say=terminal.note), base.tokenizer)
        host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        hello = f"minilora {version('minilora')} serves {name}: {url} (a page), {url}/v1 (OpenAI's API)"
        server.run(server.make_app(asked, offer, server.names_of(listening, host)), asked, listening, hello)
