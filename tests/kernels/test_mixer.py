"""The Mixer layer: library path and Triton kernels against Med3DVLM's modules and float64."""

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import mixer as file
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels._tuning import force_tile, tiles_asked
from medvl_sam2.kernels.mixer import mixer_layer, mixer_layer_reference

# batch, tokens in, channels in, tokens out, channels out
SIZES = [(1, 1, 1, 1, 1), (2, 13, 17, 7, 11), (3, 64, 48, 32, 24), (1, 33, 129, 65, 31)]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


def _layer(sizes, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)
    batch, n, d, tokens, channels = sizes

    def draw(*shape, scale=1.0, offset=0.0):
        return (torch.randn(shape, device=device) * scale + offset).to(dtype)

    def linear(i, o):
        return draw(o, i, scale=i**-0.5), draw(o, scale=0.1)

    def norm():
        return draw(d, scale=0.2, offset=1.0), draw(d, scale=0.2)

    weights = [*norm(), *linear(n, tokens), *linear(tokens, tokens)]
    return draw(batch, n, d), [*weights, *norm(), *linear(d, channels), *linear(channels, channels)]


def _gradients(function, x, weights):
    x, *weights = (tensor.detach().clone().requires_grad_() for tensor in (x, *weights))
    y = function(x, *weights)
    torch.manual_seed(7)
    factor = torch.randn(y.shape, dtype=torch.float64).to(y)
    return y.detach(), torch.autograd.grad(y, (x, *weights), factor), factor


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_backward_equal_float64(sizes):
    x, weights = _layer(sizes)
    got, grads, _ = _gradients(mixer_layer, x, weights)
    want, exact, _ = _gradients(mixer_layer_reference, x.double(), [w.double() for w in weights])
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, true in zip(grads, exact):
        assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_equals_a_plain_chain_of_modules():
    x, weights = _layer((2, 13, 17, 7, 11))
    g1, e1, w1, b1, w2, b2, g2, e2, v1, c1, v2, c2 = weights
    y = F.layer_norm(x, (17,), g1, e1).transpose(1, 2)
    y = F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2).transpose(1, 2)
    y = F.linear(F.gelu(F.linear(F.layer_norm(y, (17,), g2, e2), v1, c1)), v2, c2)
    assert_close(mixer_layer(x, *weights), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_plain_torch(dtype):
    x, weights = _layer((2, 64, 48, 32, 24), dtype)

    def plain(x, g1, e1, w1, b1, w2, b2, g2, e2, v1, c1, v2, c2):
        x = F.layer_norm(x, x.shape[-1:], g1, e1)
        x = F.linear(F.gelu(F.linear(x.mT, w1, b1)), w2, b2).mT
        x = F.layer_norm(x, x.shape[-1:], g2, e2)
        return F.linear(F.gelu(F.linear(x, v1, c1)), v2, c2)

    exact = mixer_layer_reference(x.double(), *(w.double() for w in weights))
    assert_no_worse(mixer_layer(x, *weights), plain(x, *weights), exact)
    _, grads, _ = _gradients(mixer_layer, x, weights)
    _, plain_grads, _ = _gradients(plain, x, weights)
    _, true, _ = _gradients(mixer_layer_reference, x.double(), [w.double() for w in weights])
    for mine, theirs, want in zip(grads, plain_grads, true):
        assert_no_worse(mine, theirs, want, atol=1e-2)


def test_without_gradients_nothing_is_kept_and_x_is_left_alone():
    x, weights = _layer((2, 13, 17, 7, 11))
    assert len(file._fwd(x, weights, 1e-5, False)) == 1
    trained = [w.requires_grad_() for w in weights]
    y = mixer_layer(x, *trained)
    y.sum().backward()
    assert x.grad is None and all(w.grad is not None for w in trained)
    with torch.no_grad():
        assert torch.equal(mixer_layer(x, *trained), y)


def test_autocast_runs_in_its_dtype():
    x, weights = _layer((2, 13, 17, 7, 11))
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer_layer(x, *weights)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, mixer_layer(x.bfloat16(), *(w.bfloat16() for w in weights)))


