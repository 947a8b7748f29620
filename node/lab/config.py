"""Defines the flags of the commands that measure, simulate or train."""

from typing import Annotated, Literal

from msgspec import Meta

from dsd_p2p.models.catalog import DEFAULT_MODEL
from dsd_p2p.types import HiddenFormat
from dsd_p2p.wire.messages import MAX_STAGES
from node.config.asking import GenerateConfig
from node.config.fields import FILE, POSITIONAL, Help, Positive, Settings, Shape
from node.config.running import Dtype, LinkFlags, SwarmFlags, Weights

REPEATED = Shape(is_repeated=True)
Texts = Annotated[tuple[str, ...], Meta(min_length=1)]
Json = Annotated[bool, Help("print the result as one JSON object, on the last line")]


class ReceiptFlags(Settings, frozen=True, kw_only=True):
    """The flags of every benchmark."""

    receipt: Annotated[str, Help("write the result to docs/benchmarks/NAME.json"), Shape(metavar="NAME")] = ""
    json: Json = False


class RoundFlags(ReceiptFlags, frozen=True, kw_only=True):
    """A benchmark that repeats its arms."""

    rounds: Annotated[Positive, Help("repetitions of every arm")] = 5


class OneRound(RoundFlags, frozen=True, kw_only=True):
    """A benchmark whose result one round shows well enough."""

    rounds: Annotated[Positive, Help("repetitions of every arm")] = 1


class OverheadConfig(GenerateConfig, frozen=True, kw_only=True):
    """`dsd bench overhead`."""

    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 64
    dtype: Dtype = "float32"


class SplitConfig(SwarmFlags, frozen=True, kw_only=True):
    """`dsd bench formats` and `attest`."""

    dtype: Dtype = "float32"


class AuditsConfig(SwarmFlags, frozen=True, kw_only=True):
    """`dsd bench audits`."""

    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 40
    honest: Annotated[Positive, Help("honest answers for each format of the weights")] = 100
    seed: Annotated[int, Help("seed of the order of the honest answers")] = 0


class UsersConfig(SplitConfig, frozen=True, kw_only=True):
    """`dsd bench users`."""

    sessions: Annotated[Positive, Help("requests at once")] = 16
    policies: Annotated[tuple[str, ...], Help("policies to measure beside plain, separated by commas")] = ("learned",)
    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 64
    in_process: Annotated[bool, Help("run all stages in this process, on one device")] = False


class PassesConfig(UsersConfig, frozen=True, kw_only=True):
    """`dsd bench passes`."""

    sessions: Annotated[Positive, Help("most sessions that share a pass")] = 64


class BrokersConfig(UsersConfig, frozen=True, kw_only=True):
    """`dsd bench brokers`."""

    sessions: Annotated[Positive, Help("requests at once")] = 1


class InvitedConfig(Settings, frozen=True, kw_only=True):
    """A swarm of members that were invited one by one."""

    model: Annotated[str, Help("the swarm's model")] = DEFAULT_MODEL
    dtype: Annotated[str, Help("number format that the model computes in")] = "float32"
    draft: Annotated[str, Help("the swarm's drafter")] = "auto"
    members: Annotated[Positive, Help("members that serve layers")] = 3
    link: Annotated[str, Help("emulated one-way latency of every link, like 50ms")] = "50ms"
    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 96


class DoorConfig(InvitedConfig, frozen=True, kw_only=True):
    """`dsd bench door`."""

    restarts: Annotated[int, Meta(ge=0), Help("how often everything restarts")] = 3


class DraftsConfig(InvitedConfig, frozen=True, kw_only=True):
    """`dsd bench drafts`."""

    members: Annotated[Positive, Help("members that serve layers")] = 2


class PeersConfig(UsersConfig, frozen=True, kw_only=True):
    """`dsd bench peers`."""

    stages: Annotated[Positive, Help("stage processes on loopback")] = 4
    sessions: Annotated[Positive, Help("requests at once")] = 1
    weights: Weights = "int8"
    threads: Annotated[Positive, Help("torch threads of each process, and llama.cpp's")] = 1
    draft: Annotated[str, Help("drafter; the stages decode plainly")] = "ngram"
    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 32


class ConstrainedConfig(UsersConfig, frozen=True, kw_only=True):
    """`dsd bench constrained`."""

    limit: Annotated[Positive, Help("number of schemas")] = 60
    prompts: Annotated[int, Meta(ge=1, le=5), Help("prompts for each schema")] = 5
    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 320
    stages: Annotated[Positive, Help("number of stages on the slow link")] = 2
    link: Annotated[str, Help("emulated one-way latency of every link, where answers are timed")] = "50ms"
    sessions: Annotated[Positive, Help("requests at once")] = 1
    weights: Weights = "int8"
    dtype: Dtype = "auto"


