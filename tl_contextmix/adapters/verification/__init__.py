"""Verifies a view against its model, by identities that every method relies on.

One forward pass over two rows of four tokens. The first row is clean. In the second every layer's
first value vector is zeroed and every neuron's input replaced by a known grid, which exposes hooks
whose output is ignored and activations that differ from the config. Another pass is of the Hugging
Face model that a bridge holds, without the bridge.
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
    "readout_row",
    "relative_error",
    "require_identities",
    "run_probe",
    "settle_block",
    "tolerance_of",
    "why_overflown",
]
