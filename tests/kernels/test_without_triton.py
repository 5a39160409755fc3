"""Without Triton every kernel file imports, and its operation runs on a CPU."""

import subprocess
import sys
from pathlib import Path

import medvl_sam2.kernels.layer_norm as any_kernel

PROGRAM = """
import sys


class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoTriton())
import torch

from medvl_sam2.kernels import _common
from medvl_sam2.kernels._aot import all_variants
from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.axial_rope import axial_rope_tables, rope_linear
from medvl_sam2.kernels.float8_linear import float8_linear, quantise_rows
from medvl_sam2.kernels.layer_norm import layer_norm, layer_norm_2d
from medvl_sam2.kernels.linear import linear
from medvl_sam2.kernels.lora_linear import lora_linear
from medvl_sam2.kernels.mask_encoding import mask_encoder_front
from medvl_sam2.kernels.mask_epilogue import mask_epilogue
from medvl_sam2.kernels.memory_attention import Projections, memory_attention
from medvl_sam2.kernels.mixer import mixer_layer
from medvl_sam2.kernels.patch_embed3d import patch_embed3d
from medvl_sam2.kernels.segmentation_loss import segmentation_loss
from medvl_sam2.kernels.volume_ingest import ingest_volume
from medvl_sam2.kernels.volume_statistics import foreground_box, volume_histogram
from medvl_sam2.kernels.window_attention import window_attention

assert not _common.HAS_TRITON and "triton" not in sys.modules
all_variants()
torch.manual_seed(0)


def r(*shape):
    return torch.randn(*shape, requires_grad=True)


scan = torch.randint(-1000, 1000, (4, 8, 8), dtype=torch.int16)
rope = axial_rope_tables(3, 3, 16)
projections = Projections(r(16, 16), r(16), r(16, 8), r(16), r(16, 8), r(16), r(16, 16), r(16))
front = (r(4, 1, 3, 3), r(4), r(4), r(4), r(16, 4, 3, 3), r(16), r(16), r(16))
layer = (r(6), r(6), r(5, 8), r(5), r(5, 5), r(5), r(6), r(6), r(7, 6), r(7), r(7, 7), r(7))
runs = {
    "attention": lambda: attention(r(1, 2, 9, 8), r(1, 2, 9, 8), r(1, 2, 9, 8)),
    "axial_rope": lambda: rope_linear(r(1, 9, 8), r(16, 8), r(16), rope),
    "layer_norm": lambda: layer_norm(r(3, 6), r(6), r(6), residual=r(3, 6))[0],
    "layer_norm 2d": lambda: layer_norm_2d(r(1, 3, 2, 2), r(3), r(3)),
    "linear": lambda: linear(r(3, 6), r(4, 6), r(4), "gelu"),
    "lora_linear": lambda: lora_linear(r(3, 6), r(4, 6), r(4), r(2, 2, 6), r(2, 4, 2), 2.0, torch.tensor([0, -1, 1])),
    "float8_linear": lambda: float8_linear(r(20, 16).detach(), *quantise_rows(r(32, 16).detach())),
    "mask_encoding": lambda: mask_encoder_front(r(1, 1, 4, 4), (16, 16), *front),
    "mask_epilogue": lambda: mask_epilogue(r(2, 2, 4, 4).detach(), (4, 8, 8)),
    "memory_attention": lambda: memory_attention(
        r(1, 9, 16), r(1, 20, 8), r(1, 20, 8), projections, rope, num_pointer_tokens=2
    ),
    "mixer": lambda: mixer_layer(r(1, 8, 6), *layer),
    "patch_embed3d": lambda: patch_embed3d(scan[None], r(5, 64), r(5), patch=(4, 4, 4), window=(-500, 500)),
    "segmentation_loss": lambda: segmentation_loss(r(2, 5, 5), torch.rand(2, 5, 5) > 0.5)[1],
    "volume_ingest": lambda: ingest_volume(scan, (2, 4, 4), window=(-500, 500)),
    "volume_statistics": lambda: volume_histogram(scan).sum() + foreground_box(scan, 0).sum(),
    "window_attention": lambda: window_attention(r(1, 5, 5, 24), 2, 4, r(24)),
}
names = {status.name for status in _common.op_status()}
assert names == {name.split()[0] for name in runs}, names
assert not any(status.path == "triton" for status in _common.op_status())
for name, run in runs.items():
    y = run()
    assert y.isfinite().all(), name
    if y.requires_grad:
        y.sum().backward()
print("ran", len(runs))
"""


def test_every_operation_runs_without_triton():
    checkout = Path(any_kernel.__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("ran"), run.stderr
