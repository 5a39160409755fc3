"""LayerNorm against PyTorch in fp64 and SAM2's own LayerNorm2d; Triton kernels in the interpreter."""

import functools

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import layer_norm as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.layer_norm import LayerNorm, layer_norm, layer_norm_2d

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


def _operation(x, weight, bias, eps, residual=None):
    """The registered operation itself, which the function leaves to CUDA."""
    y, total, _, _ = module._layer_norm(x, weight, bias, eps, residual, -1, False, False)
    return y if residual is None else (y, total)


def _operation_2d(x, weight, bias, eps=1e-6, channels_last=False):
    return module._layer_norm(x, weight, bias, eps, None, 1, channels_last, False)[0]


@pytest.mark.parametrize("function", [_operation, layer_norm], ids=["operation", "function"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual"])
def test_rows_match_torch_forward_and_backward(shape, fused, function):
    x, weight, bias, residual = _make(shape, -1)
    out = function(x, weight, bias, 1e-5, residual if fused else None)
    y = out[0] if fused else out
    want = _exact(x, weight, bias, 1e-5, residual if fused else None, -1)
    assert_close(y, want)
    inputs = (x, weight, bias, residual) if fused else (x, weight, bias)
    loss = (y * y.detach().cos()).sum() + (out[1].sin().sum() if fused else 0)
    want_loss = (want * y.detach().cos()).sum() + ((x + residual).double().sin().sum() if fused else 0)
    for got, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want_loss, inputs)):
        assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [_operation_2d, layer_norm_2d], ids=["operation", "function"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps_match_sam2(shape, channels_last, function):
    LayerNorm2d = pytest.importorskip("sam2.modeling.sam2_utils").LayerNorm2d
    x, weight, bias, _ = _make(shape, 1, torch.float64)
    theirs = LayerNorm2d(shape[1], eps=1e-6).double()
    theirs.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    ours, want = function(x, weight, bias, channels_last=channels_last), theirs(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.is_contiguous(memory_format=layout)
    assert_close(ours, want)
    got = torch.autograd.grad(ours.sin().sum(), (x, weight, bias))
    expected = torch.autograd.grad(want.sin().sum(), (x, theirs.weight, theirs.bias))
    for a, b in zip(got, expected):
        assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_bfloat16_is_no_worse_than_torch():
    x, weight, bias = (t.detach() for t in _make((64, 96), -1, torch.bfloat16)[:3])
    plain = F.layer_norm(x, (96,), weight, bias)
    exact = _exact(x, weight, bias, 1e-5, None, -1)
    assert_no_worse(_operation(x, weight, bias, 1e-5), plain, exact)
    assert_no_worse(layer_norm(x, weight, bias), plain, exact)


@pytest.mark.parametrize("function", [_operation, layer_norm], ids=["operation", "function"])
def test_a_branch_of_another_dtype_joins_as_torch_adds(function):
    x, weight, bias, residual = (t.detach() for t in _make((64, 96), -1))
    branch = x.bfloat16().requires_grad_()
    y, total = function(branch, weight, bias, 1e-5, residual)
    assert y.dtype == total.dtype == torch.float32
    assert_close(total.detach(), branch.float() + residual)
    assert_close(y.detach(), F.layer_norm(branch.float() + residual, (96,), weight, bias))
    (grad,) = torch.autograd.grad((y * residual).sum(), branch)
    assert grad.dtype == torch.bfloat16
    plain = F.layer_norm(branch.float() + residual, (96,), weight, bias)
    assert_close(grad, torch.autograd.grad((plain * residual).sum(), branch)[0], dtype=torch.bfloat16)


def test_module_adds_a_branch_and_keeps_its_parameters():
    x, weight, bias, branch = (t.detach() for t in _make((5, 7, 12), -1))
    ours, theirs = LayerNorm(12, eps=1e-6), torch.nn.LayerNorm(12, eps=1e-6)
    for norm in (ours, theirs):
        norm.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(ours(x), theirs(x))
    y, total = ours.add(x, branch)
    assert torch.equal(total, x + branch) and torch.equal(y, theirs(x + branch))
    y, total = ours.add(x, None)
    assert total is x and torch.equal(y, theirs(x))


def test_gradcheck():
    x, weight, bias, residual = _make((3, 5), -1, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: _operation(a[0], a[1], a[2], 1e-5, a[3]), (x, weight, bias, residual))


def test_opcheck():
    x, weight, bias, residual = _make((4, 6), -1)
    torch.library.opcheck(module._layer_norm, (x, weight, bias, 1e-5, residual, -1, False, False))
    torch.library.opcheck(module._layer_norm, (x.bfloat16(), weight, bias, 1e-5, None, -1, False, True))
    x, weight, bias, _ = _make((2, 5, 3, 4), 1)
    torch.library.opcheck(module._layer_norm, (x.detach(), weight, bias, 1e-6, None, 1, True, False))


def test_compiles_without_a_graph_break():
    x, weight, bias, residual = _make((4, 6), -1)

    def step(function, x, weight, bias, residual):
        y, total = function(x, weight, bias, 1e-5, residual)
        return (y * total).sum()

    inputs = (x, weight, bias, residual)
    for function in (_operation, layer_norm):
        plain = functools.partial(step, function)
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(plain(*inputs), inputs)):
            assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"layer_norm: expected weight of shape \(6\), got \(5,\)"),
        ({"x": torch.ones(4, 6, dtype=torch.int32)}, "layer_norm: expected x of dtype float32.*got int32"),
        ({"residual": torch.ones(3, 6)}, r"layer_norm: expected residual of shape \(4, 6\)"),
        ({"residual": torch.ones(4, 6).int()}, "layer_norm: expected residual of dtype float32.*got int32"),
        ({"bias": torch.ones(6).int()}, "layer_norm: expected bias of dtype float32.*got int32"),
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
        options = (axis, axis == 1, extra is not None)
        got = module._launch_layer_norm(x, weight, bias, 1e-5, extra, *options)
        want = module.layer_norm_reference(x, weight, bias, 1e-5, extra, *options)
        for a, b in zip(got, want):
            assert a.stride() == b.stride()
            assert_close(a, b, dtype=dtype)
        total = x if extra is None else want[1]
        grads = torch.randn_like(want[0]), (None if extra is None else torch.randn_like(want[0]))
        got = module._launch_layer_norm_backward(*grads, total, weight, want[2], want[3], axis)
        want = module.layer_norm_backward_reference(*grads, total, weight, want[2], want[3], axis)
        for a, b in zip(got, want):
            assert_rms_close(a, b)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("order", "axis"), [((1, 0, 2), -1), ((2, 1, 0), -1), ((0, 3, 1, 2), 1), ((3, 1, 0, 2), 1)])
