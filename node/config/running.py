"""What a command can be told that runs something: a stage, a member of a swarm, a swarm on this machine."""

from typing import Annotated, Literal

from msgspec import Meta

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.catalog import DEFAULT_MODEL
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.wire.membership import Role
from node.config.fields import FILE, POSITIONAL, URL, Help, Positive, Settings, Shape

DEFAULT_SWARM = "default"

_MAX_LATENCY_S = 8.0
"""A route of two stages answers at 8 s each way; at 12 s the connection is closed before it is set up."""

SwarmName = Annotated[
    str, Help("name of the swarm on this machine, or the folder that holds what this machine knows of it")
]
Json = Annotated[bool, Help("print one JSON object instead of text")]


class LinkFlags(Settings, frozen=True, kw_only=True):
    """The emulated link of everything a process sends; the default adds nothing."""

    link: Annotated[str, Help("emulated one-way latency of every link, like 50ms")] = "0ms"
    rate: Annotated[str, Help("emulated bandwidth of every link, like 100mbit; 0mbit is unlimited")] = "0mbit"
    jitter: Annotated[str, Help("emulated jitter of every link, like 5ms")] = "0ms"

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


class ComputeFlags(LinkFlags, frozen=True, kw_only=True):
    """What every process that computes needs."""

    device: Annotated[str, Help("torch device to compute on, like cpu or cuda")] = "cpu"
    threads: Annotated[Positive, Help("torch threads of each process; keep 1 where processes share cores")] = 1
    cache_memory: Annotated[str, Help("memory for the keys and values of all sessions of a stage")] = "1GB"
    mqtt: Annotated[str, Help("MQTT broker that gets telemetry, mqtt://HOST:PORT or mqtts://HOST:PORT"), URL] = ""
    mqtt_ca: Annotated[str, Help("certificate of the authority that signed the broker's"), FILE] = ""


class ModelFlags(ComputeFlags, frozen=True, kw_only=True):
    """A model and how it is computed."""

    model: Annotated[str, Help("the target: a catalog name, a folder or a Hugging Face id")] = DEFAULT_MODEL
    dtype: Annotated[str, Help("numbers to compute with: float32 (exact in every mode), bfloat16 or float16")] = (
        "float32"
    )


class ServeFlags(ComputeFlags, frozen=True, kw_only=True):
    """A member of a swarm that serves layers: `dsd create`, `dsd join`, `dsd node --swarm`."""

    swarm: SwarmName = DEFAULT_SWARM
    listen: Annotated[str, Help("address to listen on, as a multiaddr")] = "/ip4/0.0.0.0/tcp/4001"
    announce: Annotated[str, Help("address at which others reach this machine, like /ip4/203.0.113.5/tcp/4001")] = ""
    relay: Annotated[bool, Help("relay connections between members that cannot reach each other")] = False
    through: Annotated[str, Help("address of a relay through which others reach this machine")] = ""
    lan: Annotated[bool, Help("find members on the local network by multicast DNS")] = True
    max_layers: Annotated[
        int, Meta(ge=0, le=4096), Help("hold at most this many layers; 0: as many as memory allows")
    ] = 0
    memory: Annotated[str, Help("memory for layers and cache, like 8GB; by default 60 %% of what is free")] = ""
    draft: Annotated[
        str,
        Help("drafter with which this peer coordinates requests of thin clients: ngram, or none"),
    ] = "ngram"
    heartbeat: Annotated[str, Help("time between two heartbeats, 50ms to 10s")] = "1s"
    record: Annotated[str, Help("append this peer's telemetry to a file, for dsd top --replay"), FILE] = ""
    otlp: Annotated[str, Help("OpenTelemetry collector for traces, like http://127.0.0.1:4318"), URL] = ""


class JoinConfig(ServeFlags, frozen=True, kw_only=True):
    """`dsd join`."""

    invite: Annotated[str, Help("the string that dsd invite printed"), POSITIONAL]


class CreateConfig(ServeFlags, frozen=True, kw_only=True):
    """`dsd create`."""

    model: Annotated[str, Help("the swarm's model: a catalog name, a folder or a Hugging Face id")] = DEFAULT_MODEL
    dtype: Annotated[str, Help("numbers to compute with: float32 (exact in every mode), bfloat16 or float16")] = (
        "float32"
    )


class NodeConfig(ModelFlags, frozen=True, kw_only=True):
    """One stage, started by hand or by `dsd up`. An empty identity is a new one for this run only."""

    span: Annotated[str, Help("layers FIRST:LAST that the stage holds; by default all")] = ""
    listen: Annotated[str, Help("address to listen on, as a multiaddr")] = "/ip4/127.0.0.1/tcp/0"
    peers: Annotated[tuple[str, ...], Help("addresses of other stages, separated by commas")] = ()
    identity: Annotated[
        str, Help("file of the peer's secret key, made on first use; by default a new key each run"), FILE
    ] = ""


