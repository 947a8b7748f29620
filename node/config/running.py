"""Holds the settings of the commands that run a stage, a member of a swarm, or a whole swarm on this machine."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from dsd_p2p import units
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.catalog import DEFAULT_MODEL
from dsd_p2p.netmodel import LinkModel
from dsd_p2p.types import INT8, STORED
from dsd_p2p.wire.membership import Role
from node.config.fields import FILE, POSITIONAL, URL, Help, Positive, Settings, Shape
from node.config.machine import auto_device, auto_threads

DEFAULT_SWARM = "default"

_MAX_LATENCY_S = 8.0
"""A route of two stages still answers at 8 s each way; at 12 s the connection is closed during its setup."""

SwarmName = Annotated[
    str, Help("name of the swarm on this machine, or path of the folder with its keys and membership")
]
Json = Annotated[bool, Help("print one JSON object instead of text")]


class LinkFlags(Settings, frozen=True, kw_only=True):
    """The emulated link for everything that a process sends. The default adds no delay."""

    link: Annotated[str, Help("emulated one-way latency of every link, e.g. 50ms")] = "0ms"
    rate: Annotated[str, Help("emulated bandwidth of every link, e.g. 100mbit; 0mbit: unlimited")] = "0mbit"
    jitter: Annotated[str, Help("emulated jitter of every link, e.g. 5ms")] = "0ms"

    def __post_init__(self) -> None:
        model = self.link_model()
        if max(model.latency_s, model.jitter_s) > _MAX_LATENCY_S:
            raise ConfigError(
                f"link {self.link}, jitter {self.jitter}: expected at most {_MAX_LATENCY_S:g}s each; slower links cannot connect"
            )

    def link_model(self) -> LinkModel:
        """Return the link in seconds and bits per second."""
        return LinkModel(
            latency_s=units.seconds(self.link),
            jitter_s=units.seconds(self.jitter),
            bandwidth_bps=units.bits_per_second(self.rate),
        )


class ComputeFlags(LinkFlags, frozen=True, kw_only=True):
    """Settings of every process that computes."""

    device: Annotated[str, Help("torch device, e.g. cpu or cuda; auto: cuda if there is a card")] = "auto"
    threads: Annotated[
        int, Meta(ge=0, le=4096), Help("torch threads per process; 0: the cores divided by our processes")
    ] = 0
    cache_memory: Annotated[str, Help("memory for the KV cache of a stage, shared by all its sessions")] = "1GB"
    mqtt: Annotated[
        str,
        Help("MQTT broker for telemetry, mqtt(s)://HOST:PORT; none: no broker; default: none, but dsd up starts one"),
        URL,
    ] = ""
    mqtt_ca: Annotated[str, Help("CA certificate to check the MQTT broker's certificate with"), FILE] = ""

    def __post_init__(self) -> None:
        """Decide what is left to us, once: processes that we start get the decision."""
        super().__post_init__()
        if self.device == "auto":
            msgspec.structs.force_setattr(self, "device", auto_device())
        if not self.threads:
            msgspec.structs.force_setattr(self, "threads", auto_threads(getattr(self, "stages", 0) + 1))

    def compute_line(self, weights: str) -> str:
        """Return in one line what this process and those it starts compute with. weights: their format."""
        where = f"computing on {self.device}, weights: {weights}, threads a process: {self.threads}"
        return f"{where}, KV cache a stage: {self.cache_memory}"


_NAMES = "a catalog name, a folder, a GGUF file or a Hugging Face id (owner/name, owner/name:Q4_K_M)"

Weights = Annotated[
    Literal["auto", "float", "int8", "stored"],
    Help(
        "format of the target's weights; float: numbers of --dtype; int8: rounded, faster on a CPU; stored: the 4-bit "
        "numbers of a quantised checkpoint; auto: int8 if it was judged good and fits, else stored; float for checkpoints in floats"
    ),
]


Dtype = Annotated[
    str,
    Help(
        "number format of floats: float32 (exact in every mode, transformers' own tokens), bfloat16 or float16; "
        "auto: float32 unless --weights takes another form"
    ),
]


class ModelFlags(ComputeFlags, frozen=True, kw_only=True):
    """A model and the format of its weights. Afterwards `dtype` names it: a number format, "int8", "stored" or "auto"."""

    model: Annotated[str, Help(f"target model: {_NAMES}")] = DEFAULT_MODEL
    dtype: Dtype = "auto"
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        """Decide on the format, once."""
        super().__post_init__()
        msgspec.structs.force_setattr(self, "dtype", _format_of(self.weights, self.dtype))


def _format_of(weights: str, dtype: str) -> str:
    """Return the weights format that the flags ask for; "auto" if the model is to decide (`node.local.formats`).

    Raises:
        ConfigError: the flags contradict each other.
    """
    if weights == "float":
        if dtype in (INT8, STORED):
            raise ConfigError("--weights float computes in float32, bfloat16 or float16: change --dtype")
        return "float32" if dtype == "auto" else dtype
    if weights == "auto":
        return dtype
    if dtype not in ("auto", "float32", weights):
        raise ConfigError(f"--weights {weights} computes in float32, not in {dtype}: leave --dtype out")
    return weights


class ServeFlags(ComputeFlags, frozen=True, kw_only=True):
    """Settings of a member that serves layers: `dsd create`, `dsd join`, `dsd node --swarm`."""

    swarm: SwarmName = DEFAULT_SWARM
    listen: Annotated[str, Help("multiaddr to listen on")] = "/ip4/0.0.0.0/tcp/4001"
    announce: Annotated[str, Help("public multiaddr of this machine, e.g. /ip4/203.0.113.5/tcp/4001")] = ""
    relay: Annotated[bool, Help("relay connections between members that cannot reach each other directly")] = False
    through: Annotated[str, Help("address of the relay through which other members reach this machine")] = ""
    lan: Annotated[bool, Help("search for members on the local network with multicast DNS; on by default")] = True
    max_layers: Annotated[
        int, Meta(ge=0, le=4096), Help("maximum number of layers to serve; 0: as many as fit in memory")
    ] = 0
    memory: Annotated[str, Help("memory for layers and KV cache, e.g. 8GB; default: 60 %% of the free memory")] = ""
    draft: Annotated[
        str,
        Help(
            "drafter for requests that this peer coordinates: auto, ngram, shadow or a model; none: do not coordinate; "
            "default: the swarm's"
        ),
    ] = ""
    role: Annotated[
        Literal["stage", "draft"], Help("stage: serve layers; draft: serve none, only draft for members nearby")
    ] = "stage"
    heartbeat: Annotated[str, Help("interval between heartbeats, 50ms to 10s")] = "1s"
    record: Annotated[str, Help("file to append this peer's telemetry to, for dsd top --replay"), FILE] = ""
    otlp: Annotated[str, Help("OpenTelemetry collector for traces, e.g. http://127.0.0.1:4318"), URL] = ""


def check_swarm_drafter(draft: str) -> None:
    """Check that a whole swarm may be told to draft with `draft`.

    Raises:
        ConfigError: it is no drafter's name.
    """
    if draft in ("", "none"):
        raise ConfigError(f"--draft {draft!r}: a swarm drafts with auto, ngram, shadow or a model; ngram costs nothing")


class DraftConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd draft`."""

    draft: Annotated[str, Help("the swarm's drafter: auto, ngram, shadow or a model"), POSITIONAL]
    swarm: SwarmName = DEFAULT_SWARM

    def __post_init__(self) -> None:
        check_swarm_drafter(self.draft)


