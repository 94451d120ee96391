"""`as_view`: any TransformerLens model of any version, read into one shape and checked.

This package is the only place that knows hook names and class names of a host.
"""

from tl_contextmix.adapters.encoder_decoder.decoding import Generated
from tl_contextmix.adapters.encoder_decoder.model import EncoderDecoder
from tl_contextmix.adapters.verification import IdentityReport
from tl_contextmix.adapters.views import as_encoder_decoder, as_view, check

__all__ = [
    "EncoderDecoder",
    "Generated",
    "IdentityReport",
    "as_encoder_decoder",
    "as_view",
    "check",
]
