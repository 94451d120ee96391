"""What contexts have in common: endings and tokens, and how often they occur by chance."""

from __future__ import annotations

from collections import Counter

_ENDINGS = (3, 2, 1)
_KEPT = 0.5


class Base:
    """How often patterns occur among all prefixes of some documents."""

    def __init__(self, documents: dict[int, list[int]], lead: int) -> None:
        self.endings: Counter[tuple[int, ...]] = Counter()
        self.containing: Counter[int] = Counter()
        self.total = 0
        for ids in documents.values():
            text = ids[lead:]
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
