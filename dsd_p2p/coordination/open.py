"""Opens a coordinator on stages with known addresses, for both the commands and the Python API."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dsd_p2p.coordination.directory import StageList
from dsd_p2p.coordination.engine import Engine, open_engine
from dsd_p2p.drafting.choice import DrafterChoice
from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import ModelShape, read_shape
from dsd_p2p.models.formats import AUTO
from dsd_p2p.models.grammar import ModelGrammars
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.models.text import TextCodec
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.transport.ephemeral import open_ephemeral
from dsd_p2p.types import check_same_model


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorModel:
    """The parts of the target that a coordinator needs without holding layers: files, shape, tokenizer and drafter.

    drafter: the choice of one, which is loaded. grammars: compiles constraints for its tokens.
    """

    source: ModelSource
    shape: ModelShape
    text: TextCodec
    drafter: DrafterChoice
    grammars: ModelGrammars


def load_coordinator_model(
    model: str,
    draft: str,
    progress: Progress,
    *,
    draft_dtype: str = "auto",
    device: str = "cpu",
    learns: bool = False,
) -> CoordinatorModel:
    """Load the tokenizer and the drafter for a target.

    model: a catalog name, a folder or a Hugging Face id. draft: "auto" or a name that `make_drafter` takes.
    learns: see `DrafterChoice`.

    Raises:
        ConfigError, ModelError: says what is missing and what to do.
    """
    source = find_model(model, progress)
    shape, text = read_shape(source.folder), TextCodec(source.folder)
    drafter = DrafterChoice(
        draft, source, model=model, dtype=draft_dtype, device=device, progress=progress, learns=learns
    )
    drafter.load()
    grammars = ModelGrammars(source.folder, shape.vocab_size)
    return CoordinatorModel(source=source, shape=shape, text=text, drafter=drafter, grammars=grammars)


@asynccontextmanager
async def open_coordinator(
    model: CoordinatorModel, dtype: str, addresses: Sequence[str], link: LinkModel, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Engine, StageList]]:
    """Connect to the stages at `addresses` and to those that they know, until the end of the block.

    dtype: the weights format that the stages must have, or "auto". link: emulated for everything we send. host: our
        listening address.

    Raises:
        PeerError: one of the addresses cannot be reached.
        ConfigError: the stages hold another model, or not all of this one.
    """
    async with (
        open_ephemeral(link, host) as transport,
        open_engine(transport, model.drafter, model.shape.vocab_size, can_cut_texts=not model.shape.is_recurrent) as (
            engine,
            stages,
        ),
    ):
        engine.own_drafter.grammars = model.grammars
        await stages.add(addresses)
        try:
            held = stages.stages()[0].model
            wanted = held.weights if dtype == AUTO and held is not None else dtype
            check_same_model(held, model.source.key(wanted))
        except ModelError as exc:
            raise ConfigError(f"{exc}: use the same --model, --dtype and --weights as the stages") from exc
        yield engine, stages