class JoinConfig(ServeFlags, frozen=True, kw_only=True):
    """Settings of `dsd join`."""

    invite: Annotated[str, Help("invite string that dsd invite printed"), POSITIONAL]
    model: Annotated[
        str, Help("where this machine has the swarm's model: a folder or another name; default: the invite's name")
    ] = ""


class CreateConfig(ServeFlags, frozen=True, kw_only=True):
    """Settings of `dsd create`."""

    draft: Annotated[
        str,
        Help("the swarm's drafter, which members get with the invite: auto, ngram, shadow or a model"),
    ] = "auto"
    model: Annotated[str, Help(f"the swarm's model: {_NAMES}")] = DEFAULT_MODEL
    dtype: Dtype = "auto"
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        """Decide on the format of the weights, once."""
        super().__post_init__()
        msgspec.structs.force_setattr(self, "dtype", _format_of(self.weights, self.dtype))


class NodeConfig(ModelFlags, frozen=True, kw_only=True):
    """Settings of one stage, started by hand or by `dsd up`. An empty identity stands for a new key in each run."""

    span: Annotated[str, Help("layers of the stage as FIRST:LAST, LAST excluded; default: all")] = ""
    listen: Annotated[str, Help("multiaddr to listen on")] = "/ip4/127.0.0.1/tcp/0"
    peers: Annotated[tuple[str, ...], Help("multiaddrs of other stages, separated by commas")] = ()
    identity: Annotated[
        str, Help("file with the peer's secret key, created on first use; default: a new key each run"), FILE
    ] = ""


class NodeCommand(ServeFlags, frozen=True, kw_only=True):
    """Settings of `dsd node`: a member of the swarm if `swarm` is given, otherwise one stage started by hand."""

    action: Annotated[
        Literal["run", "stop", "status"],
        Help("run: serve; stop, status: stop or describe the node daemon that serves --swarm"),
        POSITIONAL,
    ] = "run"
    drain: Annotated[str, Help("with stop: time that running sessions get to finish")] = "30s"
    swarm: SwarmName = ""
    listen: Annotated[
        str, Help("multiaddr to listen on; default: port 4001 with --swarm, otherwise a free local port")
    ] = ""
    model: Annotated[str, Help(f"without --swarm: target model: {_NAMES}")] = ""
    dtype: Annotated[str, Help("without --swarm: format of the weights, see dsd up; default: auto")] = ""
    span: Annotated[str, Help("without --swarm: layers of the stage as FIRST:LAST, LAST excluded; default: all")] = ""
    peers: Annotated[tuple[str, ...], Help("without --swarm: multiaddrs of other stages, separated by commas")] = ()
    identity: Annotated[str, Help("without --swarm: file with the peer's secret key, created on first use"), FILE] = ""
    exit_with_parent: Annotated[bool, Help("stop when standard input closes")] = False


