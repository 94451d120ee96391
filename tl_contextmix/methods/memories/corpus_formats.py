"""Documents or rows of a corpus, numbered from 0, whatever holds them.

A document that cannot be used keeps its number: it is yielded with the reason, and the reader
decides what becomes of it.

Files are read here and not by ``datasets.load_dataset``: its JSON reader fails on a whole block
where one line is malformed, and it copies a corpus into a cache before the first document.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tl_contextmix.errors import InvalidInput

Kind = Literal["text", "jsonl", "array", "csv", "parquet", "dataset", "table", "iterable"]
FILE_KINDS: tuple[Kind, ...] = ("text", "jsonl", "array", "csv", "parquet")
"""The kinds that are files."""
_SUFFIXES: dict[str, Kind] = dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl")
_SUFFIXES |= {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
# Read line by line these would be documents, none of them anybody's text.
_NO_TEXT = frozenset((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".xlsx", ".arrow", ".feather"))
_FILES = "the path of a text, jsonl, JSON, CSV or parquet file"
_BOM = b"\xef\xbb\xbf"
_ROWS, _PEEK = 1024, 2**20
_LONGEST = 2**31 - 1
_END = re.compile(r"\s*[,\]]")
_ESCAPED = ("utf-8", "surrogateescape")
TOKEN_BITS = 31
"""Token ids are below 2 ** 31."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text, or a row as JSON; None where it is token ids or cannot be read.
        problem: Why it cannot be read; empty where it can.
        size: How much of the corpus it is, in the unit of `Corpus.size`.
        ids: Its token ids, if it was tokenized before.
        remedy: What could be done about the problem, where that is known.
    """

    text: str | None
    problem: str = ""
    size: int = 1
    ids: tuple[int, ...] | None = None
    remedy: str = ""

    def data(self) -> bytes:
        """Returns what it is hashed from."""
        if self.ids is not None:
            return f"{len(self.ids)} ids\n".encode() + array("q", self.ids).tobytes()
        text = (self.text or "").encode("utf-8")
        return f"{len(text)} {self.problem}\n".encode() + text

    def hash(self) -> int:
        """Returns 64 bits that tell it from other documents, as a signed integer."""
        return int.from_bytes(hashlib.sha256(self.data()).digest()[:8], "big", signed=True)


@dataclass(frozen=True)
class Corpus:
    """Where documents come from.

    Attributes:
        kind: What holds them.
        name: The file, or a description.
        column: Which column of it; None where there are none.
        held: The path, dataset, table or iterable.
        rows: Whether a document is a whole row rather than one column of it.
    """

    kind: Kind
    name: str
    column: str | None
    held: Any
    rows: bool = False

    def documents(self) -> Iterator[Document]:
        """Yields the documents.

        Raises:
            InvalidInput: If the corpus cannot be read.
        """
        with _named(self.name):
            yield from _READERS[self.kind](self)

    def size(self) -> int | None:
        """Returns how much there is: bytes of lines, else documents; None where it is unknown."""
        with _named(self.name):
            if self.kind in ("text", "jsonl", "array", "csv"):
                return self.held.stat().st_size
            if self.kind == "parquet":
                with _opened_parquet(self) as file:
                    return file.metadata.num_rows
        return len(self.held) if hasattr(self.held, "__len__") else None

    def pick(self, numbers: Iterable[int], spare: Iterable[int] = ()) -> dict[int, Document]:
        """Returns some documents; no others are decoded.

        Args:
            numbers: Those that must be there and readable.
            spare: Those that may be missing.
        """
        needed = set(numbers)
        wanted = sorted(needed.union(spare))
        with _named(self.name):
            picked = _picked(self, wanted) if wanted else ()
            result = {number: document for number, document in picked if not document.problem}
        missing = [number for number in sorted(needed) if number not in result]
        if missing:
            raise InvalidInput(
                f"{self.name} no longer has a document",
                f"no document {missing[0]}",
                "the corpus that was mined",
                "Pass the corpus again; an iterator can be read only once.",
            )
        return result


def open_corpus(
    corpus: Any, column: str | None = None, *, default: str | None = None, rows: bool = False
) -> Corpus:
    """Opens a corpus, detecting its format.

    Args:
        corpus: The path of a text file (a document per line), of a jsonl, JSON (one array), CSV,
            TSV or parquet file; a Hugging Face dataset, map-style or streaming; a pandas or Arrow
            table; or an iterable. A document is a text, or a list of token ids.
        column: Column of a file, dataset or table; None for the default.
        default: Its column where none is named; None for ``"text"``.
        rows: Whether whole rows are read, each as a JSON object.
    """
    if column is not None and not isinstance(column, str):
        raise _no_corpus(f"column={column!r}", "the name of a column", "Pass it as a str.")
    if isinstance(corpus, Corpus):
        return corpus
    if rows:
        result = replace(_open(corpus, None, ""), rows=True)
        if result.kind == "text":
            expected = "the path of a jsonl, JSON, CSV, TSV or parquet file"
            raise _no_corpus(f"{result.name}, a text", expected, "Give the file its suffix.")
        return result
    result = _open(corpus, column, default or "text")
    if result.kind == "table":
        _require_column(result, getattr(corpus, "column_names", corpus.columns))
    return result


def _open(corpus: Any, column: str | None, default: str) -> Corpus:
    if isinstance(corpus, (str, Path)):
        return _open_file(corpus, column, default)
    kind = type(corpus).__name__
    if isinstance(corpus, Mapping):
        remedy = f"Pass one of its parts: {list(corpus)[:5]}."
        raise _no_corpus(f"a {kind}", "one sequence of documents", remedy)
    if hasattr(corpus, "column_names") and hasattr(corpus, "features"):
        return Corpus("dataset", f"a {kind}", column or default, corpus)
    if hasattr(corpus, "columns"):
        return Corpus("table", f"a {kind}", column or default, corpus)
    if isinstance(corpus, Set) and not hasattr(corpus, "mapping"):
        remedy = "Pass sorted(corpus): documents are numbered, and sets have no order."
        raise _no_corpus(f"a {kind}", "documents in an order", remedy)
    # An array without axes has an iterator that fails.
    axes = getattr(corpus, "ndim", 1)
    if isinstance(corpus, Iterable) and not isinstance(corpus, bytes) and axes:
        _require_no_column(column, f"a {kind}")
        return Corpus("iterable", f"a {kind}", None, corpus)
    expected = f"{_FILES}, a dataset, a table, or an iterable"
    raise _no_corpus(f"a {kind}", expected, "Pass a list of texts or a path.")


def _open_file(given: str | Path, column: str | None, default: str) -> Corpus:
    path, seen = Path(given), str(given)[:200]
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a text instead of a path
        there = False
    if not there:
        remedy = "Check the path; pass texts themselves as a list."
        raise _no_corpus(f"{seen}, which is no file", _FILES, remedy)
    suffix = path.suffix.lower()
    if suffix in _NO_TEXT:
        remedy = "Unpack it, or load it with datasets.load_dataset and pass that."
        raise _no_corpus(f"{seen}, a {suffix} file", _FILES, remedy)
    kind = _SUFFIXES.get(suffix, "text")
    if kind == "text":
        _require_no_column(column, str(path))
        return Corpus("text", str(path), None, path)
    if kind == "jsonl" and _is_array(path):
        kind = "array"
    return Corpus(kind, str(path), column or default, path)


def _is_array(path: Path) -> bool:
    """Whether a file is one JSON array of objects, not a document per line."""
    with _named(str(path)), open(path, "rb") as file:
        first = file.read(_PEEK).removeprefix(_BOM).strip().partition(b"\n")[0]
    if not first.startswith(b"["):
        return False
    try:
        rows = json.loads(first)
    except (ValueError, RecursionError):  # it goes on in the next line
        return True
    return not rows or isinstance(rows[0], dict)


def _no_corpus(seen: str, expected: str, remedy: str) -> InvalidInput:
    return InvalidInput("the corpus cannot be read", seen, expected, remedy)


def _require_no_column(column: str | None, name: str) -> None:
    if column is not None:
        raise InvalidInput(
            "this corpus has no columns",
            f"column={column!r} of {name}",
            "None for text files and iterables",
            "Leave `column` out.",
        )


def _require_column(corpus: Corpus, names: Iterable[Any]) -> None:
    if corpus.column not in (known := list(names)):
        raise InvalidInput(
            f"there is no such column in {corpus.name}",
            repr(corpus.column),
            f"one of {known}",
            "Name it with column=.",
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Raises InvalidInput, naming the corpus, where a file cannot be read."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException, csv.Error) as error:
        raise InvalidInput(
            f"the corpus {name} cannot be read",
            str(error),
            "a readable file",
            "Check the file; the same command goes on where it stopped.",
        ) from error


def _raw_lines(corpus: Corpus) -> Iterator[bytes]:
    # Bytes: a line that is not UTF-8 is a document with a problem, not the end of the file.
    with open(corpus.held, "rb") as file:
        for number, line in enumerate(file):
            yield line.removeprefix(_BOM) if number == 0 else line


def _decoded(corpus: Corpus, line: bytes) -> Document:
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return Document(None, f"no UTF-8 ({error.reason} at byte {error.start})", len(line))
    if corpus.kind == "text" or not text.strip():
        return Document(text, size=len(line))
    try:
        found = _document(json.loads(text), corpus)
    except (ValueError, RecursionError) as error:
        found = Document(None, f"no JSON ({error})"[:200])
    return replace(found, size=len(line))


def _lines(corpus: Corpus) -> Iterator[Document]:
    return (_decoded(corpus, line) for line in _raw_lines(corpus))


def _array(corpus: Corpus) -> Iterator[Document]:
    """Yields the entries of a JSON array, without the whole of it in memory."""
    decoder, number = json.JSONDecoder(), 0
    with open(corpus.held, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(_PEEK)
        at = text.index("[") + 1
        while not text.startswith("]", at := _past(text, at)):
            found, end = None, at
            with suppress(ValueError, RecursionError):
                found, end = decoder.raw_decode(text, at)
            # Without what follows, a number may go on in the next block.
            if end > at and _END.match(text, end):
                size = len(text[at:end].encode(*_ESCAPED))
                yield replace(_document(found, corpus), size=size)
                at, number = end, number + 1
            elif block := file.read(_PEEK):
                text, at = text[at:] + block, 0
            else:
                raise InvalidInput(
                    f"the corpus {corpus.name} cannot be read",
                    f"{text[at : at + 40]!r}, entry {number}",
                    "a JSON array",
                    "Fix the file.",
                )


def _past(text: str, at: int) -> int:
    """Returns the place after white space and commas."""
    while text[at : at + 1] and text[at] in ", \t\r\n":
        at += 1
    return at


def _csv(corpus: Corpus) -> Iterator[Document]:
    sizes: list[int] = []
    # The limit is 128 KiB for the whole process; documents may be longer.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    with open(corpus.held, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:

        def lines() -> Iterator[str]:
            for line in file:
                sizes.append(len(line.encode(*_ESCAPED)))
                yield line

        tabs = corpus.held.suffix.lower() == ".tsv"
        rows = csv.DictReader(lines(), dialect="excel-tab" if tabs else "excel", strict=True)
        if not corpus.rows:
            _require_column(corpus, rows.fieldnames or ())
        for row in rows:
            found = _document(row, corpus)
            if None in row or None in row.values():
                cells = [cell for name, cell in row.items() if name is not None]
                count = len(cells) - cells.count(None) + len(row.get(None) or ())
                found = Document(
                    None, f"a row of {count} for the columns {list(rows.fieldnames or ())}"
                )
            yield replace(found, size=sum(sizes))
            sizes.clear()


@contextmanager
def _opened_parquet(corpus: Corpus) -> Iterator[Any]:
    """Yields a parquet file that has the column."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(corpus.held) as file:
        if not corpus.rows:
            _require_column(corpus, file.schema_arrow.names)
        yield file


