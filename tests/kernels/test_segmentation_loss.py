"""Mask losses: the blocked CPU path and the Triton kernels against the plain form, MONAI and closed forms."""

import mmap

import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from interpreter import count_traffic

from medvl_sam2.kernels import segmentation_loss as file
from medvl_sam2.kernels.segmentation_loss import (
    point_sampled_loss,
    sample_points,
    segmentation_loss,
    segmentation_loss_reference,
    uncertain_points,
)

SHAPES = [(1, 1), (3, 7, 11), (2, 5, 13, 17), (5, 1031), (0, 9), (2, 70001)]


def _case(shape, dtype=torch.float32, targets=torch.bool, device="cpu", scale=4.0):
    torch.manual_seed(42)
    logits = (torch.randn(shape, device=device) * scale).to(dtype)
    wanted = torch.rand(shape, device=device)
    return logits, wanted.to(targets) if targets.is_floating_point else (wanted > 0.6).to(targets)


def _gradients(function, logits, targets, seed=1):
    x = logits.detach().clone().requires_grad_()
    losses = function(x, targets)
    torch.manual_seed(seed)
    factors = torch.randn(2, logits.shape[0]).to(logits.device)
    (losses[0] * factors[0] + losses[1] * factors[1]).sum().backward()
    return *losses, x.grad


@pytest.mark.parametrize("targets", [torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_equal_the_plain_form(shape, targets):
    logits, wanted = _case(shape, targets=targets)
    for got, want in zip(
        _gradients(segmentation_loss, logits, wanted), _gradients(segmentation_loss_reference, logits, wanted)
    ):
        assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_are_summed_in_float32(dtype):
    logits, wanted = _case((2, 31, 33), dtype)
    got, want = _gradients(segmentation_loss, logits, wanted), _gradients(segmentation_loss, logits.float(), wanted)
    assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)
    assert got[2].dtype == dtype
    assert_close(got[2], want[2], dtype=dtype)


def test_dice_equals_monai():
    losses = pytest.importorskip("monai.losses")
    logits, wanted = _case((4, 1, 9, 10, 11))
    reference = losses.DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")
    assert_close(segmentation_loss(logits, wanted)[1], reference(logits, wanted.float()).flatten())


def test_gradient_equals_float64():
    logits, wanted = _case((2, 6), targets=torch.float32)

    def plain(x, g):
        p = x.sigmoid()
        return F.softplus(x).mean(1) - (x * g).mean(1), 1 - (2 * (p * g).sum(1) + 1) / (p.sum(1) + g.sum(1) + 1)

    exact = _gradients(plain, logits.double(), wanted.double())[2]
    assert_close(_gradients(segmentation_loss, logits, wanted)[2], exact, rtol=1e-5, atol=1e-7)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[-1e4, 1e4, -88.8, 88.8, 0.0]], requires_grad=True)
    wanted = torch.tensor([[True, False, True, False, True]])
    bce, dice = segmentation_loss(logits, wanted)
    (bce + dice).sum().backward()
    assert_close(bce, torch.tensor([(2e4 + 177.6 + 0.6931472) / 5]), rtol=1e-6)
    assert bool(torch.isfinite(logits.grad).all())


def test_weight_scales_each_object_and_zero_silences_it():
    logits, wanted = _case((3, 8, 9))
    x = logits.clone().requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.5])
    bce, dice = segmentation_loss(x, wanted, weight)
    plain = segmentation_loss_reference(logits, wanted)
    assert_close(bce, plain[0] * weight)
    assert_close(dice, plain[1] * weight)
    (bce + dice).sum().backward()
    assert not x.grad[1].any() and x.grad[2].any()


def test_rows_of_a_channel_slice_are_not_copied(monkeypatch):
    logits, wanted = _case((3, 4, 8, 9))
    view = logits[:, 2]
    assert file._dense_rows(view).data_ptr() == view.data_ptr()
    assert_close(segmentation_loss(view, wanted[:, 1])[0], segmentation_loss_reference(view, wanted[:, 1])[0])
    assert_close(
        segmentation_loss(view.mT, wanted[:, 1].mT)[1], segmentation_loss_reference(view.mT, wanted[:, 1].mT)[1]
    )


