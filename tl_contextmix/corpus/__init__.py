"""What a corpus says about memories: mined in one pass, resumable, the same for any division."""

from tl_contextmix.corpus.composition import composition
from tl_contextmix.corpus.merging import merge_triggers
from tl_contextmix.corpus.mining import mine_triggers
from tl_contextmix.corpus.on_ray import mine_on_ray
from tl_contextmix.corpus.triggers import Triggers, load_triggers

__all__ = [
    "Triggers",
    "composition",
    "load_triggers",
    "merge_triggers",
    "mine_on_ray",
    "mine_triggers",
]
