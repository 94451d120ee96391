"""What contexts have in common: endings and tokens, and how often they occur by chance."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.shards import frame_of
from tl_contextmix.methods.memories.trigger_contexts import contexts, places_of, sample
from tl_contextmix.results import Pattern, TriggerPatterns

if TYPE_CHECKING:
    import pandas


_ENDINGS = (3, 2, 1)
_KEPT = 0.5


def patterns(triggers: Mined, tail: str, frame: pandas.DataFrame) -> TriggerPatterns:
    """Returns what triggers of memories have in common, see `Triggers.patterns`."""
    view = triggers.require_view()
    known = contexts(triggers, frame)
    lead = frame_of(view, triggers.manifest["run"]["options"]["prepend_bos"])[0]
    base = Base(sample(triggers))
    rows = []
    for (layer, neuron), group in frame.groupby(["layer", "neuron"]):
        # Up to the trigger, also where what is behind it has been read.
        some = [tuple(known[place][lead : place[1] + 1]) for place in places_of(group)]
        some = [context for context in some if context]  # at a beginning-of-sequence token
        for kind, tokens, share in common(some):
            rows.append(
                Pattern(
                    layer=int(layer),
                    neuron=int(neuron),
                    kind=kind,
                    text="".join(view.to_string(token) for token in tokens),
                    length=len(tokens),
                    share=share,
                    chance=base.share(kind, tokens),
                    triggers=len(some),
                    contexts=len(set(some)),
                )
            )
    return TriggerPatterns(tuple(rows), triggers.describe("patterns", {"tail": tail}))


class Base:
    """How often patterns occur among all prefixes of some documents."""

    def __init__(self, documents: dict[int, list[int]]) -> None:
        self.endings: Counter[tuple[int, ...]] = Counter()
        self.containing: Counter[int] = Counter()
        self.total = 0
        for text in documents.values():
            self.total += len(text)
            for length in _ENDINGS:
                self.endings.update(
                    tuple(text[end - length : end]) for end in range(length, len(text) + 1)
                )
            firsts: dict[int, int] = {}
            for place, token in enumerate(text):
                firsts.setdefault(token, place)
            # A token is before the last one of every prefix that ends behind it.
            for token, place in firsts.items():
                self.containing[token] += len(text) - place - 1

    def share(self, kind: str, tokens: tuple[int, ...]) -> float:
        """Returns the share of prefixes with a pattern."""
        found = self.endings[tokens] if kind == "ends with" else self.containing[tokens[0]]
        return found / max(1, self.total)


def common(contexts: list[tuple[int, ...]]) -> list[tuple[str, tuple[int, ...], float]]:
    """Returns the patterns of contexts: kind, tokens, share."""
    found = []
    for length in _ENDINGS:
        endings = Counter(c[-length:] for c in contexts if len(c) >= length)
        tokens, count = endings.most_common(1)[0] if endings else ((), 0)
        if length == 1 or count >= _KEPT * len(contexts):
            found.append(("ends with", tokens, count / len(contexts)))
            break
    before = Counter(token for c in contexts for token in set(c[:-1]))
    if before:
        token, count = before.most_common(1)[0]
        found.append(("contains", (token,), count / len(contexts)))
    return found
