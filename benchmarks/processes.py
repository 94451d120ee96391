"""Processes that answer questions in environments of their own, one JSON object per line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Failed(Exception):
    """What does not run, and why."""


class Process:
    """A script beside this file, run by an environment's Python.

    Args:
        python: The environment's interpreter.
        script: Name of the script.
        *arguments: Of its command line.
    """

    def __init__(self, python: str | Path, script: str, *arguments: str | Path) -> None:
        # -I: from this folder, ``import inseq`` would find the file of that name.
        self.process = subprocess.Popen(
            [str(python), "-I", str(Path(__file__).with_name(script)), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """Returns the answer to one request.

        Raises:
            Failed: If it is an error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