class GraphsConfig(Settings, frozen=True, kw_only=True):
    """`dsd bench graphs`."""

    model: Annotated[str, Help("target model")] = "qwen2.5-coder-1.5b"
    draft: Annotated[str, Help("the model that drafts")] = "qwen2.5-coder-0.5b"
    dtype: Annotated[str, Help("number format that the models compute in")] = "bfloat16"
    device: Annotated[str, Help("torch device; only cuda has graphs, others run the same passes without")] = "cuda"
    stages: Annotated[Positive, Help("number of stages that share the layers; one of them is measured")] = 4
    threads: Annotated[Positive, Help("torch threads")] = 1


class PassConfig(Settings, frozen=True, kw_only=True):
    """`dsd bench pass`."""

    shape: Annotated[str, Help("the model whose layers are timed"), Shape(metavar="NAME")] = "qwen3-next-80b"
    dtype: Annotated[str, Help("number format that the layers compute in")] = "float32"
    window_nodes: Annotated[Positive, Help("nodes of a tree window")] = 16
    threads: Annotated[Positive, Help("torch threads")] = 1


class FormsConfig(Settings, frozen=True, kw_only=True):
    """`dsd bench forms`."""

    model: Annotated[str, Help("the model")] = DEFAULT_MODEL
    threads: Annotated[Positive, Help("torch threads")] = 1


class PlacementConfig(Settings, frozen=True, kw_only=True):
    """`dsd bench placement`."""

    peers: Annotated[Positive, Help("peers of the swarm")] = 64
    layers: Annotated[Positive, Help("layers of the model")] = 48
    small: Annotated[int, Meta(ge=0), Help("small swarms whose routes are compared with the best ones")] = 200
    seed: Annotated[int, Help("seed of the swarms")] = 1


class SimulatorConfig(ReceiptFlags, frozen=True, kw_only=True):
    """`dsd bench simulator`."""

    large: Annotated[int, Meta(ge=0), Help("also simulate this many requests on all cores; 0: do not")] = 0


class RingConfig(LinkFlags, frozen=True, kw_only=True):
    """`dsd bench ring`."""

    link: Annotated[str, Help("one-way latency of every link, like 50ms"), Shape(flag="--links")] = "50ms"
    stages: Annotated[int, Meta(ge=1, le=MAX_STAGES), Help("number of fake stages")] = 4
    stage_time: Annotated[str, Help("time of a stage's pass, like 5ms")] = "5ms"
    node_time: Annotated[str, Help("time that each node adds to a pass")] = "0ms"
    draft_time: Annotated[str, Help("time of a draft step")] = "6ms"
    max_tokens: Annotated[Positive, Help("tokens of each text")] = 64
    trace: Annotated[str, Help("file of recorded agreement; by default the bundled one"), FILE] = ""


class WanConfig(Settings, frozen=True, kw_only=True):
    """`dsd bench wan`: runs every model, number of stages and link. Each round has a prompt of every category."""

    links: Annotated[Texts, Help("one-way latencies of the links, separated by commas")] = ("50ms",)
    stages: Annotated[tuple[Positive, ...], Meta(min_length=1), Help("numbers of stages, separated by commas")] = (3,)
    models: Annotated[Texts, Help("targets, separated by commas")] = (DEFAULT_MODEL,)
    prompts: Annotated[tuple[str, ...], Meta(min_length=1), Help("categories of prompts, separated by commas")] = (
        "chat",
        "maths",
        "code",
    )
    dtype: Annotated[str, Help("number format that the targets compute in")] = "float32"
    device: Annotated[str, Help("torch device to compute on")] = "cpu"
    threads: Annotated[Positive, Help("torch threads of each process")] = 1
    draft: Annotated[str, Help("drafter; auto: the one that measured fastest for each target")] = "auto"
    draft_dtype: Annotated[str, Help("format of a drafting model: a number format, int8 or auto")] = "auto"
    max_tokens: Annotated[Positive, Help("tokens of each answer")] = 64
    plain_tokens: Annotated[Positive, Help("tokens of each plain answer")] = 16
    temperature: Annotated[float, Meta(ge=0, le=100), Help("temperature of the sampler; 0 is greedy")] = 0.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1), Help("seed of the sampler")] = 0
    hidden: Annotated[HiddenFormat, Help("format of hidden states between stages")] = HiddenFormat.MODEL
    width: Annotated[int, Meta(ge=1, le=16), Help("tree: children kept for each node")] = 4
    window_nodes: Annotated[int, Meta(ge=1, le=64), Help("tree: most nodes in a window")] = 8
    in_flight: Annotated[int, Meta(ge=1, le=256), Help("tree: most windows in flight")] = 64
    netlab: Annotated[bool, Help("real TCP between network namespaces, not emulated links; needs root")] = False
    relaxed: Annotated[bool, Help("also run the tree in relaxed mode")] = False
    relaxation: Annotated[str, Help("thresholds of relaxed mode"), FILE] = ""
    arms: Annotated[
        tuple[str, ...], Help("windows of the catalogue, separated by commas, or all; by default five and two policies")
    ] = ()
    policies: Annotated[
        tuple[str, ...],
        Help("policies to run beside --arms, each with measurements of its own"),
    ] = ()
    finalists: Annotated[
        int,
        Meta(ge=0, le=64),
        Help("after an uncounted round, keep only this many of the fastest windows; 0: keep all"),
    ] = 0
    record: Annotated[bool, Help("also record the agreement along each answer, for the simulator")] = False

    def __post_init__(self) -> None:
        for link in self.links:
            LinkFlags(link=link)


