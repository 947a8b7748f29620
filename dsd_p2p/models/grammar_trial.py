"""Tries to compile a grammar in a process of its own, because some grammars would take all time and memory of this one.

llguidance bounds most of its work, but not the intersection of regular expressions: a schema of a thousand characters can
take minutes and gigabytes. The kernel bounds the trial.
"""

import subprocess
import sys

_CPU_S, _MEMORY_BYTES, _STACK_BYTES, _WALL_S = 2, 1 << 30, 1 << 20, 20.0
_PROGRAM = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_CPU_S}, {_CPU_S}))
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY_BYTES}, {_MEMORY_BYTES}))
import threading
from llguidance import LLMatcher
source, found = sys.stdin.read(), []
# The stack of a worker thread, halved: what recurses too deeply must fail here.
threading.stack_size({_STACK_BYTES})
trial = threading.Thread(target=lambda: found.append(LLMatcher.validate_grammar(source)))
trial.start()
trial.join()
sys.stdout.write(found[0])
"""


def why_not(source: str) -> str | None:
    """Return why a grammar, in llguidance's form, cannot be used; None if it can. Takes about a tenth of a second."""
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-c", _PROGRAM], input=source, capture_output=True, text=True, timeout=_WALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _TOO_MUCH
    if done.returncode != 0:
        return _TOO_MUCH
    return done.stdout or None


_TOO_MUCH = f"compiling it takes more than {_CPU_S} s or {_MEMORY_BYTES >> 30} GiB: make it simpler"
