"""Tries an installed `dsd`: a bundled scenario, then `dsd up` with its API and its page. Used by scripts/installable."""

import json
import re
import subprocess
import sys
import urllib.request


def must(is_so: object, what: str) -> None:
    if not is_so:
        sys.exit(f"{what} does not work")


dsd = sys.argv[1]
scenario = [dsd, "sim", "run", "sharded", "--set", "workload.requests=2"]
simulated = subprocess.run(scenario, capture_output=True, text=True, check=False)
must(simulated.returncode == 0, f"the simulator ({simulated.stderr})")
command = [dsd, "up", "--port", "0", "--stages", "2"]
with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as up:
    try:
        url = next((found[1] for line in up.stdout if (found := re.search(r"(http://[\d.:]+)/", line))), "")
        must(url, "dsd up")
        with urllib.request.urlopen(url, timeout=60) as page:  # noqa: S310 - our own gateway
            must(b"<html" in page.read(), "the page")
        asked = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode(), headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
            must(json.load(reply)["choices"][0]["message"]["content"], "the API")
    finally:
        up.terminate()
