"""LoRA layers against PEFT, float64, and themselves one adapter at a time."""

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import lora_linear as file
from medvl_sam2.kernels._tuning import force_tile
from medvl_sam2.kernels.lora_linear import lora_linear, lora_linear_reference, lora_linear_shared

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


def _case(rows, k, outs, rank, adapters, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    weights = [draw(o, k, scale=k**-0.5) for o in outs]
    biases = [draw(o) if i % 2 == 0 else None for i, o in enumerate(outs)]
    a = draw(adapters, rank * len(outs), k, scale=k**-0.5)
    b = [draw(adapters, o, rank, scale=rank**-0.5) for o in outs]
    return draw(*rows, k), weights, biases, a, b


def _index(rows, adapters, device="cpu"):
    return torch.randint(-1, adapters, rows, generator=torch.Generator().manual_seed(5)).to(device)


def _gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    y = function(*leaves)
    torch.manual_seed(7)
    factor = torch.randn(y.shape, dtype=torch.float64).to(y)
    return y.detach(), torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], factor)


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize(("rows", "k", "o", "rank"), [((1,), 1, 1, 1), ((3, 7), 13, 17, 5), ((11,), 24, 9, 8)], ids=str)
def test_forward_and_backward_equal_float64(rows, k, o, rank, adapters):
    x, (weight,), (bias,), a, (b,) = _case(rows, k, [o], rank, adapters)
    index = None if adapters == 1 else _index(rows, adapters)
    tensors = [x, weight, bias, a, b]
    got, grads = _gradients(lambda *t: lora_linear(*t, 1.7, index), tensors)
    want, exact = _gradients(lambda *t: lora_linear_reference(*t, 1.7, index), [t.double() for t in tensors])
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, true in zip(grads, exact, strict=True):
        assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_equals_peft():
    peft = pytest.importorskip("peft")
    x, (weight,), (bias,), a, (b,) = _case((3, 5), 12, [10], 4, 1)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 10))
    model = peft.get_peft_model(layer, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    names = {"weight": weight, "bias": bias, "lora_A": a[0], "lora_B": b[0]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(next(t for key, t in names.items() if key in name and ("lora" in key) == ("lora" in name)))
    assert_close(lora_linear(x, weight, bias, a[0], b[0], 6 / 4), model(x))


def test_a_mixed_batch_equals_each_adapter_alone():
    x, (weight,), (bias,), a, (b,) = _case((6, 9), 24, [20], 4, 3)
    index = torch.tensor([2, -1, 0, 2, 1, 0])
    mixed = lora_linear(x, weight, bias, a, b, 0.5, index)
    for row, adapter in enumerate(index.tolist()):
        alone = F.linear(x[row], weight, bias)
        if adapter >= 0:
            alone = lora_linear(x[row], weight, bias, a[adapter], b[adapter], 0.5)
        assert_close(mixed[row], alone)


def test_shared_projections_equal_separate_ones():
    x, weights, biases, a, b = _case((2, 9), 16, [12, 4, 8], 3, 2)
    index = torch.tensor([1, 0])
    together = lora_linear_shared(x, weights, biases, a, b, 2.0, index)
    for y, weight, bias, down, up in zip(together, weights, biases, a.split(3, 1), b):
        assert_close(y, lora_linear(x, weight, bias, down, up, 2.0, index))
    leaves = [t.clone().requires_grad_() for t in (x, a, *b)]
    outputs = lora_linear_shared(leaves[0], weights, biases, leaves[1], leaves[2:], 2.0, index)
    shared = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
    outputs = [
        lora_linear_reference(leaves[0], weight, bias, down, up, 2.0, index)
        for weight, bias, down, up in zip(weights, biases, leaves[1].split(3, 1), leaves[2:])
    ]
    for mine, theirs in zip(shared, torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_adapter_is_differentiated_when_the_base_is_frozen():
    x, (weight,), (bias,), a, (b,) = _case((5,), 8, [6], 2, 1)
    a, b = a.requires_grad_(), b.requires_grad_()
    lora_linear(x, weight, bias, a, b, 1.0).sum().backward()
    assert a.grad is not None and b.grad is not None and weight.grad is None and x.grad is None


def test_empty_rows_and_a_batch_without_adapters():
    x, (weight,), (bias,), a, (b,) = _case((4,), 8, [6], 2, 2)
    assert lora_linear(x[:0], weight, bias, a, b, 1.0, torch.zeros(0, dtype=torch.long)).shape == (0, 6)
    none = torch.full((4,), -1)
    got, grads = _gradients(lambda *t: lora_linear(*t, 1.0, none), [x, weight, bias, a, b])
    assert_close(got, F.linear(x, weight, bias))
    assert not grads[3].any() and not grads[4].any() and grads[0].any()


def test_autocast_runs_in_its_dtype():
    x, (weight,), (bias,), a, (b,) = _case((5,), 8, [6], 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, 1.0)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(8)}, r"expected x of shape \(..., k\)"),
        ({"x": torch.zeros(4, 0)}, "k above 0"),
        ({"adapter_index": torch.zeros(4, dtype=torch.bool)}, "integer adapter_index"),
        ({"a": torch.zeros(2, 3, 8)}, "expected a of shape"),
        ({"b": torch.zeros(1, 6, 2)}, "expected b of shape"),
        ({"bias": torch.zeros(5)}, "expected bias of shape"),
        ({"weight": torch.zeros(6, 8).half()}, "of dtype float32"),
        ({"adapter_index": None}, "expected an adapter_index with 2 adapters"),
        ({"adapter_index": torch.zeros(3, dtype=torch.long)}, "over the leading axes"),
        ({"adapter_index": torch.zeros(4)}, "integer adapter_index"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    x, (weight,), (bias,), a, (b,) = _case((4,), 8, [6], 2, 2)
    arguments = {"x": x, "weight": weight, "bias": bias, "a": a, "b": b, "adapter_index": _index((4,), 2)}
    with pytest.raises(ValueError, match=words):
        lora_linear(**{**arguments, **change}, scaling=1.0)


def test_opcheck():
    x, weights, biases, a, b = _case((5,), 6, [4, 3], 2, 2)
    biases = [bias if bias is not None else x.new_empty(0) for bias in biases]
    index = torch.tensor([1, -1, 0, 1, 1], dtype=torch.int32)
    trained = [t.requires_grad_() for t in b]
    torch.library.opcheck(file._fwd, (x.requires_grad_(), weights, biases, a.requires_grad_(), trained, 0.5, index))
    x, a, b = x.detach(), a.detach(), [t.detach() for t in b]
    low, *outputs = file._fwd(x, weights, biases, a, b, 0.5, index)
    for flags in ((True, True), (False, False)):
        torch.library.opcheck(file._bwd, (outputs, x, weights, a, b, low, 0.5, index, *flags))


def test_compiles_without_a_break():
    x, (weight,), (bias,), a, (b,) = _case((4, 3), 8, [6], 2, 2)
    index = _index((4,), 2)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    got = _gradients(lambda *t: compiled(*t, 1.0, index), [x, weight, bias, a, b])
    want = _gradients(lambda *t: lora_linear(*t, 1.0, index), [x, weight, bias, a, b])
    for mine, theirs in zip((got[0], *got[1]), (want[0], *want[1])):
        assert_close(mine, theirs)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "k", "outs", "rank", "adapters"), [(1, 1, [1], 1, 1), (23, 37, [19, 5], 3, 3), (40, 16, [32], 16, 2)]
)
def test_kernels_equal_the_library_path(rows, k, outs, rank, adapters, poisoned):
    x, weights, biases, a, b = _case((rows,), k, outs, rank, adapters)
    biases = [bias if bias is not None else torch.zeros(0) for bias in biases]
    index = _index((rows,), adapters).int()
    with force_tile("lora_linear", SMALL):
        got = file._launch_forward(x, weights, biases, a, b, 0.5, index)
    want = file._forward(x, weights, biases, a, b, 0.5, index)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(y) for y in want[1:]]
    for flags in ((True, True), (False, False)):
        arguments = (grads, x, weights, a, b, want[0], 0.5, index, *flags)
        with force_tile("lora_linear", SMALL), force_tile("lora_linear_bwd", SMALL):
            mine = file._launch_backward(*arguments)
        for m, t in zip(mine, file._backward(*arguments), strict=True):
            assert_close(m, t, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_kernels_in_half_precision(poisoned):
    x, weights, biases, a, b = _case((33,), 24, [20], 4, 2, torch.float16)
    index = _index((33,), 2).int()
    y = file._launch_forward(x, weights, biases, a, b, 0.5, index)[1]
    plain = file._forward(x, weights, biases, a, b, 0.5, index)[1]
    tensors = [t.double() for t in (x, weights[0], biases[0], a, b[0])]
    assert_no_worse(y, plain, lora_linear_reference(*tensors, 0.5, index), atol=1e-3)


@pytest.mark.interpret
def test_only_the_adapters_that_occur_are_read():
    x, weights, biases, a, b = _case((32,), 32, [48], 16, 4)
    index = torch.tensor([1] * 16 + [-1] * 16, dtype=torch.int32)
    with force_tile("lora_linear", SMALL), count_traffic() as traffic:
        file._launch_forward(x, weights, biases, a, b, 0.5, index)
    # Half of the rows have one adapter: 16 rows through A and B of one of four, nothing for the rest.
    assert traffic.dot_flops == 2 * 16 * 16 * (32 + 48)
    low, y = 32 * 16, 16 * 48
    assert traffic.store_bytes == 4 * (low + y)
    assert traffic.unique_load_bytes == 4 * (16 * 32 + 16 * 32 + 48 * 16 + 16 * 16 + y + 32)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    index = torch.zeros(16, dtype=torch.int32)
    y, w = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(1, 16, 16, dtype=torch.float16)
    far = huge((16, 16), (2**31, 1), torch.float16)
    addresses = {far.data_ptr() + 2 * (row * 2**31 + column) for row in range(16) for column in range(16)}
    for x, out in ((far, y), (y, far)):
        with addresses_only() as asked, force_tile("lora_linear", SMALL):
            file.multiply_rows(x, w, out, index, 1.0, False)
        assert asked == addresses
    with addresses_only() as asked, force_tile("lora_linear_bwd", SMALL):
        file.sum_weights(far, y, w, index, 1.0)
    assert asked == addresses


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "k", "o", "rank"), [((3, 7), 13, 17, 5), ((8, 77), 896, 896, 128)], ids=str)
def test_gpu_equals_the_reference(rows, k, o, rank, dtype):
    x, (weight,), (bias,), a, (b,) = _case(rows, k, [o], rank, 3, dtype, "cuda")
    index = _index(rows, 3, "cuda")
    tensors = [x, weight, bias, a, b]
    got, grads = _gradients(lambda *t: lora_linear(*t, 0.5, index), tensors)
    want, exact = _gradients(lambda *t: lora_linear_reference(*t, 0.5, index), [t.double() for t in tensors])
    for mine, true in zip((got, *grads), (want, *exact)):
        assert_rms_close(mine, true)
    again = _gradients(lambda *t: lora_linear(*t, 0.5, index), tensors)
    assert torch.equal(got, again[0]) and all(torch.equal(p, q) for p, q in zip(grads, again[1]))


@pytest.mark.gpu
def test_gpu_graph_replay_with_another_index():
    x, (weight,), (bias,), a, (b,) = _case((64,), 32, [48], 16, 3, torch.bfloat16, "cuda")
    index = _index((64,), 3, "cuda")
    lora_linear(x, weight, bias, a, b, 0.5, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(x, weight, bias, a, b, 0.5, index)
    index.copy_(index.flip(0))
    graph.replay()
    assert torch.equal(y, lora_linear(x, weight, bias, a, b, 0.5, index))
