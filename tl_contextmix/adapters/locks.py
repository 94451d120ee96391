"""One lock per model: hooks and readings of a model are for one thread at a time."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


def lock_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Returns the lock of a model, which the same thread may take again."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())
