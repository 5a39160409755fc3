"""Mask epilogue against float interpolation of the whole native volume; the Triton kernel in the interpreter."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _close import assert_close
from interpreter import addresses_only, count_traffic, huge

from medvl_sam2.kernels import mask_epilogue as module
from medvl_sam2.kernels._common import disable
from medvl_sam2.kernels.mask_epilogue import mask_epilogue


def _logits(slices, objects, height, width, dtype=torch.float32):
    torch.manual_seed(42)
    coarse = torch.randn(slices, objects, 3, 3)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").add(torch.randn(1) * 0.1).to(dtype)


def _float_volumes(logits, size, box=None, z_positions=None):
    """Every object's logits at native size in float64: torch's own bilinear in plane, `numpy.interp` over slices."""
    z0, y0, x0, z1, y1, x1 = box or (0, 0, 0, *size)
    planes = F.interpolate(logits.double(), size=(y1 - y0, x1 - x0), mode="bilinear", align_corners=False)
    slices, objects = logits.shape[:2]
    if z_positions is None:
        z_positions = [z0 + (s + 0.5) * (z1 - z0) / slices - 0.5 for s in range(slices)]
    order = np.argsort(z_positions)
    at = np.interp(np.arange(z0, z1), np.array(z_positions)[order], np.arange(slices))
    low = np.clip(np.floor(at).astype(int), 0, slices - 1)
    high, share = np.clip(low + 1, 0, slices - 1), torch.from_numpy(at - low)[:, None, None, None]
    planes = planes[torch.from_numpy(order)]
    full = torch.full((objects, *size), -torch.inf, dtype=torch.float64)
    full[:, z0:z1, y0:y1, x0:x1] = torch.lerp(planes[low], planes[high], share).transpose(0, 1)
    return full


def _labels(volumes, threshold, values):
    best, index = volumes.max(0)
    return torch.where(best > threshold, torch.tensor(values)[index], 0).to(torch.uint8)


CASES = {
    "up": ((3, 2, 4, 5), (7, 11, 13), None, None),
    "down": ((5, 3, 9, 8), (3, 5, 4), None, None),
    "one": ((1, 1, 1, 1), (3, 4, 5), None, None),
    "box": ((3, 4, 6, 6), (9, 12, 10), (2, 1, 3, 8, 11, 9), None),
    "positions": ((4, 3, 5, 5), (20, 10, 9), (1, 0, 0, 19, 10, 9), (12.0, 3.0, 17.5, 5.25)),
    "each-slice": ((6, 2, 4, 4), (6, 8, 8), None, tuple(range(6))),
    "thick": ((2, 2, 4, 4), (45, 5, 6), None, None),
}

TINY = {
    "one": CASES["one"],
    "box": ((3, 4, 3, 2), (5, 4, 7), (1, 1, 2, 4, 3, 7), None),
    "positions": ((3, 2, 3, 3), (9, 2, 5), (1, 0, 0, 8, 2, 5), (7.5, 1.0, 4.25)),
    "thick": ((1, 2, 2, 3), (19, 3, 2), None, None),
}


def _agree(got, volumes, want, threshold):
    """Equal but for voxels whose decision hangs on the last bit: the best two, or the best and the threshold, tie."""
    ranked = volumes.sort(0, descending=True).values
    rival = torch.clamp(ranked[1], min=threshold) if len(ranked) > 1 else torch.full_like(ranked[0], threshold)
    clear = (ranked[0] - rival).abs() > 1e-5
    assert torch.equal(got[clear], want[clear])
    assert clear.double().mean() > 0.98


@pytest.mark.parametrize(("shape", "size", "box", "positions"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("threshold", [0.0, -0.4, 0.7])
def test_equals_float_interpolation(shape, size, box, positions, threshold):
    logits = _logits(*shape)
    values = [7, 3, 200, 1][: shape[1]]
    volumes = _float_volumes(logits, size, box, positions)
    options = {"box": box, "z_positions": positions, "threshold": threshold}
    got = mask_epilogue(logits, size, label_values=values, **options)
    assert got.dtype == torch.uint8
    _agree(got, volumes, _labels(volumes, threshold, values), threshold)
    masks = mask_epilogue(logits, size, per_object=True, **options)
    assert masks.dtype == torch.bool
    clear = (volumes - threshold).abs() > 1e-5
    assert torch.equal(masks[clear], (volumes > threshold)[clear])


def test_labels_are_those_of_the_masks_where_objects_do_not_overlap():
    logits = torch.full((2, 2, 4, 4), -5.0)
    logits[:, 0, :2, :2] = 5
    logits[:, 1, 2:, 2:] = 5
    labels, masks = mask_epilogue(logits, (4, 8, 8)), mask_epilogue(logits, (4, 8, 8), per_object=True)
    assert torch.equal(labels, masks[0].byte() + 2 * masks[1].byte())
    assert sorted(labels.unique().tolist()) == [0, 1, 2]


def test_the_earlier_object_wins_a_tie():
    logits = torch.ones(1, 2, 2, 2)
    assert mask_epilogue(logits, (2, 3, 3), label_values=[9, 4]).unique().tolist() == [9]


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_writes_into_flipped_and_transposed_views(axes):
    logits, size, box = _logits(3, 2, 5, 4), (7, 9, 8), (1, 2, 0, 6, 9, 7)
    stored = np.full((8, 7, 9), 99, dtype=np.uint8)
    view = np.flip(stored.transpose(1, 2, 0), axes)
    assert mask_epilogue(logits, box=box, out=view) is view
    assert np.array_equal(view, mask_epilogue(logits, size, box=box).numpy())


def test_low_precision_logits():
    logits = _logits(3, 2, 5, 4, torch.bfloat16)
    volumes = _float_volumes(logits, (6, 9, 8))
    _agree(mask_epilogue(logits, (6, 9, 8)), volumes, _labels(volumes, 0.0, [1, 2]), 0.0)


def test_many_objects_go_in_bands(monkeypatch):
    logits, size = _logits(3, 5, 8, 8), (7, 30, 20)
    whole = mask_epilogue(logits, size)
    monkeypatch.setattr(module, "HELD_FLOATS", 2 * 5 * 20 * 4)
    assert torch.equal(mask_epilogue(logits, size), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": torch.zeros(2, 3, 3)}, r"expected logits of shape \(any, any, any, any\)"),
        ({"logits": torch.zeros(2, 2, 3, 3).int()}, "expected logits of dtype float32"),
        ({"logits": torch.zeros(0, 2, 3, 3)}, "with slices and pixels"),
        ({"size": None}, "expected size .Z, Y, X. or out, got neither"),
        ({"box": (0, 0, 0, 9, 4, 4)}, r"expected box .* within \[4, 4, 4\]"),
        ({"z_positions": [1.0]}, "expected 2 z_positions"),
        ({"label_values": [1]}, "expected 2 label_values"),
        ({"label_values": [1, 256]}, "from 1 to 255"),
        ({"out": torch.zeros(4, 4, 5, dtype=torch.uint8)}, r"expected out of shape \(4, 4, 4\)"),
        ({"out": torch.zeros(4, 4, 4)}, "expected out of dtype uint8"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(options, message):
    arguments = {"logits": torch.zeros(2, 2, 3, 3), "size": (4, 4, 4)} | options
    with pytest.raises(ValueError, match=f"mask_epilogue: .*{message}"):
        mask_epilogue(**arguments)


def test_opcheck_and_compile():
    logits, out = _logits(3, 2, 5, 4), torch.empty(7, 9, 8, dtype=torch.uint8)
    *tables, thick = module._make_tables((0.0, 3.0, 6.0), 7, 0, 7, (1, 2), logits.device)
    arguments = (out, logits, *tables, [0, 0, 9, 8], [0, 1, 0], 0.0, thick, False)
    torch.library.opcheck(module._mask_epilogue, arguments)

    def step(logits):
        return mask_epilogue(logits * 2, (7, 9, 8))

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read the peak of memory")
def test_never_holds_floats_of_native_size():
    logits, size = _logits(4, 8, 64, 64), (80, 512, 512)
    mask_epilogue(logits[:1], (2, 8, 8))

    def resident(field):
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    labels = mask_epilogue(logits, size)
    assert resident("VmHWM") - before <= labels.numel() + (64 << 20)
    assert len(labels.unique()) > 2


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "size", "box", "positions"), TINY.values(), ids=TINY)
def test_kernel_in_the_interpreter(shape, size, box, positions):
    logits = _logits(*shape, torch.float16 if positions else torch.float32).transpose(2, 3).contiguous().transpose(2, 3)
    z0, y0, x0, z1, y1, x1 = box or (0, 0, 0, *size)
    positions = positions or tuple(z0 + (s + 0.5) * (z1 - z0) / shape[0] - 0.5 for s in range(shape[0]))
    *tables, thick = module._make_tables(positions, size[0], z0, z1, tuple(range(1, shape[1] + 1)), logits.device)
    for flips, separate in (([0, 1, 0], False), ([1, 0, 1], True)):
        full, kind = ((shape[1], *size), torch.bool) if separate else (size, torch.uint8)
        got, want = torch.empty(full, dtype=kind), torch.empty(full, dtype=kind)
        arguments = (logits, *tables, [y0, x0, y1, x1], flips, 0.1, thick, separate)
        module._launch_mask_epilogue(got, *arguments)
        module.mask_epilogue_reference(want, *arguments)
        volumes = _float_volumes(logits, size, box, positions)
        axes = [axis + 1 for axis in range(3) if flips[axis]]
        ranked = volumes.flip(axes) if axes else volumes
        if separate:
            clear = (ranked - 0.1).abs() > 1e-5
            assert torch.equal(got[clear], want[clear])
        else:
            _agree(got, ranked, want, 0.1)


@pytest.mark.interpret
def test_planes_are_read_once_per_group_of_slices():
    logits, size = _logits(2, 3, 2, 4), (20, 3, 8)
    *tables, thick = module._make_tables((2.0, 17.0), 20, 0, 20, (1, 2, 3), logits.device)
    out = torch.empty(size, dtype=torch.uint8)
    chunks = len(tables[0])
    assert chunks == 3 and thick == 16
    with count_traffic() as traffic:
        module._launch_mask_epilogue(out, logits, *tables, [0, 0, 3, 8], [0, 0, 0], 0.0, thick, False)
    assert traffic.store_bytes == out.numel()
    assert traffic.unique_load_bytes == 4 * (logits.numel() + 4 * chunks + 20 + 3)
    programs = chunks * 3
    taps = 8 * 8
    assert traffic.load_bytes == 4 * (programs * (4 + 3 * taps + 3) + 3 * 20)


@pytest.mark.interpret
def test_offsets_past_two_to_the_31():
    *tables, thick = module._make_tables((0.0, 2.0), 3, 0, 3, (1, 2), torch.device("cpu"))
    out = huge((3, 2, 2), (2**30, 2**29, 3), torch.uint8)
    logits = huge((2, 2, 2, 2), (2**31, 2**30, 2**29, 5), torch.float32)
    with addresses_only() as asked:
        module._launch_mask_epilogue(out, logits, *tables, [0, 0, 2, 2], [0, 0, 0], 0.0, thick, False)
    wrote = {z * 2**30 + y * 2**29 + x * 3 for z in range(3) for y in range(2) for x in range(2)}
    bits = [(s, b, y, x) for s in range(2) for b in range(2) for y in range(2) for x in range(2)]
    read = {4 * (s * 2**31 + b * 2**30 + y * 2**29 + x * 5) for s, b, y, x in bits}
    assert asked == {out.data_ptr() + offset for offset in wrote} | {logits.data_ptr() + offset for offset in read}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    logits, size = _logits(16, 8, 128, 128, dtype).cuda(), (100, 300, 310)
    run = lambda: mask_epilogue(logits, size, box=(3, 4, 5, 99, 290, 300))  # noqa: E731
    got = run()
    with disable("mask_epilogue"):
        want = run()
    assert (got != want).double().mean() < 1e-4
    assert torch.equal(got, run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, got)
    assert_close(got.float().mean(), want.float().mean(), rtol=1e-3)
