"""A scenario file: who drafts, who verifies, what lies between them and what is asked for (TOML, docs/simulator.md)."""

import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.placement.balance import Routing
from dsd_p2p.sim.answer import AgreementModel
from dsd_p2p.sim.service import PassCost, Spread
from dsd_p2p.sim.target import Batching

_OLD_FIELDS = {"speculation.window": "speculation.policy"}
_OLD_VALUES = {"awc": "learned"}
MAX_PEERS = 64
"""Peers in a simulated swarm."""

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Seconds(float):
    """Written as `30ms`, `2s`, `1h`."""


class BitsPerSecond(float):
    """Written as `100mbit`."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Link(_Table, frozen=True, kw_only=True):
    """A link: `latency` is one way. back_latency: of the way back, where it is another."""

    latency: Seconds = Seconds(0)
    back_latency: Seconds | None = None
    jitter: Seconds = Seconds(0)
    bandwidth: BitsPerSecond = BitsPerSecond(0)
    loss: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    stall_every: Seconds = Seconds(0)
    stall: Seconds = Seconds(0)

    def models(self) -> tuple[LinkModel, LinkModel]:
        """Return the way there and the way back."""
        there = LinkModel(
            latency_s=self.latency,
            jitter_s=self.jitter,
            bandwidth_bps=self.bandwidth,
            loss=self.loss,
            stall_every_s=self.stall_every,
            stall_s=self.stall,
        )
        return there, there if self.back_latency is None else replace(there, latency_s=self.back_latency)


class Cost(_Table, frozen=True, kw_only=True):
    """Seconds of a pass: `fixed + per_node * n + per_window * (windows - 1)`, or measured `points` of [n, seconds].

    per_context: what attention adds for each position of the text behind a window.
    """

    fixed: Seconds = Seconds(0)
    per_node: Seconds = Seconds(0)
    per_window: Seconds = Seconds(0)
    per_context: Seconds = Seconds(0)
    points: tuple[tuple[Annotated[int, Meta(ge=0, le=1_000_000)], Annotated[float, Meta(ge=0)]], ...] = ()

    def pass_cost(self) -> PassCost:
        """Return it as a curve.

        Raises:
            ConfigError: the points do not ascend.
        """
        if not self.points:
            return PassCost.line(self.fixed, self.per_node, self.per_window, self.per_context)
        nodes = tuple(n for n, _ in self.points)
        if list(nodes) != sorted(set(nodes)):
            raise ConfigError(f"points {list(nodes)}: numbers of positions must ascend")
        return PassCost(
            nodes=nodes,
            seconds=tuple(s for _, s in self.points),
            per_window_s=self.per_window,
            per_context_s=self.per_context,
        )


class DrafterPool(_Table, frozen=True, kw_only=True):
    """Machines that draft; each also asks. step: one draft step over n stems."""

    count: Count = 1
    link: str
    step: Cost


class TargetPool(_Table, frozen=True, kw_only=True):
    """Targets of one kind.

    stages: of each. stage: one stage's pass. inner_link: between stages. max_batch: windows of one pass.
    draft_step: of a drafter that sits at the target, for `placement = "target"`.
    cores: that all stages of one target share; 0 is a machine for each.
    """

    count: Count = 1
    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    stage: Cost
    inner_link: str = ""
    hidden_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 1
    batching: Batching = Batching.FIFO
    spread: Spread = Spread.NONE
    cores: Annotated[float, Meta(ge=0, le=4096)] = 0.0
    draft_step: Cost | None = None


class PeerPool(_Table, frozen=True, kw_only=True):
    """Peers of one kind that each hold a part of the model (`layers`), which the live placement code chooses when they join.

    max_layers: that their memory has room for. layer: one layer's pass. link: to and from them, beside the other machine's own.
    load: what loading a layer takes when a peer must hold others because nobody does.
    """

    count: Count = 1
    max_layers: Annotated[int, Meta(ge=1, le=1024)]
    layer: Cost
    link: str
    load: Seconds = Seconds(0)
    hidden_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 1
    batching: Batching = Batching.FIFO
    spread: Spread = Spread.NONE


class Length(_Table, frozen=True, kw_only=True):
    """Tokens: log-normal with this mean and coefficient of variation, between 1 and `most`; `variation = 0` is constant."""

    mean: Annotated[float, Meta(ge=1, le=1_000_000)]
    variation: Annotated[float, Meta(ge=0, le=10)] = 0.0
    most: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096


class Workload(_Table, frozen=True, kw_only=True):
    """What is asked.

    arrivals: "poisson" or "gamma" at `rate` requests a second, "closed" with `concurrency` requests under way at any time (each
        drafter's next after `think`), or "trace" with one JSON object a line in `file` (arrival_s, prompt_tokens, answer_tokens).
    burstiness: of gamma arrivals, coefficient of variation. slo_ttft, slo_tpot: what a request counts as good by, and its deadline.
    """

    requests: Annotated[int, Meta(ge=1, le=100_000_000)]
    arrivals: Annotated[str, Meta(pattern="^(poisson|gamma|closed|trace)$")] = "poisson"
    rate: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    burstiness: Annotated[float, Meta(gt=0, le=100)] = 1.0
    concurrency: Count = 1
    think: Seconds = Seconds(0)
    file: str = ""
    prompt: Length = Length(mean=64)
    answer: Length = Length(mean=64)
    slo_ttft: Seconds = Seconds(2)
    slo_tpot: Seconds = Seconds(0.1)


class Acceptance(_Table, frozen=True, kw_only=True):
    """How often drafts are right: `rate` and its kin (`dsd_p2p.sim.answer.Agreement`), or a recorded `trace`.

    trace: "bundled", or a file of `dsd sim record`. category: only its texts of this kind.
    """

    rate: Share = 0.8
    persistence: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    num_candidates: Annotated[int, Meta(ge=1, le=16)] = 4
    trace: str = ""
    category: str = ""

    def agreement(self) -> AgreementModel:
        """Return the parameters."""
        return AgreementModel(rate=self.rate, persistence=self.persistence, num_candidates=self.num_candidates)


class Speculation(_Table, frozen=True, kw_only=True):
    """How windows are chosen.

    policy: "plain", "static" (`depth`), "tree" (`width`, `window_nodes`, `in_flight`), "threshold", "analytic", "learned".
    modes: what analytic and learned may choose from.
    mode: "distributed" (the drafter's machine coordinates), "fused" (the target writes alone), "auto" (fused while the policy does
        not speculate). placement: of drafter and coordinator, "drafter" or "target".
    """

    policy: Annotated[str, Meta(pattern="^(plain|static|tree|threshold|analytic|learned)$")] = "static"
    modes: tuple[Annotated[str, Meta(pattern="^(sync|continuous)$")], ...] = ("sync", "continuous")
    depth: Annotated[int, Meta(ge=1, le=64)] = 4
    width: Annotated[int, Meta(ge=1, le=16)] = 4
    window_nodes: Annotated[int, Meta(ge=1, le=256)] = 8
    in_flight: Annotated[int, Meta(ge=1, le=512)] = 64
    mode: Annotated[str, Meta(pattern="^(distributed|fused|auto)$")] = "distributed"
    placement: Annotated[str, Meta(pattern="^(drafter|target)$")] = "drafter"
    routing: Routing = Routing.SHORTEST_QUEUE
    prefill_chunk: Annotated[int, Meta(ge=1, le=4096)] = 128
    remembers: bool = True


class Churn(_Table, frozen=True, kw_only=True):
    """Targets that fail: mean time up and down, exponential; 0 never. notice: until a drafter knows."""

    up: Seconds = Seconds(0)
    down: Seconds = Seconds(30)
    notice: Seconds = Seconds(1)


class Scenario(_Table, frozen=True, kw_only=True):
    """All of it. Whole `targets` verify, or `peers` that share the model's `layers`. horizon: the run ends then at the latest."""

    name: str = ""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    horizon: Seconds = Seconds(1e7)
    links: dict[str, Link]
    drafters: Annotated[tuple[DrafterPool, ...], Meta(min_length=1, max_length=64)]
    targets: Annotated[tuple[TargetPool, ...], Meta(max_length=64)] = ()
    peers: Annotated[tuple[PeerPool, ...], Meta(max_length=64)] = ()
    layers: Annotated[int, Meta(ge=0, le=1024)] = 0
    workload: Workload
    acceptance: Acceptance = Acceptance()
    speculation: Speculation = Speculation()
    churn: Churn = Churn()


_PATH = re.compile(r" - at `\$(.*?)`$")


def read_scenario(path: Path) -> Scenario:
    """Return the scenario in `path`.

    Raises:
        ConfigError: with file, line, field and what is allowed there.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"scenario {path}: {exc}; it must be a TOML file, see docs/scenarios") from exc
    return parse_scenario(text, str(path))


def parse_scenario(text: str, name: str) -> Scenario:
    """Return the scenario of that text; `name` is for errors.

    Raises:
        ConfigError: with file, line, field and what is allowed there.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    return _convert(tables, text, name)


def _check(scenario: Scenario, text: str, name: str) -> None:
    """Check what spans several tables."""

    def fail(field: str, reason: str) -> None:
        where = f"{name}:{_line_of(text, '.' + field)}" if text else name
        raise ConfigError(f"{where}: {field}: {reason}")

    known = ", ".join(scenario.links) or "none"
    pools = [
        *((f"drafters[{index}].link", pool.link) for index, pool in enumerate(scenario.drafters)),
        *((f"targets[{index}].inner_link", pool.inner_link) for index, pool in enumerate(scenario.targets)),
        *((f"peers[{index}].link", pool.link) for index, pool in enumerate(scenario.peers)),
    ]
    for field, link in pools:
        if link and link not in scenario.links:
            fail(field, f"{link!r} is none of the [links], {known}")
    if scenario.workload.arrivals == "trace" and not scenario.workload.file:
        fail("workload.arrivals", "a trace needs workload.file")
    if bool(scenario.targets) == bool(scenario.peers):
        fail("peers[0]" if scenario.peers else "targets", "give [[targets]], or [[peers]] and layers, and not both")
    if scenario.peers:
        _check_peers(scenario, fail)
    for index, pool in enumerate(scenario.targets):
        if scenario.speculation.placement == "target" and pool.draft_step is None:
            fail(f"targets[{index}]", 'speculation.placement = "target" needs the draft_step of a drafter there')


def _check_peers(scenario: Scenario, fail: Callable[[str, str], None]) -> None:
    room = sum(pool.count * pool.max_layers for pool in scenario.peers)
    if not 1 <= scenario.layers <= room:
        fail("layers", f"is {scenario.layers}: the peers have room for 1..{room}")
    if sum(pool.count for pool in scenario.peers) > MAX_PEERS:
        fail("peers[0]", f"at most {MAX_PEERS} in all: placement looks at every pair of them")
    if scenario.speculation.placement == "target" or scenario.speculation.mode != "distributed":
        fail("speculation", 'peers are no place to draft at: mode = "distributed" and placement = "drafter" only')
    if scenario.speculation.routing is not Routing.SHORTEST_QUEUE:
        fail(
            "speculation.routing",
            "among peers the route with the fewest predicted seconds a token is taken: leave it out",
        )


def changed(scenario: Scenario, changes: dict[str, Any]) -> Scenario:
    """Return the scenario with other values, by dotted name: `{"speculation.depth": 6, "links.edge.latency": "5ms"}`.

    Raises:
        ConfigError: there is no such field, or it cannot have that value.
    """
    tables = msgspec.to_builtins(scenario, enc_hook=float)
    for dotted, value in changes.items():
        _set(tables, _OLD_FIELDS.get(dotted, dotted).split("."), _present_value(value), dotted)
    return _convert(tables, "", "scenario")


def _set(table: Any, names: list[str], value: Any, dotted: str) -> None:
    """Change a field; of a list of tables the one whose number comes next, or all of them."""
    name, *rest = names
    if isinstance(table, list | tuple):
        if name.isdecimal() and int(name) < len(table) and rest:
            _set(table[int(name)], rest, value, dotted)
            return
        for each in table:
            _set(each, names, value, dotted)
    elif not rest:
        table[name] = value
    elif isinstance(table.get(name), dict | list | tuple):
        _set(table[name], rest, value, dotted)
    else:
        raise ConfigError(f"scenario has no {dotted}")


def _present_value(value: Any) -> Any:
    return _OLD_VALUES.get(value, value) if isinstance(value, str) else value


def _with_present_names(tables: dict[str, Any]) -> dict[str, Any]:
    """Return a file's tables with today's names: files of before have `[[nodes]]` and `speculation.window`."""
    tables = {"peers" if name == "nodes" else name: table for name, table in tables.items()}
    if isinstance(speculation := tables.get("speculation"), dict):
        renamed = {"policy" if name == "window" else name: value for name, value in speculation.items()}
        tables["speculation"] = {name: _present_value(value) for name, value in renamed.items()}
    return tables


def _convert(tables: dict[str, Any], text: str, name: str) -> Scenario:
    tables = _with_present_names(tables)
    try:
        scenario = msgspec.convert(tables, type=Scenario, dec_hook=_quantity)
    except msgspec.ValidationError as exc:
        found = _PATH.search(str(exc))
        field = found[1] if found else ""
        reason = str(exc)[: found.start()] if found else str(exc)
        if unknown := re.search("unknown field `(.*?)`", reason):
            field += f".{unknown[1]}"
        quoted = re.search(r"'(.*?)'", reason)
        where = f"{name}:{_line_of(text, field, quoted[1] if quoted else '')}" if text else name
        raise ConfigError(f"{where}: {field.lstrip('.') or 'scenario'}: {reason}") from exc
    _check(scenario, text, name)
    return scenario


def _quantity(kind: type, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return kind(value)
    if not isinstance(value, str):
        raise ValueError("write a number and a unit, like 30ms")  # noqa: TRY004 - msgspec turns it into its own error
    try:
        return kind(units.seconds(value) if kind is Seconds else units.bits_per_second(value))
    except ConfigError as exc:
        raise ValueError(str(exc)) from exc


def _line_of(text: str, path: str, hint: str = "") -> int:
    """The line of a field like `.targets[1].stage.fixed`, or of the nearest thing around it; of several the one with `hint` in it.

    msgspec writes `[...]` where it does not say which entry of a table it means.
    """
    wanted = re.findall(r"[^.\[\]]+|\[[^\]]*\]", path)
    counts: Counter[str] = Counter()
    table: list[str] = []
    found: dict[int, list[tuple[int, str]]] = {0: [(1, "")]}
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*(\[\[?)\s*([\w.-]+)\s*\]\]?", line)
        key = re.match(r"\s*([\w.-]+)\s*=", line)
        if header:
            table = header[2].split(".")
            if header[1] == "[[":
                table.append(f"[{counts[header[2]]}]")
                counts[header[2]] += 1
        here = [*table, *(key[1].split(".") if key else ())]
        is_around = (header or key) and len(here) <= len(wanted)
        if is_around and all(w in (h, "[...]") for h, w in zip(here, wanted, strict=False)):
            found.setdefault(len(here), []).append((number, line))
    nearest = found[max(found)]
    return next((number for number, line in nearest if hint and hint in line), nearest[0][0])
