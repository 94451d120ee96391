"""What makes two runs the same: model, tokenizer, options; and the documents, by their hashes."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tl_contextmix.adapters.inputs import package_version
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, bad
from tl_contextmix.methods.memories.corpus_formats import Corpus
from tl_contextmix.methods.memories.miner import Miner

# Cases, accents, widths, white space: what tokenizers with one vocabulary treat differently.
_PROBE = "The cat sat, didn't it?\n  3.14 na\u00efve nai\u0308ve \uff21 \u65e5\u672c \U0001f642"


def describe_run(miner: Miner, corpus: Corpus, source: str | None = None) -> dict[str, Any]:
    """Returns what the result depends on, besides the documents: plain JSON."""
    view = miner.view
    return {
        "model": view.name,
        "weights": view.fingerprint,
        "processing": list(view.processing),
        "host": view.host,
        "TransformerLens": view.host_version,
        "tl_contextmix": package_version(),
        "torch": torch.__version__,
        "dtype": str(view.dtype),
        "hooks": list(view.hooked()),
        "tokenizer": tokenizer_hash(view, miner.how.prepend_bos),
        "corpus": {"kind": corpus.kind, "column": corpus.column},
        "source": {"model": source, "corpus": corpus.name},
        "options": {
            "k": miner.k,
            "layers": [block.layer for block in miner.blocks],
            "neurons": {str(block.layer): miner.chosen(block) for block in miner.blocks},
            "stack": miner.stack,
            "unit": miner.unit,
            "tails": miner.tails,
            "duplicates": miner.duplicates,
            **asdict(miner.how),
        },
    }


def tokenizer_hash(view: ModelView, prepend_bos: bool | None) -> str:
    """Returns a hash of the vocabulary, and of what becomes of a text."""
    found = hashlib.sha256()
    for token in range(view.d_vocab):
        found.update(view.to_string(token).encode("utf-8", "surrogatepass") + b"\0")
    found.update(repr(view.encode(_PROBE, prepend_bos)).encode())
    return found.hexdigest()


def require_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises InvalidInput, naming the first difference, unless two runs are the same."""
    # Where things came from may have another name by now; what they are is told by hashes.
    for name in [name for name in now if name != "source"]:
        old, new = before.get(name), now[name]
        if isinstance(new, dict) and isinstance(old, dict):
            changed = [key for key in new if old.get(key) != new[key]]
            if changed:
                name, old, new = f"{name}: {changed[0]}", old.get(changed[0]), new[changed[0]]
        if old != new:
            raise bad(
                f"{folder} holds a run that differs in {name}",
                repr(new)[:200],
                repr(old)[:200],
                "Give what was given then, or choose another folder.",
            )


def as_far_as(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns a run that was stopped, with what has made no difference to it yet as it is now.

    Where documents of some kind are an error, none has been met so far: whoever was stopped by the
    first one may leave such documents out and go on.
    """
    options = dict(before["options"])
    for name in ("malformed", "too_long"):
        if options.get(name) == "error":
            options[name] = now["options"][name]
    return {**before, "options": options}


def changed(corpus: Corpus, seen: str) -> InvalidInput:
    """Returns the error for a corpus that is another one than before."""
    return bad(
        f"the corpus {corpus.name} is not the one that was mined before",
        seen,
        "the same documents",
        "Give the corpus of then, or choose another folder.",
    )
