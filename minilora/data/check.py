"""The data of a run, read, split, encoded, and all that is wrong with them: what `minilora data check` and `train` ask.

A fault would train something else than what the data say, or measure what was trained on; with one, nothing is trained:

    a line that cannot be read, a conversation without an answer or too long, a sample without a target
    an answer whose </s> is no target: the model would not learn to stop
    a second <s>, or a template that was written into the text: [INST] there is not the [INST] of v2 and v3
    a tokenizer and a model that are not of one version
    a record of test, validation or general text that stands in training, too

Duplicates, near duplicates and what was left out or shortened on purpose are told, and no fault.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minilora.config import DataConfig, ModelConfig
from minilora.data.duplicates import groups_of_equal, near_pairs
from minilora.data.encode import Sample, TooLongError, encode_record
from minilora.data.pack import Mix, epoch_rows
from minilora.data.records import ChatRecord, Record, TextRecord, as_jsonl
from minilora.data.sources import BAD_LINES_ALLOWED, FILE_KEYS, normal_form, read_source, side, sources
from minilora.errors import UserError
from minilora.tokenizer import Tokenizer

LEARNT = ("train", "replay_from")


@dataclass(frozen=True)
class Finding:
    """Something to be said of the data. With a fault, nothing is trained.

    kind: what it is one of, such as "duplicate"; text: "file:line: what, and what to do"; part: the one of FILE_KEYS in
    which it stands
    """

    kind: str
    text: str
    fault: bool = True
    part: str = ""

    @property
    def where(self) -> str:
        """ "file:line", "" if it is about no line."""
        return match[0] if (match := re.match(r".*?:\d+(?=: )", self.text)) else ""


@dataclass
class Data:
    """The records and samples of each part (FILE_KEYS), what an epoch takes of the learnt ones, and what was found."""

    tokenizer: Tokenizer
    records: dict[str, list[Record]] = field(default_factory=lambda: {part: [] for part in FILE_KEYS})
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {part: [] for part in FILE_KEYS})
    findings: list[Finding] = field(default_factory=list)
    mix: Mix | None = None

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fault]

    @property
    def learnt(self) -> list[Sample]:
        """What `mix` counts in: the samples of training, then those of replay."""
        return [sample for part in LEARNT for sample in self.samples[part]]

    def refuse_faults(self, listed: str = "`minilora data check` lists them") -> None:
        """Raise UserError with the first fault and how many there are."""
        if faults := self.faults:
            more = f" (and {len(faults) - 1} more: {listed})" if faults[1:] else ""
            raise UserError(f"{faults[0].text}{more}")

    def warnings(self) -> Iterator[str]:
        """A line for each kind of what was found and is no fault."""
        harmless = [finding for finding in self.findings if not finding.fault]
        for group in groups_of_equal(finding.kind for finding in harmless):
            first = harmless[group[0]]
            yield f"warning: {len(group):,} x {first.kind}, the first: {first.text}"


def load_data(config: DataConfig, tokenizer: Tokenizer, model: ModelConfig, mend: bool = False) -> Data:
    """Read, split and encode what the configuration names, and look for faults; they are not raised but collected.

    model: whose vocabulary and positions the samples must lie in
    mend: of damaged conversations keep what can be kept (see `parse_row`)

    Raises UserError for a file that cannot be read, and for a weight that would be ignored.
    """
    data, sizes = Data(tokenizer), list[int]()
    if mismatch := tokenizer.mismatch(model.vocab_size):
        data.findings.append(Finding("template", mismatch))
    elif more := model.vocab_size - tokenizer.vocab_size:
        padded = f"{tokenizer.path}: the model's vocabulary has {more:,} more, padding or added tokens no text gets"
        data.findings.append(Finding("vocabulary", padded, False))
    parts = [part for part in FILE_KEYS if part != "replay_from" or config.replay]
    named = [(part, source) for part in parts for source in sources(getattr(config, part))]
    for part, source in named:
        if part != "train" and source.weight is not None:
            of_training = "but only the sources of data.train have one; leave it out"
            raise UserError(f"data.{part}: {source.path} has the weight {source.weight:g}, {of_training}")
    for part, source in named:
        before = len(data.samples[part])
        records, unread = read_source(source.path, mend)
        wrong = [Finding("bad line", text, part=part) for text in unread]
        for record in records:
            if of := side(record, config) if part == "train" else part:
                wrong += _add(data, of, record, config)
        allowed = max(BAD_LINES_ALLOWED, (len(records) + len(unread)) // 100) if config.bad_lines == "skip" else 0
        too_many = len({finding.where for finding in wrong}) > allowed
        data.findings += [replace(finding, fault=too_many) for finding in wrong]
        if part == "train":
            sizes.append(len(data.samples[part]) - before)
    sizes += [len(data.samples["replay_from"])] if config.replay else []
    weights = [source.weight for part, source in named if part == "train"]
    if any(weights) or config.replay:
        shares = tuple(1.0 if weight is None else weight for weight in weights) if any(weights) else None
        data.mix = Mix(tuple(sizes), shares, config.replay)
    data.findings += [Finding("empty", text) for text in _empty_parts(data, config, sizes)]
    data.findings += _duplicates(data)
    longest = max((s for found in data.samples.values() for s in found), key=lambda s: s.length, default=None)
    if longest and longest.length > model.max_seq_len:
        beyond = f"{longest.length:,} positions, but the model's max_position_embeddings is {model.max_seq_len:,}"
        text = f"{longest.where}: the longest sample takes {beyond}: it knows none beyond; lower data.max_seq_len"
        data.findings.append(Finding("long sample", text, False))
    return data


def _add(data: Data, part: str, record: Record, config: DataConfig) -> list[Finding]:
    """Encode and keep a record; return what makes it a bad line, which data.bad_lines "skip" does not keep."""

    def found(kind: str, text: str, fault: bool = True) -> Finding:
        return Finding(kind, f"{record.where}: {text}", fault, part)

    wrong = [found("template", text) for text in _written_template(record, data.tokenizer)]
    try:
        samples, n_left_out = encode_record(record, data.tokenizer, config.max_seq_len, config.too_long)
    except TooLongError as error:  # data.too_long says what becomes of it
        data.findings.append(Finding("not encoded", str(error), part=part))
        return wrong
    except UserError as error:
        return [*wrong, Finding("not encoded", str(error), part=part)]
    wrong += [found("tokens", text) for sample in samples for text in _sample_faults(sample, data.tokenizer)]
    if not samples:
        text = f"left out, it takes more than data.max_seq_len, {config.max_seq_len} positions"
        data.findings.append(found("too long", text, False))
    elif not wrong or config.bad_lines == "fail":
        lost = {"messages": max(sample.dropped for sample in samples), "answers": n_left_out}
        if parts := [f"{n} {what}" for what, n in lost.items() if n]:
            data.findings.append(found("shortened", f"too long, {' and '.join(parts)} are left out", False))
        data.findings += [found("template's limit", text, False) for text in _unseen(record, data.tokenizer)]
        data.records[part].append(record)
        data.samples[part] += samples
    return wrong


def _empty_parts(data: Data, config: DataConfig, sizes: Sequence[int]) -> Iterator[str]:
    """A sentence for each part that has no sample left though no fault says why."""
    if data.faults:
        return
    if not data.samples["train"]:
        lost = [finding.text for finding in data.findings if finding.part == "train"]
        why = f"every line is lost, the first: {lost[0]}" if lost else "data.share and the splits leave no record"
        yield f"nothing to train on: {why}"
    elif 0 in sizes:
        yield "a source of data.train or data.replay_from has no sample left; drop it"
    for part in ("validation", "test", "general"):
        share = getattr(config, f"{part}_share", None)
        if not data.samples[part] and (getattr(config, part) or share):
            larger = "" if share is None else f", or a larger data.{part}_share"
            yield f"data.{part} has no sample; name another file{larger}"


# Templates and tokens


def _written_template(record: Record, tokenizer: Tokenizer) -> Iterator[str]:
    """What is wrong with a text that begins or ends like a rendered prompt. In the middle, one may just talk of it."""
    raw = isinstance(record, TextRecord)
    texts = [record.text] if isinstance(record, TextRecord) else [str(m["content"]) for m in record.messages]
    bare = [text.lstrip().removeprefix("<s>").lstrip() for text in texts]
    if texts[0].lstrip().startswith("<s>") and (
        bare[0].startswith("[INST]") or not bare[0].partition("</s>")[2].strip()
    ):
        yield 'the text begins with a written "<s>", and one is put there anyway: two bos; drop it'
    elif any(text.startswith("[INST]") for text in bare) and not (raw and tokenizer.version == "v1"):
        hint = 'give "messages"' if raw else "drop it"
        yield f'a written "[INST]": the {tokenizer.version} template puts one there by itself; {hint}'
    elif texts[-1].rstrip().endswith("</s>"):
        yield 'the text ends with a written "</s>", which is not the token that ends an answer; drop it'


def _unseen(record: Record, tokenizer: Tokenizer) -> Iterator[str]:
    """What of a conversation the template does not show, or not to all answers."""
    if not isinstance(record, ChatRecord):
        return
    if record.tools and not tokenizer.shows_tools:
        yield f"the {tokenizer.version} template shows no tools; they are left out"
    n_answers = sum(m["role"] == "assistant" and m.get("weight") != 0 for m in record.messages)
    if (
        tokenizer.version in ("v2", "v3")
        and record.messages[0]["role"] == "system"
        and not record.tools
        and n_answers > 1
    ):
        yield f"the {tokenizer.version} template shows the system text to the last of {n_answers} answers alone"


def _sample_faults(sample: Sample, tokenizer: Tokenizer) -> Iterator[str]:
    tokens, mask = sample.tokens, sample.target_mask
    if int((tokens == tokenizer.bos_id).sum()) > 1:
        yield "two bos in one sample; drop the one in the text"
    if not mask.any():
        yield "no token to train on; drop the line"
    ends = tokens[np.flatnonzero(mask & ~np.append(mask[1:], False))]
    if not mask[1:].all() and (ends != tokenizer.eos_id).any():
        yield "an answer ends without a </s> to train on: it is cut, or its end is masked"


# Duplicates


def _duplicates(data: Data) -> Iterator[Finding]:
    """A finding for each record that stands twice, equal or nearly, within a part or across: learnt, then test."""
    order = (*LEARNT, "test", "validation", "general")
    placed = [(part, record) for part in order for record in data.records[part]]
    texts = [normal_form(record) for _, record in placed]
    equal = groups_of_equal(texts)
    for first, *others in equal:
        yield from (_twice(placed[first], placed[i], "the same record as") for i in others)
    firsts = [placed[first] for first, *_ in equal]
    n_learnt = sum(part in LEARNT for part, _ in firsts)
    for a, b in near_pairs([texts[first] for first, *_ in equal], n_learnt):
        yield _twice(firsts[a], firsts[b], "nearly the same text, answers and all, as", "near ")


def _twice(first: tuple[str, Record], second: tuple[str, Record], what: str, near: str = "") -> Finding:
    (part, record), (other, again) = first, second
    if other == part or (part in LEARNT) == (other in LEARNT):
        return Finding(f"{near}duplicate", f"{again.where}: {what} {record.where}", False, other)
    remedy = "look whether it gives the answer away (--fix keeps it)" if near else "drop it here"
    leak = f"{record.where}: {what} {again.where}, which data.{other} measures on; {remedy}"
    return Finding(f"{near}leak", leak, not near, part)


# Mended, counted


def mended(data: Data) -> tuple[str, Counter[str]]:
    """JSONL of the training records without a fault, each once; and how many were left out, by kind. The same chat with
    other answers to learn is another record."""
    records = data.records["train"]
    held = {record.where for record in records}  # bad and too long ones may be left out already, and be no fault
    of_train = (finding for finding in data.findings if finding.part == "train")
    wrong = {finding.where: finding.kind for finding in of_train if finding.fault or finding.where not in held}
    equal = groups_of_equal((normal_form(record), _unlearnt(record)) for record in records)
    kept = [records[first] for first, *_ in equal if records[first].where not in wrong]
    copies = [i for _, *others in equal for i in others if records[i].where not in wrong]
    return as_jsonl(kept), Counter(wrong.values()) + Counter(duplicate=len(copies))


def _unlearnt(record: Record) -> tuple[int, ...]:
    """Which messages are not trained on."""
    messages = record.messages if isinstance(record, ChatRecord) else []
    return tuple(i for i, message in enumerate(messages) if message.get("weight") == 0)


def figures(data: Data, max_seq_len: int, seed: int = 0) -> list[tuple[str, str]]:
    """What the samples come to, each a name and a text; lengths are positions in a row. seed: of the epoch's order"""
    rows, lengths = [], [sample.length for sample in data.learnt]
    for part, samples in ((part, samples) for part, samples in data.samples.items() if samples):
        n_tokens, n_targets = sum(s.length for s in samples), sum(s.n_targets for s in samples)
        done = "trained" if part in LEARNT else "measured"
        share = f"{n_targets:,} of them {done} on ({n_targets / n_tokens:.1%})"
        rows.append((part, f"{len(samples):,} samples, {n_tokens:,} tokens, {share}"))
    shares = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    quantiles = (f"{name} {np.percentile(lengths, at, method='higher'):,}" for name, at in shares.items())
    kinds = Counter(finding.kind for finding in data.findings)
    packed = epoch_rows(lengths, max_seq_len, seed, epoch=0, mix=data.mix)
    filled = sum(lengths[i] for row in packed for i in row) / (len(packed) * max_seq_len)
    return [
        *rows,
        ("lengths", ", ".join(quantiles)),
        ("too long", f"{kinds['too long']:,} left out, {kinds['shortened']:,} shortened"),
        ("packing", f"{len(packed):,} rows of {max_seq_len:,} in an epoch, {filled:.1%} of the slots are tokens"),
    ]
