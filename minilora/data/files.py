"""A data file as rows, each an object with its place in the file.

    .jsonl .json   an object a line, or one array of objects       "file:line", in an array "file:item"
    .csv           a row for each row below the header             "file:line", the one that the row ends in
    .parquet       a row for each row; null in a struct is no key  "file:row"
    .txt           the whole file is one document of raw text      "file:1"

A name with another ending is read as .jsonl. In a .txt no line or blank line ends the document: paragraphs belong
together, and each document would get an end of its own. Many documents are many files, or JSONL of {"text"}.

A row that is damaged is there as the error that says how, so that whoever reads can go on behind it; behind a quote of
CSV that is left open nobody can.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from minilora.conversation import kind
from minilora.errors import UserError, need_library

LINE_LIMIT_BYTES = 64 << 20
WHOLE_LIMIT_BYTES = 512 << 20
BOM = b"\xef\xbb\xbf"

Row = dict[str, Any] | UserError


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """("file:line", the row or what is wrong with it) of all that are not blank.

    Raises UserError if the file cannot be read, and at the end of a file that has no row.
    """
    read: Callable[[str], Iterator[tuple[str, Row]]] = READERS.get(reader(path), _read_json)
    empty = True
    try:
        if (there := Path(path)).exists() and not (there.is_file() or there.is_dir()):  # endless, or read once only
            raise UserError("is no file; name one of JSONL, CSV, Parquet or text, and write a pipe to a file first")
        for row in read(str(path)):
            empty = False
            yield row
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or what pyarrow refuses
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{path!s:.200}: cannot be read: {reason:.200}") from None
    if empty:
        raise UserError(f"{path}: the file holds no records; give it some, or name another")


def reader(path: str | Path) -> str:
    """The ending of its name that says how a file is read, such as ".csv"; "" of those read as .jsonl."""
    return ending if (ending := Path(path).suffix.lower()) in READERS else ""


def read_lines(path: str | Path) -> Iterator[tuple[bytes, str]]:
    """(line, "file:line") of all that are not blank, without a byte order mark or the line's end.

    Of a line over the limit, one byte more than the limit is read, and the rest passed over.
    """
    number, ended = 0, True
    with open(path, "rb") as file:
        while line := file.readline(LINE_LIMIT_BYTES + 1):
            number, begins, ended = number + ended, ended, line.endswith(b"\n")
            line = line.removeprefix(BOM) if number == 1 else line
            if begins and line.strip():
                yield line.rstrip(b"\r\n"), f"{path}:{number}"


def parse_line(line: bytes) -> Row:
    """The object that a line of JSON holds, or why there is none: also for what is no JSON, such as NaN."""
    if len(line) > LINE_LIMIT_BYTES:
        return UserError("the line is over 64 MiB; is this JSONL, one object a line?")
    try:
        return _row(_parse(line))
    except UserError as error:
        return error


def _parse(text: bytes) -> Any:
    try:
        data = json.loads(_decode(text), parse_constant=_refuse_constant, object_pairs_hook=_refuse_twins)
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # an escape is the only way to half of a surrogate pair
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except UnicodeEncodeError:
        raise UserError("it holds half of a surrogate pair (\\ud800 to \\udfff); mend or drop that character") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " * (error.lineno > 1) + f"column {error.colno}"  # an array has many lines
        raise UserError(f"not JSON at {place}: {error.msg}; write one JSON object a line") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError("it holds a number of thousands of digits; shorten or drop it") from error
    except RecursionError:
        raise UserError("its JSON is nested too deeply; is this a line of data?") from None


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raise UserError where a key stands twice: Python would drop the first value without a word."""
    if len(found := dict(pairs)) < len(pairs):
        raise UserError(f"it has the key {_twin(key for key, _ in pairs)!r} twice; keep one of them")
    return found


def _twin(names: Iterable[str]) -> str | None:
    """The first name that stands there more than once."""
    return next((name for name, n in Counter(names).items() if n > 1), None)


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not JSON; write null or a number")


def _read_json(path: str) -> Iterator[tuple[str, Row]]:
    for first, (line, where) in enumerate(read_lines(path)):
        if first == 0 and line.lstrip().startswith(b"["):
            for number, item in enumerate(_parse(_read_whole(path)), 1):
                yield f"{path}:{number}", _row(item)
            return
        yield where, parse_line(line)


def _read_document(path: str) -> Iterator[tuple[str, Row]]:
    text = _decode(_read_whole(path)).replace("\r\n", "\n")
    if text.strip():
        yield f"{path}:1", {"text": text}


def _read_whole(path: str) -> bytes:
    with open(path, "rb") as file:
        content = file.read(WHOLE_LIMIT_BYTES + 1)
    if len(content) > WHOLE_LIMIT_BYTES:
        raise UserError("over 512 MiB in one piece; write JSONL, one object a line")
    return content


def _row(item: Any) -> Row:
    if isinstance(item, dict):
        return item
    return UserError(f"the line is {kind(item)}, but must be an object; write one JSON object a line")


def _read_csv(path: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(LINE_LIMIT_BYTES)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows, begins = csv.DictReader(file, strict=True), 1
        try:
            names, begins = [name.strip() for name in rows.fieldnames or ()], rows.line_num + 1
            rows.fieldnames = names
            if (twin := _twin(names)) is not None:
                raise UserError(f"its header has {twin!r} twice; give each column its own name")
            for row in rows:
                wrong = None
                if None in row or None in row.values():
                    wrong = UserError(f"it has not the {len(names)} cells of the header row; mend or drop it")
                elif re.search("[\ud800-\udfff]", "".join([*row, *row.values()])):
                    wrong = UserError("not UTF-8; save the file as UTF-8")
                yield f"{path}:{rows.line_num}", wrong or row
                begins = rows.line_num + 1
        except csv.Error as error:  # an open quote has taken what follows, so there is no going on behind it
            raise UserError(f"not CSV at line {begins}: {error}; is a quote left open?") from None


def _read_parquet(path: str) -> Iterator[tuple[str, Row]]:
    need_library("pyarrow", "parquet", "Parquet")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", {column: _without_nulls(value) for column, value in row.items()}
    except (ArrowException, ArithmeticError) as error:  # such as a date that Python has not
        raise ValueError(error) from None


def _without_nulls(value: Any) -> Any:
    """A Parquet value without its objects' nulls: in each row they have all keys that they have in any."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _decode(content: bytes) -> str:
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None


READERS = {".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_document}
