"""Implements `dsd models list|pull|path|families`."""

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.catalog import CATALOG
from node.config import ModelsConfig
from node.console import ConsoleProgress, console


def run(config: ModelsConfig) -> int:
    """List the catalog, download a model, print the folder that transformers can load, or try the families."""
    name = config.name
    match config.action:
        case "list":
            _list()
        case "families":
            _families(config)
        case action if not name:
            raise ConfigError(
                f"dsd models {action} needs a model: one of {', '.join(CATALOG)}, a folder, a GGUF file or a hub id"
            )
        case "pull":
            _pull(config)
            console.print(f"{name} is ready")
        case _:
            print(_find(name))
    return 0


def _find(name: str) -> str:
    from dsd_p2p.models.source import find_model

    with ConsoleProgress() as progress:
        return str(find_model(name, progress).path)


def _pull(config: ModelsConfig) -> None:
    """Fetch a whole model, or the files of one span."""
    from dsd_p2p.models.source import pull_model

    with ConsoleProgress() as progress:
        source = pull_model(config.name, progress)
        tensors = source.weights.names
        if config.span:
            from dsd_p2p.models.loader import tensors_of

            tensors = tensors_of(source, units.span(config.span))
        source.fetch(tensors, progress)


def _list() -> None:
    from dsd_p2p.models.source import is_cached

    table = Table(box=None)
    for column in ("model", "what", "download", "licence", "cached"):
        table.add_column(column)
    for model in CATALOG.values():
        size = f"{model.num_bytes / 1e6:.0f} MB"
        table.add_row(model.name, model.description, size, model.licence, "yes" if is_cached(model.name) else "no")
    Console().print(table)


def _families(config: ModelsConfig) -> None:
    """Try the families, print a line for each, and write the table or a JSON object if asked for."""
    from node.lab.families import FamilyStatus, all_families, try_families, with_table

    known = all_families()
    if config.name and config.name not in known:
        raise ConfigError(f"no family {config.name!r}: transformers knows {', '.join(known)}")
    page = Path(config.page)
    if config.page and not page.is_file():
        raise ConfigError(f"--page {config.page}: there is no such file")
    found = {}
    for name, family in try_families([config.name] if config.name else known):
        found[name] = family
        print(f"{name:28} {family.status:8} {family.reason}".rstrip())
    counts = Counter(family.status for family in found.values())
    if config.page:
        page.write_text(with_table(page.read_text(), found))
    if config.json:
        families = {name: str(family.status) for name, family in found.items()}
        print(json.dumps({str(status): counts[status] for status in FamilyStatus} | {"families": families}))
    else:
        print(", ".join(f"{counts[status]} {status}" for status in FamilyStatus))
