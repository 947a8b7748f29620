"""Holds the settings of the commands that ask for text or watch a swarm."""

from typing import Annotated, Literal

from msgspec import Meta

from dsd_p2p.types import MAX_BUDGET, HiddenFormat, Sampling
from dsd_p2p.window.base import Mode
from node.config.fields import FILE, POSITIONAL, Help, Positive, Settings
from node.config.running import Json, SwarmFlags


class VerifyConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd verify`."""

    answer: Annotated[str, Help("file with the output of dsd generate --json; -: standard input"), POSITIONAL]
    model: Annotated[str, Help("where the model is on this machine; default: as the answer names it")] = ""
    threads: Annotated[Positive, Help("torch threads")] = 1
    json: Json = False


class GenerateConfig(SwarmFlags, frozen=True, kw_only=True):
    """Settings of `dsd generate`."""

    prompt: Annotated[str, Help("prompt to answer, or with --raw to continue; -: read standard input")] = ""
    prompt_ids: Annotated[str, Help("prompt as token ids, separated by commas")] = ""
    raw: Annotated[bool, Help("continue the prompt as it is, without the model's chat template")] = False
    max_tokens: Annotated[Positive, Help("maximum number of new tokens")] = 128
    temperature: Annotated[float, Meta(ge=0, le=100), Help("sampling temperature; 0: greedy")] = 0.0
    top_p: Annotated[
        float,
        Meta(gt=0, le=1),
        Help("sample only from the likeliest tokens whose probabilities add up to this; 1: all"),
    ] = 1.0
    top_k: Annotated[int, Meta(ge=0), Help("sample only from this many of the likeliest tokens; 0: all")] = 0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1), Help("sampling seed; the same seed gives the same text")] = 0
    connect: Annotated[
        tuple[str, ...],
        Help("multiaddrs of one or more stages of a running swarm, separated by commas; default: start stages here"),
    ] = ()
    swarm: Annotated[str, Help("name of the swarm to use, with its model, or path of its folder")] = ""
    coordinator: Annotated[
        Literal["auto", "self"],
        Help("with --swarm: coordinator of the request; auto: the best-placed peer; self: this machine"),
    ] = "auto"
    timeout: Annotated[str, Help("time limit for an answer that another peer coordinates, e.g. 1h")] = "1h"
    audit: Annotated[bool, Help("with --swarm: have the stages sign their outputs, and spot-check them")] = False
    netlab: Annotated[
        bool, Help("connect the stages through network namespaces instead of emulated links; needs root")
    ] = False
    mode: Annotated[
        Mode,
        Help("plain: one token per traversal; sync: one window at a time; continuous: many windows in flight"),
    ] = Mode.CONTINUOUS
    policy: Annotated[
        Literal["learned", "analytic", "static"],
        Help(
            "policy: learned (trained in simulation), analytic (latency model), static (implied by the options below)"
        ),
    ] = "learned"
    depth: Annotated[
        int,
        Meta(ge=0, le=256),
        Help("static policy: depth of the draft tree (γ in sync mode); 0: the mode's default"),
    ] = 0
    width: Annotated[
        int, Meta(ge=0, le=8), Help("static policy: children per node; 1: a chain; 0: the mode's default")
    ] = 0
    window_nodes: Annotated[
        int,
        Meta(ge=0, le=256),
        Help("static policy: maximum number of nodes in a window; 0: the mode's default"),
    ] = 0
    in_flight: Annotated[
        int, Meta(ge=0, le=256), Help("static policy: maximum number of windows in flight; 0: the mode's default")
    ] = 0
    prefill_chunk: Annotated[int, Meta(ge=1, le=1024), Help("maximum number of prompt tokens in a window")] = 128
    stall_timeout: Annotated[str, Help("time without a verdict after which a route counts as lost")] = "60s"
    hidden: Annotated[
        HiddenFormat, Help("format of hidden states between stages; model: as computed; bf16, int8: smaller")
    ] = HiddenFormat.MODEL
    verify: Annotated[
        Literal["exact", "relaxed"],
        Help("exact: every token is the target's own pick; relaxed: some drafted tokens may stand"),
    ] = "exact"
    relaxation: Annotated[
        str, Help("thresholds of relaxed mode, as written by dsd calibrate; default: the bundled file"), FILE
    ] = ""
    tau: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Help("relaxed mode: weight of the drafter, 0 to 1; default: from the thresholds"),
    ] = None
    budget: Annotated[
        Annotated[float, Meta(ge=0, le=MAX_BUDGET)] | None,
        Help("relaxed mode: nats a token that an answer may lose; default: from the thresholds"),
    ] = None
    json: Json = False

    def sampling(self) -> Sampling:
        """Return the sampling settings."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


class DemoConfig(GenerateConfig, frozen=True, kw_only=True):
    """Settings of `dsd demo`."""

    prompt: Annotated[str, Help("prompt to answer")] = "Why is the sky blue? Answer in three sentences."
    link: Annotated[str, Help("emulated one-way latency of every link, e.g. 50ms")] = "50ms"
    max_tokens: Annotated[Positive, Help("maximum number of new tokens")] = 80


class ChatConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd chat`."""

    gateway: Annotated[str, Help("address of a gateway, http://HOST:PORT"), POSITIONAL] = "http://127.0.0.1:8484"
    key: Annotated[str, Help("API key of the gateway; default: $OPENAI_API_KEY")] = ""
    system: Annotated[str, Help("instructions before everything")] = ""
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None, Help("sampling seed; default: another one each time")
    ] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Help("sampling temperature; default: the model's own")
    ] = None
    max_tokens: Annotated[
        int, Meta(ge=0, le=1 << 20), Help("maximum tokens of an answer; 0: the gateway's default")
    ] = 0


class TopConfig(Settings, frozen=True, kw_only=True):
    """Settings of `dsd top`."""

    target: Annotated[
        str, Help("source of events: a gateway, http://HOST:PORT, or a broker, mqtt://HOST:PORT"), POSITIONAL
    ] = "http://127.0.0.1:8484"
    topics: Annotated[str, Help("name of the swarm in the broker's topics")] = "local"
    mqtt_ca: Annotated[str, Help("CA certificate to check the MQTT broker's certificate with"), FILE] = ""
    key: Annotated[str, Help("API key of the gateway; default: $OPENAI_API_KEY")] = ""
    record: Annotated[str, Help("file to append the events to, for --replay"), FILE] = ""
    replay: Annotated[str, Help("recording of a live or simulated run to show"), FILE] = ""
    speed: Annotated[float, Meta(gt=0, le=1e12), Help("with --replay: speed factor, e.g. 2 for twice as fast")] = 1.0
    once: Annotated[bool, Help("print one picture of the swarm and exit")] = False
    seconds: Annotated[
        float,
        Meta(ge=0, le=600),
        Help("with --once or --svg: seconds to collect events from a gateway or broker; 0: 2.5"),
    ] = 0.0
    json: Annotated[bool, Help("with --once: print one JSON object")] = False
    svg: Annotated[str, Help("SVG file to draw one picture of the swarm to"), FILE] = ""
    columns: Annotated[int, Meta(ge=40, le=500), Help("with --svg: width of the picture in characters")] = 120
    rows: Annotated[int, Meta(ge=10, le=200), Help("with --svg: height of the picture in lines")] = 32
