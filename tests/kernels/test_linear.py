"""oneDNN's linear layer against float64, and when it has to give way."""

import pytest
import torch
import torch.nn.functional as F

from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.linear import Linear, linear, product

SHAPES = [((1, 16), 24), ((3, 5, 7), 11), ((2, 3, 4, 64), 130), ((0, 8), 4), ((1025, 33), 65)]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize(("shape", "width"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_float64(shape: tuple[int, ...], width: int, activation: str, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(width, shape[-1], generator=generator)
    bias = torch.randn(width, generator=generator) if has_bias else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    want = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation](want)
    got = linear(x, weight, bias, activation)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_takes_views() -> None:
    x, weight = torch.randn(6, 5, 8).transpose(0, 1), torch.randn(9, 20)[:, 4:12]
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    keys = torch.randn(12, 7, 8)[:, 3]
    torch.testing.assert_close(product(x[0], keys), x[0] @ keys.T, rtol=1e-5, atol=1e-5)


def test_gives_way_to_autograd_and_other_types() -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    layer(x, "gelu").sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    double = layer.double()(x.double())
    assert double.dtype == torch.float64
    layer = layer.float()
    with torch.inference_mode():
        fast = layer(x, "relu")
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with disable("linear"):
            torch.testing.assert_close(layer(x, "relu"), fast, rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_compiles() -> None:
    layer, x = Linear(8, 4).eval(), torch.randn(3, 8)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
