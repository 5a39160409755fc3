"""3D patch embedding against MONAI's and a plain fp64 chain; Triton kernels in the interpreter."""

import pytest
import torch
from _close import assert_close, assert_no_worse, assert_rms_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import patch_embed3d as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.patch_embed3d import patch_embed3d

CASES = {
    "ct": ((1, 8, 32, 32), (4, 16, 16), 24),
    "odd": ((2, 6, 6, 10), (3, 2, 5), 7),
    "one-token": ((3, 2, 3, 4), (2, 3, 4), 33),
    "one-voxel": ((1, 3, 1, 2), (1, 1, 1), 5),
    "empty": ((0, 4, 4, 4), (2, 2, 2), 5),
}


def _make(shape, patch, width, dtype=torch.float32, voxels=torch.int16, device="cpu"):
    torch.manual_seed(42)
    volume = torch.randint(-1500, 1500, shape).to(voxels)
    k = patch[0] * patch[1] * patch[2]
    tokens = shape[1] // patch[0] * (shape[2] // patch[1]) * (shape[3] // patch[2])
    weight, bias = torch.randn(width, k) / k**0.5, torch.randn(width)
    parameters = [t.to(device, dtype).requires_grad_() for t in (weight, bias, torch.randn(tokens, width))]
    return volume.to(device), *parameters


def _exact(volume, weight, bias, position, patch, window=None, slope=1.0, intercept=0.0):
    """Voxel by voxel, with slices rather than a rearrangement, in float64."""
    values = volume.double() * slope + intercept
    if window is not None:
        values = (values.clamp(*window) - window[0]) / (window[1] - window[0])
    p, q, r = patch
    rows = [
        values[:, d : d + p, h : h + q, w : w + r].flatten(1)
        for d in range(0, values.shape[1], p)
        for h in range(0, values.shape[2], q)
        for w in range(0, values.shape[3], r)
    ]
    return torch.stack(rows, 1) @ weight.double().T + bias.double() + (0 if position is None else position.double())


