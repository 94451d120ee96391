"""Tiny trained models that ship with the package.

`lexicon` and `grammar` write English with token-level rationales; `lexicon_fr` holds the words of
the translator. ``scripts/demo_models`` in the repository makes the weights and measures them.
Importing this package is cheap; it imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from tl_contextmix.errors import InvalidInput

DemoName = Literal["causal-lm", "masked-lm", "encoder-decoder"]
DEMO_NAMES: tuple[DemoName, ...] = get_args(DemoName)


def demo_folder(name: str) -> Path:
    """Returns the folder with the weights, tokenizer and model card of a demo model.

    Args:
        name: One of `DEMO_NAMES`.

    Raises:
        InvalidInput: If there is no such demo model.
    """
    require_demo_name(name)
    return Path(__file__).parent / name.replace("-", "_")


def known_words(name: str) -> frozenset[str]:
    """Returns the words a demo model was trained to read; the rest is foreign to it.

    Args:
        name: One of `DEMO_NAMES`. The words of the encoder-decoder are those of its English side.

    Raises:
        InvalidInput: If there is no such demo model.
    """
    require_demo_name(name)
    if name == "encoder-decoder":
        from tl_contextmix.demo_models import lexicon_fr

        return lexicon_fr.known_words()
    from tl_contextmix.demo_models import lexicon

    return lexicon.known_words()


def require_demo_name(name: str) -> None:
    """Raises InvalidInput unless `name` is a demo model."""
    if name in DEMO_NAMES:
        return
    raise InvalidInput(
        "Cannot find the demo model",
        repr(name),
        f"one of {', '.join(map(repr, DEMO_NAMES))}",
        "Use one of these names; for any other model, call load_model.",
    )
