"""Checks a view against its model: whatever is computed later stands on these identities.

Two forward passes over four tokens. The first is clean. In the second every layer's first value
is zeroed and every neuron's input is replaced by a known grid, so that hooks which are only shown
and not used, and activations that are not what the config says, are seen for what they are.
"""

from tl_contextmix.adapters.verification.checks import check_rows, readout_row, require_followed
from tl_contextmix.adapters.verification.identity_report import (
    CheckRow,
    IdentityReport,
    require_identities,
)
from tl_contextmix.adapters.verification.probe import Probe, run_probe, settle_block, tolerance_of

__all__ = [
    "CheckRow",
    "IdentityReport",
    "Probe",
    "check_rows",
    "readout_row",
    "require_followed",
    "require_identities",
    "run_probe",
    "settle_block",
    "tolerance_of",
]