def _parquet(corpus: Corpus) -> Iterator[Document]:
    with _opened_parquet(corpus) as file:
        for batch in file.iter_batches(_ROWS, columns=None if corpus.rows else [corpus.column]):
            if corpus.rows:
                yield from map(_row, batch.to_pylist())
            else:
                yield from map(_checked, batch.column(0).to_pylist())


def _dataset(corpus: Corpus) -> Iterator[Document]:
    if not corpus.rows:  # a streaming one may not know its columns
        _require_column(corpus, corpus.held.column_names or [corpus.column])
    for row in corpus.held:
        yield _document(row, corpus)


def _values(corpus: Corpus) -> Iterator[Document]:
    held = corpus.held
    if not corpus.rows:
        return map(_checked, held if corpus.column is None else held[corpus.column])
    if corpus.kind == "iterable":
        return map(_row, held)
    names = list(getattr(held, "column_names", held.columns))
    columns = zip(*map(held.__getitem__, names), strict=True)
    return (_row(dict(zip(names, row, strict=True))) for row in columns)


def _picked(corpus: Corpus, wanted: list[int]) -> Iterator[tuple[int, Document]]:
    """Yields the documents with some numbers, in order, reading no more than it has to."""
    if corpus.kind == "parquet":
        yield from _picked_rows(corpus, wanted)
    elif corpus.kind == "dataset" and hasattr(corpus.held, "__len__"):
        _require_column(corpus, corpus.held.column_names)
        there = range(len(corpus.held))
        yield from ((n, _document(corpus.held[n], corpus)) for n in wanted if n in there)
    else:
        keep, by_line = set(wanted), corpus.kind in ("text", "jsonl")
        each: Iterator[Any] = _raw_lines(corpus) if by_line else _READERS[corpus.kind](corpus)
        for number, one in enumerate(each):
            if number in keep:
                yield number, _decoded(corpus, one) if by_line else one
            if number >= wanted[-1]:
                return