def test_nothing_of_the_logits_size_is_kept_or_made():
    logits, wanted = _case((4, 1 << 18))
    x = logits.requires_grad_()
    made = []
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bce, dice = segmentation_loss(x, wanted)
    made = [event.cpu_memory_usage for event in profile.events()]
    assert max(made) < x.nbytes / 2
    kept = [t for t in bce.grad_fn.saved_tensors if t.data_ptr() not in (x.data_ptr(), wanted.data_ptr())]
    assert sum(t.nbytes for t in kept) <= 4 * 4 * x.shape[0]


@pytest.mark.parametrize(
    ("logits", "targets", "weight", "words"),
    [
        (torch.zeros(3), torch.zeros(3), None, "expected logits of shape"),
        (torch.zeros(3, 0), torch.zeros(3, 0), None, "P > 0"),
        (torch.zeros(3, 4), torch.zeros(3, 5), None, "expected targets of shape"),
        (torch.zeros(3, 4).double(), torch.zeros(3, 4), None, "expected logits of dtype"),
        (torch.zeros(3, 4), torch.zeros(3, 4).long(), None, "expected targets of dtype"),
        (torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2), "expected weight of shape"),
        (torch.zeros(3, 4), torch.zeros(3, 4, device="meta"), None, "one device"),
    ],
)
def test_wrong_arguments_are_named(logits, targets, weight, words):
    with pytest.raises(ValueError, match=words):
        segmentation_loss(logits, targets, weight)


def test_opcheck():
    logits, wanted = _case((2, 33))
    torch.library.opcheck(file._fwd, (logits.requires_grad_(), wanted, 1.0))
    sums = file._fwd(logits, wanted, 1.0)[2].detach()
    torch.library.opcheck(file._bwd, (torch.ones(2), torch.ones(2), logits.detach(), wanted, sums, 1.0))


def test_compiles_without_a_break():
    logits, wanted = _case((3, 5, 7))
    compiled = torch.compile(segmentation_loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(_gradients(compiled, logits, wanted), _gradients(segmentation_loss, logits, wanted)):
        assert_close(got, want)


def test_sampled_points_equal_the_maps_at_pixel_centres():
    maps = torch.randn(2, 5, 7)
    y, x = torch.meshgrid((torch.arange(5) + 0.5) / 5, (torch.arange(7) + 0.5) / 7, indexing="ij")
    points = torch.stack((x, y), -1).flatten(0, 1).expand(2, -1, -1)
    assert_close(sample_points(maps, points), maps.flatten(1), rtol=0, atol=1e-5)


def test_points_gather_where_the_mask_is_uncertain():
    column = torch.linspace(-8, 8, 64)
    logits = column.expand(3, 64, 64)
    points = uncertain_points(logits, 1000, generator=torch.Generator().manual_seed(0))
    assert points.shape == (3, 1000, 2) and bool((points >= 0).all()) and bool((points <= 1).all())
    # 750 points are the nearest to zero of 3000, so within the middle quarter of the width, as an eighth of the other
    # 250 is on average; uniform points would have a quarter there.
    middle = ((points[..., 0] - 0.5).abs() < 0.135).float().mean(1)
    assert bool((middle > 0.75).all())
    again = uncertain_points(logits, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(points, again)


def test_point_sampled_loss_is_exact_on_constant_maps_and_reaches_the_logits():
    logits = torch.full((2, 16, 16), 0.7, requires_grad=True)
    wanted = torch.ones(2, 16, 16, dtype=torch.bool)
    points = {"num_points": 128, "generator": torch.Generator().manual_seed(3)}
    inner = logits[:, 1:-1, 1:-1]
    bce, dice = point_sampled_loss(F.pad(inner, (1,) * 4, value=0.7), wanted, **points)
    # Half a pixel around the border blends with zeros outside, for logits and targets alike.
    assert bool((bce < 0.7).all()) and bool((bce > 0.39).all())
    assert dice.shape == (2,)
    (bce + dice).sum().backward()
    assert logits.grad.count_nonzero() > 100


def test_point_sampled_loss_names_wrong_options():
    maps = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match="flatten slices"):
        point_sampled_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="oversample >= 1"):
        point_sampled_loss(maps, maps, oversample=0.5)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 1031), (2, 5003), (0, 9)], ids=str)
