"""A stage that takes as long to start as it is told, and tells about each step or nothing. Run by test_starting.py."""

import json
import sys
import time

from node.local.events import Failed, Loading, Ready, Started
from node.local.pipe import report

(wanted,) = json.loads(sys.stdin.readline())
report(0, Started(pid=1))
for step in range(wanted["steps"]):
    time.sleep(0.3)
    if wanted["tells"]:
        report(0, Loading(what=f"step {step}"))
report(0, Failed(text=wanted["fails"]) if wanted["fails"] else Ready(address="here", span="0:1", weight_bytes=1))
sys.stdin.read()
