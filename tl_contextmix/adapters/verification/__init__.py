"""Verifies a view against its model, by identities that every method relies on.

Two forward passes over four tokens. The first is clean. The second zeroes every layer's first
value vector and replaces every neuron's input by a known grid, which exposes hooks whose output
is ignored and activations that differ from the config.
"""

from tl_contextmix.adapters.verification.checks import check_rows, follow, readout_row
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
    "probe_batch",
    "readout_row",
    "relative_error",
    "require_identities",
    "run_probe",
    "settle_block",
    "tolerance_of",
    "why_overflown",
]
