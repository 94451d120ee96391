"""From what a user passes to what a model runs: text, tokens, masks and caches, all checked."""

from tl_contextmix.adapters.inputs.activation_cache import Cache, names_read
from tl_contextmix.adapters.inputs.tokens import (
    Given,
    Ids,
    Input,
    Inputs,
    PaddingSide,
    Text,
    TokenInputs,
    label,
    make_batch,
    pad_rows,
    read_batch,
    word_table,
)
from tl_contextmix.adapters.tokenizers import Labels, name_tokens

__all__ = [
    "Cache",
    "Given",
    "Ids",
    "Input",
    "Inputs",
    "Labels",
    "PaddingSide",
    "Text",
    "TokenInputs",
    "label",
    "make_batch",
    "name_tokens",
    "names_read",
    "pad_rows",
    "read_batch",
    "word_table",
]