@pytest.mark.parametrize(("shape", "patch", "width"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("slope", [1.0, -2.0])
def test_matches_the_plain_chain_forward_and_backward(shape, patch, width, slope):
    volume, weight, bias, position = _make(shape, patch, width)
    options = {"patch": patch, "window": (-900.0, 700.0), "slope": slope, "intercept": 20.0}
    for extra in (position, None):
        got, want = (
            patch_embed3d(volume, weight, bias, extra, **options),
            _exact(volume, weight, bias, extra, **options),
        )
        assert_close(got, want)
        inputs = (weight, bias) if extra is None else (weight, bias, extra)
        upstream = torch.randn_like(got)
        grads = torch.autograd.grad((got * upstream).sum(), inputs)
        for a, b in zip(grads, torch.autograd.grad((want * upstream).sum(), inputs)):
            assert_rms_close(a, b)


def test_equals_monai():
    blocks = pytest.importorskip("monai.networks.blocks.patchembedding")
    theirs = blocks.PatchEmbeddingBlock(
        in_channels=1,
        img_size=(8, 32, 48),
        patch_size=(4, 16, 16),
        hidden_size=24,
        num_heads=2,
        proj_type="perceptron",
        pos_embed_type="learnable",
    )
    volume = torch.rand(2, 8, 32, 48)
    projection = theirs.patch_embeddings[1]
    got = patch_embed3d(volume, projection.weight, projection.bias, theirs.position_embeddings[0])
    assert_close(got, theirs(volume[:, None]))


@pytest.mark.parametrize("voxels", module.VOXELS, ids=str)
def test_every_stored_dtype_and_strides(voxels):
    stored, _, bias, _ = _make((2, 8, 6, 4), (2, 3, 2), 9)
    volume = (stored % 100).to(voxels).permute(0, 3, 1, 2)[..., ::2]
    weight, position = torch.randn(9, 8), torch.randn(2 * 2 * 3, 9)
    got = patch_embed3d(volume, weight, bias, position, patch=(2, 4, 1))
    assert_close(got, _exact(volume, weight, bias, position, (2, 4, 1)), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_no_worse_than_torch():
    volume, weight, bias, position = (t.detach() for t in _make(*CASES["ct"], torch.bfloat16))
    patches = module._patches(volume, (4, 16, 16), -1000.0, 1000.0, 1 / 2000, 0.5).bfloat16()
    plain = torch.nn.functional.linear(patches, weight, bias) + position
    got = patch_embed3d(volume, weight, bias, position, window=(-1000, 1000))
    assert got.dtype == torch.bfloat16
    assert_no_worse(got, plain, _exact(volume, weight, bias, position, (4, 16, 16), (-1000.0, 1000.0)))


def test_autocast_decides_the_dtype():
    volume, weight, bias, position = _make(*CASES["ct"])
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_embed3d(volume, weight, bias, position, window=(-1000, 1000))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def test_gradcheck():
    volume, weight, bias, position = _make((1, 2, 4, 4), (2, 2, 2), 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *p: patch_embed3d(volume, *p, patch=(2, 2, 2), window=(-900, 700)), (weight, bias, position)
    )


def test_opcheck_and_compile():
    volume, weight, bias, position = _make(*CASES["odd"])
    options = (list(CASES["odd"][1]), -900.0, 700.0, 0.01, 0.5)
    torch.library.opcheck(module._patch_embed3d, (volume, weight, bias, position, *options))
    torch.library.opcheck(module._patch_embed3d, (volume, weight.detach(), bias, None, *options))

    def step(volume, *parameters):
        return patch_embed3d(volume, *parameters, patch=CASES["odd"][1], window=(-900, 700)).sin().sum()

    parameters = (weight, bias, position)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(volume, *parameters)
    plain = step(volume, *parameters)
    assert_close(compiled, plain)
    for a, b in zip(torch.autograd.grad(compiled, parameters), torch.autograd.grad(plain, parameters)):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": torch.zeros(1, 8, 32, 32, requires_grad=True)}, r"volume without a gradient.*volume.detach\(\)"),
        ({"volume": torch.zeros(1, 8, 32)}, r"expected volume of shape \(any, any, any, any\)"),
        ({"volume": torch.zeros(1, 8, 30, 32)}, r"divisible by a patch of 3, got \(8, 30, 32\) and \[4, 16, 16\]"),
        ({"volume": torch.zeros(1, 8, 32, 32, dtype=torch.bool)}, "expected volume of dtype int16"),
        ({"weight": torch.zeros(24, 1000)}, r"expected weight of shape \(any, 1024\)"),
        ({"position": torch.zeros(5, 24)}, r"expected position of shape \(8, 24\)"),
        ({"window": (3, 3)}, "lo < hi"),
        ({"slope": 0.0}, "slope other than 0"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change, message):
    volume, weight, bias, position = _make(*CASES["ct"])
    arguments = {"volume": volume, "weight": weight, "bias": bias, "position": position} | change
    with pytest.raises(ValueError, match=f"patch_embed3d: .*{message}"):
        patch_embed3d(**arguments)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "patch", "width"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_in_the_interpreter(shape, patch, width, dtype):
    volume, weight, bias, position = (t.detach() for t in _make(shape, patch, width, dtype))
    volume = volume.transpose(1, 3).contiguous().transpose(1, 3)
    options = (list(patch), -900.0, 700.0, 1 / 1600, 0.5)
    for extra in (position, None):
        arguments = (volume, weight, bias, extra, *options)
        got, want = module._launch_patch_embed3d(*arguments), module.patch_embed3d_reference(*arguments)
        assert_close(got, want, atol=1e-5 if dtype == torch.float32 else 4e-3)
    grad = torch.randn_like(got)
    got = module._launch_patch_embed3d_backward(grad, volume, *options)
    assert_rms_close(got, module.patch_embed3d_backward_reference(grad, volume, *options))


@pytest.mark.interpret
def test_each_tile_is_read_once_per_neighbour_and_the_output_written_once():
    volume, weight, bias, position = (t.detach() for t in _make((1, 16, 32, 32), (2, 8, 8), 130, torch.float16))
    with count_traffic() as traffic:
        module._launch_patch_embed3d(volume, weight, bias, position, [2, 8, 8], -900.0, 700.0, 0.01, 0.5)
    tokens, k, n = 128, 128, 130
    assert traffic.dot_flops == 2 * tokens * 256 * k
    assert traffic.unique_load_bytes == 2 * (volume.numel() + n * k + n + tokens * n)
    assert traffic.store_bytes == 2 * tokens * n
    columns, rows = 2, 2
    assert traffic.load_bytes == 2 * (columns * tokens * k + rows * n * k + rows * n + tokens * n)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    volume = huge((3, 2, 2, 2), (2**31, 2**30, 2**29, 5), torch.int16)
    weight = torch.ones(1, 1)
    with addresses_only() as asked:
        module._launch_patch_embed3d(volume, weight, weight[0], None, [1, 1, 1], 0.0, 1.0, 1.0, 0.0)
    assert len(asked) == volume.numel()
    assert max(asked) == volume.data_ptr() + 2 * (2 * 2**31 + 2**30 + 2**29 + 5)
    with addresses_only() as again:
        module._launch_patch_embed3d_backward(torch.ones(3, 8, 1), volume, [1, 1, 1], 0.0, 1.0, 1.0, 0.0)
    assert again == asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    volume, weight, bias, position = _make((2, 32, 256, 256), (4, 16, 16), 768, dtype, device="cuda")
    run = lambda: patch_embed3d(volume, weight, bias, position, window=(-1000.0, 650.0))  # noqa: E731
    got = run()
    grads = torch.autograd.grad(got.sum(), (weight, bias, position))
    with disable("patch_embed3d"):
        want = run()
        expected = torch.autograd.grad(want.sum(), (weight, bias, position))
    assert_rms_close(got, want)
    for a, b in zip(grads, expected):
        assert_rms_close(a, b)
    assert torch.equal(got, run())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, got)