def test_empty_batch():
    x, weights = _layer((2, 13, 17, 7, 11))
    y, grads, _ = _gradients(mixer_layer, x[:0], weights)
    assert y.shape == (0, 7, 11) and not any(g.any() for g in grads)


def test_non_contiguous_input():
    x, weights = _layer((2, 13, 17, 7, 11))
    wide = torch.stack((x, x), -1)[..., 0].requires_grad_()
    assert not wide.is_contiguous()
    assert torch.equal(mixer_layer(wide, *weights), mixer_layer(x, *weights))


@pytest.mark.parametrize(
    ("index", "tensor", "words"),
    [
        (0, torch.zeros(13, 17), "expected x of shape"),
        (3, torch.zeros(7, 12), "expected w1 of shape"),
        (6, torch.zeros(8), "expected b2 of shape"),
        (9, torch.zeros(11, 16), "expected v1 of shape"),
        (12, torch.zeros(11).half(), "expected c2 of dtype float32"),
        (1, torch.zeros(17, device="meta"), "one device"),
    ],
)
def test_wrong_arguments_are_named(index, tensor, words):
    x, weights = _layer((2, 13, 17, 7, 11))
    arguments = [x, *weights]
    arguments[index] = tensor
    with pytest.raises(ValueError, match=words):
        mixer_layer(*arguments)


def test_opcheck():
    x, weights = _layer((2, 5, 6, 3, 4))
    trained = [w.requires_grad_() for w in weights]
    torch.library.opcheck(file._fwd, (x.requires_grad_(), trained, 1e-5, True))
    y, *kept = (t.detach() for t in file._fwd(x, trained, 1e-5, True))
    x, weights = x.detach(), [w.detach() for w in weights]
    torch.library.opcheck(file._bwd, (torch.ones_like(y), x, weights, kept, 1e-5, True))
    torch.library.opcheck(file._bwd, (torch.ones_like(y), x, weights, kept, 1e-5, False))


def test_compiles_without_a_break():
    x, weights = _layer((2, 13, 17, 7, 11))
    compiled = torch.compile(mixer_layer, fullgraph=True, backend="aot_eager")
    got, want = _gradients(compiled, x, weights), _gradients(mixer_layer, x, weights)
    for mine, theirs in zip((got[0], *got[1]), (want[0], *want[1])):
        assert_close(mine, theirs)


