"""Stopping work under way from another thread, between two calls of PyTorch."""

from __future__ import annotations

from typing import Any, no_type_check

from torch.overrides import TorchFunctionMode


class Stopped(BaseException):
    """The work was asked to stop, and did.

    No `Exception`: some attention modules of bridges catch those and go on in another way.
    """


class Stoppable(TorchFunctionMode):
    """Lets another thread stop the work that a thread does while this is active.

    The work ends with `Stopped` at its next call of PyTorch, at a line of Python and never inside
    an operator, so that hooks are taken off and locks are let go on the way out. Results are the
    same with it and without.

    Attributes:
        calls: Calls of PyTorch so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self._asked = self._raised = False

    def stop(self) -> None:
        """Asks the work to stop; may be called from any thread, and more than once."""
        self._asked = True

    def check(self) -> None:
        """Ends the work here if it was asked to stop."""
        if self._asked:
            raise Stopped

    @no_type_check
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls PyTorch, or ends the work."""
        self.calls += 1
        # Once: what cleans up on the way out may call PyTorch, too.
        if self._asked and not self._raised:
            self._raised = True
            raise Stopped
        return func(*args, **(kwargs or {}))
