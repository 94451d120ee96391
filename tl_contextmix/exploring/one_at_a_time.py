"""Answers one question at a time, in a thread of its own: progress, stopping, what was answered."""

from __future__ import annotations

import secrets
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from tl_contextmix.core.interruption import Stoppable, Stopped
from tl_contextmix.errors import ContextMixError, ContextMixWarning, reason
from tl_contextmix.exploring.limits import Limits
from tl_contextmix.exploring.typed_questions import TypedQuestion, answered, require_text_model

_KEPT = 8
# Seconds: one operator may take that long.
_PATIENCE = 5.0
State = Literal["running", "done", "refused", "stopped", "failed"]


@dataclass(eq=False)
class Call:
    """One question, by a name that addresses have, and what became of it.

    ``step`` is under way, ``done`` are those before it; ``message`` says why there is no answer.
    """

    question: TypedQuestion
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "running"
    step: str = "start"
    done: int = 0
    message: str = ""
    html: str = ""
    likely: tuple[str, ...] = ()
    seconds: float = 0.0
    mode: Stoppable = field(default_factory=Stoppable)
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        """How many steps there are: the maps, what was picked, and drawing."""
        return 2 + len(self.question.sections) + len(self.question.methods)

    def begin(self, step: str) -> None:
        """Notes the next step, or ends here if the call was stopped."""
        self.mode.check()
        if self.step not in ("start", "estimate"):
            self.done += 1
        self.step = step

    def status(self) -> dict[str, Any]:
        """Returns what a page is told of it."""
        running = self.state == "running"
        seconds = time.monotonic() - self.started if running else self.seconds
        shown = {
            name: getattr(self, name) for name in ("state", "step", "done", "steps", "message")
        }
        return {**shown, "seconds": round(seconds, 1), "likely": self.likely}


class Busy(Exception):
    """Another question is being answered."""


class Explorer:
    """A model that is asked one question at a time."""

    def __init__(self, model: Any, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self._lock = threading.Lock()
        self._calls: dict[str, Call] = {}
        self._under_way: Call | None = None
        self._thread: threading.Thread | None = None

    def ask(self, question: TypedQuestion) -> Call:
        """Begins to answer a question."""
        with self._lock:
            if self._under_way is not None:
                raise Busy
            call = self._under_way = Call(question)
            self._calls[call.name] = call
            for old in [*self._calls][:-_KEPT]:
                del self._calls[old]
            self._thread = threading.Thread(target=self._answer, args=(call,), daemon=True)
            self._thread.start()
        return call

    def call(self, name: str) -> Call | None:
        """Returns one of the last calls by its name."""
        return self._calls.get(name)

    def stop(self, name: str | None = None) -> None:
        """Stops a call, or whichever is under way; one that is over stays as it is."""
        call = self._under_way if name is None else self._calls.get(name)
        if call is not None:
            call.mode.stop()

    def close(self) -> None:
        """Stops what is under way, and waits a little for it."""
        self.stop()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _answer(self, call: Call) -> None:
        state: State = "failed"
        try:
            with call.mode:
                self._work(call)
            state = "done"
        except Stopped:
            state = "stopped"
        except ContextMixError as error:
            state, call.message = "refused", str(error)
        except Exception as error:
            # What went wrong is for the terminal; the page says that it did.
            traceback.print_exc(file=sys.stderr)
            call.message = _explained(error)
        finally:
            with self._lock:
                call.seconds = time.monotonic() - call.started
                call.state, self._under_way = state, None

    def _work(self, call: Call) -> None:
        view = require_text_model(self.model)
        with warnings.catch_warnings():
            # They are given again, where the page tells them.
            warnings.simplefilter("ignore", ContextMixWarning)
            self.limits.require(view, call.question, call.begin)
        explanation = answered(self.model, call.question, call.begin)
        call.begin("draw")
        call.html, call.likely = explanation.page.html(), explanation.likely
        call.mode.check()


def _explained(error: Exception) -> str:
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "The memory of this machine is not enough. Shorten the text, or show less."
    return f"This failed, and should not have ({reason(error)}). The terminal has the details."
