"""Volume ingest against the whole-volume float chain in PyTorch and MONAI's resize; the kernel in the interpreter."""

import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import volume_ingest as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.volume_ingest import ingest_volume


def _scan(shape: tuple[int, ...], dtype: torch.dtype = torch.int16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(42)
    values = torch.randint(-1024, 3000, shape, generator=generator)
    if dtype in (torch.uint8, torch.int8):
        values = values % 100
    return (values + 1024 if dtype == torch.uint16 else values).to(dtype)


def _whole_chain(voxels, size, box=None, slope=1.0, intercept=0.0, window=None):
    """The plain way: cast the whole volume, clamp, normalise, crop, interpolate; in float64."""
    values = voxels.double() * slope + intercept
    if window is not None:
        values = (values.clamp(*window) - window[0]) / (window[1] - window[0])
    if box is not None:
        z0, y0, x0, z1, y1, x1 = box
        values = values[z0:z1, y0:y1, x0:x1]
    return F.interpolate(values[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]


CASES = {
    "down": ((11, 13, 17), (3, 5, 7), None),
    "up": ((5, 3, 2), (7, 11, 13), None),
    "same": ((5, 7, 3), (5, 7, 3), None),
    "one-voxel": ((1, 1, 1), (2, 3, 4), None),
    "one-output": ((5, 6, 7), (1, 1, 1), None),
    "box": ((11, 13, 17), (4, 4, 9), (2, 1, 5, 9, 12, 16)),
    "thin-box": ((11, 13, 17), (2, 3, 5), (4, 0, 16, 5, 13, 17)),
}


@pytest.mark.parametrize(("shape", "size", "box"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("slope", [1.0, -0.5])
def test_equals_the_whole_volume_chain(shape, size, box, slope):
    voxels = _scan(shape)
    options = {"box": box, "slope": slope, "intercept": -3.0, "window": (-900.0, 1000.0)}
    assert_close(ingest_volume(voxels, size, **options), _whole_chain(voxels, size, **options), atol=2e-6)


@pytest.mark.parametrize("dtype", module.STORED, ids=str)
def test_every_stored_dtype(dtype):
    voxels = _scan((6, 7, 5), dtype)
    assert_close(
        ingest_volume(voxels, (3, 4, 6)), _whole_chain(voxels, (3, 4, 6)), rtol=1e-3 if dtype.itemsize < 4 else 1e-5
    )


def test_equals_monai_min_max_crop_resize():
    transforms = pytest.importorskip("monai.transforms")
    voxels = _scan((12, 20, 18))
    box = (2, 3, 4, 11, 17, 15)
    scaled = (voxels.float() - voxels.min()) / (voxels.max() - voxels.min())
    cropped = scaled[2:11, 3:17, 4:15]
    want = transforms.Resize((4, 8, 8), mode="trilinear")(cropped[None])[0].as_tensor()
    lo, hi = float(voxels.min()), float(voxels.max())
    assert_close(ingest_volume(voxels, (4, 8, 8), box=box, scale=(lo, 1 / (hi - lo), lo, hi)), want)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_flipped_transposed_and_memory_mapped_arrays_need_no_copy(axes, tmp_path):
    np.save(tmp_path / "scan.npy", _scan((9, 8, 7)).numpy())
    stored = np.load(tmp_path / "scan.npy", mmap_mode="r").transpose(2, 0, 1)
    view = np.flip(stored, axes)
    box = (1, 2, 0, 6, 9, 7)
    got = ingest_volume(view, (3, 4, 5), box=box, window=(-1000, 400))
    want = _whole_chain(torch.from_numpy(view.copy()), (3, 4, 5), box, window=(-1000.0, 400.0))
    assert_close(got, want, atol=2e-6)
    tensor, flips = module.as_voxels(view)
    assert flips == tuple(int(a in axes) for a in range(3))
    assert np.shares_memory(tensor.numpy(), stored)


def test_big_endian_arrays():
    voxels = _scan((4, 5, 6))
    swapped = voxels.numpy().astype(">i2")
    assert torch.equal(ingest_volume(swapped, (2, 3, 3)), ingest_volume(voxels, (2, 3, 3)))


def test_slice_stack_with_several_windows_at_given_positions():
    voxels, windows = _scan((9, 10, 12)), [(-1000.0, 400.0), (-160.0, 240.0), (-500.0, 1300.0)]
    positions = [0.0, 8.0, 3.25, 7.5]
    got = ingest_volume(voxels, (4, 6, 6), windows=windows, z_positions=positions)
    assert got.shape == (3, 4, 6, 6)
    for c, window in enumerate(windows):
        planes = _whole_chain(voxels, (9, 6, 6), window=window)
        for d, z in enumerate(positions):
            low = int(z)
            want = planes[low] + (planes[min(low + 1, 8)] - planes[low]) * (z - low)
            assert_close(got[c, d], want, atol=2e-6)


def test_scale_from_the_device_and_low_precision_out():
    voxels = _scan((5, 6, 7))
    table = torch.tensor([[-100.0, 0.01, -300.0, 500.0], [0.0, 1.0, -torch.inf, torch.inf]])
    got = ingest_volume(voxels, (2, 3, 4), scale=table, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.shape == (2, 2, 3, 4)
    want = (_whole_chain(voxels.clamp(-300, 500), (2, 3, 4)) + 100) * 0.01
    assert_close(got[0], want)
    one = ingest_volume(voxels, (2, 3, 4), scale=table[0])
    assert_close(one, want)
    assert torch.equal(one, ingest_volume(voxels, (2, 3, 4), scale=table[0].tolist()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 2, 2)}, "size .D, H, W. of positive numbers"),
        ({"voxels": torch.zeros(4, 4)}, r"expected voxels of shape \(any, any, any\)"),
        ({"voxels": torch.zeros(4, 4, 0)}, "at least one element"),
        ({"voxels": torch.zeros(2, 2, 2, dtype=torch.bool)}, "expected voxels of dtype int16"),
        ({"box": (0, 0, 0, 5, 4, 4)}, r"expected box .* within \(4, 4, 4\)"),
        ({"box": (2, 0, 0, 2, 4, 4)}, "expected box"),
        ({"window": (5, 5)}, "lo < hi"),
        ({"window": (0, 1), "scale": (0, 1, 0, 1)}, "pass one"),
        ({"slope": 0.0}, "slope other than 0"),
        ({"z_positions": [1.0]}, r"expected z_positions of shape \(2\)"),
        ({"dtype": torch.int16}, "expected dtype float32"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(options, message):
    arguments = {"voxels": _scan((4, 4, 4)), "size": (2, 2, 2)} | options
    with pytest.raises(ValueError, match=message):
        ingest_volume(**arguments)


def test_opcheck_and_compile():
    voxels, table = _scan((5, 6, 7)), torch.tensor([[-100.0, 0.01, -300.0, 500.0]])
    box = torch.tensor([0, 1, 2, 5, 6, 7], dtype=torch.int32)
    for z in (None, torch.tensor([0.0, 2.5])):
        arguments = (voxels, table, box, z, [2, 3, 4], [0, 1, 0], 1.0, -1024.0, torch.float32)
        torch.library.opcheck(module._volume_ingest, arguments)
    compiled = torch.compile(
        lambda v: ingest_volume(v, (2, 3, 4), scale=table).exp(), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(voxels), ingest_volume(voxels, (2, 3, 4), scale=table).exp())


def test_side_by_side_with_the_whole_volume_chain():
    """A factor that any machine keeps, also a busy one; what quiet machines reach is told in docs/benchmarks.md."""
    voxels = _scan((200, 512, 512))
    ours, chain = [], []
    for _ in range(5):
        start = time.perf_counter()
        got = ingest_volume(voxels, (32, 256, 256), window=(-1000.0, 650.0))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        values = voxels.float().clamp(-1000, 650).sub(-1000).div(1650)
        want = F.interpolate(values[None, None], size=(32, 256, 256), mode="trilinear", align_corners=False)[0, 0]
        chain.append(time.perf_counter() - start)
    assert_close(got, want)
    assert statistics.median(chain) > 5 * statistics.median(ours), (chain, ours)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "size", "box"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32], ids=str)
def test_kernel_in_the_interpreter(shape, size, box, dtype):
    voxels = _scan(tuple(reversed(shape)), dtype).permute(2, 1, 0)
    table = torch.tensor([[-100.0, 0.01, -300.0, 500.0], [0.0, 1 / 6000, -torch.inf, torch.inf]])
    corners = torch.tensor(box or (0, 0, 0, *shape), dtype=torch.int32)
    for flips, slope, z in (([0, 0, 0], 1.0, None), ([1, 0, 1], -2.0, torch.rand(size[0]) * shape[0])):
        arguments = (voxels, table, corners, z, list(size), flips, slope, 7.0, torch.float32)
        assert_close(module._launch_volume_ingest(*arguments), module.volume_ingest_reference(*arguments))


@pytest.mark.interpret
def test_reads_the_taps_and_writes_the_grid():
    voxels, size = _scan((16, 16, 32)), (2, 4, 8)
    table, box = torch.tensor([[0.0, 1.0, -500.0, 500.0]]), torch.tensor([0, 0, 0, 16, 16, 32], dtype=torch.int32)
    with count_traffic() as traffic:
        module._launch_volume_ingest(voxels, table, box, None, list(size), [0, 0, 0], 1.0, 0.0, torch.float32)
    outputs = 2 * 4 * 8
    tables = 4 * (4 + 6)
    assert traffic.unique_load_bytes == 2 * 8 * outputs + tables
    assert traffic.store_bytes == 4 * outputs
    programs = 2
    assert traffic.load_bytes == 2 * 8 * outputs + programs * tables


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    voxels = huge((4, 3, 3), (2**30, 2**29, 2), torch.int16)
    table, box = torch.tensor([[0.0, 1.0, -500.0, 500.0]]), torch.tensor([0, 0, 0, 4, 3, 3], dtype=torch.int32)
    for flips in ([0, 0, 0], [1, 1, 1]):
        with addresses_only() as asked:
            module._launch_volume_ingest(voxels, table, box, None, [4, 3, 3], flips, 1.0, 0.0, torch.float32)
        wanted = {2 * (z * 2**30 + y * 2**29 + x * 2) for z in range(4) for y in range(3) for x in range(3)}
        assert asked == {voxels.data_ptr() + offset for offset in wanted}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    voxels = _scan((60, 128, 130)).cuda()
    options = {"window": (-1000.0, 650.0), "dtype": dtype, "box": (3, 5, 7, 58, 120, 128)}
    run = lambda: ingest_volume(voxels, (32, 64, 64), **options)  # noqa: E731
    got = run()
    with disable("volume_ingest"):
        assert_close(got, run(), dtype=dtype)
    assert torch.equal(got, run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, got)
