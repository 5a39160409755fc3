"""Window attention against the sam2 package's Hiera blocks; Triton kernels in the interpreter."""

import pytest
import torch
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge, program_at

from medvl_sam2.kernels import window_attention as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels._tuning import force_tile
from medvl_sam2.kernels.window_attention import projected_window_attention, window_attention
from medvl_sam2.kernels.window_attention_kernels import (
    column_blocks,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from medvl_sam2.kernels.window_attention_torch import (
    attend_windows,
    pad,
    partition,
    unpartition,
    window_attention_reference,
)

# (batch, height, width, heads, head dim, window, pool)
SHAPES = [
    (2, 5, 7, 2, 20, 4, False),
    (1, 8, 6, 1, 40, 4, True),
    (2, 4, 4, 2, 8, 4, False),
    (1, 1, 1, 1, 16, 3, False),
    (1, 2, 10, 2, 17, 8, True),
    (0, 4, 4, 1, 8, 2, False),
    (1, 3, 9, 3, 5, 5, False),
]


def _make(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)
    b, h, w, heads, dim, _, _ = shape
    qkv, padding = torch.randn(b, h, w, 3 * heads * dim), torch.randn(3 * heads * dim)
    return tuple(t.to(device, dtype).requires_grad_() for t in (qkv, padding))


def _gradients(out, *inputs):
    loss = (out.double() * out.detach().double().cos()).sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    ("size", "window", "pool"),
    [((16, 16), 8, False), ((10, 13), 7, False), ((10, 14), 8, True), ((8, 8), 8, True), ((6, 9), 0, False)],
    ids=str,
)
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_a_hiera_block_of_sam2(size, window, pool, heads, monkeypatch):
    """The package's block with its MLP silenced, against our attention and its projections; gradients as well."""
    hieradet = pytest.importorskip("sam2.modeling.backbones.hieradet")
    torch.manual_seed(7)
    dim, dim_out = 24, 48 if pool else 24
    block = hieradet.MultiScaleBlock(dim, dim_out, heads, q_stride=(2, 2) if pool else None, window_size=window)
    torch.nn.init.zeros_(block.mlp.layers[1].weight)
    torch.nn.init.zeros_(block.mlp.layers[1].bias)
    x = torch.randn(2, *size, dim, requires_grad=True)
    want = block(x)
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    inputs = (x, weight, bias)
    expected = _gradients(want, *inputs)
    for projected in (False, True, "in parts"):
        if projected == "in parts":
            monkeypatch.setattr(module, "_PROJECTED_BYTES", 1)
        normed = block.norm1(x)
        shortcut = hieradet.do_pool(block.proj(normed), block.pool) if pool else x
        if projected:
            attended = projected_window_attention(normed, weight, bias, heads, window, pool=pool)
        else:
            attended = window_attention(block.attn.qkv(normed), heads, window, bias, pool=pool)
        got = shortcut + block.attn.proj(attended)
        assert_close(got, want)
        for a, b in zip(_gradients(got, *inputs), expected):
            assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_equals_the_reference(shape):
    qkv, padding = _make(shape)
    *_, heads, _, window, pool = shape
    want = window_attention_reference(qkv.double(), padding.double(), heads, window, pool)
    expected = _gradients(want, qkv, padding)
    operation = module._windows(qkv, padding, heads, window, pool, True)[0]
    for got in (window_attention(qkv, heads, window, padding, pool=pool), operation):
        assert_close(got, want)
        for a, b in zip(_gradients(got, qkv, padding), expected):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
    zero = window_attention_reference(qkv, torch.zeros_like(padding), heads, window, pool)
    assert_close(window_attention(qkv, heads, window, pool=pool), zero)
    assert_close(module._windows(qkv.detach(), None, heads, window, pool, False)[0], zero)


