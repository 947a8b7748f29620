"""Implements `dsd models list|pull|path`."""

from rich.console import Console
from rich.table import Table

from dsd_p2p.errors import ConfigError
from dsd_p2p.models.catalog import CATALOG
from node.config import ModelsConfig
from node.console import ConsoleProgress, console


def run(config: ModelsConfig) -> int:
    """List the catalog, download a model, or print the folder that transformers can load."""
    name = config.name
    match config.action:
        case "list":
            _list()
        case action if not name:
            raise ConfigError(f"dsd models {action} needs a model: one of {', '.join(CATALOG)}, a folder or a hub id")
        case "pull":
            _find(name)
            console.print(f"{name} is ready")
        case _:
            print(_find(name))
    return 0


def _find(name: str) -> str:
    from dsd_p2p.models.source import find_model

    with ConsoleProgress() as progress:
        return str(find_model(name, progress).folder)


def _list() -> None:
    from dsd_p2p.models.source import is_cached

    table = Table(box=None)
    for column in ("model", "what", "download", "licence", "cached"):
        table.add_column(column)
    for model in CATALOG.values():
        size = f"{model.num_bytes / 1e6:.0f} MB"
        table.add_row(model.name, model.description, size, model.licence, "yes" if is_cached(model.name) else "no")
    Console().print(table)