class DrafterFlags(ModelFlags, frozen=True, kw_only=True):
    """The drafter of a coordinator."""

    draft: Annotated[
        str,
        Help("drafter: ngram, shadow, or a model; +ngram adds prompt lookup; auto: the fastest for the target"),
    ] = "auto"
    draft_dtype: Annotated[
        str, Help("format of a drafting model: a number format or int8; auto: int8 on a CPU where the model allows it")
    ] = "auto"


class SwarmFlags(DrafterFlags, frozen=True, kw_only=True):
    """A swarm of stage processes on this machine."""

    stages: Annotated[Positive, Help("number of stage processes to start")] = 3


class GatewayConfig(Settings, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP gateway."""

    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Help("port of the OpenAI-compatible API; 0: any free port; default: 8484 for dsd up, otherwise no API"),
    ] = None
    host: Annotated[str, Help("IP address that the API listens on")] = "127.0.0.1"
    api_keys: Annotated[
        str, Help("TOML file of API keys and their limits; default: no key needed, this machine only"), FILE
    ] = ""
    names: Annotated[
        tuple[str, ...], Help("additional host names that clients use for this machine, separated by commas")
    ] = ()
    defaults: Annotated[
        Literal["model", "openai"],
        Help("sampling if a request does not say; model: as its files say; openai: temperature 1"),
    ] = "model"
    strict: Annotated[bool, Help("refuse requests with fields that the gateway does not know")] = False
    max_running: Annotated[int, Meta(ge=1, le=1024), Help("maximum number of answers generated at once")] = 16
    max_waiting: Annotated[int, Meta(ge=0, le=65536), Help("maximum number of queued answers")] = 256
    answer_timeout: Annotated[str, Help("time limit for one answer, e.g. 1h")] = "1h"


NO_GATEWAY = GatewayConfig()


class UpConfig(SwarmFlags, frozen=True, kw_only=True):
    """Settings of `dsd up`. An empty `mqtt` starts a broker on this machine; "none" runs without one."""

    policy: Annotated[
        Literal["learned", "analytic"],
        Help("policy that decides how much to guess: learned, trained in the simulator; analytic, latency model only"),
    ] = "learned"
    otlp: Annotated[str, Help("OpenTelemetry collector for traces, e.g. http://127.0.0.1:4318"), URL] = ""


class InviteConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd invite`."""

    swarm: SwarmName = DEFAULT_SWARM
    role: Annotated[Role, Help("role of the new member; stage: serves layers; client: only sends requests")] = (
        Role.STAGE
    )
    expires: Annotated[str, Help("how long the invite, and membership gained with it, stays valid, e.g. 24h")] = "30d"
    uses: Annotated[int, Meta(ge=1, le=1 << 20), Help("number of machines that may join with the invite")] = 1
    address: Annotated[
        tuple[str, ...], Help("multiaddrs to join at, separated by commas; default: those of the running node daemon")
    ] = ()
    qr: Annotated[bool, Help("QR code of the invite on a terminal; on by default")] = True


class SwarmQuestion(Settings, frozen=True, kw_only=True):
    """Settings of `dsd members`, `dsd invites`, `dsd plan` and `dsd doctor`."""

    swarm: SwarmName = DEFAULT_SWARM
    json: Json = False


class RevokeConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd revoke`."""

    peer: Annotated[str, Help("id of a member or an invite, or the last characters of it"), POSITIONAL]
    keep_invite: Annotated[bool, Help("let the member's invite stay valid, and those who came with it stay")] = False
    swarm: SwarmName = DEFAULT_SWARM


class RekeyConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd rekey`."""

    swarm: SwarmName = DEFAULT_SWARM


class RecoverConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd recover`."""

    swarm: SwarmName = DEFAULT_SWARM


class QuantizeConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd quantize`."""

    model: Annotated[str, Help("catalog name, folder or Hugging Face id of the model"), POSITIONAL]
    output: Annotated[str, Help("folder to write"), FILE]
    threads: Annotated[int, Meta(ge=0, le=4096), Help("torch threads; 0: as many as there are cores")] = 0


class ModelsConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd models`."""

    action: Annotated[
        Literal["list", "pull", "path", "families"],
        Help(
            "list: show the catalog; pull: download a model; path: print the folder that transformers can load; "
            "families: try every family of transformers with tiny random weights"
        ),
        POSITIONAL,
    ]
    name: Annotated[
        str,
        Help(f"with pull, path: {_NAMES}; with families: only this family"),
        POSITIONAL,
    ] = ""
    json: Annotated[bool, Help("with families: print a JSON object as the last line")] = False
    span: Annotated[str, Help("with pull: only the files of these layers, FIRST:LAST, of a model on the hub")] = ""
    page: Annotated[str, Help("with families: write the table into this page, between its marks")] = ""


class CompletionConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd completion`."""

    shell: Annotated[
        Literal["bash", "zsh", "tcsh"],
        Help("shell to print the script for"),
        Shape(is_positional=True),
    ]
