"""`dsd`: one small file that reads flags; each command is imported only when it runs, so that a mistyped flag answers at once."""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from dsd_p2p.errors import ConfigError, DsdError, first_cause

_COMMAND_MODULES = {
    "models": "node.cli.commands.models",
    "node": "node.cli.commands.node",
    "up": "node.cli.commands.up",
    "create": "node.cli.commands.create",
    "join": "node.cli.commands.join",
    "invite": "node.cli.commands.invite",
    "members": "node.cli.commands.members",
    "revoke": "node.cli.commands.revoke",
    "plan": "node.cli.commands.plan",
    "doctor": "node.cli.commands.doctor",
    "top": "node.cli.commands.top",
    "generate": "node.cli.commands.generate",
    "demo": "node.cli.commands.demo",
    "calibrate": "node.cli.commands.calibrate",
    "bench": "node.cli.commands.bench",
    "profile": "node.cli.commands.profile",
    "sim": "node.cli.commands.sim",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error of ours or a peer's, 2 wrong usage, 130 interrupted."""
    options = vars(_parser().parse_args(arguments))
    command = str(options.pop("command"))
    words = [str(options["what"])] if "what" in options else []
    given = {key: value for key, value in options.items() if value is not None}
    # An interrupt while modules load can vanish in one of Python's own callbacks; nothing is to be cleaned up yet, so die at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = import_module(_COMMAND_MODULES[command])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code: int = module.run(given)
    except (DsdError, KeyboardInterrupt, BaseExceptionGroup) as exc:
        match first_cause(exc):
            case KeyboardInterrupt():
                return 130
            case DsdError() as cause:
                from node.config import FlagError

                hint = f"; see `dsd {' '.join((command, *words))} --help`" if isinstance(cause, FlagError) else ""
                print(f"dsd {command}: {cause}{hint}", file=sys.stderr)
                return 2 if isinstance(cause, ConfigError) else 1
            case _:
                raise
    return code


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return each command's parser, for the reference in the documents."""
    actions = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(actions).choices)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsd", description="Peer-to-peer LLM inference, fast over distance.")
    commands = parser.add_subparsers(dest="command", required=True)

    models = commands.add_parser("models", help="list, fetch and locate models")
    models.add_argument("action", choices=["list", "pull", "path"])
    models.add_argument("name", nargs="?", help="a catalog name, a folder or a Hugging Face id")

    _add_swarm_commands(commands)
    _add_sim_commands(commands)

    node = commands.add_parser("node", help="run one stage, or this machine's node of a swarm")
    node.add_argument("action", nargs="?", choices=["run", "stop", "status"], help="stop, status: of a swarm's node")
    _add_model_flags(node)
    _add_serve_flags(node)
    _add_gateway_flags(node)
    node.add_argument("--drain", help="stop: let what is under way go on for this long (default 30s)")
    node.add_argument("--span", help="layers FIRST:LAST of this stage (default: all)")
    node.add_argument("--peers", type=_comma_list, help="addresses of other nodes, comma separated")
    node.add_argument("--identity", help="file of the node's secret, made on first use (default: a new one each run)")
    node.add_argument("--exit-with-parent", action="store_const", const=True, help="stop when standard input closes")

    up = commands.add_parser("up", help="run a whole swarm on this machine")
    _add_model_flags(up)
    up.add_argument("--stages", type=int, help="number of stage processes (default 3)")
    up.add_argument("--draft", help="drafter: ngram, shadow, a model; also +ngram (default: what measured best)")
    up.add_argument("--draft-dtype", help="dtype of a drafting model (default float32)")
    up.add_argument("--window", choices=["awc", "analytic"], help="who decides how much to guess (default awc)")
    _add_trace_flag(up)
    _add_gateway_flags(up)

    generate = commands.add_parser("generate", help="write text")
    _add_model_flags(generate)
    _add_generate_flags(generate)

    demo = commands.add_parser("demo", help="write one answer plain and speculative, and compare")
    _add_model_flags(demo)
    _add_generate_flags(demo)

    top = commands.add_parser("top", help="watch a swarm")
    top.add_argument(
        "target", nargs="?", help="gateway http://HOST:PORT (default http://127.0.0.1:8484), or broker mqtt://…"
    )
    top.add_argument("--topics", help="the swarm's name in the broker's topics (default local)")
    top.add_argument("--mqtt-ca", metavar="FILE", help="certificate authority of the broker")
    top.add_argument("--key", help="of a gateway that needs one (default: $OPENAI_API_KEY)")
    top.add_argument("--record", metavar="FILE", help="also write the events down, to be replayed")
    top.add_argument("--replay", metavar="FILE", help="a recording of a live or simulated run")
    top.add_argument("--speed", type=float, help="of the replay (default 1)")
    top.add_argument("--once", action="store_const", const=True, help="one look")
    top.add_argument("--seconds", type=float, help="how long the one look takes (default 2.5)")
    top.add_argument("--json", action="store_const", const=True, help="with --once: as one JSON object")
    top.add_argument("--svg", metavar="FILE", help="one look, as a picture")
    top.add_argument("--columns", type=int, help="of the picture (default 120)")
    top.add_argument("--rows", type=int, help="of the picture (default 32)")

    calibrate = commands.add_parser("calibrate", help="find relaxed mode's thresholds for a quality budget")
    _add_pair_flags(calibrate)
    calibrate.add_argument("--prompts", choices=["chat", "maths", "code"], help="what to calibrate on (default chat)")
    calibrate.add_argument("--num-prompts", type=int, help="how many of them (default 24)")
    calibrate.add_argument("--budget", type=float, help="mean log-likelihood a token may lose, nats (default 0.01)")
    calibrate.add_argument("--output", metavar="FILE", help="where to write the thresholds (default relaxation.json)")

    _add_bench_commands(commands.add_parser("bench", help="measure; --receipt keeps the result in docs/benchmarks"))
    return parser