def test_ties_of_the_maximum_pass_the_gradient_as_max_pool2d():
    qkv = torch.randint(0, 2, (1, 4, 4, 24)).float().requires_grad_()
    q, k, v = qkv.chunk(3, -1)
    pooled = torch.nn.functional.max_pool2d(q.permute(0, 3, 1, 2), 2).flatten(2).mT
    want = torch.nn.functional.scaled_dot_product_attention(pooled, k.flatten(1, 2), v.flatten(1, 2)).view(1, 2, 2, 8)
    got = module._windows(qkv, None, 1, 4, True, True)[0]
    assert_close(got, want)
    assert_close(*(_gradients(out, qkv)[0] for out in (got, want)))


def test_bfloat16_is_no_worse_than_plain_torch():
    qkv, padding = (t.detach() for t in _make((1, 12, 12, 2, 24, 8, False), torch.bfloat16))
    exact = window_attention_reference(qkv.double(), padding.double(), 2, 8, False)
    q, k, v = partition(pad(qkv, 8, padding), 8).flatten(1, 2).unflatten(-1, (3, 2, 24)).permute(2, 0, 3, 1, 4)
    plain = ((q * 24**-0.5) @ k.mT).softmax(-1) @ v
    plain = unpartition(plain.transpose(1, 2).flatten(2).unflatten(1, (8, 8)), 1, 12, 12)
    assert_no_worse(window_attention(qkv, 2, 8, padding), plain, exact)


@pytest.mark.parametrize("pool", [False, True])
def test_gradcheck(pool):
    qkv, padding = _make((1, 4, 6, 2, 3, 4, pool), torch.float64)
    assert torch.autograd.gradcheck(lambda x, p: module._windows(x, p, 2, 4, pool, True)[0], (qkv, padding))


