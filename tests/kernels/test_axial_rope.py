"""The rotary projection against SAM2's own rotary encoding; the Triton kernel in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_rms_close
from interpreter import addresses_only, count_traffic, huge, program_at

from medvl_sam2.kernels import axial_rope as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.axial_rope import axial_rope_tables, rope_linear

# (batch, repeats of the grid, columns, rows, plain tokens, input channels, output channels)
SHAPES = [
    (2, 3, 5, 3, 4, 12, 24),
    (1, 1, 7, 1, 0, 5, 8),
    (3, 0, 2, 2, 3, 7, 4),
    (1, 2, 3, 11, 1, 33, 72),
    (0, 1, 2, 2, 0, 4, 4),
]
LARGE = [(2, 7, 64, 64, 64, 64, 256), (1, 1, 32, 32, 0, 256, 256), (3, 2, 5, 3, 4, 12, 24)]


def _make(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)
    batch, repeats, columns, rows, plain, channels, dim = shape
    x = torch.randn(batch, repeats * columns * rows + plain, channels)
    tensors = (x, torch.randn(dim, channels) / channels**0.5, torch.randn(dim))
    tables = axial_rope_tables(columns, rows, dim, device)
    return *(t.to(device, dtype).requires_grad_() for t in tensors), tables, plain


def _side_by_side(x):
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_sam2_forward_and_backward(shape):
    sam2 = pytest.importorskip("sam2.modeling.position_encoding")
    x, weight, bias, tables, plain = _make(shape)
    columns, rows = shape[2:4]
    frequencies = sam2.compute_axial_cis(shape[-1], columns, rows)
    y = F.linear(x, weight, bias)
    turned = y.shape[1] - plain
    keys = y[:, None, :turned]
    queries = torch.zeros(shape[0], 1, columns * rows, shape[-1])
    if turned and shape[0]:
        keys = sam2.apply_rotary_enc(queries, keys, frequencies, repeat_freqs_k=True)[1]
    want = torch.cat((keys[:, 0], y[:, turned:]), dim=1)
    got = rope_linear(x, weight, bias, tables, num_plain_tokens=plain)
    assert_close(_side_by_side(got), want)
    expected = torch.autograd.grad((want * want.detach().cos()).sum(), (x, weight, bias))
    for a, b in zip(torch.autograd.grad((got * got.detach().cos()).sum(), (x, weight, bias)), expected):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    x, weight, bias, tables, plain = _make((2, 2, 3, 2, 1, 3, 4), torch.float64)
    tables = tuple(t.double() for t in tables)
    assert torch.autograd.gradcheck(lambda *a: rope_linear(*a, tables, num_plain_tokens=plain), (x, weight, bias))


def test_is_linear_so_a_temporal_term_may_be_added_later():
    x, weight, bias, tables, _ = _make((2, 3, 4, 4, 0, 16, 32), torch.float64)
    term = torch.randn(3, 1, 16, dtype=torch.float64).expand(3, 16, 16).reshape(1, 48, 16)
    whole = rope_linear(x + term, weight, bias, tables)
    assert_close(rope_linear(x, weight, bias, tables) + rope_linear(term, weight, None, tables), whole)


def test_opcheck_and_compile():
    x, weight, bias, tables, plain = _make((2, 3, 5, 3, 4, 12, 24))
    torch.library.opcheck(module._rope_linear, (x, weight, bias, *tables, plain))
    torch.library.opcheck(module._rope_linear, (x, weight, None, *tables, plain))
    compiled = torch.compile(
        lambda *a: rope_linear(*a, tables, num_plain_tokens=plain).sin().sum(), fullgraph=True, backend="aot_eager"
    )
    plain_run = rope_linear(x, weight, bias, tables, num_plain_tokens=plain).sin().sum()
    got = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    for a, b in zip(got, torch.autograd.grad(plain_run, (x, weight, bias))):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 7, 5)}, r"expected a multiple of 6 tokens before 0 plain ones, got 7"),
        ({"x": torch.ones(6, 5)}, r"rope_linear: expected x of shape"),
        ({"weight": torch.ones(8, 4)}, r"rope_linear: expected weight of shape \(any, 5\)"),
        ({"weight": torch.ones(8, 5).half()}, "rope_linear: expected weight of dtype float32, got float16"),
        ({"weight": torch.ones(12, 5), "bias": torch.ones(12)}, r"rope_linear: expected cosines of shape \(6, 6\)"),
        ({"bias": torch.ones(7)}, r"rope_linear: expected bias of shape \(8\)"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change, message):
    arguments = {"x": torch.ones(2, 6, 5), "weight": torch.ones(8, 5), "bias": None} | change
    with pytest.raises(ValueError, match=message):
        rope_linear(**arguments, rope=axial_rope_tables(3, 2, 8))
    with pytest.raises(ValueError, match="divisible by 4"):
        axial_rope_tables(3, 2, 6)
    x, weight, (cos, sin) = torch.ones(2, 6, 5), torch.ones(8, 5), axial_rope_tables(3, 2, 8)
    with pytest.raises(ValueError, match="expected cosines of dtype float32"):
        rope_linear(x, weight, None, (cos.half(), sin.half()))
    with pytest.raises(ValueError, match="expected a multiple of 0 tokens"):
        rope_linear(x, weight, None, (cos[:0], sin[:0]))


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_in_the_interpreter(shape, dtype):
    x, weight, bias, tables, plain = _make(shape, dtype)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    wider = torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]
    for source in (x, wider):
        for extra in (bias, None):
            got = module._launch_rope_linear(source, weight, extra, *tables, plain)
            assert_rms_close(got, module.rope_linear_reference(x, weight, extra, *tables, plain))


@pytest.mark.interpret
def test_bytes_and_operations():
    x, weight, bias, tables, plain = _make((2, 2, 4, 4, 0, 32, 64))
    with count_traffic() as traffic:
        module._launch_rope_linear(*(t.detach() for t in (x, weight, bias)), *tables, plain)
    rows = 2 * 32
    assert traffic.dot_flops == 2 * rows * 32 * 64
    assert traffic.store_bytes == 4 * rows * 64
    assert traffic.unique_load_bytes == 4 * (rows * 32 + 64 * 32 + 64 + 2 * 16 * 32)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    tokens = 2**27
    space = huge((tokens * 48,), (1,), torch.float16)
    x, out = space[: tokens * 32].view(1, tokens, 32), space[tokens * 32 :].view(1, tokens, 16)
    weight, (cos, sin) = torch.ones(16, 32).half(), axial_rope_tables(4, 2, 16)
    constants = {"C": 32, "HALF": 8, "HAS_BIAS": False, "PRECISION": "ieee"}
    sizes = {"BLOCK_M": 16, "BLOCK_H": 16, "BLOCK_C": 32}
    with addresses_only() as asked, program_at(tokens // 16 - 1):
        module._rope_linear_kernel[(1, 1)](
            x, weight, weight, cos, sin, out, tokens, tokens, tokens, 8, **constants, **sizes
        )
    assert {t.data_ptr() + 2 * (t.numel() - 1) for t in (x, out)} <= asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_on_a_gpu(shape, dtype):
    x, weight, bias, tables, plain = _make(shape, dtype, "cuda")

    def run():
        return rope_linear(x, weight, bias, tables, num_plain_tokens=plain).detach()

    got = run()
    with disable("axial_rope"):
        assert_rms_close(got, run())
    assert torch.equal(got, run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(got, captured)
