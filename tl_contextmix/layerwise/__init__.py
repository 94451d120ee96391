"""Every encoder layer through the decoder at once: the engine of the decoder lens."""

from tl_contextmix.layerwise.answers import Lens
from tl_contextmix.layerwise.given import (
    integer,
    read_references,
    read_source,
    read_tokens,
)
from tl_contextmix.layerwise.listening import Listening

__all__ = [
    "Lens",
    "Listening",
    "integer",
    "read_references",
    "read_source",
    "read_tokens",
]
