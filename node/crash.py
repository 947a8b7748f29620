"""Turns a failure that nobody foresaw into one sentence and a file to send, in every process."""

import os
import platform
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

from dsd_p2p.errors import first_cause
from node.paths import state_dir


def explain(error: BaseException, what: str) -> str:
    """Write a report of the error and return a sentence that names it.

    what: what failed, such as "stage 8:16". The report holds no settings, because these can be secret.
    """
    last = traceback.format_exception_only(first_cause(error))[-1].strip().partition("\n")[0]
    text = "\n".join(
        [
            f"dsd-p2p {version('dsd-p2p')}, Python {platform.python_version()}, {platform.platform()}",
            f"{what}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}",
            "",
            "".join(traceback.format_exception(error)),
        ]
    )
    path = _write(text)
    where = f"please report it with {path}" if path else "no report could be written"
    return f"{what} failed for a reason that nobody foresaw: {last}; {where}"


def _write(text: str) -> Path | None:
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.txt"
    for folder in (state_dir() / "reports", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = folder / name
            path.write_text(text)
        except OSError:
            continue
        return path
    return None
