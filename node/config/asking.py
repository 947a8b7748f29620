"""What a command can be told that asks for text or watches."""

from typing import Annotated, Literal

from msgspec import Meta

from dsd_p2p.types import HiddenFormat, Sampling
from dsd_p2p.window.base import Mode
from node.config.fields import FILE, POSITIONAL, Help, Positive, Settings
from node.config.running import Json, SwarmFlags


class GenerateConfig(SwarmFlags, frozen=True, kw_only=True):
    """`dsd generate`."""

    prompt: Annotated[str, Help("what to answer, or to continue with --raw; - reads standard input")] = ""
    prompt_ids: Annotated[str, Help("the prompt as token ids, separated by commas")] = ""
    raw: Annotated[bool, Help("continue the prompt as it is, without the model's chat template")] = False
    max_tokens: Annotated[Positive, Help("most new tokens")] = 128
    temperature: Annotated[float, Meta(ge=0, le=100), Help("temperature of the sampler; 0 is greedy")] = 0.0
    top_p: Annotated[
        float, Meta(gt=0, le=1), Help("sample from the likeliest tokens that hold this much of the probability")
    ] = 1.0
    top_k: Annotated[int, Meta(ge=0), Help("sample from this many of the likeliest tokens; 0 is all")] = 0
    seed: Annotated[
        int, Meta(ge=0, le=(1 << 63) - 1), Help("seed of the sampler; the same seed gives the same text")
    ] = 0
    connect: Annotated[
        tuple[str, ...], Help("address of a stage of a running swarm; by default dsd starts stages for this answer")
    ] = ()
    swarm: Annotated[str, Help("use this machine's swarm of that name, and its model")] = ""
    coordinator: Annotated[
        Literal["auto", "self"],
        Help("with --swarm: who coordinates: the best placed peer (auto) or this machine (self)"),
    ] = "auto"
    timeout: Annotated[str, Help("longest time for an answer that another peer coordinates")] = "1h"
    audit: Annotated[bool, Help("with --swarm: have the stages sign what they compute, and spot-check them")] = False
    netlab: Annotated[bool, Help("real links between network namespaces instead of emulated ones (root)")] = False
    mode: Annotated[
        Mode,
        Help("plain: one token a trip; sync: a window a trip; continuous: windows all the time"),
    ] = Mode.CONTINUOUS
    policy: Annotated[
        Literal["learned", "analytic", "static"],
        Help("what decides how much to guess: a learned policy, the latency model alone, or the four numbers below"),
    ] = "learned"
    depth: Annotated[
        int,
        Meta(ge=0, le=256),
        Help("static: deepest guess, γ in sync mode; 0: the mode's default"),
    ] = 0
    width: Annotated[
        int, Meta(ge=0, le=8), Help("static: children kept of each node; 1 is a chain; 0: the mode's default")
    ] = 0
    window_nodes: Annotated[
        int,
        Meta(ge=0, le=256),
        Help("static: most nodes in a window; 0: the mode's default"),
    ] = 0
    in_flight: Annotated[int, Meta(ge=0, le=256), Help("static: most windows under way; 0: the mode's default")] = 0
    prefill_chunk: Annotated[int, Meta(ge=1, le=1024), Help("prompt tokens in a window")] = 128
    stall_timeout: Annotated[str, Help("how long a silent route is waited for")] = "60s"
    hidden: Annotated[HiddenFormat, Help("format of hidden states between stages: as computed (model), or smaller")] = (
        HiddenFormat.MODEL
    )
    verify: Annotated[
        Literal["exact", "relaxed"],
        Help("exact: every token is the target's own; relaxed: some may be the drafter's"),
    ] = "exact"
    relaxation: Annotated[
        str, Help("thresholds of relaxed mode, written by dsd calibrate; by default the bundled ones"), FILE
    ] = ""
    tau: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, Help("relaxed mode: weight of the drafter, instead of the file's")
    ] = None
    json: Json = False

    def sampling(self) -> Sampling:
        """Return the sampler's settings."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


class DemoConfig(GenerateConfig, frozen=True, kw_only=True):
    """`dsd demo`."""

    prompt: Annotated[str, Help("what to answer")] = "Why is the sky blue? Answer in three sentences."
    link: Annotated[str, Help("emulated one-way latency of every link, like 50ms")] = "50ms"
    max_tokens: Annotated[Positive, Help("most new tokens")] = 80


class TopConfig(Settings, frozen=True, kw_only=True):
    """`dsd top`."""

    target: Annotated[
        str, Help("what to watch: a gateway http://HOST:PORT, or a broker mqtt://HOST:PORT"), POSITIONAL
    ] = "http://127.0.0.1:8484"
    topics: Annotated[str, Help("the swarm's name in the broker's topics")] = "local"
    mqtt_ca: Annotated[str, Help("certificate of the authority that signed the broker's"), FILE] = ""
    key: Annotated[str, Help("API key of a gateway that needs one; by default $OPENAI_API_KEY")] = ""
    record: Annotated[str, Help("also write the events to a file, to be replayed"), FILE] = ""
    replay: Annotated[str, Help("show a recording of a live or simulated run"), FILE] = ""
    speed: Annotated[float, Meta(gt=0, le=1e12), Help("how many times as fast to replay")] = 1.0
    once: Annotated[bool, Help("look once and print")] = False
    seconds: Annotated[
        float, Meta(ge=0, le=600), Help("how long that look takes; 0: 2.5 seconds, or the whole recording")
    ] = 0.0
    json: Annotated[bool, Help("with --once: print one JSON object")] = False
    svg: Annotated[str, Help("look once and draw a picture"), FILE] = ""
    columns: Annotated[int, Meta(ge=40, le=500), Help("width of the picture, characters")] = 120
    rows: Annotated[int, Meta(ge=10, le=200), Help("height of the picture, lines")] = 32
