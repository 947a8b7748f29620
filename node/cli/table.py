"""Lists the commands in groups. A command is imported only when it runs or shows its help."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command. settings: its structs, as `module:name`. run: the function that takes them, as `module:name`.

    parts: its subcommands, as in `dsd sim run`.
    """

    help: str
    run: str = ""
    settings: tuple[str, ...] = ()
    parts: "dict[str, Command]" = field(default_factory=dict)

    def load_settings(self) -> tuple[type[msgspec.Struct], ...]:
        """Import and return the structs."""
        return tuple(_load(name) for name in self.settings)

    def load_run(self) -> Any:
        """Import and return the function."""
        return _load(self.run)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _command(module: str, help_: str, *settings: str, run: str = "run") -> Command:
    return Command(help=help_, run=f"node.cli.commands.{module}:{run}", settings=settings)


_CONFIG, _LAB = "node.config", "node.lab.config"
_GATEWAY = f"{_CONFIG}:GatewayConfig"


def _bench(help_: str, config: str, rounds: str = "RoundFlags", run: str = "") -> Command:
    settings = (f"{_LAB}:{config}", f"{_LAB}:{rounds}")
    return _command("bench", help_, *settings, run=run)


GROUPS: dict[str, dict[str, Command]] = {
    "run a model on this machine": {
        "up": _command("up", "start a whole swarm and its API on this machine", f"{_CONFIG}:UpConfig", _GATEWAY),
        "chat": _command("chat", "talk to a model through a gateway", f"{_CONFIG}:ChatConfig"),
        "demo": _command("demo", "write one answer plain and speculative, and compare", f"{_CONFIG}:DemoConfig"),
        "quantize": _command(
            "quantize", "write a copy of a model that loses less in int8", f"{_CONFIG}:QuantizeConfig"
        ),
        "models": _command("models", "list, download and locate models", f"{_CONFIG}:ModelsConfig"),
    },
    "join a swarm": {
        "create": _command("create", "create a swarm and run its first peer", f"{_CONFIG}:CreateConfig", _GATEWAY),
        "invite": _command("invite", "print an invite for another machine", f"{_CONFIG}:InviteConfig"),
        "join": _command("join", "join with an invite, and serve layers", f"{_CONFIG}:JoinConfig", _GATEWAY),
        "node": _command(
            "node", "run, stop or describe this machine's node daemon", f"{_CONFIG}:NodeCommand", _GATEWAY
        ),
        "members": _command("members", "list the members of the swarm", f"{_CONFIG}:SwarmQuestion"),
        "plan": _command("plan", "show which route a request would use, and why", f"{_CONFIG}:SwarmQuestion"),
        "doctor": _command("doctor", "find problems and print their fixes", f"{_CONFIG}:SwarmQuestion"),
        "draft": _command("draft", "choose the drafter of the whole swarm", f"{_CONFIG}:DraftConfig"),
        "invites": _command("invites", "list the invites made here, and who used them", f"{_CONFIG}:SwarmQuestion"),
        "revoke": _command("revoke", "remove a member or an invite from the swarm", f"{_CONFIG}:RevokeConfig"),
        "rekey": _command("rekey", "give the swarm a new network key, without those revoked", f"{_CONFIG}:RekeyConfig"),
        "recover": _command("recover", "bring the owner's key back from the recovery key", f"{_CONFIG}:RecoverConfig"),
    },
    "ask": {
        "generate": _command("generate", "write an answer", f"{_CONFIG}:GenerateConfig"),
        "verify": _command(
            "verify", "say whether a finished answer is what its model writes", f"{_CONFIG}:VerifyConfig"
        ),
    },
    "watch": {
        "top": _command("top", "show a dashboard of a swarm in the terminal", f"{_CONFIG}:TopConfig"),
    },
    "measure": {
        "bench": Command(
            help="run a benchmark; --receipt saves the result in docs/benchmarks",
            parts={
                "overhead": _bench("cost of splitting a model into stages", "OverheadConfig", run="overhead"),
                "ring": _bench("speed of the protocol on fake stages", "RingConfig", "OneRound", "ring"),
                "relaxed": _bench(
                    "problems solved in exact and in relaxed mode", "RelaxedConfig", "ReceiptFlags", "relaxed"
                ),
                "wan": _bench("speed of real models on emulated wide-area links, arm by arm", "WanConfig", run="wan"),
                "peers": _bench("speed of the int8 pass beside llama.cpp's", "PeersConfig", run="peers"),
                "forms": _bench(
                    "how near int8 and the stored form are to floats", "FormsConfig", "ReceiptFlags", "forms"
                ),
                "door": _bench(
                    "speed of a swarm joined by invites, through its gateway, beside `dsd up`", "DoorConfig", run="door"
                ),
                "drafts": _bench(
                    "speed of a slow gateway that drafts at home and with a near member", "DraftsConfig", run="drafts"
                ),
                "users": _bench("speed of many requests at once, compared with one", "UsersConfig", run="users"),
                "pass": _bench(
                    "a step and a tree window of a large model's layers, with random weights",
                    "PassConfig",
                    run="pass_of_shape",
                ),
                "passes": _bench("cost of a stage's pass as more sessions share it", "PassesConfig", run="passes"),
                "constrained": _bench(
                    "answers that schemas constrain: validity, sameness over modes, speed",
                    "ConstrainedConfig",
                    "OneRound",
                    "constrained",
                ),
                "graphs": _bench("passes replayed as CUDA graphs, beside launched ones", "GraphsConfig", run="graphs"),
                "brokers": _bench(
                    "decoding speed with a broker that works, was killed, or hangs", "BrokersConfig", run="brokers"
                ),
                "formats": _bench("error and size of compressed hidden states", "SplitConfig", run="formats"),
                "attest": _bench("cost of signing every window at a stage", "SplitConfig", run="attest"),
                "audits": _bench(
                    "which lies an audit catches, and whether it accuses honest stages",
                    "AuditsConfig",
                    "ReceiptFlags",
                    "audits",
                ),
                "placement": _bench("time that planning takes in a large swarm", "PlacementConfig", run="placement"),
                "simulator": _bench(
                    "speed and memory use of the simulator", "SimulatorConfig", "ReceiptFlags", "simulator"
                ),
                "plots": _command("bench", "draw the receipts in docs/benchmarks", f"{_LAB}:PlotsConfig", run="plots"),
            },
        ),
        "sim": Command(
            help="simulate a swarm in virtual time, with the live protocol",
            parts={
                "run": _command("sim", "simulate a scenario", f"{_LAB}:SimRunConfig", run="run"),
                "sweep": _command(
                    "sim",
                    "simulate all combinations of changes, on all cores",
                    f"{_LAB}:SimSweepConfig",
                    run="sweep_grid",
                ),
                "trace": _command(
                    "sim", "write a run's timeline for chrome://tracing", f"{_LAB}:SimTraceConfig", run="trace"
                ),
                "compare": _command(
                    "sim",
                    "predict measured runs, and compare prediction and measurement",
                    f"{_LAB}:SimCompareConfig",
                    run="compare_receipts",
                ),
                "record": _command(
                    "sim", "record how well one model guesses another", f"{_LAB}:RecordConfig", run="record"
                ),
            },
        ),
        "profile": _command("profile", "measure this machine for a scenario file", f"{_LAB}:ProfileConfig"),
        "calibrate": _command(
            "calibrate", "find relaxed mode's thresholds for a quality budget", f"{_LAB}:CalibrateConfig"
        ),
    },
    "more": {
        "completion": _command("completion", "print a shell completion script", f"{_CONFIG}:CompletionConfig"),
    },
}

COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}
