"""Reads scenario files, and changes fields of a scenario by name (TOML, docs/simulator.md)."""

import re
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.placement.balance import Routing
from dsd_p2p.sim.scenario import MAX_PEERS, Scenario, Seconds

_OLD_FIELDS = {"speculation.window": "speculation.policy"}
_OLD_VALUES = {"awc": "learned"}
"""Names of earlier versions, which old files and scripts still use."""

_PATH = re.compile(r" - at `\$(.*?)`$")


def read_scenario(path: Path) -> Scenario:
    """Return the scenario in `path`.

    Raises:
        ConfigError: the file is unreadable or wrong; the message names file, line, field and what is allowed there.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"scenario {path}: {exc}; it must be a TOML file, see docs/scenarios") from exc
    return parse_scenario(text, str(path))


def parse_scenario(text: str, name: str) -> Scenario:
    """Return the scenario that `text` describes. name: stands for the file in errors.

    Raises:
        ConfigError: the text is wrong; the message names file, line, field and what is allowed there.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    return _convert(tables, text, name)


def _check(scenario: Scenario, text: str, name: str) -> None:
    """Check the rules that span several tables."""

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
            fail(field, f"is {link!r}, expected one of the [links]: {known}")
    if scenario.workload.arrivals == "trace" and not scenario.workload.file:
        fail("workload.arrivals", '"trace" needs workload.file')
    if bool(scenario.targets) == bool(scenario.peers):
        fail("peers[0]" if scenario.peers else "targets", "give either [[targets]], or [[peers]] and layers")
    if scenario.peers:
        _check_peers(scenario, fail)
    for index, pool in enumerate(scenario.targets):
        if scenario.speculation.placement == "target" and pool.draft_step is None:
            fail(f"targets[{index}]", 'is missing draft_step, which speculation.placement = "target" needs')


def _check_peers(scenario: Scenario, fail: Callable[[str, str], None]) -> None:
    room = sum(pool.count * pool.max_layers for pool in scenario.peers)
    if not 1 <= scenario.layers <= room:
        fail("layers", f"is {scenario.layers}, expected 1 to {room}, the layers that fit into the peers")
    if sum(pool.count for pool in scenario.peers) > MAX_PEERS:
        fail("peers[0]", f"expected at most {MAX_PEERS} peers in all: placement looks at every pair of them")
    if scenario.speculation.placement == "target" or scenario.speculation.mode != "distributed":
        fail("speculation", 'peers cannot draft: set mode = "distributed" and placement = "drafter"')
    if scenario.speculation.routing is not Routing.SHORTEST_QUEUE:
        fail(
            "speculation.routing",
            "has no effect with peers, which take the route with the fewest predicted seconds per token: leave it out",
        )


def changed(scenario: Scenario, changes: dict[str, Any]) -> Scenario:
    """Return the scenario with `changes` by dotted name: `{"speculation.depth": 6, "links.edge.latency": "5ms"}`.

    Raises:
        ConfigError: there is no such field, or it cannot have that value.
    """
    tables = msgspec.to_builtins(scenario, enc_hook=float)
    for dotted, value in changes.items():
        _set(tables, _OLD_FIELDS.get(dotted, dotted).split("."), _present_value(value), dotted)
    return _convert(tables, "", "scenario")


def _set(table: Any, names: list[str], value: Any, dotted: str) -> None:
    """Set a field. In a list of tables, set it in the table whose number comes next in `names`, or in all of them."""
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
        raise ConfigError(f"scenario has no field {dotted}: see docs/simulator.md for the fields")


def _present_value(value: Any) -> Any:
    return _OLD_VALUES.get(value, value) if isinstance(value, str) else value


def _with_present_names(tables: dict[str, Any]) -> dict[str, Any]:
    """Return a file's tables with today's names: old files have `[[nodes]]` and `speculation.window`."""
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
        raise ValueError("expected a number and a unit, like 30ms")  # noqa: TRY004 - msgspec turns it into its own error
    try:
        return kind(units.seconds(value) if kind is Seconds else units.bits_per_second(value))
    except ConfigError as exc:
        raise ValueError(str(exc)) from exc


def _line_of(text: str, path: str, hint: str = "") -> int:
    """Return the line of a field like `.targets[1].stage.fixed`, or of the nearest table around it.

    Prefer a line that contains `hint`. msgspec writes `[...]` where it does not say which entry it means.
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
