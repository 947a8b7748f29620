"""Programs that a model wrote are run without being trusted."""

import pytest

from node.benches.relaxed import solves
from node.prompts import Problem
from node.sandbox import passes


@pytest.mark.parametrize(
    ("program", "is_passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(3)", False),
        ("x = bytearray(4 << 30)", False),
        ("open('big', 'wb').write(bytes(8 << 20))", False),
        ("import socket; socket.create_connection(('127.0.0.1', 1), 1)", False),
    ],
)
def test_a_program_passes_only_within_its_limits(program, is_passed):
    assert passes(program) is is_passed


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