def test_permuted_inputs_in_the_interpreter(order, axis):
    x = torch.randn((3, 5, 4, 6)[: len(order)]).permute(order)
    weight, bias = torch.randn(2, x.shape[axis]).unbind(0)
    arguments = (x, weight, bias, 1e-5, None, axis, False, False)
    want = module.layer_norm_reference(*arguments)
    for a, b in zip(module._launch_layer_norm(*arguments), want):
        assert_close(a, b)
    backward = (torch.randn(x.shape), None, x, weight, want[2], want[3], axis)
    for a, b in zip(module._launch_layer_norm_backward(*backward), module.layer_norm_backward_reference(*backward)):
        assert a.stride() == b.stride()
        assert_rms_close(a, b)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
def test_a_branch_of_another_dtype_in_the_interpreter():
    x, weight, bias, residual = (t.detach() for t in _make((5, 33), -1))
    arguments = (x.half(), weight, bias, 1e-5, residual, -1, False, False)
    for a, b in zip(module._launch_layer_norm(*arguments), module.layer_norm_reference(*arguments)):
        assert a.dtype == b.dtype == torch.float32
        assert_close(a, b)


def test_rows_too_wide_for_registers_are_pytorchs():
    x, weight, bias, residual = (t.detach() for t in _make((2, module.WIDEST + 1), -1))
    got = module._launch_layer_norm(x, weight, bias, 1e-5, residual, -1, False, False)
    assert_close(got[0], _exact(x, weight, bias, 1e-5, residual, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
def test_reads_once_and_writes_once():
    x, weight, bias, residual = (t.detach() for t in _make((37, 64), -1))
    with count_traffic() as traffic:
        module._launch_layer_norm(x, weight, bias, 1e-5, residual, -1, False, False)
    assert traffic.unique_load_bytes == 4 * (2 * x.numel() + 2 * 64)
    assert traffic.store_bytes == 4 * (2 * x.numel() + 2 * 37)
    x, weight, bias, _ = (t.detach() for t in _make((2, 8, 5, 7), 1))
    with count_traffic() as traffic:
        module._launch_layer_norm(x, weight, bias, 1e-6, None, 1, True, False)
    programs = 2 * 1
    assert traffic.load_bytes == 4 * (x.numel() + programs * 2 * 8)
    assert traffic.store_bytes == 4 * (x.numel() + 2 * 2 * 35)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    x, ones = huge((4, 8), (2**30, 1), torch.float16), torch.ones(8)
    with addresses_only() as asked:
        module._launch_layer_norm(x, ones, ones, 1e-5, None, -1, False, False)
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
    arguments = (x, weight, bias, 1e-5, residual, axis, axis == 1, False)
    run = module._layer_norm
    got = run(*arguments)
    with disable("layer_norm"):
        want = run(*arguments)
    for a, b in zip(got, want):
        assert_close(a, b, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, run(*arguments)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, captured))


@pytest.mark.gpu
def test_under_autocast_as_pytorchs_on_a_gpu():
    x, weight, bias, residual = (t.detach() for t in _make((33, 96), -1, torch.float32, "cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        y, total = layer_norm(x.bfloat16(), weight, bias, residual=residual.bfloat16())
        want = F.layer_norm(x.bfloat16() + residual.bfloat16(), (96,), weight, bias)
    assert total.dtype == torch.bfloat16 and y.dtype == want.dtype == torch.float32
    assert_close(y, want, rtol=1e-4, atol=1e-4)
