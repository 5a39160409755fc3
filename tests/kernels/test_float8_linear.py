"""Float8 layers against float64 on the rounded operands, the rounding's own bound, and Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_no_worse
from interpreter import count_traffic
from torch import nn

from medvl_sam2.kernels import float8_linear as file
from medvl_sam2.kernels._common import HAS_TRITON, why_not_triton
from medvl_sam2.kernels.float8_linear import FEW_ROWS, FLOAT8, Float8Linear, float8_linear, quantise_rows

# Half of the distance between neighbours of e4m3, three bits of mantissa, relative to the value.
HALF_STEP = 2.0**-4
SIZES = [(1, 16, 16), (5, 48, 32), (FEW_ROWS, 272, 80), (FEW_ROWS + 1, 64, 48), (70, 128, 16)]


def _case(m, k, n, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)
    x = torch.randn(m, k, device=device) * torch.logspace(-2, 2, m, device=device)[:, None]
    layer = nn.Linear(k, n, device=device)
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 1, n, device=device)[:, None]
    return x.to(dtype), Float8Linear(layer.to(dtype)), layer


def _exact(x, layer, rows_rounded):
    """The product in float64 of what is left of the operands."""
    weight = layer.weight.double() * layer.scale.double()[:, None]
    if rows_rounded:
        rounded, scale = file.quantise_rows_reference(x)
        x = rounded.double() * scale.double()[:, None]
    return x.double() @ weight.T + layer.bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_keeps_its_bound_for_rows_of_any_size(dtype):
    x = (torch.randn(40, 100) * torch.logspace(-20, 20, 40)[:, None]).to(dtype)
    x[3] = 0
    rounded, scale = quantise_rows(x)
    assert rounded.dtype == FLOAT8 and scale.dtype == torch.float32 and scale[3] == 1
    back = rounded.double() * scale.double()[:, None]
    # Below e4m3's smallest normal number, 2^-6, the distance is fixed.
    allowed = torch.maximum(x.double().abs() * HALF_STEP, scale.double()[:, None] * 2.0**-10) * (1 + 1e-6)
    assert ((back - x.double()).abs() <= allowed).all()
    largest = x.double().abs().amax(-1)
    assert_close(back.abs().amax(-1), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64_on_what_was_rounded(size, dtype):
    x, layer, _ = _case(*size, dtype)
    got = layer(x)
    want = _exact(x, layer, rows_rounded=len(x) > FEW_ROWS)
    assert got.dtype == dtype and got.shape == want.shape
    if dtype == torch.float32:
        assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    else:
        assert_no_worse(got, want.to(dtype), want, atol=float(want.abs().max()) * 2.0**-10)


@pytest.mark.parametrize("rows", [4, 64])
def test_is_near_the_layer_it_stands_for(rows):
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 96), torch.randn(rows, 256)
    want = layer(x)
    error = (Float8Linear(layer)(x) - want).square().mean().sqrt() / want.square().mean().sqrt()
    # Random signs: the mean square of the relative errors, once for each rounded operand.
    assert 0.005 < error < 0.06


def test_activations_shapes_and_state():
    x, layer, plain = _case(6, 32, 48)
    got = layer(x.view(2, 3, 32), "gelu")
    assert_close(got.view(6, 48), F.gelu(layer(x)))
    assert_close(layer(x, "relu"), layer(x).relu())
    assert layer(x[:0]).shape == (0, 48)
    assert set(layer.state_dict()) == {"weight", "scale", "bias"}
    assert Float8Linear(nn.Linear(32, 16, bias=False)).bias is None
    assert layer.weight.nbytes + layer.scale.nbytes < 0.4 * plain.weight.nbytes


@pytest.mark.parametrize("rows", [4, 40])
def test_takes_views(rows):
    layer = _case(2, 32, 16)[1]
    x = torch.randn(32, rows).T
    assert_close(layer(x), layer(x.contiguous()))


def test_moves_but_keeps_its_weight_when_cast():
    layer = _case(2, 32, 16)[1].to(torch.bfloat16)
    assert layer.weight.dtype == FLOAT8 and layer.scale.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 31)}, "weight of shape"),
        ({"x": torch.randn(2, 32, dtype=torch.float64)}, "x of dtype"),
        ({"weight": torch.randn(16, 32)}, "weight of dtype"),
        ({"weight": torch.zeros(15, 32).to(FLOAT8), "scale": torch.ones(15)}, "divisible by 16"),
        ({"scale": torch.ones(3)}, "scale of shape"),
        ({"bias": torch.ones(3)}, "bias of shape"),
    ],
)
def test_refuses(change, words):
    given = {"x": torch.randn(2, 32), "weight": torch.zeros(16, 32).to(FLOAT8), "scale": torch.ones(16), "bias": None}
    with pytest.raises(ValueError, match=words):
        float8_linear(**{**given, **change})


def test_a_layer_of_odd_sides_is_left_alone():
    assert not Float8Linear.fits(nn.Linear(30, 16))
    with pytest.raises(ValueError, match="keep this layer"):
        Float8Linear(nn.Linear(30, 16))


def test_says_why_not_on_a_cpu():
    assert "no float8 products on cpu" in file.why_not_float8(torch.device("cpu"))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(("capability", "has_float8"), [((8, 0), False), ((8, 9), False), ((9, 0), True)])
def test_needs_hopper_where_other_operations_need_ampere(monkeypatch, capability, has_float8):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    version = "{}.{}".format(*capability)
    reason = "" if has_float8 else f"compute capability {version} is below 9.0"
    assert file.why_not_float8(torch.device("cuda")) == reason == why_not_triton("float8_linear", "cuda")
    assert why_not_triton("layer_norm", "cuda") == ""


@pytest.mark.parametrize("rows", [3, 40])
def test_compiles_and_passes_opcheck(rows):
    x, layer, _ = _case(rows, 32, 16)
    # opcheck's other tests multiply inputs and outputs, which float8 tensors do not know.
    tests = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(file._rows, (x,), test_utils=tests)
    torch.library.opcheck(file._few, (x[:FEW_ROWS], layer.weight, layer.scale, layer.bias), test_utils=tests)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(x), layer(x))


@pytest.mark.interpret
@pytest.mark.parametrize("size", [(1, 16), (7, 100), (3, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_kernel_equals_torch(poisoned, size, dtype):
    torch.manual_seed(0)
    x = (torch.randn(*size) * torch.logspace(-3, 3, size[0])[:, None]).to(dtype)
    x[0] = 0
    got, scale = file._launch_quantise_rows(x)
    want, exact = file.quantise_rows_reference(x)
    assert_close(scale, exact, rtol=1e-6, atol=0)
    # Triton 3.6's interpreter drops the carry of a mantissa that is rounded up to the next power of two, and rounds
    # what lies midway between two numbers up.
    asked, power = (x.float() / exact[:, None]).abs(), want.float().abs().frexp()
    odd = (power[0] == 0.5) & (asked < want.float().abs())
    odd |= (asked - want.float().abs()).abs() == 2.0 ** (power[1] - 5)
    assert odd.float().mean() < 0.1
    assert_close(got.float()[~odd], want.float()[~odd], rtol=0, atol=0)


@pytest.mark.interpret
@pytest.mark.parametrize("size", [(1, 16, 16), (5, 48, 32), (16, 272, 80), (9, 512, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_few_rows_kernel_equals_torch(poisoned, size, dtype, has_bias):
    x, layer, _ = _case(*size, dtype)
    args = (x, layer.weight, layer.scale, layer.bias if has_bias else None)
    got, want = file._launch_few_rows(*args), file.few_rows_reference(*args)
    assert got.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-10
    assert_close(got, want, rtol=rtol, atol=rtol * float(want.float().abs().max()))


@pytest.mark.interpret
def test_few_rows_kernel_reads_the_weight_once():
    x, layer, _ = _case(16, 512, 64, torch.float16)
    with count_traffic() as traffic:
        file._launch_few_rows(x, layer.weight, layer.scale, None)
    programs = layer.out_features // 16
    assert traffic.load_bytes == layer.weight.nbytes + layer.scale.nbytes + programs * x.nbytes
    assert traffic.store_bytes == 2 * 16 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (4096, 896, 4864), (1, 4864, 896)], ids=str)
def test_on_the_gpu(size):
    if reason := file.why_not_float8(torch.device("cuda")):
        pytest.skip(reason)
    x, layer, _ = _case(*size, torch.bfloat16, "cuda")
    want = _exact(x, layer, rows_rounded=len(x) > FEW_ROWS)
    assert_no_worse(layer(x), want.bfloat16(), want, atol=float(want.abs().max()) * 2.0**-7)