class NodeCommand(ServeFlags, frozen=True, kw_only=True):
    """`dsd node`: a member of a swarm when `swarm` is given, else one stage by hand."""

    action: Annotated[
        Literal["run", "stop", "status"],
        Help("run a node, or stop or describe the one that runs for --swarm"),
        POSITIONAL,
    ] = "run"
    drain: Annotated[str, Help("with stop: how long sessions under way may go on")] = "30s"
    swarm: SwarmName = ""
    listen: Annotated[str, Help("address to listen on; default: port 4001 in a swarm, else a free local port")] = ""
    model: Annotated[str, Help("without --swarm: a catalog name, a folder or a Hugging Face id")] = ""
    dtype: Annotated[str, Help("without --swarm: numbers to compute with")] = ""
    span: Annotated[str, Help("without --swarm: layers FIRST:LAST of the stage; by default all")] = ""
    peers: Annotated[tuple[str, ...], Help("without --swarm: addresses of other stages, separated by commas")] = ()
    identity: Annotated[str, Help("without --swarm: file of the peer's secret key, made on first use"), FILE] = ""
    exit_with_parent: Annotated[bool, Help("stop when standard input closes")] = False


class DrafterFlags(ModelFlags, frozen=True, kw_only=True):
    """The drafter."""

    draft: Annotated[
        str,
        Help("drafter: ngram, shadow or a model, each also with +ngram; auto: the fastest measured"),
    ] = "auto"
    draft_dtype: Annotated[str, Help("numbers that a drafting model computes with")] = "float32"


class SwarmFlags(DrafterFlags, frozen=True, kw_only=True):
    """A swarm of processes on this machine."""

    stages: Annotated[Positive, Help("number of stage processes to start")] = 3


class GatewayConfig(Settings, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP gateway."""

    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Help("port of the OpenAI-compatible API; 0: any free one; default: 8484 for dsd up, else none"),
    ] = None
    host: Annotated[str, Help("address the API listens on")] = "127.0.0.1"
    api_keys: Annotated[
        str, Help("TOML file of API keys and their limits; without it, anybody on this machine may ask"), FILE
    ] = ""
    names: Annotated[
        tuple[str, ...], Help("further host names that clients use for this machine, separated by commas")
    ] = ()
    max_running: Annotated[int, Meta(ge=1, le=1024), Help("answers written at once")] = 16
    max_waiting: Annotated[int, Meta(ge=0, le=65536), Help("answers that may wait for a place")] = 256
    answer_timeout: Annotated[str, Help("longest time that one answer may take")] = "1h"


NO_GATEWAY = GatewayConfig()


class UpConfig(SwarmFlags, frozen=True, kw_only=True):
    """`dsd up`. An empty mqtt starts a broker on this machine, "none" does without."""

    policy: Annotated[
        Literal["learned", "analytic"],
        Help("what decides how much to guess: a learned policy, or the latency model alone"),
    ] = "learned"
    otlp: Annotated[str, Help("OpenTelemetry collector for traces, like http://127.0.0.1:4318"), URL] = ""


class InviteConfig(Settings, frozen=True, kw_only=True):
    """`dsd invite`."""

    swarm: SwarmName = DEFAULT_SWARM
    role: Annotated[Role, Help("what the newcomer may do: stage serves layers, client only asks")] = Role.STAGE
    expires: Annotated[str, Help("how long the invite, and the membership gained with it, stays valid, like 24h")] = (
        "30d"
    )
    uses: Annotated[int, Meta(ge=1, le=1 << 20), Help("machines that may join with it")] = 1
    address: Annotated[tuple[str, ...], Help("addresses to join at; by default those of the running node")] = ()
    qr: Annotated[bool, Help("also print a QR code on a terminal")] = True


class SwarmQuestion(Settings, frozen=True, kw_only=True):
    """`dsd members`, `dsd plan`, `dsd doctor`."""

    swarm: SwarmName = DEFAULT_SWARM
    json: Json = False


class RevokeConfig(Settings, frozen=True, kw_only=True):
    """`dsd revoke`."""

    peer: Annotated[str, Help("peer id of the member, or the end of it"), POSITIONAL]
    swarm: SwarmName = DEFAULT_SWARM


class ModelsConfig(Settings, frozen=True, kw_only=True):
    """`dsd models`."""

    action: Annotated[
        Literal["list", "pull", "path"],
        Help("list the catalog, fetch a model, or print the folder that transformers loads"),
        POSITIONAL,
    ]
    name: Annotated[str, Help("a catalog name, a folder or a Hugging Face id"), POSITIONAL] = ""


class CompletionConfig(Settings, frozen=True, kw_only=True):
    """`dsd completion`."""

    shell: Annotated[
        Literal["bash", "zsh", "tcsh"],
        Help("the shell to print a script for"),
        Shape(is_positional=True),
    ]
