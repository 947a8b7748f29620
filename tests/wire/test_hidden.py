"""Smaller hidden states on a link: their size, their error, and that a swarm which uses them says what it is told to."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsd_p2p.errors import ConfigError, RemoteProtocolError
from dsd_p2p.types import ComputeFormat, HiddenFormat, StageCost
from dsd_p2p.wire.codec import encode
from dsd_p2p.wire.hidden import pack, packed_row_bytes, unpack
from dsd_p2p.wire.messages import Verdict, Window

H = 96
DTYPES = {ComputeFormat(name): getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
PAIRS = [
    (dtype, f) for dtype in DTYPES for f in HiddenFormat if (dtype, f) != (ComputeFormat.BFLOAT16, HiddenFormat.BF16)
]


def rows(dtype, num_rows=5, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_rows, H, generator=generator)).to(DTYPES[dtype])


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def values(data, dtype):
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).float().view(-1, H)


@pytest.mark.parametrize(("dtype", "hidden_format"), [pair for pair in PAIRS if pair != ("float16", HiddenFormat.BF16)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_size_and_error(dtype, hidden_format, scale):
    tensor = rows(dtype, scale=scale)
    row_bytes = H * tensor.element_size()
    packed = pack(raw(tensor), row_bytes, dtype, hidden_format)
    assert len(packed) == 5 * packed_row_bytes(row_bytes, dtype, hidden_format)
    back = values(unpack(packed, row_bytes, dtype, hidden_format), dtype)
    match hidden_format:
        case HiddenFormat.MODEL:
            assert torch.equal(back, tensor.float())
        case HiddenFormat.BF16:
            assert torch.equal(back, tensor.bfloat16().float())
        case HiddenFormat.INT8:
            largest = tensor.float().view(5, -1, 32).abs().amax(dim=2, keepdim=True)
            error = (back - tensor.float()).view(5, -1, 32).abs()
            # Half a step of the group's scale, and what float16 and the model's dtype round on top.
            assert (error <= largest * (0.5 / 127 + 2.0**-8) + 1e-4 * scale).all()


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_bfloat16_rounds_as_torch_does(bits):
    array = np.array(bits, np.uint32).view(np.float32)
    array = np.where(np.isfinite(array), array, 1.0).astype(np.float32)
    packed = pack(array.tobytes(), 4 * len(array), ComputeFormat.FLOAT32, HiddenFormat.BF16)
    expected = torch.from_numpy(array.copy()).bfloat16()
    assert packed == expected.view(torch.uint8).numpy().tobytes()


def test_zeros_stay_zeros():
    data = bytes(2 * H * 4)
    assert (
        unpack(
            pack(data, H * 4, ComputeFormat.FLOAT32, HiddenFormat.INT8), H * 4, ComputeFormat.FLOAT32, HiddenFormat.INT8
        )
        == data
    )


def test_scales_from_a_peer_must_be_finite():
    packed = bytearray(pack(raw(rows(ComputeFormat.FLOAT32)), H * 4, ComputeFormat.FLOAT32, HiddenFormat.INT8))
    packed[H : H + 2] = np.array([np.inf], np.float16).tobytes()
    with pytest.raises(RemoteProtocolError, match="scales"):
        unpack(bytes(packed), H * 4, ComputeFormat.FLOAT32, HiddenFormat.INT8)


@pytest.mark.parametrize(
    ("row_bytes", "dtype", "hidden_format"),
    [(2 * H, ComputeFormat.BFLOAT16, HiddenFormat.BF16), (4 * 33, ComputeFormat.FLOAT32, HiddenFormat.INT8)],
)
def test_formats_that_do_not_fit_are_refused(row_bytes, dtype, hidden_format):
    with pytest.raises(ConfigError, match="hidden format"):
        packed_row_bytes(row_bytes, dtype, hidden_format)


def window_of(num_nodes):
    return Window(
        session=bytes(8),
        epoch=1000,
        window=100_000,
        root=(1000, 5000),
        first_node=5000,
        tokens=(151_000,) * num_nodes,
        parents=tuple(range(4999, 4999 + num_nodes)),
        positions=(30_000,) * num_nodes,
        costs=(StageCost(us=12_000, num_rows=8),) * 4,
        link_bytes=1 << 30,
    )


@pytest.mark.parametrize(
    ("dtype", "hidden_format"),
    [
        (ComputeFormat.BFLOAT16, HiddenFormat.MODEL),
        (ComputeFormat.FLOAT32, HiddenFormat.BF16),
        (ComputeFormat.FLOAT32, HiddenFormat.INT8),
    ],
)
def test_a_window_of_sixteen_nodes_of_a_model_of_1536_fits_in_64_kilobytes(dtype, hidden_format):
    row_bytes = 1536 * (4 if dtype is ComputeFormat.FLOAT32 else 2)
    payload = bytes(16 * packed_row_bytes(row_bytes, dtype, hidden_format))
    assert len(encode(window_of(16), payload)) < 64_000


def test_a_verdict_of_four_stages_stays_near_a_hundred_bytes():
    verdict = Verdict(
        session=bytes(range(8)),
        epoch=1000,
        window=100_000,
        start_pos=30_000,
        tokens=(151_000,) * 4,
        settled=(5000,) * 4,
        num_live=16,
        num_stale=12,
        costs=(StageCost(us=12_000, num_rows=8),) * 4,
        link_bytes=1 << 30,
        waited=1200,
    )
    assert len(encode(verdict)) <= 104
