"""Runs a swarm on this machine, to try things out (`up`) or to test it hard (`chaos`, `siege`, `attack`, `place`).

`up` and `chaos` use network namespaces and need root.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

from dsd_p2p.errors import DsdError, first_cause
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.telemetry.events import encode_event, read_events
from node.config import GatewayConfig
from node.lab.receipt import machine, write_receipt
from node.lab.testnet.attack import API_KEY, Suite
from node.lab.testnet.chaos import Chaos, Plan
from node.lab.testnet.placement import measure_placement
from node.lab.testnet.siege import ATTACKERS, Siege
from node.lab.testnet.swarm import Layout, open_testnet

_MODEL = "smollm2-135m"
_QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers of Europe.",
    "What is 17 times 23? Show your work.",
    "Write a haiku about the sea.",
    "Explain what a compiler does to a child.",
    "List the planets of the solar system in order.",
    "What happens when water freezes?",
    "Write a Python function that reverses a string.",
)


def main() -> int:
    """Run one command and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/testnet", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="run until Ctrl-C")
    up.set_defaults(receipt=None, json=False)
    chaos = commands.add_parser("chaos", help="break peers and links while clients write")
    chaos.add_argument("--minutes", type=float, default=10.0)
    chaos.add_argument("--clients", type=int, default=4)
    chaos.add_argument("--tokens", type=int, default=48)
    chaos.add_argument("--draft", default="ngram", help="drafter of the clients and of the members that draft for them")
    chaos.add_argument("--drafters", type=int, default=0, help="how many of the nodes only draft")
    chaos.add_argument("--record", metavar="FILE", help="write the telemetry of all processes, for dsd top --replay")
    chaos.add_argument("--json", action="store_true", help="print the outcome as one JSON object, the last line")
    siege = commands.add_parser("siege", help="attack a peer while an honest client writes (needs no root)")
    siege.add_argument("--frames", type=int, default=1_000_000)
    siege.add_argument("--handshakes", type=int, default=10_000)
    siege.add_argument("--rounds", type=int, default=3)
    siege.add_argument("--json", action="store_true", help="print the outcome as one JSON object, the last line")
    attack = commands.add_parser("attack", help="carry out all known attacks while an honest client writes (no root)")
    attack.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth attack")
    attack.add_argument("--json", action="store_true", help="print the outcome as one JSON object, the last line")
    place = commands.add_parser("place", help="compare placement with an even split, one of four peers slow (no root)")
    place.add_argument("--rounds", type=int, default=5)
    place.add_argument("--json", action="store_true", help="print the outcome as one JSON object, the last line")
    for each in (up, chaos):
        each.add_argument("--nodes", type=int, default=8)
        each.add_argument("--max-layers", type=int, default=12)
        each.add_argument("--heartbeat", type=float, default=0.75, help="seconds")
        each.add_argument("--seed", type=int, default=0)
    for each in (chaos, siege, attack, place):
        each.add_argument("--receipt", metavar="NAME", help="write docs/benchmarks/NAME.json")
    options = parser.parse_args()
    before = machine()
    try:
        with tempfile.TemporaryDirectory(prefix="dsd-testnet-") as folder:
            outcome = trio.run(_COMMANDS[options.command], options, Path(folder))
    except (DsdError, BaseExceptionGroup, KeyboardInterrupt) as exc:
        cause = first_cause(exc)
        if isinstance(cause, KeyboardInterrupt):
            return 130
        if not isinstance(cause, DsdError):
            raise
        print(f"scripts/testnet: {cause}", file=sys.stderr)
        return 1
    if options.receipt:
        write_receipt(options.receipt, options.command, outcome, before, program="scripts/testnet")
    print(json.dumps(outcome) if options.json else "\n".join(f"{key}: {value}" for key, value in outcome.items()))
    return 0 if _is_good(outcome) else 1


def _is_good(outcome: dict[str, Any]) -> bool:
    """Return whether the outcome is free of errors."""
    bad = ("wrong", "hung", "leaked", "failed_while_covered", "not_held", "honest_wrong")
    return outcome.get("is_alive", True) and not any(outcome.get(name) for name in bad)