@pytest.mark.interpret
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_equal_the_library_path(sizes, poisoned):
    x, weights = _layer(sizes)
    with force_tile("mixer", SMALL):
        (inference,) = file._launch_forward(x, weights, 1e-5, False)
        y, *kept = file._launch_forward(x, weights, 1e-5, True)
    want, *kept_want = file._forward(x, weights, 1e-5, True)
    assert_close(inference, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip((y, *kept), (want, *kept_want)):
        assert mine.stride() == theirs.stride()
        assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
    grad = torch.randn(y.shape)
    for needs_x in (True, False):
        with force_tile("mixer", SMALL):
            got = file._launch_backward(grad, x, weights, kept_want, 1e-5, needs_x)
        for mine, theirs in zip(got, file._backward(grad, x, weights, kept_want, 1e-5, needs_x)):
            assert mine.is_contiguous()
            assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
def test_a_measured_tile_serves_one_epilogue_and_one_width_of_operands():
    asked = {}
    for dtype, width in ((torch.float32, "32bit"), (torch.float16, "16bit")):
        x, weights = _layer((1, 16, 16, 16, 16), dtype)

        def run(x=x, weights=weights):
            y, *kept = file._launch_forward(x, weights, 1e-5, True)
            file._launch_backward(y, x, weights, kept, 1e-5, False)

        asked[width] = tiles_asked(run)["mixer"]
        assert all(key.endswith(width) for key in asked[width])
        same = {f"M16-N16-K16-none-{epilogue}-{width}" for epilogue in ("none", "backward")}
        assert same <= set(asked[width])


@pytest.mark.interpret
def test_kernels_in_half_precision(poisoned):
    x, weights = _layer((2, 40, 24, 20, 18), torch.float16)
    exact = mixer_layer_reference(x.double(), *(w.double() for w in weights))
    with force_tile("mixer", SMALL):
        (y,) = file._launch_forward(x, weights, 1e-5, False)
    assert_no_worse(y, file._forward(x, weights, 1e-5, False)[0], exact, atol=1e-3)


@pytest.mark.interpret
def test_the_shipped_tiles_give_the_same(poisoned):
    x, weights = _layer((1, 70, 66, 65, 67))
    (y,) = file._launch_forward(x, weights, 1e-5, False)
    assert_close(y, mixer_layer_reference(x, *weights), rtol=2e-5, atol=2e-5)


@pytest.mark.interpret
def test_bytes_and_operations_equal_the_closed_form():
    batch, n, d, tokens, channels = sizes = (2, 64, 48, 32, 16)
    x, weights = _layer(sizes)
    with force_tile("mixer", SMALL), count_traffic() as traffic:
        file._launch_forward(x, weights, 1e-5, False)
    token = 2 * batch * d * tokens * (n + tokens)
    channel = 2 * batch * tokens * channels * (d + channels)
    assert traffic.dot_flops == token + channel
    hidden, s, y = batch * tokens * d, batch * tokens * d, batch * tokens * channels
    stats = 2 * batch * (n + tokens)
    assert traffic.store_bytes == 4 * (hidden + s + 2 * y + stats)
    # No transposed copy: what is read is the input, the weights and what the launches hand to each other.
    read = x.numel() + sum(w.numel() for w in weights) + hidden + s + y + stats
    assert traffic.unique_load_bytes == 4 * read


@pytest.mark.interpret
@pytest.mark.parametrize("far", ["a", "b", "out"])
def test_offsets_past_two_to_the_31(far):
    matrices = {name: torch.zeros(1, 16, 16, dtype=torch.float16) for name in ("a", "b", "out")}
    matrices[far] = huge((1, 16, 16), (0, 1, 2**31), torch.float16)
    with addresses_only() as asked, force_tile("mixer", SMALL):
        file._matmul(**matrices)
    start = matrices[far].data_ptr()
    assert asked == {start + 2 * (row + column * 2**31) for row in range(16) for column in range(16)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 13, 17, 7, 11), (1, 2048, 768, 1024, 448), (3, 256, 384, 192, 129)], ids=str)
def test_gpu_equals_the_reference(sizes, dtype):
    x, weights = _layer(sizes, dtype, "cuda")
    got, grads, factor = _gradients(mixer_layer, x, weights)
    with disable("mixer"):
        plain, plain_grads, _ = _gradients(mixer_layer, x, weights)
    exact, true, _ = _gradients(mixer_layer_reference, x.double(), [w.double() for w in weights])
    assert_no_worse(got, plain, exact, atol=1e-4)
    for mine, theirs, want in zip(grads, plain_grads, true):
        limit = max(0.0005, 2 * float((theirs.double() - want).norm() / want.norm()))
        assert_rms_close(mine, want, ratio=limit)
    again = _gradients(mixer_layer, x, weights)
    assert torch.equal(got, again[0]) and all(torch.equal(a, b) for a, b in zip(grads, again[1]))


@pytest.mark.gpu
def test_gpu_graph_replay_and_compile():
    x, weights = _layer((2, 64, 48, 32, 24), torch.bfloat16, "cuda")
    with torch.no_grad():
        want = mixer_layer(x, *weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mixer_layer(x, *weights)
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(out, want.flip(0))
        compiled = torch.compile(mixer_layer, fullgraph=True)
        assert torch.equal(compiled(x, *weights), out)