def test_kernels_equal_the_plain_form(shape, dtype, poisoned):
    logits, wanted = _case(shape, dtype)
    bce, dice, sums = file._launch_forward(logits, wanted, 1.0)
    plain = segmentation_loss_reference(logits, wanted)
    assert_close(bce, plain[0], rtol=1e-5, atol=1e-6)
    assert_close(dice, plain[1], rtol=1e-5, atol=1e-6)
    factors = torch.randn(2, shape[0])
    grad = file._launch_backward(*factors, logits, wanted, sums, 1.0)
    want = file._backward(*factors, logits, wanted, sums, 1.0)
    assert_close(grad, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.interpret
def test_kernels_take_strided_rows_and_soft_targets(poisoned):
    logits, wanted = _case((3, 2, 130), targets=torch.float32)
    view, target = logits[:, 1], wanted[:, 0]
    bce, dice, sums = file._launch_forward(view, target, 1.0)
    assert_close(torch.stack((bce, dice)), torch.stack(segmentation_loss_reference(view, target)))
    ones = torch.ones(3)
    assert_close(
        file._launch_backward(ones, ones, view, target, sums, 1.0),
        file._backward(ones, ones, view, target, sums, 1.0),
    )


@pytest.mark.interpret
def test_each_pass_reads_its_input_once():
    logits, wanted = _case((3, 5003), torch.float32, torch.uint8)
    parts, _ = file._settings(logits)
    with count_traffic() as forward:
        *_, sums = file._launch_forward(logits, wanted, 1.0)
    partial = 3 * parts * 16
    assert forward.load_bytes == logits.nbytes + wanted.nbytes + partial
    assert forward.store_bytes == partial + 3 * 4 * 6
    with count_traffic() as backward:
        file._launch_backward(torch.ones(3), torch.ones(3), logits, wanted, sums, 1.0)
    assert backward.load_bytes == logits.nbytes + wanted.nbytes + 3 * parts * 5 * 4
    assert backward.store_bytes == logits.nbytes


@pytest.mark.interpret
def test_offsets_are_64_bit(poisoned):
    # Rows 2^31 elements apart, in address space that is reserved and never filled.
    logits, wanted = _case((2, 77), torch.float16, torch.uint8)
    space = torch.frombuffer(mmap.mmap(-1, (2 << 31) + 4096), dtype=torch.float16)
    far = space.as_strided((2, 77), (1 << 31, 1)).copy_(logits)
    space = torch.frombuffer(mmap.mmap(-1, (1 << 31) + 4096), dtype=torch.uint8)
    marks = space.as_strided((2, 77), (1 << 31, 1)).copy_(wanted)
    bce, dice, sums = file._launch_forward(far, marks, 1.0)
    assert_close(torch.stack((bce, dice)), torch.stack(segmentation_loss_reference(logits, wanted)))
    ones = torch.ones(2)
    grad = file._launch_backward(ones, ones, far, marks, sums, 1.0)
    assert_close(grad, file._backward(ones, ones, logits, wanted, sums, 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 11), (5, 256, 256), (2, 70001)], ids=str)
def test_gpu_equals_the_plain_form(shape, dtype):
    logits, wanted = _case(shape, dtype, device="cuda")
    got = _gradients(segmentation_loss, logits, wanted)
    want = _gradients(segmentation_loss_reference, logits.float(), wanted)
    assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert_close(got[2], want[2], dtype=dtype)
    again = _gradients(segmentation_loss, logits, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.gpu
def test_gpu_graph_replay():
    logits, wanted = _case((4, 64, 64), device="cuda")
    segmentation_loss(logits, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = segmentation_loss(logits, wanted)
    logits.copy_(logits.flip(0))
    graph.replay()
    assert_close(torch.stack(out), torch.stack(segmentation_loss_reference(logits, wanted)))
