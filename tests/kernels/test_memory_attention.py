"""Memory attention against the sam2 package's own modules and fp64 arithmetic; Triton kernels in the interpreter."""

import pytest
import torch
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge, program_at

from medvl_sam2.kernels import memory_attention as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels._tuning import force_tile
from medvl_sam2.kernels.axial_rope import axial_rope_tables, rope_linear
from medvl_sam2.kernels.memory_attention import (
    Projections,
    absorb_values,
    memory_attention,
    memory_attention_cached,
    memory_self_attention,
)
from medvl_sam2.kernels.memory_attention_kernels import (
    MAX_RANGES,
    forward_kernel,
    key_gradient_kernel,
    num_ranges,
    query_gradient_kernel,
)
from medvl_sam2.kernels.memory_attention_torch import attend_in_chunks, memory_attention_reference

# (batch, queries, slot size, slots, pointers, key width, value width, valid keys or None)
SHAPES = [
    (2, 5, 7, 3, 4, 32, 16, None),
    (2, 40, 17, 3, 4, 32, 16, [[17, 0, 3, 2], [0, 5, 0, 4]]),
    (1, 33, 40, 2, 0, 16, 32, None),
    (1, 1, 1, 1, 5, 16, 16, [[1, 3]]),
    (1, 8, 40, 2, 3, 16, 32, [[0, 0, 0]]),
    (0, 3, 4, 1, 0, 16, 16, None),
    (1, 0, 4, 1, 0, 16, 16, None),
    (1, 3, 4, 0, 0, 16, 16, None),
]


def _make(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)
    batch, queries, slot_size, slots, pointers, width, value_width, lengths = shape
    tokens = slot_size * slots + pointers
    sizes = ((queries, width), (tokens, width), (tokens, value_width))
    q, k, v = (torch.randn(batch, *size).to(device, dtype).requires_grad_() for size in sizes)
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return q, k, v, lengths, slot_size, slots


def _exact(q, k, v, lengths, slot_size, slots):
    """Softmax over the valid keys alone, picked out one by one, in fp64."""
    outs = []
    for b in range(q.shape[0]):
        starts = [slot * slot_size for slot in range(slots)] + [slots * slot_size]
        ends = [*starts[1:], k.shape[1]]
        counts = [end - start for start, end in zip(starts, ends)] if lengths is None else lengths[b].tolist()
        chosen = [t for start, count in zip(starts, counts) for t in range(start, start + count)]
        scores = q[b].double() @ k[b, chosen].double().T / q.shape[-1] ** 0.5
        outs.append(scores.softmax(-1) @ v[b, chosen].double())
    nothing = (q.sum() + k.sum() + v.sum()).double()
    return torch.stack(outs) if outs else nothing * v.double().new_zeros(*q.shape[:2], v.shape[-1])


def _detached(shape, dtype=torch.float32):
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in _make(shape, dtype))


def _gradients(out, *inputs):
    return torch.autograd.grad((out.double() * out.detach().double().cos()).sum(), inputs)


def _cached(q, k, v, lengths, slot_size, slots):
    return memory_attention_cached(
        q, k, v, slot_size=slot_size, num_pointer_tokens=k.shape[1] - slot_size * slots, lengths=lengths
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_equals_fp64_arithmetic_over_the_valid_keys(shape):
    inputs = _make(shape)
    want = _exact(*inputs)
    expected = _gradients(want, *inputs[:3])
    out = _cached(*inputs)
    oracle = memory_attention_reference(*inputs, shape[5] ** -0.5)[0]
    for got in (out, oracle):
        assert_close(got, want)
        for a, b in zip(_gradients(got, *inputs[:3]), expected):
            assert_close(a, b, rtol=1e-4, atol=1e-5)


def _sam2_module(queries, inner, **options):
    transformer = pytest.importorskip("sam2.modeling.sam.transformer")
    side = int(queries**0.5)
    torch.manual_seed(7)
    return transformer.RoPEAttention(inner, num_heads=1, downsample_rate=1, feat_sizes=(side, side), **options).cpu()


def _projections(attention):
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return Projections(*(p for name in names for p in (getattr(attention, name).weight, getattr(attention, name).bias)))


@pytest.mark.parametrize(("pointers", "frames"), [(0, 1), (8, 3), (64, 7)])
def test_cross_attention_equals_sam2(pointers, frames):
    theirs = _sam2_module(64, 256, rope_k_repeat=True, kv_in_dim=64)
    weights = _projections(theirs)
    query = torch.randn(2, 64, 256, requires_grad=True)
    memory, position = (torch.randn(2, 64 * frames + pointers, 64, requires_grad=True) for _ in range(2))
    want = theirs(query, memory + position, memory, num_k_exclude_rope=pointers)
    rope = axial_rope_tables(8, 8, 256)
    got = memory_attention(query, memory, position, weights, rope, num_pointer_tokens=pointers)
    assert_close(got, want)
    inputs = (query, memory, position, *weights)
    for a, b in zip(_gradients(got, *inputs), _gradients(want, *inputs)):
        assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_attention_equals_sam2(dtype):
    theirs = _sam2_module(25, 64)
    x = torch.randn(2, 25, 64, requires_grad=True)
    want = theirs(x, x.clone(), x.clone())
    weights = Projections(*(w.to(dtype) for w in _projections(theirs)))
    got = memory_self_attention(x.to(dtype), weights, axial_rope_tables(5, 5, 64))
    assert_close(got, want)
    with torch.no_grad():
        assert_close(memory_self_attention(x.to(dtype), weights, axial_rope_tables(5, 5, 64)), want, dtype=dtype)


def test_absorbing_the_values_is_exact_in_double_precision():
    theirs = _sam2_module(16, 32, rope_k_repeat=True, kv_in_dim=16).double()
    query, memory, position = (torch.randn(1, n, c).double() for n, c in ((16, 32), (52, 16), (52, 16)))
    want = theirs(query, memory + position, memory, num_k_exclude_rope=4)
    rope = axial_rope_tables(4, 4, 32)
    got = memory_attention(query, memory, position, _projections(theirs), rope, num_pointer_tokens=4)
    # The package turns queries and keys in fp32 even so.
    assert_close(got, want, rtol=1e-6, atol=1e-6)
    average = torch.rand(3, 52, dtype=torch.float64).softmax(-1) @ memory[0]
    values = average @ theirs.v_proj.weight.T + theirs.v_proj.bias
    weight, bias = absorb_values(_projections(theirs))
    assert_close(average @ weight.T + bias, theirs.out_proj(values), rtol=1e-13, atol=1e-13)


def test_ring_buffer_with_temporal_terms_equals_the_stateless_form():
    """Slots in any order, one of them empty, pointers half filled, temporal terms added to keys kept from before."""
    theirs = _sam2_module(16, 32, rope_k_repeat=True, kv_in_dim=16)
    weights, rope = _projections(theirs), axial_rope_tables(4, 4, 32)
    torch.manual_seed(3)
    query = torch.randn(2, 16, 32)
    memories, pointers = torch.randn(2, 3, 16, 16), torch.randn(2, 6, 16)
    grid, temporal, pointer_pos = torch.randn(16, 16), torch.randn(5, 16), torch.randn(2, 6, 16)
    ages = [4, 0, 2]
    position = torch.stack([grid + temporal[age] for age in ages])[None].expand(2, -1, -1, -1).flatten(1, 2)
    want = theirs(
        query,
        torch.cat((memories.flatten(1, 2) + position, pointers + pointer_pos), 1),
        torch.cat((memories.flatten(1, 2), pointers), 1),
        num_k_exclude_rope=6,
    )
    terms = rope_linear(temporal[:, None].expand(-1, 16, -1), weights.k_weight, None, rope)
    keys, values = torch.full((2, 4 * 16 + 8, 32), 1e4), torch.full((2, 4 * 16 + 8, 16), -1e4)
    for slot, frame in ((3, 0), (0, 1), (2, 2)):
        once = rope_linear(memories[:, frame] + grid, weights.k_weight, weights.k_bias, rope)
        keys[:, slot * 16 : slot * 16 + 16] = once + terms[ages[frame]]
        values[:, slot * 16 : slot * 16 + 16] = memories[:, frame]
    plain = rope_linear(pointers + pointer_pos, weights.k_weight, weights.k_bias, rope, num_plain_tokens=6)
    keys[:, 64:70], values[:, 64:70] = plain, pointers
    lengths = torch.tensor([[16, 0, 16, 16, 6]] * 2, dtype=torch.int32)
    q = rope_linear(query, weights.q_weight, weights.q_bias, rope)
    got = memory_attention_cached(q, keys, values, slot_size=16, num_pointer_tokens=8, lengths=lengths)
    assert_close(torch.nn.functional.linear(got, *absorb_values(weights)), want)


def test_objects_are_independent():
    inputs = _make((3, 9, 5, 2, 3, 16, 16, [[5, 2, 1], [0, 5, 3], [3, 3, 0]]))
    whole = _cached(*inputs)
    for b in range(3):
        one = [t[b : b + 1] if isinstance(t, torch.Tensor) else t for t in inputs]
        assert_close(whole[b : b + 1], _cached(*one), rtol=1e-6, atol=1e-6)


def test_chunks_do_not_show_and_bfloat16_is_no_worse_than_plain_torch(monkeypatch):
    q, k, v, *sizes = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in _make((1, 150, 30, 5, 4, 32, 16, None))
    )
    exact = _exact(q, k, v, *sizes)
    monkeypatch.setattr("medvl_sam2.kernels.memory_attention_torch.CHUNK_BYTES", 1)
    assert_close(attend_in_chunks(q, k, v, *sizes, 32**-0.5, True)[0], exact)
    low = [t.bfloat16() for t in (q, k, v)]
    plain = (low[0] * 32**-0.5 @ low[1].mT).softmax(-1) @ low[2]
    assert_no_worse(attend_in_chunks(*low, *sizes, 32**-0.5, False)[0], plain, _exact(*low, *sizes))


def test_gradcheck():
    q, k, v, lengths, *sizes = _make((2, 3, 4, 2, 3, 6, 5, [[4, 1, 2], [0, 4, 3]]), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: _cached(*t, lengths, *sizes), (q, k, v))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=["all", "lengths"])
def test_opcheck_and_compile(shape):
    q, k, v, lengths, *sizes = _make(shape)
    torch.library.opcheck(module._attend, (q, k, v, lengths, *sizes, 0.2, True))
    torch.library.opcheck(module._attend, (q.detach(), k.detach(), v.detach(), lengths, *sizes, 0.2, False))
    compiled = torch.compile(lambda *t: _cached(*t, lengths, *sizes), fullgraph=True, backend="aot_eager")
    for a, b in zip(_gradients(compiled(q, k, v), q, k, v), _gradients(_cached(q, k, v, lengths, *sizes), q, k, v)):
        assert_close(a, b)


def test_stateless_form_compiles_and_follows_autocast():
    weights = _projections(_sam2_module(16, 32, rope_k_repeat=True, kv_in_dim=16))
    rope = axial_rope_tables(4, 4, 32)
    query, memory, position = (torch.randn(2, n, c) for n, c in ((16, 32), (36, 16), (36, 16)))

    def step(query, memory, position):
        y = memory_attention(query, memory, position, weights, rope, num_pointer_tokens=4)
        return memory_self_attention(y, weights._replace(k_weight=weights.q_weight, v_weight=weights.out_weight), rope)

    want = step(query, memory, position)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(query, memory, position), want)
    with torch.autocast("cpu", torch.bfloat16):
        out = step(query, memory, position)
    assert out.dtype == torch.bfloat16
    assert_close(out, want, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3)}, "memory_attention: expected q of shape"),
        ({"keys": torch.ones(2, 10, 4)}, r"expected keys of shape \(2, any, 8\), got \(2, 10, 4\)"),
        ({"values": torch.ones(2, 9, 5)}, r"expected values of shape \(2, 10, any\)"),
        ({"values": torch.ones(2, 10, 5).half()}, "expected values of dtype float32, got float16"),
        ({"slot_size": 3}, "whole slots of 3 keys before 2 pointers, got 10 keys"),
        ({"lengths": torch.ones(2, 3)}, "expected lengths of dtype int32, got float32"),
        ({"lengths": torch.ones(2, 2, dtype=torch.int32)}, r"expected lengths of shape \(2, 3\)"),
        ({"scale": -1.0}, "expected a positive scale"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change, message):
    given = {"q": torch.ones(2, 3, 8), "keys": torch.ones(2, 10, 8), "values": torch.ones(2, 10, 5), "slot_size": 4}
    with pytest.raises(ValueError, match=message):
        memory_attention_cached(**{**given, "num_pointer_tokens": 2, **change})


def test_number_of_ranges_fills_the_chip():
    """32 query tiles leave 100 of 132 processors idle; four ranges fill 97 % of one wave, eight objects need none."""
    assert num_ranges(32, 449, 132) == 4
    assert num_ranges(8 * 32, 449, 132) == 1
    assert num_ranges(8, 113, 132) == 15
    assert num_ranges(1, 10**6, 10**4) == MAX_RANGES
    assert num_ranges(1, 2, 132) <= 2


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ranges", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_in_the_interpreter(monkeypatch, shape, ranges, dtype):
    monkeypatch.setattr(module, "_takes", lambda *a, **o: True)
    q, k, v, *sizes = _detached(shape, dtype)
    q, k = (torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in (q, k))
    scale = shape[5] ** -0.5
    small = {"BLOCK_M": 16, "BLOCK_N": 16}
    with force_tile("memory_attention", small | {"RANGES": ranges}), force_tile("memory_attention_dq", small):
        out, lse = module._launch_attend(q, k, v, *sizes, scale, True)
        want, want_lse = memory_attention_reference(q, k, v, *sizes, scale)
        assert_rms_close(out, want)
        assert torch.equal(lse.isinf(), want_lse.isinf())
        assert_close(lse.nan_to_num(neginf=0), want_lse.nan_to_num(neginf=0), rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(want)
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        expected = torch.autograd.grad(memory_attention_reference(*leaves, *sizes, scale)[0], leaves, grad)
        with force_tile("memory_attention_dk", small):
            got = module._launch_attend_backward(grad, q, k, v, want, want_lse, *sizes, scale)
        for a, b in zip(got, expected):
            assert_rms_close(a, b)


@pytest.mark.interpret
def test_bytes_and_operations_follow_the_valid_keys(monkeypatch):
    monkeypatch.setattr(module, "_takes", lambda *a, **o: True)
    batch, queries, slot, slots, width, value_width, block = 1, 32, 32, 3, 32, 16, 16
    q, k, v, *_ = _detached((1, 32, 32, 3, 16, 32, 16, None))
    lengths = torch.tensor([[32, 0, 32, 16]], dtype=torch.int32)
    valid, tiles, ranges = 80, queries // block, 2
    with (
        force_tile("memory_attention", {"BLOCK_M": block, "BLOCK_N": block, "RANGES": ranges}),
        count_traffic() as traffic,
    ):
        module._launch_attend(q, k, v, lengths, slot, slots, 0.2, False)
    assert traffic.dot_flops == 2 * batch * queries * valid * (width + value_width)
    partial = ranges * queries * (value_width + 1)
    counts = tiles * (slots + 1)
    loaded = ranges * queries * width + tiles * valid * (width + value_width) + partial + counts
    assert traffic.load_bytes == 4 * loaded
    assert traffic.store_bytes == 4 * (partial + queries * (value_width + 1))
    unique = queries * width + valid * (width + value_width) + partial + 4
    assert traffic.unique_load_bytes == 4 * unique


@pytest.mark.interpret
@pytest.mark.parametrize("large", ["tokens", "batch"])
def test_offsets_past_two_to_the_31(large):
    """The last tile of many queries and of the last of many keys, then the last of many objects."""
    many, width, value_width = 2**26, 32, 16
    batch, queries, slot_size = (1, many, many) if large == "tokens" else (many, 16, 16)
    tokens = slot_size + 16
    # The first slot is empty, so that the loops over keys begin behind it.
    lengths = torch.tensor([[0, 16]], dtype=torch.int32) if large == "tokens" else None
    space, used = huge((2**42,), (1,), torch.int8), 0

    def claim(*shape, dtype=torch.float16):
        nonlocal used
        start, used = used, used + torch.Size(shape).numel() * dtype.itemsize
        return space[start:used].view(dtype).view(shape)

    def last(*tensors):
        return {t.data_ptr() + (t.numel() - 1) * t.element_size() for t in tensors}

    q, k, v = claim(batch, queries, width), claim(batch, tokens, width), claim(batch, tokens, value_width)
    grad, rows = claim(batch, queries, value_width), claim(batch, queries, dtype=torch.float32)
    out, dq, dk, dv = claim(*grad.shape), claim(*q.shape), claim(*k.shape), claim(*v.shape)
    sizes = (slot_size, 1)
    constants = {"HAS_LENGTHS": lengths is not None, "D": width, "DV": value_width, "PRECISION": "ieee"}
    constants |= {"BLOCK_M": 16, "BLOCK_N": 16}
    counts = rows if lengths is None else lengths
    with addresses_only() as asked, program_at(queries // 16 - 1, 0, batch - 1):
        forward_kernel[(1, 1, 1)](q, k, v, counts, out, rows, queries, tokens, *sizes, tokens, 1.0, **constants)
    assert last(q, k, v, out, rows) <= asked
    with addresses_only() as asked, program_at(queries // 16 - 1, batch - 1):
        query_gradient_kernel[(1, 1)](q, k, v, counts, grad, rows, rows, dq, queries, tokens, *sizes, 1.0, **constants)
    assert last(q, k, v, grad, rows, dq) <= asked
    queries = 16
    with addresses_only() as asked, program_at(tokens // 16 - 1, batch - 1):
        key_gradient_kernel[(1, 1)](
            q, k, v, counts, grad, rows, rows, dk, dv, queries, tokens, *sizes, 1.0, **constants
        )
    assert last(k, v, dk, dv) <= asked
    assert large == "tokens" or last(q, grad, rows) <= asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1024, 1024, 7, 64, 256, 64, None),
        (3, 1024, 1024, 7, 64, 256, 64, [[1024, 0, 7, 1024, 0, 1024, 1, 60], [1024] * 7 + [64], [0] * 8]),
        (2, 256, 256, 7, 64, 128, 32, None),
        (1, 4096, 4096, 1, 0, 256, 256, None),
    ],
    ids=["@512", "@512-3-objects", "micro", "self@1024"],
)
def test_on_a_gpu(shape, dtype):
    inputs = _make(shape, dtype, "cuda")
    exact, _ = memory_attention_reference(*inputs, shape[5] ** -0.5)
    with disable("memory_attention"):
        plain = _cached(*inputs)
    got = _cached(*inputs)
    assert_no_worse(got, plain, exact, atol=1e-4)
    for a, b in zip(_gradients(got, *inputs[:3]), _gradients(exact, *inputs[:3])):
        assert_rms_close(a, b, ratio=0.02)
    with torch.no_grad():
        once = _cached(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _cached(*inputs)
        graph.replay()
    assert torch.equal(once, captured)
