"""Programs that a model wrote are run without being trusted."""

import os
import select
import socket
import subprocess
import sys

import pytest

from node.lab.benches.relaxed import solves
from node.lab.quality.prompts import Problem
from node.lab.quality.sandbox import passes


@pytest.mark.parametrize(
    ("program", "is_passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(3)", False),
        ("x = bytearray(4 << 30)", False),
        ("open('big', 'wb').write(bytes(8 << 20))", False),
    ],
)
def test_a_program_passes_only_within_its_limits(program, is_passed):
    assert passes(program) is is_passed


def test_a_program_has_no_network():
    """The very connection works outside."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        program = f"import socket; socket.create_connection({address!r}, 1)"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=10)
        if subprocess.run(["unshare", "--net", "true"], check=False, timeout=10).returncode:
            pytest.skip("this user may not make network namespaces")
        assert not passes(program)


def test_what_a_program_leaves_running_is_ended(tmp_path):
    pid_file = tmp_path / "pid"
    program = f"import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(60)\nopen({str(pid_file)!r}, 'w').write(str(pid))"
    assert passes(program)
    try:
        descriptor = os.pidfd_open(int(pid_file.read_text()))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([descriptor], [], [], 10)
    os.close(descriptor)
    assert ended, "it would have slept for 60 s"


def test_a_program_that_never_ends_is_ended():
    assert not passes("while True: pass")


CODE = Problem(
    name="t",
    category="code",
    prompt="",
    test="def check(f):\n    assert f([1, 2]) == 3\n",
    entry_point="total",
    signature="from typing import List\n\ndef total(xs: List[int]) -> int:\n    '''Sum.'''\n",
)
MATHS = Problem(name="m", category="maths", prompt="", expected="1,200")


@pytest.mark.parametrize(
    ("problem", "answer", "is_solved"),
    [
        (CODE, "Here:\n```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```\nDone.", True),
        (CODE, "```python\ndef total(xs):\n    return 0\n```", False),
        (CODE, "I cannot.", False),
        (MATHS, "So 3 * 400 = 1200.\n#### 1200", True),
        (MATHS, "#### $1,200.00 in 5 days", True),
        (MATHS, "The answer is 1200", True),
        (MATHS, "#### 12", False),
        (MATHS, "no number", False),
    ],
)
def test_answers_are_judged(problem, answer, is_solved):
    assert solves(problem, answer) is is_solved