def test_opcheck_and_compile():
    qkv, padding = _make((2, 5, 7, 2, 8, 4, False))
    torch.library.opcheck(module._windows, (qkv, padding, 2, 4, False, True))
    torch.library.opcheck(module._windows, (qkv.detach(), None, 2, 4, False, False))

    def step(x, p):
        return window_attention(x, 2, 4, p) + module._windows(x, p, 2, 4, False, True)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(_gradients(compiled(qkv, padding), qkv, padding), _gradients(step(qkv, padding), qkv, padding)):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(4, 4, 24)}, "window_attention: expected qkv of shape"),
        ({"num_heads": 3}, "C divisible by 3 heads, got 24"),
        ({"padding": torch.ones(8)}, r"expected padding of shape \(24\), got \(8,\)"),
        ({"qkv": torch.ones(1, 5, 4, 24), "pool": True}, r"even sides with pool, got a map of \(5, 4\)"),
        ({"window_size": 3, "pool": True}, "windows of 3"),
        ({"qkv": torch.ones(1, 4, 4, 24, dtype=torch.int32)}, "expected qkv of dtype float32.*got int32"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        window_attention(**{"qkv": torch.ones(1, 4, 4, 24), "num_heads": 2, "window_size": 4, **change})


def test_column_blocks_waste_little():
    """Hiera's head dims (T/S 96, B+ 56, L 72, micro 48) in blocks of the matrix unit."""
    blocks = {dim: column_blocks(dim) for dim in (5, 16, 32, 48, 56, 72, 96)}
    assert blocks == {5: (16, 0), 16: (16, 0), 32: (32, 0), 48: (32, 16), 56: (64, 0), 72: (64, 16), 96: (64, 32)}


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_in_the_interpreter(shape, dtype):
    qkv, padding = (t.detach() for t in _make(shape, dtype))
    *_, heads, _, window, pool = shape
    qkv = torch.stack((qkv, qkv), -1).flatten(-2)[..., ::2]
    sizes = (heads, window, pool)
    small = {"BLOCK_M": 16, "BLOCK_N": 16}
    with (
        force_tile("window_attention", small),
        force_tile("window_attention_dq", small),
        force_tile("window_attention_dk", small),
    ):
        out, lse = module._launch_windows(qkv, padding, *sizes, True)
        want, want_lse = attend_windows(qkv, padding, *sizes, True)
        assert_rms_close(out, want)
        assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
        leaves = [t.clone().requires_grad_() for t in (qkv, padding)]
        grad = torch.randn_like(want)
        reference = window_attention_reference(*leaves, *sizes)
        expected = torch.autograd.grad(reference, leaves, grad, allow_unused=True, materialize_grads=True)
        for a, b in zip(module._launch_windows_backward(grad, qkv, padding, want, want_lse, *sizes), expected):
            assert_rms_close(a, b)


@pytest.mark.interpret
def test_reads_the_map_once_and_writes_once():
    heads, dim, window = 2, 24, 4
    qkv, padding = (t.detach() for t in _make((1, 8, 8, heads, dim, window, False)))
    with count_traffic() as traffic:
        module._launch_windows(qkv, None, heads, window, False, False)
    tokens, blocks = 64, sum(column_blocks(dim))
    assert traffic.load_bytes == traffic.unique_load_bytes == 4 * qkv.numel()
    assert traffic.store_bytes == 4 * (tokens * heads * dim + tokens * heads)
    assert traffic.dot_flops == 2 * 2 * tokens * heads * window**2 * blocks
    with count_traffic() as traffic:
        module._launch_windows(qkv[:, :7, :5].contiguous(), padding, heads, window, False, False)
    assert traffic.unique_load_bytes == 4 * (35 * 3 * heads * dim + 2 * heads * dim)


@pytest.mark.interpret
@pytest.mark.parametrize("pool", [False, True])
def test_offsets_past_two_to_the_31(pool):
    """The last window of a map of 2**30 tokens, and the last of as many in small images."""
    step, window, dim = 2 if pool else 1, 4, 16
    for batch, height, width in ((1, 2**28, 4), (2**26, 4, 4)):
        space, used = huge((2**42,), (1,), torch.int8), 0
        cells = batch * (height // step) * (width // step)
        tensors = []
        for count, dtype in (
            (batch * height * width * 3 * dim, torch.float16),
            (cells * dim, torch.float16),
            (cells, torch.float32),
            (batch * height * width * 3 * dim, torch.float16),
        ):
            tensors.append(space[used : used + count * dtype.itemsize].view(dtype))
            used += count * dtype.itemsize
        qkv, out, rows, dqkv = tensors
        last = [t.data_ptr() + (t.numel() - 1) * t.element_size() for t in tensors]
        constants = {"WINDOW": window, "POOL": pool, "PADDED": False, "DIM": dim, "D1": dim, "D2": 0}
        constants |= {"PRECISION": "ieee", "BLOCK_M": 16, "BLOCK_N": 16}
        sizes = (height, width, 1, 1.0)
        with addresses_only() as asked, program_at(batch * height * width // window**2 - 1):
            forward_kernel[(1, 1, 1)](qkv, qkv, out, rows, *sizes, **constants)
            assert set(last[:3]) <= asked
            query_gradient_kernel[(1, 1, 1)](qkv, qkv, out, rows, rows, dqkv, *sizes, **constants)
            key_gradient_kernel[(1, 1, 1)](qkv, qkv, out, rows, rows, dqkv, rows, *sizes, **constants)
        assert last[3] in asked and last[3] - 4 * dim in asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 64, 64, 2, 72, 16, False), (1, 64, 64, 4, 96, 14, False), (1, 64, 64, 2, 96, 8, True), *SHAPES],
    ids=str,
)
def test_on_a_gpu(shape, dtype):
    qkv, padding = _make(shape, dtype, "cuda")
    *_, heads, _, window, pool = shape

    def run():
        return window_attention(qkv, heads, window, padding, pool=pool)

    exact = window_attention_reference(qkv, padding, heads, window, pool)
    with disable("window_attention"):
        plain = run()
    got = run()
    assert_no_worse(got, plain, exact, atol=1e-4)
    for a, b in zip(_gradients(got, qkv, padding), _gradients(exact, qkv, padding)):
        assert_rms_close(a, b, ratio=0.02)
    assert torch.equal(got, run())
    with torch.no_grad():
        once, graph = run(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
    assert torch.equal(once, captured)
