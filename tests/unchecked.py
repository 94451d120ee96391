"""Questions asked without the type checker of the test run, as users ask them.

Expressions are evaluated one after the other in one process that checks no types: wrong ones must
end in an error of the package, not of the checker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ASK = """
import json, sys
answers = {}
for code in json.loads(sys.argv[1]):
    try:
        answers[code] = ["", repr(eval(code))]
    except Exception as error:
        answers[code] = [type(error).__name__, str(error)]
"""


def answers(setting: str, *questions: str, after: str = "") -> dict[str, list[str]]:
    """Returns, by question, the name and message of its error, or ``""`` and the answer's repr.

    Args:
        setting: What the questions speak of: a script.
        questions: Expressions.
        after: What must hold once all are answered: a script.
    """
    script = "\n".join([setting, _ASK, after, "print(json.dumps(answers))"])
    return json.loads(run("-W", "ignore", "-c", script, json.dumps(questions)).splitlines()[-1])


def run(*arguments: str) -> str:
    """Returns what Python prints with some arguments; it must end well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=_HERE.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (_HERE, _HERE.parent)))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout
