"""Implements `dsd bench`: run a benchmark, print a table, write a receipt."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from dsd_p2p.models.progress import Progress
from node.config.relaxation import bundled_thresholds, read_thresholds
from node.console import ConsoleProgress
from node.lab.config import (
    AuditsConfig,
    BrokersConfig,
    ConstrainedConfig,
    DoorConfig,
    DraftsConfig,
    FormsConfig,
    GraphsConfig,
    OneRound,
    OverheadConfig,
    PassConfig,
    PassesConfig,
    PeersConfig,
    PlacementConfig,
    PlotsConfig,
    ReceiptFlags,
    RelaxedConfig,
    RingConfig,
    RoundFlags,
    SimulatorConfig,
    SplitConfig,
    UsersConfig,
    WanConfig,
)
from node.lab.receipt import machine, write_receipt


def ring(config: RingConfig, flags: OneRound) -> int:
    """Measure the protocol on fake stages."""
    from node.lab.benches.ring import run_ring

    return _measure("ring", flags, lambda progress: trio.run(run_ring, config, flags.rounds, progress))


def wan(config: WanConfig, flags: RoundFlags) -> int:
    """Measure real models on emulated wide-area links."""
    from node.lab.benches.wan import run_wan

    return _measure("wan", flags, lambda progress: trio.run(run_wan, config, flags.rounds, progress))


def users(config: UsersConfig, flags: RoundFlags) -> int:
    """Measure many requests at once."""
    from node.lab.benches.users import run_users

    return _measure("users", flags, lambda progress: trio.run(run_users, config, flags.rounds, progress))


def brokers(config: BrokersConfig, flags: RoundFlags) -> int:
    """Measure decoding with a telemetry broker beside it."""
    from node.lab.benches.brokers import run_brokers

    return _measure("brokers", flags, lambda progress: trio.run(run_brokers, config, flags.rounds, progress))


def door(config: DoorConfig, flags: RoundFlags) -> int:
    """Measure what a member of a swarm gets through its gateway."""
    from node.lab.benches.door import run_door

    return _measure("door", flags, lambda progress: trio.run(run_door, config, flags.rounds, progress))


def drafts(config: DraftsConfig, flags: RoundFlags) -> int:
    """Measure a gateway on a slowed core without and with a member that drafts for it."""
    from node.lab.benches.far_drafts import run_drafts

    return _measure("drafts", flags, lambda progress: trio.run(run_drafts, config, flags.rounds, progress))


def peers(config: PeersConfig, flags: RoundFlags) -> int:
    """Measure the pass of a whole model beside llama.cpp."""
    from node.lab.benches.lean_pass import run_peers

    return _measure("peers", flags, lambda progress: trio.run(run_peers, config, flags.rounds, progress))


def forms(config: FormsConfig, flags: ReceiptFlags) -> int:
    """Judge int8 and the stored form by the floats."""
    from node.lab.benches.forms import run_forms

    return _measure("forms", flags, lambda progress: run_forms(config, progress))


def pass_of_shape(config: PassConfig, flags: RoundFlags) -> int:
    """Measure a step and a tree window of each kind of layer of a large model."""
    from node.lab.benches.shapes import run_pass

    return _measure("pass", flags, lambda progress: run_pass(config, flags.rounds, progress))


def passes(config: PassesConfig, flags: RoundFlags) -> int:
    """Measure the cost of a pass as more sessions share it."""
    from node.lab.benches.passes import run_passes

    return _measure("passes", flags, lambda progress: run_passes(config, flags.rounds, progress))


def constrained(config: ConstrainedConfig, flags: OneRound) -> int:
    """Measure answers that schemas constrain."""
    from node.lab.benches.constrained import run_constrained

    return _measure("constrained", flags, lambda progress: trio.run(run_constrained, config, flags.rounds, progress))


def graphs(config: GraphsConfig, flags: RoundFlags) -> int:
    """Measure passes that a GPU replays as graphs."""
    from node.lab.benches.graphs import run_graphs

    return _measure("graphs", flags, lambda progress: run_graphs(config, flags.rounds, progress))


def formats(config: SplitConfig, flags: RoundFlags) -> int:
    """Measure error and size of compressed hidden states on the links."""
    from node.lab.benches.link_formats import run_formats

    return _measure("formats", flags, lambda progress: run_formats(config, progress))


def attest(config: SplitConfig, flags: RoundFlags) -> int:
    """Measure the cost of signing windows."""
    from node.lab.benches.attestation import run_attestation

    return _measure("attest", flags, lambda progress: run_attestation(config, flags.rounds, progress))


def audits(config: AuditsConfig, flags: ReceiptFlags) -> int:
    """Measure what audits catch."""
    from node.lab.benches.audits import run_audits

    return _measure("audits", flags, lambda progress: trio.run(run_audits, config, progress))


def simulator(config: SimulatorConfig, flags: ReceiptFlags) -> int:
    """Measure the simulator's speed."""
    from node.lab.benches.simulator import run_simulator_bench

    return _measure("simulator", flags, lambda progress: run_simulator_bench(progress, config.large))


def placement(config: PlacementConfig, flags: RoundFlags) -> int:
    """Measure planning."""
    from node.lab.benches.placement import run_placement

    return _measure("placement", flags, lambda progress: run_placement(config, flags.rounds, progress))


def relaxed(config: RelaxedConfig, flags: ReceiptFlags) -> int:
    """Compare problems solved in exact and in relaxed mode."""
    from node.lab.benches.relaxed import run_relaxed

    paths = [Path(name) for name in config.relaxation] or [bundled_thresholds()]
    thresholds = [read_thresholds(path) for path in paths]
    if config.prompts == "chat":
        from node.lab.benches.relaxed_chat import run_relaxed_chat

        return _measure("relaxed-chat", flags, lambda progress: run_relaxed_chat(config, thresholds[0], progress))
    return _measure("relaxed", flags, lambda progress: run_relaxed(config, thresholds, progress))


def overhead(config: OverheadConfig, flags: RoundFlags) -> int:
    """Measure the cost of splitting a model."""
    from node.lab.benches.overhead import run_overhead

    return _measure("overhead", flags, lambda _progress: trio.run(run_overhead, config, flags.rounds))


def plots(_config: PlotsConfig) -> int:
    """Draw the plots of all receipts."""
    from node.lab.benches.plots import draw_plots

    for path in draw_plots():
        print(path)
    return 0


def _measure(name: str, flags: ReceiptFlags, run: Callable[[Progress], dict[str, object]]) -> int:
    """Run one benchmark. With --json, its last line on standard output is the result as one object."""
    before = machine()
    with ConsoleProgress() as progress:
        results = run(progress)
    if flags.receipt:
        write_receipt(flags.receipt, name, results, before)
    if flags.json:
        print(msgspec.json.encode(results).decode(), flush=True)
    return 0