def _add_gateway_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=int, help="of the OpenAI-compatible door (dsd up: 8484; 0 picks a free one; else none)"
    )
    parser.add_argument("--host", help="address it listens on (default 127.0.0.1)")
    parser.add_argument("--api-keys", metavar="FILE", help="TOML file of who may ask and how much")
    parser.add_argument("--names", type=_comma_list, help="host names that clients call it by")
    parser.add_argument("--max-running", type=int, help="answers written at once (default 16)")
    parser.add_argument("--max-waiting", type=int, help="answers that may wait for a place (default 256)")
    parser.add_argument("--answer-timeout", help="of a whole answer (default 1h)")


def _add_swarm_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    create = commands.add_parser("create", help="make a swarm and run its first node")
    create.add_argument("--model", help="a catalog name, a folder or a Hugging Face id (default smollm2-135m)")
    create.add_argument("--dtype", help="float32 (default, exact in every mode), bfloat16 or float16")

    join = commands.add_parser("join", help="join a swarm and serve: the invite is all that is needed")
    join.add_argument("invite", help="the string that `dsd invite` printed")
    for parser in (create, join):
        _add_compute_flags(parser)
        _add_serve_flags(parser)
        _add_gateway_flags(parser)

    invite = commands.add_parser("invite", help="print a string that lets a machine in")
    invite.add_argument("--role", choices=["stage", "client"], help="stage (default) serves layers, client only asks")
    invite.add_argument("--expires", help="when it, and who joined by it, must leave: like 24h (default 30d)")
    invite.add_argument("--uses", type=int, help="machines that may join by it (default 1)")
    invite.add_argument("--address", type=_comma_list, help="addresses to join at (default: of the running node)")
    invite.add_argument("--no-qr", dest="qr", action="store_const", const=False, help="no QR code")

    members = commands.add_parser("members", help="who is in the swarm")
    revoke = commands.add_parser("revoke", help="throw a member out")
    revoke.add_argument("peer", help="its peer id, or the end of it")
    plan = commands.add_parser("plan", help="which chain and which coordinator a request would use, and why")
    doctor = commands.add_parser("doctor", help="what is reachable, slow or wrong, and what mends it")
    for parser in (members, plan, doctor):
        parser.add_argument("--json", action="store_const", const=True, help="print one JSON object")
    for parser in (invite, members, revoke, plan, doctor):
        parser.add_argument("--swarm", help="the swarm's name on this machine (default: default)")


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--swarm", help="the swarm's name on this machine, or a folder (default: default)")
    parser.add_argument("--listen", help="multiaddr to listen on (in a swarm: /ip4/0.0.0.0/tcp/4001)")
    parser.add_argument("--announce", help="address that others reach this machine at, like /ip4/203.0.113.5/tcp/4001")
    parser.add_argument("--relay", action="store_const", const=True, help="pass connections on between others")
    parser.add_argument(
        "--lan", action=argparse.BooleanOptionalAction, help="find members on the local network by multicast DNS"
    )
    parser.add_argument("--through", help="be reached through the relay of this address")
    parser.add_argument(
        "--max-layers", type=int, help="hold at most so many layers (default: what memory has room for)"
    )
    parser.add_argument("--memory", help="memory for layers and cache, like 8GB (default: 60%% of what is free)")
    parser.add_argument(
        "--draft", choices=["ngram", "none"], help="coordinate for others with this drafter (default ngram)"
    )
    parser.add_argument("--heartbeat", help="interval of heartbeats (default 1s, 50ms to 10s)")
    parser.add_argument("--record", metavar="FILE", help="append the node's telemetry, for dsd top --replay")
    _add_trace_flag(parser)
    parser.add_argument("--slowdown", type=float, help=argparse.SUPPRESS)