def _layout(options: argparse.Namespace, num_clients: int) -> Layout:
    return Layout(
        num_nodes=options.nodes,
        num_clients=num_clients,
        max_layers=options.max_layers,
        model=_MODEL,
        heartbeat_s=options.heartbeat,
        seed=options.seed,
    )


async def _up(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    async with open_testnet(_layout(options, 0), folder) as net:
        for node in net.nodes:
            await net.start_node(node.index)
        await net.all_ready(net.nodes)
        print(f"{options.nodes} peers are up; Ctrl-C ends them. List them with")
        print(f"dsd members --swarm {net.nodes[0].state.folder}/", flush=True)
        await trio.sleep_forever()
    return {}


async def _chaos(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    prompts, expected = await trio.to_thread.run_sync(_reference, options.tokens)
    recordings = folder / "recordings"
    recordings.mkdir()
    layout = dataclasses.replace(
        _layout(options, options.clients),
        record=str(recordings) if options.record else "",
        draft=options.draft,
        num_drafters=options.drafters,
    )
    async with open_testnet(layout, folder) as net:
        plan = Plan(minutes=options.minutes, seed=options.seed, prompts=prompts, expected=expected)
        outcome = (await Chaos(net, plan).run()).as_dict()
    if options.record:
        _merge(recordings, Path(options.record))
    return outcome


def _merge(folder: Path, file: Path) -> None:
    """Merge the events of all processes into one file, ordered by time."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    events = sorted(read_events(lines), key=lambda event: event.at_s)
    file.write_bytes(b"".join(encode_event(event) + b"\n" for event in events))


async def _siege(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    prompts, expected = await trio.to_thread.run_sync(_reference, 32)
    layout = Layout(num_nodes=2, num_clients=1 + ATTACKERS, max_layers=18, model=_MODEL, is_loopback=True)
    elsewhere = dataclasses.replace(layout, num_nodes=1, max_layers=30, base_port=layout.base_port + 50)
    async with open_testnet(layout, folder / "net") as net, open_testnet(elsewhere, folder / "decoy") as decoy:
        return await Siege(net, decoy, options.frames, options.handshakes, options.rounds, expected).run(prompts)


async def _attack(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    prompts, expected = await trio.to_thread.run_sync(_reference, 32)
    keys = folder / "keys.toml"
    keys.write_text(f'[[key]]\nname = "attackers"\nkey = "{API_KEY}"\n')
    nets = [
        Layout(
            num_nodes=2,
            num_clients=1,
            max_layers=18,
            model=_MODEL,
            is_loopback=True,
            base_port=port,
            gateway=GatewayConfig(port=port + 40, api_keys=str(keys)),
        )
        for port in (42100, 42150)
    ]
    async with open_testnet(nets[0], folder / "net") as net, open_testnet(nets[1], folder / "decoy") as decoy:
        return await Suite(net, decoy, find_model(_MODEL, NoProgress()), expected, options.every).run(prompts)


async def _place(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    prompts, expected = await trio.to_thread.run_sync(_reference, 24)
    return await measure_placement(folder, _MODEL, prompts[0], expected[0], options.rounds)


_COMMANDS = {"up": _up, "chaos": _chaos, "siege": _siege, "attack": _attack, "place": _place}


def _reference(num_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts and the unsplit model's answer to each."""
    import torch

    from dsd_p2p.models.loader import load_whole
    from dsd_p2p.models.text import TextCodec

    source = find_model(_MODEL, NoProgress())
    text = TextCodec(source.folder)
    model = load_whole(source, torch.float32)
    # Go on past the end of the text, so that all answers have the same length and more tokens can be wrong.
    model.generation_config.eos_token_id = None
    prompts, answers = [], []
    for question in _QUESTIONS:
        prompt = text.encode(question, is_raw=False)
        inputs = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        prompts.append(prompt)
        answers.append(output[0, len(prompt) :].tolist())
    return prompts, answers


if __name__ == "__main__":
    sys.exit(main())