class PlotsConfig(Settings, frozen=True, kw_only=True):
    """`dsd bench plots`."""


class PairFlags(Settings, frozen=True, kw_only=True):
    """A target and a drafting model in one process."""

    model: Annotated[str, Help("the target")] = "qwen2.5-coder-1.5b"
    draft: Annotated[str, Help("the drafting model")] = "qwen2.5-coder-0.5b"
    dtype: Annotated[str, Help("number format that both compute in")] = "bfloat16"
    device: Annotated[str, Help("torch device to compute on")] = "cpu"
    threads: Annotated[Positive, Help("torch threads")] = 2
    max_tokens: Annotated[Positive, Help("most tokens of each text")] = 128
    batch: Annotated[Positive, Help("texts written side by side")] = 8


class CalibrateConfig(PairFlags, frozen=True, kw_only=True):
    """`dsd calibrate`."""

    prompts: Annotated[Literal["chat", "maths", "code"], Help("what to calibrate on")] = "chat"
    num_prompts: Annotated[Positive, Help("how many prompts")] = 24
    budget: Annotated[
        float, Meta(gt=0), Help("average loss of the target's log-likelihood allowed per token, in nats")
    ] = 0.01
    output: Annotated[str, Help("where to write the thresholds"), FILE] = "relaxation.json"


class RelaxedConfig(PairFlags, frozen=True, kw_only=True):
    """`dsd bench relaxed`."""

    prompts: Annotated[
        Literal["problems", "chat"],
        Help("problems: maths and code, counted as solved; chat: MT-Bench, compared and timed"),
    ] = "problems"
    problems: Annotated[Positive, Help("problems of maths and of code, each")] = 80
    limit: Annotated[Positive, Help("with --prompts chat: questions, of two turns each")] = 80
    max_tokens: Annotated[Positive, Help("most tokens of each text")] = 384
    relaxation: Annotated[
        tuple[str, ...],
        Help("thresholds to compare with exact mode, separated by commas"),
        Shape(metavar="FILES"),
    ] = ()


class RecordConfig(PairFlags, frozen=True, kw_only=True):
    """`dsd sim record`."""

    texts: Annotated[Positive, Help("texts of each category")] = 12
    output: Annotated[str, Help("where to write the agreement"), FILE] = "agreement.json.gz"


class ProfileConfig(SwarmFlags, frozen=True, kw_only=True):
    """`dsd profile`."""

    stages: Annotated[Positive, Help("stages of the swarm that this machine would be one of")] = 3


class ScenarioFlags(Settings, frozen=True, kw_only=True):
    """A scenario file and changes to it."""

    scenario: Annotated[str, Help("TOML file (docs/simulator.md), or the name of a bundled scenario"), POSITIONAL]
    set: Annotated[
        tuple[str, ...],
        Help("change a field, like workload.rate=20; may be given several times"),
        Shape(metavar="NAME=VALUE", is_repeated=True),
    ] = ()
    seed: Annotated[int | None, Help("seed of the run, instead of the scenario's")] = None


class SimRunConfig(ScenarioFlags, frozen=True, kw_only=True):
    """`dsd sim run`."""

    record: Annotated[str, Help("write the run's telemetry, for dsd top --replay"), FILE] = ""
    csv: Annotated[str, Help("write one row for each request"), FILE] = ""
    json: Json = False


class SimTraceConfig(ScenarioFlags, frozen=True, kw_only=True):
    """`dsd sim trace`."""

    output: Annotated[str, Help("where to write the timeline"), FILE] = "trace.json"


class SimSweepConfig(ScenarioFlags, frozen=True, kw_only=True):
    """`dsd sim sweep`."""

    grid: Annotated[
        tuple[str, ...],
        Meta(min_length=1),
        Help("values of a field, like workload.rate=10,20; may be given several times"),
        Shape(metavar="NAME=VALUE,VALUE", is_repeated=True),
    ]
    seeds: Annotated[Positive, Help("runs of every point")] = 1
    processes: Annotated[int, Meta(ge=0), Help("processes to use; 0: one for each core")] = 0
    ray: Annotated[str, Help("run on a Ray cluster at this address; local starts one"), Shape(metavar="ADDRESS")] = ""
    plot: Annotated[str, Help("draw throughput and time per token"), FILE] = ""
    csv: Annotated[str, Help("write one row for each report"), FILE] = ""
    json: Json = False


class SimCompareConfig(Settings, frozen=True, kw_only=True):
    """`dsd sim compare`."""

    receipts: Annotated[
        tuple[str, ...],
        Meta(min_length=1),
        Help("receipts of dsd bench wan --arms ... --record, or their folder"),
        POSITIONAL,
    ]
    held_out: Annotated[bool, Help("show only the cells that the fit did not use")] = False
    json: Json = False
