"""Verifies a view against its model, by identities that every method relies on.

Two forward passes over four tokens. The first is clean. The second zeroes every layer's first
value vector and replaces every neuron's input by a known grid, which exposes hooks whose output
is ignored and activations that differ from the config. A third one is of the Hugging Face model
that a bridge holds, without the bridge.
"""

from tl_contextmix.adapters.verification.checks import check_rows, follow, readout_row
from tl_contextmix.adapters.verification.hugging_face import hugging_face_rows
from tl_contextmix.adapters.verification.identity_report import (
    CheckRow,
    IdentityReport,
    require_identities,
)
from tl_contextmix.adapters.verification.probe import (
    Probe,
    probe_batch,
    reading_error,
    relative_error,
    run_probe,
    settle_block,
    tolerance_of,
    why_overflown,
)

__all__ = [
    "CheckRow",
    "IdentityReport",
    "Probe",
    "check_rows",
    "follow",
    "hugging_face_rows",
    "probe_batch",
    "reading_error",
    "readout_row",
    "relative_error",
    "require_identities",
    "run_probe",
    "settle_block",
    "tolerance_of",
    "why_overflown",
]
