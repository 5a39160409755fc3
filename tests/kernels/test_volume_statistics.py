"""Statistics of a scan against NumPy and MONAI; Triton kernels in the interpreter."""

import numpy as np
import pytest
import torch
from _close import assert_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import volume_statistics as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.volume_statistics import (
    foreground_box,
    percentiles_from_histogram,
    volume_histogram,
    volume_minmax,
)

SHAPES = [(5, 7, 11), (1, 1, 1), (3, 130, 5), (2, 3, 700)]


def _scan(shape: tuple[int, ...], seed: int = 42) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 700 - 300).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.uint16, torch.float32], ids=str)
def test_minmax(dtype):
    voxels = (_scan((4, 5, 6)).int() % 200).to(dtype)
    for slope, intercept in ((1.0, 0.0), (-2.0, 5.0)):
        values = voxels.double() * slope + intercept
        assert_close(volume_minmax(voxels, slope, intercept), torch.stack((values.min(), values.max())))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 4)], ids=str)
def test_histogram_counts_every_voxel(shape):
    voxels = _scan(shape)
    got = volume_histogram(voxels)
    want = np.bincount(voxels.numpy().astype(np.int64).ravel() + 32768, minlength=65536)
    assert np.array_equal(got.numpy(), want)


def test_histogram_holds_the_ends_of_int16():
    histogram = volume_histogram(torch.tensor([[[-32768, 32767, 32767]]], dtype=torch.int16))
    assert histogram[0] == 1 and histogram[-1] == 2 and histogram.sum() == 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_percentiles_equal_numpy(shape):
    voxels, asked = _scan(shape), [0, 0.05, 0.5, 33.3, 50, 99.5, 99.95, 100]
    got = percentiles_from_histogram(volume_histogram(voxels), asked)
    assert_close(got, torch.from_numpy(np.percentile(voxels.numpy().astype(np.float64), asked)), rtol=1e-6, atol=1e-4)


def test_percentiles_of_the_foreground():
    voxels = _scan((5, 17, 13))
    histogram, array = volume_histogram(voxels), voxels.numpy().astype(np.float64)
    for above, limit in (("mean", array.mean()), (0.0, 0.0), (torch.tensor(-50.0), -50.0)):
        want = np.percentile(array[array > limit], [0.05, 99.95])
        assert_close(
            percentiles_from_histogram(histogram, [0.05, 99.95], above=above), torch.from_numpy(want), rtol=1e-6
        )
    assert percentiles_from_histogram(histogram, [50], above=40_000.0).isnan().all()


@pytest.mark.parametrize("threshold", [-100.0, 900.0, 1500.0])
def test_foreground_box_equals_monai(threshold):
    generate = pytest.importorskip("monai.transforms.utils").generate_spatial_bounding_box
    voxels = _scan((7, 9, 11))
    start, stop = generate(voxels[None].float().numpy(), lambda v: v > threshold, allow_smaller=True)
    assert foreground_box(voxels, threshold).tolist() == [*start, *stop]


def test_foreground_box_of_nothing_is_everything():
    assert foreground_box(_scan((3, 4, 5)), 1e6).tolist() == [0, 0, 0, 3, 4, 5]


@pytest.mark.parametrize("slope", [2.0, -1.5])
def test_foreground_box_in_rescaled_units(slope):
    voxels = _scan((7, 9, 11))
    hit = (voxels.double() * slope + 24 > 1100).nonzero()
    want = [*hit.min(0).values.tolist(), *(hit.max(0).values + 1).tolist()]
    assert foreground_box(voxels, torch.tensor(1100.0), slope, 24.0).tolist() == want


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="volume_histogram: expected voxels of dtype int16, int8, uint8, got float32"):
        volume_histogram(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="percentiles in .0, 100."):
        percentiles_from_histogram(torch.zeros(65536, dtype=torch.int64), [101])
    with pytest.raises(ValueError, match="at least one element"):
        foreground_box(torch.zeros(0, 2, 2), 1)
    with pytest.raises(ValueError, match="volume_minmax: expected voxels with at least one element"):
        volume_minmax(torch.zeros(2, 0, 2))
    with pytest.raises(ValueError, match="slope other than 0"):
        foreground_box(torch.zeros(2, 2, 2), 1, slope=0.0)


def test_opcheck_and_compile():
    voxels = _scan((3, 4, 5))
    torch.library.opcheck(module._volume_histogram, (voxels,))
    torch.library.opcheck(module._foreground_box, (voxels, torch.tensor([0.0]), 1.0, 0.0))

    def statistics(voxels):
        return percentiles_from_histogram(volume_histogram(voxels), [1, 99]), foreground_box(voxels, 0.0)

    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(voxels), statistics(voxels)):
        assert torch.equal(a, b)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_in_the_interpreter(shape):
    voxels = _scan(tuple(reversed(shape))).permute(2, 1, 0)
    assert torch.equal(module._launch_volume_histogram(voxels), module.volume_histogram_reference(voxels))
    for threshold, slope in ((300.0, 1.0), (600.0, -2.0), (1e6, 1.0)):
        arguments = (voxels, torch.tensor([threshold]), slope, 3.0)
        got, want = module._launch_foreground_box(*arguments), module.foreground_box_reference(*arguments)
        assert got.tolist() == want.tolist()


@pytest.mark.interpret
def test_each_voxel_is_read_once():
    voxels = _scan((3, 5, 37))
    with count_traffic() as traffic:
        module._launch_foreground_box(voxels, torch.tensor([1e6]), 1.0, 0.0)
    assert traffic.load_bytes == 2 * voxels.numel() + 4 * 3
    with count_traffic() as traffic:
        module._launch_volume_histogram(voxels)
    assert traffic.load_bytes == (2 + 4) * voxels.numel()


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    voxels = huge((4, 2, 3), (2**30, 2**29, 7), torch.int16)
    last = voxels.data_ptr() + 2 * (3 * 2**30 + 2**29 + 14)
    with addresses_only() as asked:
        module._launch_foreground_box(voxels, torch.tensor([1e6]), 1.0, 0.0)
    assert max(asked) == last and len(asked) == voxels.numel()


@pytest.mark.gpu
def test_on_a_gpu():
    voxels = _scan((40, 300, 310)).cuda()
    got = volume_histogram(voxels), foreground_box(voxels, 900.0)
    with disable("volume_statistics"):
        want = volume_histogram(voxels), foreground_box(voxels, 900.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
