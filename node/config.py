"""What each command can be told, from a TOML file and from flags; flags beat the file, unknown keys are errors."""

import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.catalog import DEFAULT_MODEL
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.types import Sampling
from dsd_p2p.wire.hidden import HiddenFormat
from dsd_p2p.wire.membership import Role
from dsd_p2p.wire.messages import MAX_STAGES

DEFAULT_SWARM = "default"

_MAX_LATENCY_S = 8.0
"""A chain of two stages answers at 8 s each way; at 12 s the connection is closed before it is set up."""

Positive = Annotated[int, Meta(ge=1)]
Config = TypeVar("Config", bound=msgspec.Struct)


class LinkFlags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The emulated link of everything a process sends; the default adds nothing."""

    link: str = "0ms"
    rate: str = "0mbit"
    jitter: str = "0ms"

    def __post_init__(self) -> None:
        model = self.link_model()
        if max(model.latency_s, model.jitter_s) > _MAX_LATENCY_S:
            raise ConfigError(
                f"link {self.link}, jitter {self.jitter}: at most {_MAX_LATENCY_S:g}s each; longer ones do not connect"
            )

    def link_model(self) -> LinkModel:
        """Return it in numbers."""
        return LinkModel(
            latency_s=units.seconds(self.link),
            jitter_s=units.seconds(self.jitter),
            bandwidth_bps=units.bits_per_second(self.rate),
        )


class ComputeFlags(LinkFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every process that computes needs.

    threads: of torch in one process; more than one slows several processes on the same cores down.
    cache_memory: for the keys and values of all sessions of a stage.
    mqtt: the broker that is told what happens, mqtt://… or mqtts://…; mqtt_ca: file of the certificate that signed the broker's.
    """

    device: str = "cpu"
    threads: Positive = 1
    cache_memory: str = "1GB"
    mqtt: str = ""
    mqtt_ca: str = ""


