"""Which token, which memory, which component made the model say this?

Context-mixing and decomposition methods for TransformerLens models of any class and version.
Public names are listed in ``__init__.pyi`` and imported when first asked for.
"""

from types import FunctionType
from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    from tl_contextmix.core.validation import RENAMED, checked

    if name in RENAMED:
        raise AttributeError(f"tl_contextmix.{name} is now called {RENAMED[name]}")
    value = _load(name)
    value = checked(value) if isinstance(value, FunctionType) else value
    globals()[name] = value
    return value
