"""Every encoder layer through the decoder at once: the engine of the decoder lens."""

from tl_contextmix.methods.decoder_lens.answers import Lens
from tl_contextmix.methods.decoder_lens.layerwise_decoder import Listening
from tl_contextmix.methods.decoder_lens.references import (
    read_references,
    read_source,
    read_tokens,
)

__all__ = [
    "Lens",
    "Listening",
    "read_references",
    "read_source",
    "read_tokens",
]
