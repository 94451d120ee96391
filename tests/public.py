"""Every public function, at the top level or where it belongs, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tl_contextmix as cm
from tl_contextmix.evaluation import (
    agreement,
    cue_alignment,
    demo_pairs,
    hook_names,
    load_minimal_pairs,
)
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.methods.flow_knockout import flow_knockout
from tl_contextmix.methods.memories import merge_triggers, mine_on_ray

_ELSEWHERE = (
    *(agreement, cue_alignment, demo_pairs, load_minimal_pairs),
    *(decompx_vectors, flow_knockout, hook_names, merge_triggers, mine_on_ray),
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(cm, name) for name in cm.__all__ if inspect.isfunction(getattr(cm, name))
} | {function.__name__: function for function in _ELSEWHERE}