def _picked_rows(corpus: Corpus, wanted: list[int]) -> Iterator[tuple[int, Document]]:
    with _opened_parquet(corpus) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = range(first, first + file.metadata.row_group(group).num_rows)
            first = rows.stop
            if some := [number for number in wanted if number in rows]:
                column = file.read_row_group(group, columns=[corpus.column]).column(0)
                yield from ((n, _checked(column[n - rows.start])) for n in some)


def _document(row: Any, corpus: Corpus) -> Document:
    if corpus.rows:
        return _row(row)
    column = corpus.column
    if not isinstance(row, dict):
        return Document(None, f"a {type(row).__name__}, no object with columns")
    if column not in row:
        remedy = f"It has {list(row)[:20]}: name one with column=."
        return Document(None, f"no column {column!r}", remedy=remedy)
    return _checked(row[column])


def _row(row: Any) -> Document:
    """Returns a whole row, as JSON."""
    try:
        return Document(json.dumps(row, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        return Document(None, f"a {type(row).__name__}, which is no JSON ({error})"[:200])


def _plain(value: Any) -> Any:
    """Returns what JSON has no word for in the words it has."""
    if isinstance(value, Set):
        return sorted(value, key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    for name in ("as_py", "tolist"):  # scalars of Arrow; of NumPy and PyTorch
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"a {type(value).__name__} in it")


def _checked(value: Any) -> Document:
    value = value.as_py() if hasattr(value, "as_py") else value  # a scalar of Arrow
    kind = type(value).__name__
    value = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if isinstance(value, (list, tuple)) and all(type(one) is int for one in value):
        if not all(0 <= one < 1 << TOKEN_BITS for one in value):
            return Document(None, f"a {kind}, no token ids")
        return Document(None, ids=tuple(value))
    if not isinstance(value, str):
        return Document(None, f"a {kind}, no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can hold it
        return Document(None, f"no Unicode text ({error.reason} at character {error.start})")
    return Document(value)


_READERS = {
    "text": _lines,
    "jsonl": _lines,
    "array": _array,
    "csv": _csv,
    "parquet": _parquet,
    "dataset": _dataset,
    "table": _values,
    "iterable": _values,
}
