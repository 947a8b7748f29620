"""Implements `dsd profile`: measure a stage's passes on this machine and print them for a scenario file."""

import sys
import time

from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.open import open_span
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span
from node.console import ConsoleProgress
from node.lab.config import ProfileConfig
from node.local.formats import with_format
from node.member.measure import describe_machine, pass_s

_NODES = (1, 2, 4, 8, 16, 32, 64, 128)


def run(config: ProfileConfig) -> int:
    """Measure one middle layer and the last one, and print a `[[targets]]` table."""
    with ConsoleProgress() as progress:
        source = find_model(config.model, progress)
        config = with_format(config, source)
        num_layers = read_shape(source.folder).num_layers
        curves = []
        for what, first in (("a middle layer", num_layers // 2), ("the tail", num_layers - 1)):
            model = open_span(source, Span(first, first + 1), dtype=config.dtype, device=config.device)
            curve = []
            for done, count in enumerate(_NODES):
                progress.step(f"measure {what}", done, len(_NODES))
                curve.append(pass_s(model, count))
            curves.append(curve)
            row_bytes = model.row_bytes
    layer, tail = curves
    # A scenario's stages are alike, so the tail's extra time is spread over all of them.
    stage = [
        (layer_s * num_layers + max(0.0, tail_s - layer_s)) / config.stages
        for layer_s, tail_s in zip(layer, tail, strict=True)
    ]
    points = ", ".join(f"[{count}, {seconds:.6f}]" for count, seconds in zip(_NODES, stage, strict=True))
    command = " ".join(["dsd", *sys.argv[1:]])
    print(f"# {config.model} {config.dtype}, {describe_machine(config)}, {time.strftime('%Y-%m-%d')}; {command}")
    print("[[targets]]")
    print(f"stages = {config.stages}")
    print(f"hidden_bytes = {row_bytes}")
    print(f"stage = {{ points = [{points}] }}")
    return 0
