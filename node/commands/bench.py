"""`dsd bench`: measures, prints a table, writes a receipt."""

import msgspec
import trio

from dsd_p2p.errors import ConfigError
from node.bench import machine, write_receipt
from node.config import GenerateConfig, RingConfig, read_config
from node.console import ConsoleProgress


def run(options: dict[str, object]) -> int:
    """Run one benchmark; with --json its last line on standard output is the result as one object."""
    what = str(options.pop("what"))
    rounds = int(str(options.pop("rounds", 5 if what != "ring" else 1)))
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}: at least 1")
    file = options.pop("config", None)
    file = str(file) if file else None
    receipt, is_json = options.pop("receipt", None), options.pop("json", False)
    before = machine()
    match what:
        case "ring":
            results = _ring(read_config(RingConfig, file, options), rounds)
        case _:
            from node.benches.overhead import run_overhead

            config = read_config(GenerateConfig, file, {"max_tokens": 64} | options)
            results = trio.run(run_overhead, config, rounds)
    if receipt is not None:
        write_receipt(str(receipt), what, results, before)
    if is_json:
        print(msgspec.json.encode(results).decode(), flush=True)
    return 0


def _ring(config: RingConfig, rounds: int) -> dict[str, object]:
    from node.benches.ring import run_ring

    with ConsoleProgress() as progress:
        return trio.run(run_ring, config, rounds, progress)
