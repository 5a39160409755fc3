"""Front of the memory encoder against SAM2's own modules, float64, and the Triton kernel in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import mask_encoding as file
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels._tuning import force_tile
from medvl_sam2.kernels.mask_encoding import mask_encoder_front, mask_encoder_front_reference

# batch, logits (h, w), size (H, W)
SIZES = [(1, (1, 1), (1, 1)), (2, (5, 7), (13, 19)), (1, (8, 8), (32, 32)), (2, (9, 6), (9, 6)), (1, (16, 16), (7, 5))]
SHAPES = ((4, 1, 3, 3), (4,), (4,), (4,), (16, 4, 3, 3), (16,), (16,), (16,))


def _case(batch, low, dtype=torch.float32, device="cpu"):
    torch.manual_seed(42)
    weights = [torch.randn(shape, device=device) * 0.3 + (i in (2, 6)) for i, shape in enumerate(SHAPES)]
    logits = torch.randn(batch, 1, *low, device=device) * 4
    return logits, [weight.to(dtype) for weight in weights]


def _gradients(function, logits, weights, size, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (logits, *weights)]
    y = function(leaves[0], size, *leaves[1:], **options)
    torch.manual_seed(7)
    factor = torch.randn(y.shape, dtype=torch.float64).to(y)
    return y.detach(), torch.autograd.grad(y, leaves, factor, materialize_grads=True)


def _operation(logits, size, *weights, scale=20.0, shift=-10.0, binarize=False, eps=1e-6):
    """The registered operation, whose backward makes the maps again, also where the function does without it."""
    return file._fwd(logits, list(weights), list(size), scale, shift, binarize, eps)


def _double(logits, weights):
    return logits.double(), [weight.double() for weight in weights]


@pytest.mark.parametrize("function", [_operation, mask_encoder_front], ids=["operation", "function"])
@pytest.mark.parametrize(("batch", "low", "size"), SIZES, ids=str)
def test_forward_and_backward_equal_float64(batch, low, size, function):
    logits, weights = _case(batch, low)
    got, grads = _gradients(function, logits, weights, size)
    want, exact = _gradients(mask_encoder_front_reference, *_double(logits, weights), size)
    assert_close(got, want, rtol=1e-5, atol=2e-5)
    for mine, true in zip(grads, exact):
        assert_rms_close(mine, true)


@pytest.mark.parametrize("binarize", [False, True])
def test_equals_the_sam2_package(binarize):
    module = pytest.importorskip("sam2.modeling.memory_encoder")
    torch.manual_seed(0)
    chain = module.MaskDownSampler(kernel_size=3, stride=2, padding=1).encoder[:6]
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    logits = torch.randn(2, 1, 16, 16) * 4
    # sam2_base.SAM2Base: high-resolution masks, then _encode_new_memory.
    high = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    mask = (high > 0).float() if binarize else torch.sigmoid(high)
    want = chain(mask * 20.0 + -10.0)
    got = mask_encoder_front(logits, (64, 64), *chain.state_dict().values(), binarize=binarize)
    assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_binary_masks_pass_no_gradient_to_the_logits():
    logits, weights = _case(2, (5, 7))
    _, grads = _gradients(_operation, logits, weights, (13, 19), binarize=True)
    _, exact = _gradients(mask_encoder_front_reference, *_double(logits, weights), (13, 19), binarize=True)
    assert not grads[0].any()
    for mine, true in zip(grads[1:], exact[1:]):
        assert_rms_close(mine, true)


def test_float64_gives_what_the_plain_chain_gives():
    logits, weights = _case(2, (5, 7), torch.float64)
    got, grads = _gradients(_operation, logits, weights, (13, 19))
    want, exact = _gradients(mask_encoder_front_reference, logits.double(), weights, (13, 19))
    assert got.dtype == torch.float64
    # The logits are float32, and so is their gradient.
    for mine, true in zip((got, *grads), (want, *exact)):
        assert_close(mine, true, rtol=1e-5 if mine.dtype == torch.float32 else 1e-9, atol=1e-9)


def test_scale_and_shift():
    logits, weights = _case(1, (6, 6))
    options = {"scale": 2.0, "shift": 0.5, "eps": 1e-3}
    got = mask_encoder_front(logits, (12, 12), *weights, **options)
    assert_close(got, mask_encoder_front_reference(logits, (12, 12), *weights, **options), rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_are_no_worse_than_plain_torch():
    logits, weights = _case(2, (16, 16), torch.bfloat16)
    double = _double(logits, weights)

    def plain(x, conv1, bias1, norm1, offset1, conv2, bias2, norm2, offset2):
        x = (F.interpolate(x, size=(64, 64), mode="bilinear").sigmoid() * 20 - 10).bfloat16()
        for conv, bias, norm, offset in ((conv1, bias1, norm1, offset1), (conv2, bias2, norm2, offset2)):
            x = F.conv2d(x, conv, bias, stride=2, padding=1)
            x = F.gelu(F.layer_norm(x.movedim(1, -1), norm.shape, norm, offset, 1e-6).movedim(-1, 1))
        return x

    got = mask_encoder_front(logits, (64, 64), *weights)
    assert got.dtype == torch.bfloat16
    assert_no_worse(got, plain(logits, *weights), mask_encoder_front_reference(double[0], (64, 64), *double[1]))


def test_empty_batch():
    logits, weights = _case(2, (5, 7))
    got, grads = _gradients(_operation, logits[:0], weights, (13, 19))
    assert got.shape == (0, 16, 4, 5) and not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, torch.zeros(2, 2, 4, 4), "expected logits of shape"),
        (1, (0, 8), r"expected a size \(H, W\)"),
        (2, torch.zeros(8, 1, 3, 3), "expected conv1 of shape"),
        (7, torch.zeros(16).half(), "expected bias2 of dtype float32"),
        (0, torch.zeros(2, 1, 4, 4, device="meta"), "one device"),
    ],
)
def test_wrong_arguments_are_named(index, value, words):
    logits, weights = _case(2, (4, 4))
    arguments = [logits, (8, 8), *weights]
    arguments[index] = value
    with pytest.raises(ValueError, match=words):
        mask_encoder_front(*arguments)


def test_opcheck():
    logits, weights = _case(2, (3, 4))
    options = ([6, 5], 20.0, -10.0, False, 1e-6)
    torch.library.opcheck(file._fwd, (logits.requires_grad_(), [w.requires_grad_() for w in weights], *options))
    logits, weights = logits.detach(), [w.detach() for w in weights]
    torch.library.opcheck(file._bwd, (torch.ones(2, 16, 2, 2), logits, weights, *options))


def test_compiles_without_a_break():
    logits, weights = _case(2, (5, 7))
    compiled = torch.compile(mask_encoder_front, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = mask_encoder_front(logits, (13, 19), *weights)
        got = compiled(logits, (13, 19), *weights)
    assert_close(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for function in (mask_encoder_front, _operation):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, want = (_gradients(f, logits, weights, (13, 19)) for f in (compiled, function))
        assert_close(got[0], want[0])
        for mine, theirs in zip(got[1], want[1]):
            assert_rms_close(mine, theirs)


@pytest.mark.interpret
@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize(("batch", "low", "size"), SIZES, ids=str)
def test_kernel_equals_the_library_path(batch, low, size, binarize, poisoned):
    logits, weights = _case(batch, low)
    options = (list(size), 20.0, -10.0, binarize, 1e-6)
    with force_tile("mask_encoding", {"BLOCK": 16}):
        got = file._launch_forward(logits, weights, *options)
    assert_close(got, file._forward(logits, weights, *options), rtol=1e-5, atol=3e-5)


@pytest.mark.interpret
def test_only_the_output_is_written_and_only_inputs_are_read(poisoned):
    logits, weights = _case(2, (8, 8), torch.float16)
    with count_traffic() as traffic:
        out = file._launch_forward(logits, weights, [32, 32], 20.0, -10.0, False, 1e-6)
    assert traffic.store_bytes == out.nbytes == 2 * 2 * 16 * 8 * 8
    assert traffic.unique_load_bytes == logits.nbytes + sum(weight.nbytes for weight in weights)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    _, weights = _case(1, (1, 1))
    logits = huge((2, 1, 2, 2), (2**31, 4, 2, 1), torch.float32)
    with addresses_only() as asked:
        file._launch_forward(logits, weights, [4, 4], 20.0, -10.0, False, 1e-6)
    start = logits.data_ptr()
    assert asked == {start + 4 * (image * 2**31 + pixel) for image in range(2) for pixel in range(4)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "low", "size"), [*SIZES, (3, (256, 256), (1024, 1024))], ids=str)
def test_gpu_equals_the_reference(batch, low, size, dtype):
    logits, weights = _case(batch, low, dtype, "cuda")
    double = _double(logits, weights)
    got, grads = _gradients(mask_encoder_front, logits, weights, size)
    with disable("mask_encoding"):
        plain, _ = _gradients(mask_encoder_front, logits, weights, size)
    want, exact = _gradients(mask_encoder_front_reference, *double, size)
    assert_no_worse(got, plain, want, atol=1e-4)
    for mine, true in zip(grads, exact):
        assert_rms_close(mine, true, ratio=0.001 if dtype == torch.float32 else 0.05)
    assert torch.equal(got, mask_encoder_front(logits, size, *weights))


@pytest.mark.gpu
def test_gpu_graph_replay():
    logits, weights = _case(2, (64, 64), device="cuda")
    want = mask_encoder_front(logits, (256, 256), *weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mask_encoder_front(logits, (256, 256), *weights)
    logits.copy_(logits.flip(0))
    graph.replay()
    assert torch.equal(out, want.flip(0))