def _add_bench_commands(bench: argparse.ArgumentParser) -> None:
    benchmarks = bench.add_subparsers(dest="what", required=True)

    overhead = benchmarks.add_parser("overhead", help="what splitting a model into stages costs")
    _add_model_flags(overhead)
    _add_generate_flags(overhead)

    ring = benchmarks.add_parser("ring", help="the protocol on fake stages with recorded tokens")
    ring.add_argument("--links", dest="link", help="one-way latency of every link, like 50ms (default)")
    ring.add_argument("--stages", type=int, help="number of fake stages (default 4)")
    ring.add_argument("--stage-time", help="seconds of a stage's pass, like 5ms (default)")
    ring.add_argument("--node-time", help="what each node of the pass adds (default 0ms)")
    ring.add_argument("--draft-time", help="seconds of a draft step, like 6ms (default)")
    ring.add_argument("--rate", help="bandwidth of every link, like 100mbit (default unlimited)")
    ring.add_argument("--jitter", help="jitter of every link, like 5ms (default none)")
    ring.add_argument("--max-tokens", type=int, help="tokens of each text (default 64)")
    ring.add_argument("--trace", help="file of recorded agreement (default: the bundled one)")
    ring.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags")
    ring.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    relaxed = benchmarks.add_parser("relaxed", help="problems solved in exact and in relaxed mode")
    _add_pair_flags(relaxed)
    relaxed.add_argument("--problems", type=int, help="of maths and of code each (default 80)")
    relaxed.add_argument(
        "--relaxation", type=_comma_list, metavar="FILES", help="calibrations to compare with exact mode"
    )
    relaxed.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    wan = benchmarks.add_parser("wan", help="real models on emulated wide-area links, every arm side by side")
    wan.add_argument("--links", type=_comma_list, help="one-way latencies, like 10ms,50ms (default 50ms)")
    wan.add_argument("--stages", type=_int_list, help="numbers of stages, like 2,4 (default 3)")
    wan.add_argument("--models", type=_comma_list, help="targets (default smollm2-135m)")
    wan.add_argument("--prompts", type=_comma_list, help="categories (default chat,maths,code)")
    wan.add_argument("--dtype", help="of the target (default float32)")
    wan.add_argument("--device", help="torch device (default cpu)")
    wan.add_argument("--threads", type=int, help="torch threads of a process (default 1)")
    wan.add_argument("--draft", help="drafter (default: what measured best for each target)")
    wan.add_argument("--draft-dtype", help="dtype of a drafting model (default: the target's)")
    wan.add_argument("--max-tokens", type=int, help="tokens of each answer (default 64)")
    wan.add_argument("--plain-tokens", type=int, help="tokens of each plain answer (default 16)")
    wan.add_argument("--temperature", type=float, help="0 is greedy (default)")
    wan.add_argument("--seed", type=int, help="of the sampler (default 0)")
    wan.add_argument("--hidden", choices=["model", "bf16", "int8"], help="format of hidden states between stages")
    wan.add_argument("--width", type=int, help="children kept of each node of the tree (default 4)")
    wan.add_argument("--window-nodes", type=int, help="nodes of a window of the tree (default 8)")
    wan.add_argument("--in-flight", type=int, help="most windows of the tree under way (default 64)")
    wan.add_argument("--netlab", action="store_const", const=True, help="real TCP between network namespaces (root)")
    wan.add_argument("--relaxed", action="store_const", const=True, help="also run the tree in relaxed mode")
    wan.add_argument("--relaxation", metavar="FILE", help="thresholds of relaxed mode")
    wan.add_argument("--arms", type=_comma_list, help="windows of the catalogue, or all (default: one of each mode)")
    wan.add_argument("--policies", type=_comma_list, help="with --arms: policies that run beside them, like analytic")
    wan.add_argument("--finalists", type=int, help="only so many of the fastest windows go on after the first round")
    wan.add_argument(
        "--record", action="store_const", const=True, help="keep the drafter's candidates for the simulator"
    )
    wan.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags")
    wan.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    users = benchmarks.add_parser("users", help="many requests at once, beside one alone")
    _add_model_flags(users)
    users.add_argument("--stages", type=int, help="number of stages (default 3)")
    users.add_argument("--sessions", type=int, help="requests at once (default 16)")
    users.add_argument("--policies", type=_comma_list, help="beside plain (default awc)")
    users.add_argument("--draft", help="drafter (default: what measured best)")
    users.add_argument("--draft-dtype", help="dtype of a drafting model (default float32)")
    users.add_argument("--max-tokens", type=int, help="of each answer (default 64)")
    users.add_argument(
        "--in-process", action="store_const", const=True, help="all stages in this process, on one device"
    )
    users.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    passes = benchmarks.add_parser("passes", help="what a stage's pass costs as sessions share it")
    _add_model_flags(passes)
    passes.add_argument("--stages", type=int, help="number of stages (default 3)")
    passes.add_argument("--sessions", type=int, help="at most so many (default 64)")
    passes.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    brokers = benchmarks.add_parser("brokers", help="decoding beside a broker that lives, was killed, or never answers")
    _add_model_flags(brokers)
    brokers.add_argument("--stages", type=int, help="number of stages (default 3)")
    brokers.add_argument("--sessions", type=int, help="requests at once (default 1)")
    brokers.add_argument("--draft", help="drafter (default: what measured best)")
    brokers.add_argument("--max-tokens", type=int, help="of each answer (default 64)")
    brokers.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    formats = benchmarks.add_parser("formats", help="error and size of smaller hidden states on the links")
    _add_model_flags(formats)
    formats.add_argument("--stages", type=int, help="number of stages (default 3)")
    formats.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    attest = benchmarks.add_parser("attest", help="what signing every window costs a stage")
    _add_model_flags(attest)
    attest.add_argument("--stages", type=int, help="number of stages (default 3)")
    attest.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    simulator = benchmarks.add_parser("simulator", help="how fast the simulator is, and what it needs")
    simulator.add_argument("--large", type=int, help="requests of a large run on all cores (default: none)")
    simulator.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")

    benchmarks.add_parser("plots", help="draw the receipts in docs/benchmarks")

    for benchmark in (overhead, ring, relaxed, wan, users, passes, brokers, formats, attest, simulator):
        benchmark.add_argument("--rounds", type=int, help="repetitions of every arm (default 5; ring: 1)")
        benchmark.add_argument("--receipt", metavar="NAME", help="write docs/benchmarks/NAME.json")


