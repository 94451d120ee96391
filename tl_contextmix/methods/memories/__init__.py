"""What a corpus says about memories: mined in one pass, resumable, the same for any division."""

from tl_contextmix.methods.memories.composition import composition
from tl_contextmix.methods.memories.mining import merge_triggers, mine_triggers
from tl_contextmix.methods.memories.on_ray import mine_on_ray
from tl_contextmix.methods.memories.triggers import Triggers, load_triggers

__all__ = [
    "Triggers",
    "composition",
    "load_triggers",
    "merge_triggers",
    "mine_on_ray",
    "mine_triggers",
]
