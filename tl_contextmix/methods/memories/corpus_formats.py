"""Documents of a corpus, numbered from 0, whatever holds them.

A document that cannot be used keeps its number: it is yielded with the reason, and what becomes of
it is up to who reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tl_contextmix.errors import InvalidInput, bad

Kind = Literal["text", "jsonl", "parquet", "dataset", "iterable"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
# Read line by line these would be documents, none of them anybody's text.
_NO_TEXT = frozenset(
    (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".csv", ".tsv", ".xlsx", ".arrow", ".feather")
)
_BOM = b"\xef\xbb\xbf"
_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text, or None where it cannot be read.
        problem: Why; empty where it can.
        size: How much of the corpus it is, in the unit of `Corpus.size`.
    """

    text: str | None
    problem: str = ""
    size: int = 1


@dataclass(frozen=True)
class Corpus:
    """Where documents come from.

    Attributes:
        kind: What holds them.
        name: The file, or a description.
        column: Which column of it; None where there are none.
        held: The path, dataset or iterable.
    """

    kind: Kind
    name: str
    column: str | None
    held: Any

    def documents(self) -> Iterator[Document]:
        """Yields the documents.

        Raises:
            InvalidInput: If the corpus cannot be read.
        """
        try:
            yield from _READERS[self.kind](self)
        except OSError as error:
            raise _unreadable(self.name, str(error)) from error

    def size(self) -> int | None:
        """Returns how much there is: bytes of lines, else documents; None where nobody knows."""
        try:
            if self.kind in ("text", "jsonl"):
                return self.held.stat().st_size
            if self.kind == "parquet":
                with _opened_parquet(self) as file:
                    return file.metadata.num_rows
        except OSError as error:
            raise _unreadable(self.name, str(error)) from error
        return len(self.held) if hasattr(self.held, "__len__") else None

    def pick(self, numbers: Iterable[int], spare: Iterable[int] = ()) -> dict[int, str]:
        """Returns the texts of some documents; none but these are decoded.

        Args:
            numbers: Those that must be there.
            spare: Those that are welcome, if they can be read.

        Raises:
            InvalidInput: If there is no such document, or the corpus can be read only once.
        """
        needed = set(numbers)
        wanted = sorted(needed.union(spare))
        try:
            picked = _picked(self, wanted) if wanted else ()
            found = {n: d.text for n, d in picked if d.text is not None}
        except OSError as error:
            raise _unreadable(self.name, str(error)) from error
        missing = [number for number in sorted(needed) if number not in found]
        if missing:
            raise bad(
                f"documents of {self.name} are not there any more",
                f"no document {missing[0]}",
                "the corpus that was mined",
                "Give the corpus again; an iterator can be read only once.",
            )
        return found


def open_corpus(corpus: object, column: str | None = None, *, default: str | None = None) -> Corpus:
    """Returns a corpus, told from what it is.

    Args:
        corpus: The path of a text file (a document per line), of a jsonl or a parquet file; a
            Hugging Face dataset, map-style or streaming; or an iterable of texts.
        column: Column of a jsonl file, parquet file or dataset; None for the default.
        default: Its column where none is named; None for ``"text"``.

    Raises:
        InvalidInput: If it is none of these.
    """
    default = default or "text"
    if column is not None and not isinstance(column, str):
        raise _no_corpus(f"column={column!r}", "the name of a column", "Give it as a str.")
    if isinstance(corpus, Corpus):
        return corpus
    if isinstance(corpus, (str, Path)):
        return _open_file(corpus, column, default)
    kind = type(corpus).__name__
    if isinstance(corpus, Mapping):
        remedy = f"Give one of its parts: {list(corpus)[:5]}."
        raise _no_corpus(f"a {kind}", "one sequence of documents", remedy)
    if hasattr(corpus, "column_names") and hasattr(corpus, "features"):
        return Corpus("dataset", f"a {kind}", column or default, corpus)
    if hasattr(corpus, "columns"):
        # Iterated over, a table yields the names of its columns.
        remedy = f"Give the column: table[{column or default!r}]."
        raise _no_corpus(f"a {kind}, a table", "an iterable of texts", remedy)
    if isinstance(corpus, Set) and not hasattr(corpus, "mapping"):
        remedy = "Give sorted(corpus): documents are numbered, and sets have no order."
        raise _no_corpus(f"a {kind}", "documents in an order", remedy)
    if isinstance(corpus, Iterable) and not isinstance(corpus, bytes):
        _require_no_column(column, f"a {kind}")
        return Corpus("iterable", f"a {kind}", None, corpus)
    expected = "the path of a text, jsonl or parquet file, a dataset, or an iterable of texts"
    raise _no_corpus(f"a {kind}", expected, "Give a list of texts or a path.")