class ModelFlags(ComputeFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model and how it is computed."""

    model: str = DEFAULT_MODEL
    dtype: str = "float32"


class ServeFlags(ComputeFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node of a swarm: `dsd create`, `dsd join`, `dsd node --swarm`.

    swarm: its name on this machine, or the folder that keeps what this machine knows of it.
    announce: address that others reach us at, where it is not one of our own. relay: pass connections on between others.
    through: address of a relay to be reached through. lan: find members on the local network.
    max_layers, memory: of the layers; by default what is free.
    draft: coordinate requests of thin clients with this drafter; "none" does not. heartbeat: interval.
    record: file that the node's own telemetry is appended to. otlp: collector that traces of requests go to.
    """

    swarm: str = DEFAULT_SWARM
    listen: str = "/ip4/0.0.0.0/tcp/4001"
    announce: str = ""
    relay: bool = False
    through: str = ""
    lan: bool = True
    max_layers: Annotated[int, Meta(ge=0, le=4096)] = 0
    memory: str = ""
    draft: str = "ngram"
    heartbeat: str = "1s"
    record: str = ""
    otlp: str = ""


class JoinConfig(ServeFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd join`."""

    invite: str


class CreateConfig(ServeFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd create`."""

    model: str = DEFAULT_MODEL
    dtype: str = "float32"


class InviteConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd invite`."""

    swarm: str = DEFAULT_SWARM
    role: Role = Role.STAGE
    expires: str = "30d"
    uses: Annotated[int, Meta(ge=1, le=1 << 20)] = 1
    address: tuple[str, ...] = ()
    qr: bool = True


class NodeConfig(ModelFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd node`. An empty span is the whole model; an empty identity is a new one for this run only."""

    span: str = ""
    listen: str = "/ip4/127.0.0.1/tcp/0"
    peers: tuple[str, ...] = ()
    identity: str = ""


class DrafterFlags(ModelFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who guesses.

    draft: "ngram", "shadow", a model, each also "+ngram", or "auto": what measured best for the target.
    """

    draft: str = "auto"
    draft_dtype: str = "float32"


class SwarmFlags(DrafterFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A swarm of processes on this machine."""

    stages: Positive = 3


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenAI-compatible door.

    host, port: where it listens; port 0 picks a free one; no port, no door (`dsd up` takes 8484). names: further host names that
        clients call it by. api_keys: file of who may ask (docs/api.md); without one everybody on this machine may.
    max_running, max_waiting: answers. answer_timeout: of one.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    api_keys: str = ""
    names: tuple[str, ...] = ()
    max_running: Annotated[int, Meta(ge=1, le=1024)] = 16
    max_waiting: Annotated[int, Meta(ge=0, le=65536)] = 256
    answer_timeout: str = "1h"


NO_DOOR = GatewayConfig()


class UpConfig(SwarmFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd up`.

    window: "awc" or "analytic". mqtt: empty starts a broker on this machine, "none" goes without. otlp: collector that traces of
        requests go to.
    """

    window: str = "awc"
    otlp: str = ""


class GenerateConfig(SwarmFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd generate`.

    netlab: links between network namespaces instead of emulated ones (`node.local.netlab`).
    swarm: the swarm to use, by its name on this machine; its model is taken. coordinator: "self", or "auto": the peer with the
        shortest loop, when that is not here. timeout: of the whole answer, when somebody else coordinates.
    audit: have the stages sign what they compute, and spot-check them (in a swarm).
    window: "awc", "analytic" or "static". depth, width, window_nodes, in_flight: a static window; 0 is the mode's default.
    hidden: format of hidden states between stages. verify: "exact" or "relaxed"; relaxation: a file of `dsd calibrate`, empty is
        the bundled one; tau overrides the file's.
    """

    connect: tuple[str, ...] = ()
    swarm: str = ""
    coordinator: str = "auto"
    timeout: str = "1h"
    audit: bool = False
    netlab: bool = False
    mode: str = "continuous"
    window: str = "awc"
    depth: Annotated[int, Meta(ge=0, le=256)] = 0
    width: Annotated[int, Meta(ge=0, le=8)] = 0
    window_nodes: Annotated[int, Meta(ge=0, le=256)] = 0
    in_flight: Annotated[int, Meta(ge=0, le=256)] = 0
    prompt: str = ""
    prompt_ids: str = ""
    raw: bool = False
    max_tokens: Positive = 128
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    prefill_chunk: Annotated[int, Meta(ge=1, le=1024)] = 128
    stall_timeout: str = "60s"
    hidden: HiddenFormat = HiddenFormat.MODEL
    verify: str = "exact"
    relaxation: str = ""
    tau: Annotated[float, Meta(ge=0, le=1)] | None = None
    json: bool = False

    def sampling(self) -> Sampling:
        """Return the sampler's settings."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


class UsersConfig(SwarmFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd bench users`. sessions: at once. policies: run beside plain. in_process: all stages in one process, on one device."""

    sessions: Positive = 16
    policies: tuple[str, ...] = ("awc",)
    max_tokens: Positive = 64
    in_process: bool = False


class TopConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd top`.

    target: a gateway or a broker; topics: of the swarm at a broker. key: of a gateway that needs one (or OPENAI_API_KEY).
    record: file to write the events to. replay, speed: a recording, and how many times as fast. once: one look, of `seconds`; json,
        svg: as what; columns, rows: of svg.
    """

    target: str = "http://127.0.0.1:8484"
    topics: str = "local"
    mqtt_ca: str = ""
    key: str = ""
    record: str = ""
    replay: str = ""
    speed: Annotated[float, Meta(gt=0, le=1e12)] = 1.0
    once: bool = False
    seconds: Annotated[float, Meta(ge=0, le=600)] = 0.0
    json: bool = False
    svg: str = ""
    columns: Annotated[int, Meta(ge=40, le=500)] = 120
    rows: Annotated[int, Meta(ge=10, le=200)] = 32


class CalibrateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd calibrate`, `dsd bench relaxed` and `record`.

    prompts: chat, maths or code. problems, texts: of each category. batch: texts written side by side.
    budget: nats of the target's log-likelihood a token may lose.
    """

    model: str = "qwen2.5-coder-1.5b"
    draft: str = "qwen2.5-coder-0.5b"
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: Positive = 2
    prompts: str = "chat"
    num_prompts: Positive = 24
    problems: Positive = 80
    texts: Positive = 12
    max_tokens: Positive = 128
    batch: Positive = 8
    budget: Annotated[float, Meta(gt=0)] = 0.01
    output: str = "relaxation.json"


class RingConfig(LinkFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd bench ring`. trace: of recorded agreement; empty is the bundled one."""

    link: str = "50ms"
    stages: Annotated[int, Meta(ge=1, le=MAX_STAGES)] = 4
    stage_time: str = "5ms"
    node_time: str = "0ms"
    draft_time: str = "6ms"
    max_tokens: Positive = 64
    trace: str = ""


class WanConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dsd bench wan`: every model x number of stages x link, every category of prompts in each round.

    netlab: real TCP between network namespaces instead of emulated links. relaxed: also run the tree in relaxed mode.
    arms: names of `dsd_p2p.window.catalogue`, "all" of them, or by default a choice of modes. policies: run beside them,
    each arm with measurements of its own, after a first round that is not counted. finalists: so many of the fastest fixed arms go
    on after that round; 0 is all of them.
    record: also keep what the drafter says along each answer, for the simulator.
    """

    links: Annotated[tuple[str, ...], Meta(min_length=1)] = ("50ms",)
    stages: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (3,)
    models: Annotated[tuple[str, ...], Meta(min_length=1)] = (DEFAULT_MODEL,)
    prompts: Annotated[tuple[str, ...], Meta(min_length=1)] = ("chat", "maths", "code")
    dtype: str = "float32"
    device: str = "cpu"
    threads: Positive = 1
    draft: str = "auto"
    draft_dtype: str = ""
    max_tokens: Positive = 64
    plain_tokens: Positive = 16
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    hidden: HiddenFormat = HiddenFormat.MODEL
    width: Annotated[int, Meta(ge=1, le=16)] = 4
    window_nodes: Annotated[int, Meta(ge=1, le=64)] = 8
    in_flight: Annotated[int, Meta(ge=1, le=256)] = 64
    netlab: bool = False
    relaxed: bool = False
    relaxation: str = ""
    arms: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    finalists: Annotated[int, Meta(ge=0, le=64)] = 0
    record: bool = False

    def __post_init__(self) -> None:
        for link in self.links:
            LinkFlags(link=link)


class FlagError(ConfigError):
    """A flag, or a key of the configuration file, that the command does not take as it is."""


def read_config(kind: type[Config], file: str | None, flags: dict[str, object]) -> Config:
    """Return the configuration: defaults, then `file`, then `flags` that were given.

    Raises:
        ConfigError: the file cannot be read. FlagError: it has an unknown key, or a value is out of range.
    """
    return _convert(_values(file, flags), kind)


def read_with_gateway(kind: type[Config], file: str | None, flags: dict[str, object]) -> tuple[Config, GatewayConfig]:
    """Return a command's configuration and that of its gateway, which stand in one file and among one set of flags.

    Raises:
        ConfigError: see `read_config`.
    """
    values = _values(file, flags)
    names = GatewayConfig.__struct_fields__
    gateway = {name: value for name, value in values.items() if name in names}
    rest = {name: value for name, value in values.items() if name not in names}
    return _convert(rest, kind), _convert(gateway, GatewayConfig)


def _values(file: str | None, flags: dict[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    if file is not None:
        try:
            values = tomllib.loads(Path(file).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"config file {file}: {exc}") from exc
    return values | flags


def _convert(values: dict[str, object], kind: type[Config]) -> Config:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as exc:
        raise FlagError(str(exc)) from exc
