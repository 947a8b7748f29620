"""Implements `dsd bench plots`: draws the receipts of `dsd bench wan` and `dsd bench simulator`."""

from importlib.util import find_spec
from pathlib import Path

import msgspec

from dsd_p2p.errors import ConfigError
from node.lab.receipt import RECEIPTS

_LABELS = {
    "plain": "plain",
    "sync_chain_8": "synchronous chain, γ = 8",
    "sync_chain": "synchronous chain, best γ",
    "sync_tree": "synchronous tree",
    "continuous_chain": "continuous chain",
    "continuous_tree": "continuous tree",
    "continuous_tree_relaxed": "continuous tree, relaxed",
    "analytic": "analytic policy",
    "awc": "learned policy",
    "learned": "learned policy",
}


class _Sample(msgspec.Struct):
    median: float
    low: float
    high: float


class _Cell(msgspec.Struct):
    model: str
    stages: int
    link: str
    device: str
    temperature: float
    tokens_per_s: dict[str, _Sample]
    predicted_tokens_per_s: dict[str, float]


class _Results(msgspec.Struct):
    cells: list[_Cell]


class _Scale(msgspec.Struct):
    drafters: int
    requests: float
    cpu_s: float


class _SimulatorResults(msgspec.Struct):
    scaling: list[_Scale]


class _Receipt(msgspec.Struct):
    benchmark: str
    results: msgspec.Raw


def draw_plots() -> list[Path]:
    """Draw every receipt that there is and return the files.

    Raises:
        ConfigError: matplotlib is missing, or there are no receipts of `dsd bench wan`.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'dsd-p2p[bench]'")
    return [*_draw_links(), *_draw_scaling()]


def _draw_scaling() -> list[Path]:
    """Draw the simulator's CPU time for one request of each drafter against the number of drafters."""
    from matplotlib.figure import Figure

    written = []
    for path in sorted(RECEIPTS.glob("*.json")):
        receipt = msgspec.json.decode(path.read_bytes(), type=_Receipt)
        if receipt.benchmark != "simulator":
            continue
        scales = msgspec.json.decode(receipt.results, type=_SimulatorResults).scaling
        drafters = [scale.drafters for scale in scales]
        seconds = [scale.cpu_s / scale.requests * scale.drafters for scale in scales]
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(drafters, seconds, marker="o", label="measured")
        axes.plot(drafters, [seconds[0] / drafters[0] * count for count in drafters], linestyle=":", label="linear")
        axes.set(xlabel="drafters", ylabel="CPU seconds for a request of each", xscale="log", yscale="log")
        axes.legend()
        figure.savefig(written_to := path.with_suffix(".svg"))
        written.append(written_to)
    return written


def _draw_links() -> list[Path]:
    """Draw tokens a second against link latency: one picture for each model, number of stages and device."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, int, str], list[_Cell]] = {}
    for path in sorted(RECEIPTS.glob("*.json")):
        receipt = msgspec.json.decode(path.read_bytes(), type=_Receipt)
        if receipt.benchmark == "wan":
            for cell in msgspec.json.decode(receipt.results, type=_Results).cells:
                if cell.temperature:
                    continue
                groups.setdefault((cell.model, cell.stages, cell.device), []).append(cell)
    if not groups:
        raise ConfigError(f"no receipts of dsd bench wan in {RECEIPTS}: run scripts/bench wan first")
    written = []
    for (model, stages, device), cells in groups.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        cells.sort(key=_latency_ms)
        latencies = [_latency_ms(cell) for cell in cells]
        for arm, label in _LABELS.items():
            points = [
                (x, cell.tokens_per_s[arm])
                for x, cell in zip(latencies, cells, strict=True)
                if arm in cell.tokens_per_s
            ]
            if not points:
                continue
            xs, medians = [x for x, _ in points], [sample.median for _, sample in points]
            spread = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            line = axes.errorbar(xs, medians, yerr=spread, marker="o", capsize=3, label=label)
            promised = [cell.predicted_tokens_per_s.get(arm, float("nan")) for cell in cells]
            if arm in ("plain", "continuous_tree"):
                axes.plot(
                    latencies, promised, linestyle=":", color=line[0].get_color(), label=f"{label}: latency model"
                )
        axes.set(
            title=f"{model}, {stages} stages, {device}", xlabel="one-way link latency, ms", ylabel="tokens a second"
        )
        axes.set_yscale("log")
        axes.legend(fontsize="small")
        path = RECEIPTS / f"wan-{model}-{stages}-{device}.svg"
        figure.savefig(path)
        written.append(path)
    return written


def _latency_ms(cell: _Cell) -> float:
    from dsd_p2p import units

    return 1e3 * units.seconds(cell.link)