def _add_sim_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    profile = commands.add_parser("profile", help="measure this machine for the simulator")
    _add_model_flags(profile)
    profile.add_argument("--stages", type=int, help="of the chain it would be one of (default 3)")
    sim = commands.add_parser("sim", help="what a swarm would do: scenarios in virtual time, with the live core")
    actions = sim.add_subparsers(dest="what", required=True)
    once = actions.add_parser("run", help="simulate a scenario")
    sweep = actions.add_parser("sweep", help="simulate a grid of changes, on all cores")
    trace = actions.add_parser("trace", help="write a run's timeline for chrome://tracing")
    for parser in (once, sweep, trace):
        parser.add_argument("scenario", help="TOML file, see docs/simulator.md")
        parser.add_argument(
            "--set", action="append", metavar="NAME=VALUE", help="change a field, like workload.rate=20"
        )
        parser.add_argument("--seed", type=int, help="instead of the scenario's")
    once.add_argument("--record", metavar="FILE", help="write the run's telemetry, for dsd top --replay")
    trace.add_argument("--output", metavar="FILE", help="default trace.json")
    sweep.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="NAME=VALUE,VALUE",
        help="values of a field; several: every combination",
    )
    sweep.add_argument("--seeds", type=int, help="runs of every point (default 1)")
    sweep.add_argument("--processes", type=int, help="default: one a core")
    sweep.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster; local starts one")
    sweep.add_argument("--plot", metavar="FILE", help="draw throughput and time per token")
    for parser in (once, sweep):
        parser.add_argument("--csv", metavar="FILE", help="write one row a request (run) or a report (sweep)")
    compare = actions.add_parser("compare", help="predict measured runs, and print predicted against measured")
    compare.add_argument("receipts", nargs="+", help="receipts of dsd bench wan --arms ... --record, or their folder")
    compare.add_argument("--held-out", action="store_const", const=True, help="only what nothing was fitted to")
    for parser in (once, sweep, compare):
        parser.add_argument("--json", action="store_const", const=True, help="print the result as one JSON object")
    record = actions.add_parser("record", help="record from two real models how well one guesses the other")
    _add_pair_flags(record)
    record.add_argument("--texts", type=int, help="texts of each category (default 12)")
    record.add_argument("--output", metavar="FILE", help="where to write the trace (default agreement.json.gz)")


