"""Documents of a corpus, numbered from 0, whatever holds them.

A document that cannot be used keeps its number: it is yielded with the reason, and what becomes of
it is up to who reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tl_contextmix.errors import InvalidInput, four_parts

Kind = Literal["text", "jsonl", "parquet", "dataset", "iterable"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text, or None where it cannot be read.
        problem: Why; empty where it can.
    """

    text: str | None
    problem: str = ""


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

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yields the documents from a number on.

        Raises:
            InvalidInput: If the corpus cannot be read.
        """
        try:
            yield from _READERS[self.kind](self, start)
        except OSError as error:
            raise _unreadable(self.name, str(error)) from error

    def pick(self, numbers: Iterable[int], spare: Iterable[int] = ()) -> dict[int, str]:
        """Returns the texts of some documents.

        Args:
            numbers: Those that must be there.
            spare: Those that are welcome, if they can be read.

        Raises:
            InvalidInput: If there is no such document, or the corpus can be read only once.
        """
        needed = set(numbers)
        wanted = sorted(needed.union(spare))
        found: dict[int, str] = {}
        # A streaming dataset has items too, but no length.
        if self.kind == "dataset" and hasattr(self.held, "__len__"):
            reader = ((n, _document(self.held[n], self.column)) for n in wanted)
        else:
            last = wanted[-1] if wanted else -1
            reader = enumerate(islice(self.documents(), last + 1))
        keep = set(wanted)
        for number, document in reader:
            if number in keep and document.text is not None:
                found[number] = document.text
        missing = [number for number in sorted(needed) if number not in found]
        if missing:
            raise InvalidInput(
                four_parts(
                    f"documents of {self.name} are not there any more",
                    f"no document {missing[0]}",
                    "the corpus that was mined",
                    "Give the corpus again; an iterator can be read only once.",
                )
            )
        return found


def open_corpus(corpus: object, column: str | None = None) -> Corpus:
    """Returns a corpus, told from what it is.

    Args:
        corpus: The path of a text file (a document per line), of a jsonl or a parquet file; a
            Hugging Face dataset, map-style or streaming; or an iterable of texts.
        column: Column of a jsonl file, parquet file or dataset; None for ``"text"``.

    Raises:
        InvalidInput: If it is none of these.
    """
    if isinstance(corpus, Corpus):
        return corpus
    if isinstance(corpus, (str, Path)):
        return _open_file(Path(corpus), column)
    if hasattr(corpus, "column_names") and hasattr(corpus, "__iter__"):
        return Corpus("dataset", f"a {type(corpus).__name__}", column or "text", corpus)
    if isinstance(corpus, Iterable) and not isinstance(corpus, (bytes, dict)):
        _require_no_column(column, f"a {type(corpus).__name__}")
        return Corpus("iterable", f"a {type(corpus).__name__}", None, corpus)
    raise InvalidInput(
        four_parts(
            "the corpus cannot be read",
            f"a {type(corpus).__name__}",
            "the path of a text, jsonl or parquet file, a dataset, or an iterable of texts",
            "Give a list of texts or a path.",
        )
    )


def _open_file(path: Path, column: str | None) -> Corpus:
    if not path.is_file():
        raise InvalidInput(
            four_parts(
                "the corpus cannot be read",
                f"{path}, which is no file",
                "the path of a text, jsonl or parquet file",
                "Check the path; give texts themselves as a list.",
            )
        )
    kind = _SUFFIXES.get(path.suffix.lower(), "text")
    if kind == "text":
        _require_no_column(column, str(path))
        return Corpus("text", str(path), None, path)
    return Corpus(kind, str(path), column or "text", path)


def _require_no_column(column: str | None, name: str) -> None:
    if column is not None:
        raise InvalidInput(
            four_parts(
                "a corpus without columns was asked for one",
                f"column={column!r} of {name}",
                "None for text files and iterables",
                "Leave `column` out.",
            )
        )


def _lines(corpus: Corpus, start: int) -> Iterator[Document]:
    # Bytes: a line that is not UTF-8 is a document with a problem, not the end of the file.
    with open(corpus.held, "rb") as file:
        for line in islice(file, start, None):
            try:
                yield Document(line.rstrip(b"\r\n").decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Document(None, f"no UTF-8 ({error.reason} at byte {error.start})")


def _objects(corpus: Corpus, start: int) -> Iterator[Document]:
    for line in _lines(corpus, start):
        if line.text is None or not line.text.strip():
            yield line
            continue
        try:
            found = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            yield Document(None, f"no JSON ({error})"[:200])
            continue
        yield _document(found, corpus.column)


def _parquet(corpus: Corpus, start: int) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(corpus.held) as file:
            if corpus.column not in file.schema_arrow.names:
                raise _no_column(corpus, file.schema_arrow.names)
            groups, skipped = _from_row(file.metadata, start)
            rows = file.iter_batches(_ROWS, row_groups=groups, columns=[corpus.column])
            listed = (value for batch in rows for value in batch.column(0).to_pylist())
            for value in islice(listed, skipped, None):
                yield _checked(value)
    except pyarrow.ArrowInvalid as error:
        raise _unreadable(corpus.name, str(error)) from error


def _from_row(metadata: Any, start: int) -> tuple[list[int], int]:
    """Returns the row groups from a row on, and how many rows of the first to skip."""
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if start < count:
            return list(range(group, metadata.num_row_groups)), start
        start -= count
    return [], 0


def _dataset(corpus: Corpus, start: int) -> Iterator[Document]:
    names = corpus.held.column_names
    if names is not None and corpus.column not in names:
        raise _no_column(corpus, list(names))
    if hasattr(corpus.held, "__len__"):
        for number in range(start, len(corpus.held)):
            yield _document(corpus.held[number], corpus.column)
        return
    for row in corpus.held.skip(start) if start else corpus.held:
        yield _document(row, corpus.column)


def _iterable(corpus: Corpus, start: int) -> Iterator[Document]:
    for text in islice(corpus.held, start, None):
        yield _checked(text)


def _document(row: Any, column: str | None) -> Document:
    if not isinstance(row, dict):
        return Document(None, f"a {type(row).__name__}, no object with columns")
    if column not in row:
        return Document(None, f"no column {column!r}")
    return _checked(row[column])


def _checked(text: Any) -> Document:
    if isinstance(text, str):
        return Document(text)
    return Document(None, f"a {type(text).__name__}, no text")


def _unreadable(name: str, seen: str) -> InvalidInput:
    return InvalidInput(
        four_parts(
            f"the corpus {name} cannot be read",
            seen,
            "a file that can be read",
            "Check the file; the same command goes on where it stopped.",
        )
    )


def _no_column(corpus: Corpus, names: list[str]) -> InvalidInput:
    return InvalidInput(
        four_parts(
            f"there is no such column in {corpus.name}",
            repr(corpus.column),
            f"one of {names}",
            "Name it with `column`.",
        )
    )


_READERS = {
    "text": _lines,
    "jsonl": _objects,
    "parquet": _parquet,
    "dataset": _dataset,
    "iterable": _iterable,
}
