"""Packed linear layers against torch's own."""

import itertools

import pytest
import torch
from torch import nn

from dsd_p2p.models.packed import PackedLinear, can_pack, pack_linear_layers

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, "cpu")]
SIZES = [(576, 192), (1536, 576), (48, 100)]

pytestmark = pytest.mark.skipif(not DTYPES, reason="this CPU or torch has no oneDNN")


@pytest.fixture(params=itertools.product(DTYPES, SIZES, (False, True)), ids=str)
def layer(request):
    dtype, sizes, has_bias = request.param
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=has_bias, dtype=dtype).requires_grad_(requires_grad=False)


def test_it_computes_what_torch_does(layer):
    packed, dtype = PackedLinear(layer.weight, layer.bias), layer.weight.dtype
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    for shape in ((1,), (1, 7), (3,), (2, 1), (2, 5)):
        inputs = torch.randn(*shape, layer.in_features).to(dtype)
        output = packed(inputs)
        assert output.dtype is dtype
        assert torch.allclose(output, layer(inputs), atol=tolerance, rtol=tolerance)


def test_a_row_is_the_same_bits_whatever_stands_beside_it(layer):
    packed = PackedLinear(layer.weight, layer.bias)
    inputs = torch.randn(1, 70, layer.in_features).to(layer.weight.dtype)
    together = packed(inputs)
    for num_rows in range(1, 34):
        for start in (0, 1, 37 - num_rows, 70 - num_rows):
            part = inputs[:, start : start + num_rows]
            assert torch.equal(packed(part), together[:, start : start + num_rows]), (num_rows, start)


def test_every_linear_layer_of_a_model_is_replaced_and_nothing_else():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 8, bias=False)))
    inputs = torch.randn(1, 3, 8)
    expected = model(inputs)
    num_bytes = sum(each.numel() * 4 for each in (model[0].weight, model[0].bias, model[2][0].weight))
    pack_linear_layers(model)
    assert [type(module).__name__ for module in (model[0], model[1], model[2][0])] == [
        "PackedLinear",
        "LayerNorm",
        "PackedLinear",
    ]
    assert model[0].num_bytes + model[2][0].num_bytes == num_bytes
    assert torch.allclose(model(inputs), expected, atol=1e-5)


def test_other_dtypes_and_devices_are_left_to_torch():
    assert not can_pack(torch.float16, "cpu")
    assert not can_pack(torch.float32, "cuda")