def _add_pair_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags")
    parser.add_argument("--model", help="the target (default qwen2.5-coder-1.5b)")
    parser.add_argument("--draft", help="the drafting model (default qwen2.5-coder-0.5b)")
    parser.add_argument("--dtype", help="of both models (default bfloat16)")
    parser.add_argument("--device", help="torch device (default cpu)")
    parser.add_argument("--threads", type=int, help="torch threads (default 2)")
    parser.add_argument("--max-tokens", type=int, help="most tokens of each text (default 128; bench relaxed: 384)")
    parser.add_argument("--batch", type=int, help="texts written side by side (default 8)")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags")
    parser.add_argument("--model", help="a catalog name, a folder or a Hugging Face id (default smollm2-135m)")
    parser.add_argument("--dtype", help="float32 (default, exact in every mode), bfloat16 or float16")
    _add_compute_flags(parser)


def _add_compute_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="torch device (default cpu)")
    parser.add_argument("--threads", type=int, help="torch threads of a process (default 1)")
    parser.add_argument("--cache-memory", help="cache of one stage, like 1GB (default)")
    parser.add_argument("--link", help="emulated one-way latency of every link, like 50ms")
    parser.add_argument("--rate", help="emulated bandwidth, like 100mbit")
    parser.add_argument("--jitter", help="emulated jitter, like 5ms")
    parser.add_argument("--mqtt", metavar="URL", help="broker to tell what happens: mqtt://HOST:PORT or mqtts://…")
    parser.add_argument("--mqtt-ca", metavar="FILE", help="certificate authority of the broker")


def _add_trace_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--otlp", metavar="URL", help="OpenTelemetry collector for traces, like http://127.0.0.1:4318")


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", type=int, help="start this many stage processes for this answer (default 3)")
    parser.add_argument("--connect", type=_comma_list, help="use a running swarm: address of one of its nodes")
    parser.add_argument("--swarm", help="use this machine's swarm of that name, and its model")
    parser.add_argument(
        "--coordinator", choices=["auto", "self"], help="of a swarm's request: the best placed peer (default), or here"
    )
    parser.add_argument(
        "--audit",
        action="store_const",
        const=True,
        help="in a swarm: stages sign what they compute, and are spot-checked",
    )
    parser.add_argument("--timeout", help="of an answer that another peer coordinates (default 1h)")
    parser.add_argument("--netlab", action="store_const", const=True, help="links between network namespaces (root)")
    parser.add_argument("--prompt", help="what to answer or continue; - reads standard input")
    parser.add_argument("--prompt-ids", help="the prompt as token ids, separated by commas")
    parser.add_argument("--raw", action="store_const", const=True, help="no chat template: continue the prompt")
    parser.add_argument("--max-tokens", type=int, help="most new tokens (default 128)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int, help="of the sampler (default 0)")
    parser.add_argument("--mode", choices=["plain", "sync", "continuous"], help="default continuous")
    parser.add_argument("--draft", help="ngram, shadow, a model, or auto (default)")
    parser.add_argument("--draft-dtype", help="dtype of a drafting model (default float32)")
    parser.add_argument(
        "--window",
        choices=["awc", "analytic", "static"],
        help="default awc, which learned to in the simulator; analytic: the latency model alone; the numbers below mean static",
    )
    parser.add_argument("--depth", type=int, help="deepest draft; γ in sync mode")
    parser.add_argument("--width", type=int, help="children kept of each draft node; 1 is a chain")
    parser.add_argument("--window-nodes", type=int, help="most nodes a window carries")
    parser.add_argument("--in-flight", type=int, help="most windows under way")
    parser.add_argument("--prefill-chunk", type=int, help="prompt tokens a window (default 128)")
    parser.add_argument("--stall-timeout", help="give a silent chain up after this long (default 60s)")
    parser.add_argument("--hidden", choices=["model", "bf16", "int8"], help="format of hidden states between stages")
    parser.add_argument(
        "--verify", choices=["exact", "relaxed"], help="exact (default): every token is the target's own"
    )
    parser.add_argument("--relaxation", metavar="FILE", help="thresholds of relaxed mode, made by dsd calibrate")
    parser.add_argument("--tau", type=float, help="weight of the drafter in relaxed mode, instead of the file's")
    parser.add_argument("--json", action="store_const", const=True, help="print one JSON object instead of text")


def _comma_list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _int_list(text: str) -> list[int]:
    try:
        return [int(part) for part in _comma_list(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers separated by commas") from None