def _open_file(given: str | Path, column: str | None, default: str) -> Corpus:
    path, seen = Path(given), str(given)[:200]
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a text instead of a path
        there = False
    expected = "the path of a text, jsonl or parquet file"
    if not there:
        remedy = "Check the path; give texts themselves as a list."
        raise _no_corpus(f"{seen}, which is no file", expected, remedy)
    suffix = path.suffix.lower()
    if suffix in _NO_TEXT:
        remedy = "Unpack it, or load it with datasets.load_dataset and give that."
        raise _no_corpus(f"{seen}, a {suffix} file", expected, remedy)
    kind = _SUFFIXES.get(suffix, "text")
    if kind == "text":
        _require_no_column(column, str(path))
        return Corpus("text", str(path), None, path)
    return Corpus(kind, str(path), column or default, path)


def _no_corpus(seen: str, expected: str, remedy: str) -> InvalidInput:
    return bad("the corpus cannot be read", seen, expected, remedy)


def _require_no_column(column: str | None, name: str) -> None:
    if column is not None:
        raise bad(
            "a corpus without columns was asked for one",
            f"column={column!r} of {name}",
            "None for text files and iterables",
            "Leave `column` out.",
        )


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
        found = _document(json.loads(text), corpus.column)
    except (ValueError, RecursionError) as error:
        found = Document(None, f"no JSON ({error})"[:200])
    return replace(found, size=len(line))


def _lines(corpus: Corpus) -> Iterator[Document]:
    return (_decoded(corpus, line) for line in _raw_lines(corpus))


@contextmanager
def _opened_parquet(corpus: Corpus) -> Iterator[Any]:
    """Yields a parquet file that has the column."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(corpus.held) as file:
            if corpus.column not in file.schema_arrow.names:
                raise _no_column(corpus, file.schema_arrow.names)
            yield file
    except pyarrow.ArrowException as error:
        raise _unreadable(corpus.name, str(error)) from error


def _parquet(corpus: Corpus) -> Iterator[Document]:
    with _opened_parquet(corpus) as file:
        for batch in file.iter_batches(_ROWS, columns=[corpus.column]):
            yield from map(_checked, batch.column(0).to_pylist())


def _dataset(corpus: Corpus) -> Iterator[Document]:
    _require_column(corpus)
    for row in corpus.held:
        yield _document(row, corpus.column)


def _require_column(corpus: Corpus) -> None:
    names = corpus.held.column_names
    if names is not None and corpus.column not in names:
        raise _no_column(corpus, list(names))


def _iterable(corpus: Corpus) -> Iterator[Document]:
    return map(_checked, corpus.held)


def _picked(corpus: Corpus, wanted: list[int]) -> Iterator[tuple[int, Document]]:
    """Yields the documents with some numbers, in order, reading no more than it has to."""
    if corpus.kind == "parquet":
        yield from _picked_rows(corpus, wanted)
    elif corpus.kind == "dataset" and hasattr(corpus.held, "__len__"):
        _require_column(corpus)
        there = range(len(corpus.held))
        yield from ((n, _document(corpus.held[n], corpus.column)) for n in wanted if n in there)
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
                yield from ((n, _checked(column[n - rows.start].as_py())) for n in some)


def _document(row: Any, column: str | None) -> Document:
    if not isinstance(row, dict):
        return Document(None, f"a {type(row).__name__}, no object with columns")
    if column not in row:
        return Document(None, f"no column {column!r}")
    return _checked(row[column])


def _checked(text: Any) -> Document:
    if not isinstance(text, str):
        return Document(None, f"a {type(text).__name__}, no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can hold it
        return Document(None, f"no Unicode text ({error.reason} at character {error.start})")
    return Document(text)


def _unreadable(name: str, seen: str) -> InvalidInput:
    return bad(
        f"the corpus {name} cannot be read",
        seen,
        "a file that can be read",
        "Check the file; the same command goes on where it stopped.",
    )


def _no_column(corpus: Corpus, names: list[str]) -> InvalidInput:
    return bad(
        f"there is no such column in {corpus.name}",
        repr(corpus.column),
        f"one of {names}",
        "Name it with `column`.",
    )


_READERS = {
    "text": _lines,
    "jsonl": _lines,
    "parquet": _parquet,
    "dataset": _dataset,
    "iterable": _iterable,
}
