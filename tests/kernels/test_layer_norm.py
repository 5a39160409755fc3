"""LayerNorm against PyTorch in fp64 and SAM2's own LayerNorm2d; Triton kernels in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import layer_norm as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.layer_norm import layer_norm, layer_norm_2d

ROWS = [(5, 123), (9, 7, 41), (1, 1, 1023), (3, 1), (33,), (0, 16)]
MAPS = [(2, 7, 5, 3), (1, 64, 9, 11), (2, 3, 1, 1), (0, 4, 2, 2), (1, 257, 3, 5)]


def _make(shape: tuple[int, ...], axis: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    torch.manual_seed(42)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    weight, bias = torch.randn(2, shape[axis], dtype=torch.float64).unbind(0)
    return tuple(t.to(device, dtype).requires_grad_() for t in (x, weight, bias, torch.randn_like(x)))


def _exact(x, weight, bias, eps, residual, axis):
    total = (x if residual is None else x + residual).double().movedim(axis, -1)
    return F.layer_norm(total, total.shape[-1:], weight.double(), bias.double(), eps).movedim(-1, axis)


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual"])
def test_rows_match_torch_forward_and_backward(shape, fused):
    x, weight, bias, residual = _make(shape, -1)
    out = layer_norm(x, weight, bias, 1e-5, residual if fused else None)
    y = out[0] if fused else out
    want = _exact(x, weight, bias, 1e-5, residual if fused else None, -1)
    assert_close(y, want)
    inputs = (x, weight, bias, residual) if fused else (x, weight, bias)
    loss = (y * y.detach().cos()).sum() + (out[1].sin().sum() if fused else 0)
    want_loss = (want * y.detach().cos()).sum() + ((x + residual).double().sin().sum() if fused else 0)
    for got, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want_loss, inputs)):
        assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps_match_sam2(shape):
    LayerNorm2d = pytest.importorskip("sam2.modeling.sam2_utils").LayerNorm2d
    x, weight, bias, _ = _make(shape, 1, torch.float64)
    theirs = LayerNorm2d(shape[1], eps=1e-6).double()
    theirs.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    ours, want = layer_norm_2d(x, weight, bias), theirs(x)
    assert_close(ours, want)
    got = torch.autograd.grad(ours.sin().sum(), (x, weight, bias))
    expected = torch.autograd.grad(want.sin().sum(), (x, theirs.weight, theirs.bias))
    for a, b in zip(got, expected):
        assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_bfloat16_is_no_worse_than_torch():
    x, weight, bias = (t.detach() for t in _make((64, 96), -1, torch.bfloat16)[:3])
    plain = F.layer_norm(x, (96,), weight, bias)
    assert_no_worse(layer_norm(x, weight, bias), plain, _exact(x, weight, bias, 1e-5, None, -1))


def test_gradcheck():
    x, weight, bias, residual = _make((3, 5), -1, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: layer_norm(a[0], a[1], a[2], 1e-5, a[3]), (x, weight, bias, residual))


def test_opcheck():
    x, weight, bias, residual = _make((4, 6), -1)
    torch.library.opcheck(module._layer_norm, (x, weight, bias, 1e-5, residual, -1))
    torch.library.opcheck(module._layer_norm, (x, weight, bias, 1e-5, None, -1))
    x, weight, bias, _ = _make((2, 5, 3, 4), 1)
    torch.library.opcheck(module._layer_norm, (x.detach(), weight, bias, 1e-6, None, 1))


def test_compiles_without_a_graph_break():
    x, weight, bias, residual = _make((4, 6), -1)

    def step(x, weight, bias, residual):
        y, total = layer_norm(x, weight, bias, 1e-5, residual)
        return (y * total).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = (x, weight, bias, residual)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs)):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"layer_norm: expected weight of shape \(6\), got \(5,\)"),
        ({"x": torch.ones(4, 6, dtype=torch.int32)}, "layer_norm: expected x of dtype float32.*got int32"),
        ({"residual": torch.ones(3, 6)}, r"layer_norm: expected residual of shape \(4, 6\)"),
        ({"residual": torch.ones(4, 6).half()}, "layer_norm: expected residual of dtype float32, got float16"),
        ({"x": torch.ones(4, 0)}, "C >= 1"),
        ({"bias": torch.ones(6, device="meta")}, "layer_norm: expected all tensors on one device, got cpu, meta"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change, message):
    arguments = {"x": torch.ones(4, 6), "weight": torch.ones(6), "bias": torch.ones(6), "residual": None} | change
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [(s, -1) for s in ROWS] + [(s, 1) for s in MAPS], ids=str)
def test_kernels_in_the_interpreter(shape, axis, dtype):
    x, weight, bias, residual = (t.detach() for t in _make(shape, axis, dtype))
    if len(shape) > 1 and axis == -1:
        # Every other row of a wider array: strides that are not those of a fresh tensor.
        x = torch.stack((x, x), dim=-2).flatten(-3, -2)[..., ::2, :]
    for extra in (None, residual):
        got = module._launch_layer_norm(x, weight, bias, 1e-5, extra, axis)
        want = module.layer_norm_reference(x, weight, bias, 1e-5, extra, axis)
        for a, b in zip(got, want):
            assert_close(a, b, dtype=dtype)
        total = x if extra is None else want[1]
        grads = torch.randn_like(want[0]), (None if extra is None else torch.randn_like(want[0]))
        got = module._launch_layer_norm_backward(*grads, total, weight, want[2], want[3], axis)
        want = module.layer_norm_backward_reference(*grads, total, weight, want[2], want[3], axis)
        for a, b in zip(got, want):
            assert_rms_close(a, b)


@pytest.mark.interpret
def test_reads_once_and_writes_once():
    x, weight, bias, residual = (t.detach() for t in _make((37, 64), -1))
    with count_traffic() as traffic:
        module._launch_layer_norm(x, weight, bias, 1e-5, residual, -1)
    assert traffic.unique_load_bytes == 4 * (2 * x.numel() + 2 * 64)
    assert traffic.store_bytes == 4 * (2 * x.numel() + 2 * 37)
    x, weight, bias, _ = (t.detach() for t in _make((2, 8, 5, 7), 1))
    with count_traffic() as traffic:
        module._launch_layer_norm(x, weight, bias, 1e-6, None, 1)
    programs = 2 * 1
    assert traffic.load_bytes == 4 * (x.numel() + programs * 2 * 8)
    assert traffic.store_bytes == 4 * (x.numel() + 2 * 2 * 35)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    x, ones = huge((4, 8), (2**30, 1), torch.float16), torch.ones(8)
    with addresses_only() as asked:
        module._launch_layer_norm(x, ones, ones, 1e-5, None, -1)
    assert asked == {x.data_ptr() + 2 * (row * 2**30 + column) for row in range(4) for column in range(8)}
    grad = huge((2, 3, 2, 2), (2**33, 2**31, 2, 1), torch.float16)
    statistics = torch.ones(2, 2, 2)
    with addresses_only() as asked:
        module._launch_layer_norm_backward(grad, None, torch.ones(2, 3, 2, 2), torch.ones(3), statistics, statistics, 1)
    assert max(asked) == grad.data_ptr() + 2 * (2**33 + 2 * 2**31 + 3) and len(asked) == grad.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((4, 2049, 768), -1), ((2, 256, 64, 64), 1), ((9, 7, 41), -1)], ids=str)
def test_on_a_gpu(shape, axis, dtype):
    x, weight, bias, residual = (t.detach() for t in _make(shape, axis, dtype, "cuda"))
    run = module._layer_norm
    got = run(x, weight, bias, 1e-5, residual, axis)
    with disable("layer_norm"):
        want = run(x, weight, bias, 1e-5, residual, axis)
    for a, b in zip(got, want):
        assert_close(a, b, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, run(x, weight, bias, 1e-5, residual, axis)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, weight, bias, 1e-5, residual, axis)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, captured))
