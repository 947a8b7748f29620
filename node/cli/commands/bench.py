"""`dsd bench`: measures, prints a table, writes a receipt."""

from pathlib import Path

import msgspec
import trio

from dsd_p2p.errors import ConfigError
from node.client.relaxation import bundled_calibration, read_calibration
from node.config import CalibrateConfig, GenerateConfig, RingConfig, UsersConfig, WanConfig, read_config
from node.console import ConsoleProgress
from node.lab.receipt import machine, write_receipt


def run(options: dict[str, object]) -> int:
    """Run one benchmark; with --json its last line on standard output is the result as one object."""
    what = str(options.pop("what"))
    match what:
        case "plots":
            return _plots()
        case _:
            return _measure(what, options)


def _measure(what: str, options: dict[str, object]) -> int:
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
        case "formats":
            from node.lab.benches.link_formats import run_formats

            with ConsoleProgress() as progress:
                results = run_formats(read_config(GenerateConfig, file, options), progress)
        case "attest":
            from node.lab.benches.attestation import run_attestation

            with ConsoleProgress() as progress:
                results = run_attestation(read_config(GenerateConfig, file, options), rounds, progress)
        case "simulator":
            from node.lab.benches.simulator import run_simulator_bench

            with ConsoleProgress() as progress:
                results = run_simulator_bench(progress, int(str(options.get("large", 0))))
        case "relaxed":
            results = _relaxed(file, options)
        case "users":
            from node.lab.benches.users import run_users

            with ConsoleProgress() as progress:
                results = trio.run(run_users, read_config(UsersConfig, file, options), rounds, progress)
        case "brokers":
            from node.lab.benches.brokers import run_brokers

            with ConsoleProgress() as progress:
                results = trio.run(
                    run_brokers, read_config(UsersConfig, file, {"sessions": 1} | options), rounds, progress
                )
        case "passes":
            from node.lab.benches.passes import run_passes

            with ConsoleProgress() as progress:
                results = run_passes(read_config(UsersConfig, file, {"sessions": 64} | options), rounds, progress)
        case "wan":
            results = _wan(read_config(WanConfig, file, options), rounds)
        case _:
            from node.lab.benches.overhead import run_overhead

            config = read_config(GenerateConfig, file, {"max_tokens": 64} | options)
            results = trio.run(run_overhead, config, rounds)
    if receipt is not None:
        write_receipt(str(receipt), what, results, before)
    if is_json:
        print(msgspec.json.encode(results).decode(), flush=True)
    return 0


def _plots() -> int:
    from node.lab.benches.plots import draw_plots

    for path in draw_plots():
        print(path)
    return 0


def _relaxed(file: str | None, options: dict[str, object]) -> dict[str, object]:
    from node.lab.benches.relaxed import run_relaxed

    given = options.pop("relaxation", None)
    paths = [Path(str(name)) for name in given] if isinstance(given, list) else [bundled_calibration()]
    config = read_config(CalibrateConfig, file, {"max_tokens": 384} | options)
    with ConsoleProgress() as progress:
        return run_relaxed(config, [read_calibration(path) for path in paths], progress)


def _wan(config: WanConfig, rounds: int) -> dict[str, object]:
    from node.lab.benches.wan import run_wan

    with ConsoleProgress() as progress:
        return trio.run(run_wan, config, rounds, progress)


def _ring(config: RingConfig, rounds: int) -> dict[str, object]:
    from node.lab.benches.ring import run_ring

    with ConsoleProgress() as progress:
        return trio.run(run_ring, config, rounds, progress)
