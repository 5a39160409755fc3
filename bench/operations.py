"""The operations that `bench/kernels.py` measures: inputs at the model's shapes, rivals, and what each must move.

Each rival computes the same as the public function: ``eager`` is the chain as public reference code has it, ``library``
the best form that PyTorch's own kernels give. Sizes come in two scales: ``model`` as in the 1b presets, ``small`` for a
CPU in a continuous-integration machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.axial_rope import axial_rope_tables
from medvl_sam2.kernels.float8_linear import FLOAT8, float8_linear
from medvl_sam2.kernels.layer_norm import layer_norm, layer_norm_2d
from medvl_sam2.kernels.lora_linear import lora_linear
from medvl_sam2.kernels.mask_encoding import mask_encoder_front
from medvl_sam2.kernels.mask_epilogue import mask_epilogue
from medvl_sam2.kernels.memory_attention import Projections, absorb_values, memory_attention
from medvl_sam2.kernels.mixer import mixer_layer
from medvl_sam2.kernels.patch_embed3d import patch_embed3d
from medvl_sam2.kernels.segmentation_loss import segmentation_loss, segmentation_loss_reference
from medvl_sam2.kernels.volume_ingest import ingest_volume
from medvl_sam2.kernels.window_attention import window_attention

WINDOW = (-1000.0, 1000.0)


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: Name, as the kernel file's.
        shape: The shape in words, for the table.
        inputs: What the rivals are called with.
        ours: The public function.
        eager: The chain that reference code has.
        flops: Floating-point operations of the products that cannot be avoided.
        bytes: Inputs and outputs, each moved once.
        library: The best form in PyTorch's own kernels, where that is another than `eager`.
        trained: Positions of the inputs to differentiate in mode "full"; empty where only the forward is of interest.
    """

    operation: str
    shape: str
    inputs: tuple[Any, ...]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    flops: float
    bytes: float
    library: Callable[..., Any] | None = None
    trained: tuple[int, ...] = ()


def _size(*tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _scan(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(-1024, 2000, shape, dtype=torch.int16, device=device)


def _volume_ingest(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    native, grid = ((60, 128, 128), (16, 64, 64)) if small else ((300, 512, 512), (32, 256, 256))
    scan = _scan(native, device)

    def eager(scan: Tensor) -> Tensor:
        x = (scan.to(torch.float32).clamp(*WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
        return F.interpolate(x[None, None], size=grid, mode="trilinear", align_corners=False)[0, 0]

    voxels = grid[0] * grid[1] * grid[2]
    taps = min(scan.numel(), 8 * voxels)
    ours = lambda scan: ingest_volume(scan, grid, window=WINDOW)  # noqa: E731
    return [Case("volume_ingest", f"{native} to {grid}", (scan,), ours, eager, 16.0 * voxels, 2 * taps + 4 * voxels)]


def _patch_embed3d(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    grid, width = ((8, 64, 64), 96) if small else ((32, 256, 256), 768)
    tokens = grid[0] // 4 * (grid[1] // 16) * (grid[2] // 16)
    draw = {"device": device, "dtype": dtype}
    weights = torch.randn(width, 1024, **draw) / 32, torch.randn(width, **draw), torch.randn(tokens, width, **draw)

    def scaled(scan: Tensor, like: Tensor) -> Tensor:
        return ((scan.to(torch.float32).clamp(*WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0])).to(like.dtype)

    def eager(scan: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
        x = scaled(scan, weight).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).unflatten(1, (-1, 4))
        return F.linear(x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3), weight, bias) + position

    def library(scan: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
        kernel = weight.view(-1, 1, 4, 16, 16)
        x = F.conv3d(scaled(scan, weight)[:, None], kernel, bias, stride=(4, 16, 16))
        return x.flatten(2).mT + position

    ours = lambda scan, *weights: patch_embed3d(scan, *weights, window=WINDOW)  # noqa: E731
    cases = []
    for batch in (1,) if small else (1, 8):
        inputs = (_scan((batch, *grid), device), *weights)
        flops = 2.0 * batch * tokens * 1024 * width
        moved = _size(*inputs) + batch * tokens * width * weights[0].element_size()
        name = f"{batch}x{grid} to {tokens}x{width}"
        cases.append(Case("patch_embed3d", name, inputs, ours, eager, flops, moved, library, trained=(1, 2, 3)))
    return cases


def _mixer(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    n, d, tokens, channels = (256, 96, 128, 64) if small else (2048, 768, 1024, 448)
    draw = {"device": device, "dtype": dtype}
    shapes = ((d,), (d,), (tokens, n), (tokens,), (tokens, tokens), (tokens,))
    shapes += ((d,), (d,), (channels, d), (channels,), (channels, channels), (channels,))
    weights = [torch.randn(shape, **draw) * shape[-1] ** -0.5 for shape in shapes]

    def eager(x: Tensor, *weights: Tensor) -> Tensor:
        g1, e1, w1, b1, w2, b2, g2, e2, v1, c1, v2, c2 = weights
        x = F.layer_norm(x, x.shape[-1:], g1, e1).transpose(1, 2)
        x = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2).transpose(1, 2)
        return F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], g2, e2), v1, c1)), v2, c2)

    cases = []
    for batch in (1,) if small else (1, 8):
        x = torch.randn(batch, n, d, **draw)
        flops = 2.0 * batch * (d * tokens * (n + tokens) + tokens * channels * (d + channels))
        moved = _size(x, *weights) + batch * tokens * channels * x.element_size()
        name = f"{batch}x{n}x{d} to {tokens}x{channels}"
        trained = tuple(range(1, 13))
        cases.append(Case("mixer", name, (x, *weights), mixer_layer, eager, flops, moved, trained=trained))
    return cases


def _memory_attention(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    side, slots, pointers = (16, 3, 16) if small else (64, 7, 64)
    channels, width = 256, 64
    draw = {"device": device, "dtype": dtype}
    tokens = side * side
    shapes = ((channels, channels), (channels,), (channels, width), (channels,))
    shapes += ((channels, width), (channels,), (channels, channels), (channels,))
    weights = [torch.randn(shape, **draw) * shape[-1] ** -0.5 for shape in shapes]
    cos, sin = axial_rope_tables(side, side, channels, device)

    def turn(x: Tensor, cos: Tensor, sin: Tensor, plain: int) -> Tensor:
        # As sam2's apply_rotary_enc: complex numbers of neighbouring channels, in float32.
        head, tail = x[:, : x.shape[1] - plain], x[:, x.shape[1] - plain :]
        pairs = torch.view_as_complex(head.float().unflatten(-1, (-1, 2)))
        table = torch.complex(cos.float(), sin.float()).repeat(head.shape[1] // cos.shape[0], 1)
        return torch.cat((torch.view_as_real(pairs * table).flatten(2).to(x.dtype), tail), 1)

    def queries_keys(query: Tensor, memory: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, w: tuple) -> tuple:
        q = turn(F.linear(query, w[0], w[1]), cos, sin, 0)
        return q, turn(F.linear(memory + pos, w[2], w[3]), cos, sin, pointers)

    def eager(query: Tensor, memory: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, *w: Tensor) -> Tensor:
        q, k = queries_keys(query, memory, pos, cos, sin, w)
        v = F.linear(memory, w[4], w[5])
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return F.linear(out, w[6], w[7])

    def library(query: Tensor, memory: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, *w: Tensor) -> Tensor:
        q, k = queries_keys(query, memory, pos, cos, sin, w)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], memory[:, None])[:, 0]
        return F.linear(out, *absorb_values(Projections(*w)))

    def ours(query: Tensor, memory: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, *w: Tensor) -> Tensor:
        return memory_attention(query, memory, pos, Projections(*w), (cos, sin), num_pointer_tokens=pointers)

    cases = []
    for batch in (1,) if small else (1, 8):
        keys = slots * tokens + pointers
        query = torch.randn(batch, tokens, channels, **draw)
        memory, pos = (torch.randn(batch, keys, width, **draw) for _ in range(2))
        products = tokens * channels * (channels + width) + keys * width * channels
        flops = 2.0 * batch * (products + tokens * keys * (channels + width))
        moved = 2 * _size(query) + _size(memory, pos, *weights)
        inputs = (query, memory, pos, cos, sin, *weights)
        name = f"{batch} objects, {tokens} queries, {keys} keys"
        cases.append(Case("memory_attention", name, inputs, ours, eager, flops, moved, library))
    return cases


def _window_attention(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    # Stages of SAM2 tiny at 1024 pixels: side of the map, heads of 96 channels, window.
    settings = ((28, 2, 14),) if small else ((256, 1, 8), (128, 2, 4), (64, 4, 14))
    cases = []
    for side, heads, window in settings:
        channels = 96 * heads
        batch = 1 if small else 8
        qkv = torch.randn(batch, side, side, 3 * channels, device=device, dtype=dtype)

        def eager(qkv: Tensor, heads: int = heads, window: int = window) -> Tensor:
            # As sam2's window_partition, MultiScaleAttention and window_unpartition.
            b, h, w, _ = qkv.shape
            x = F.pad(qkv, (0, 0, 0, -w % window, 0, -h % window))
            rows, columns = x.shape[1] // window, x.shape[2] // window
            x = x.view(b, rows, window, columns, window, -1).permute(0, 1, 3, 2, 4, 5)
            x = x.reshape(b * rows * columns, window * window, 3, heads, -1)
            q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = x.reshape(b, rows, columns, window, window, -1).permute(0, 1, 3, 2, 4, 5)
            return x.reshape(b, rows * window, columns * window, -1)[:, :h, :w].contiguous()

        ours = lambda qkv, heads=heads, window=window: window_attention(qkv, heads, window)  # noqa: E731
        flops = 4.0 * batch * side * side * window * window * channels
        name = f"{batch}x{side}x{side}, {heads} heads of 96, window {window}"
        cases.append(Case("window_attention", name, (qkv,), ours, eager, flops, _size(qkv) * 4 / 3))
    return cases


def _layer_norm(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    rows, width, side = (257, 96, 16) if small else (2049, 768, 64)
    draw = {"device": device, "dtype": dtype}
    x, residual = torch.randn(1, rows, width, **draw), torch.randn(1, rows, width, **draw)
    weight, bias = torch.randn(width, **draw), torch.randn(width, **draw)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(x + residual, x.shape[-1:], weight, bias)

    def eager_2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        deviation = (x - mean).pow(2).mean(1, keepdim=True)
        return weight[:, None, None] * ((x - mean) / torch.sqrt(deviation + 1e-6)) + bias[:, None, None]

    ours = lambda x, weight, bias, residual: layer_norm(x, weight, bias, residual=residual)[0]  # noqa: E731
    rows_case = Case(
        "layer_norm",
        f"{rows}x{width} with residual",
        (x, weight, bias, residual),
        ours,
        eager,
        0.0,
        4 * _size(x),
        trained=(0, 1, 2, 3),
    )
    image = torch.randn(1, 256, side, side, **draw)
    inputs = (image, torch.randn(256, **draw), torch.randn(256, **draw))
    name = f"map 256x{side}x{side}"
    moved = 2 * _size(image)
    return [rows_case, Case("layer_norm", name, inputs, layer_norm_2d, eager_2d, 0.0, moved, trained=(0, 1, 2))]


def _mask_encoding(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    low, size = (32, 128) if small else (256, 1024)
    draw = {"device": device, "dtype": dtype}
    shapes = ((4, 1, 3, 3), (4,), (4,), (4,), (16, 4, 3, 3), (16,), (16,), (16,))
    weights = [torch.randn(shape, **draw) * 0.3 for shape in shapes]

    def eager(logits: Tensor, *w: Tensor) -> Tensor:
        x = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
        x = (torch.sigmoid(x) * 20.0 + -10.0).to(w[0].dtype)
        for conv, bias, norm, offset in (w[:4], w[4:]):
            x = F.conv2d(x, conv, bias, stride=2, padding=1)
            mean = x.mean(1, keepdim=True)
            deviation = (x - mean).pow(2).mean(1, keepdim=True)
            x = F.gelu(norm[:, None, None] * ((x - mean) / torch.sqrt(deviation + 1e-6)) + offset[:, None, None])
        return x

    ours = lambda logits, *w: mask_encoder_front(logits, (size, size), *w)  # noqa: E731
    cases = []
    for objects in (1,) if small else (1, 8):
        logits = torch.randn(objects, 1, low, low, device=device) * 4
        flops = 2.0 * objects * ((size // 2) ** 2 * 36 + (size // 4) ** 2 * 576)
        moved = _size(logits, *weights) + objects * 16 * (size // 4) ** 2 * weights[0].element_size()
        inputs = (logits, *weights)
        cases.append(Case("mask_encoding", f"{objects} objects, {low} to {size}", inputs, ours, eager, flops, moved))
    return cases


def _mask_epilogue(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    slices, low, native = (8, 32, (30, 64, 64)) if small else (32, 256, (300, 512, 512))

    def eager(logits: Tensor) -> Tensor:
        x = F.interpolate(logits.transpose(0, 1)[None], size=native, mode="trilinear", align_corners=False)[0]
        best, label = x.max(0)
        return torch.where(best > 0, label + 1, 0).to(torch.uint8)

    ours = lambda logits: mask_epilogue(logits, native)  # noqa: E731
    voxels = native[0] * native[1] * native[2]
    cases = []
    for objects in (2,) if small else (1, 8):
        coarse = torch.randn(1, objects, 4, 4, 4, device=device) - 0.5
        logits = F.interpolate(coarse, size=(slices, low, low), mode="trilinear")[0].transpose(0, 1).to(dtype)
        name = f"{objects} objects, {slices}x{low}x{low} to {native}"
        moved = voxels + _size(logits)
        cases.append(Case("mask_epilogue", name, (logits,), ours, eager, 0.0, moved))
    return cases


def _lora_linear(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    batch, length, k, o, rank, adapters = (4, 16, 128, 96, 8, 3) if small else (8, 600, 896, 4864, 128, 4)
    draw = {"device": device, "dtype": dtype}
    x = torch.randn(batch, length, k, **draw)
    weight, bias = torch.randn(o, k, **draw) * k**-0.5, torch.randn(o, **draw)
    a, b = torch.randn(adapters, rank, k, **draw) * k**-0.5, torch.randn(adapters, o, rank, **draw) * rank**-0.5
    index = torch.arange(batch, device=device) % (adapters + 1) - 1

    def eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        # As PEFT's mixed batches: each adapter on its rows, one after the other.
        y = F.linear(x, weight, bias)
        for adapter in range(len(a)):
            rows = (index == adapter).nonzero()[:, 0]
            y = y.index_add(0, rows, F.linear(F.linear(x[rows], a[adapter]), b[adapter]) * 2.0)
        return y

    ours = lambda x, weight, bias, a, b, index: lora_linear(x, weight, bias, a, b, 2.0, index)  # noqa: E731
    rows = batch * length
    flops = 2.0 * rows * (k * o + rank * (k + o))
    moved = _size(x, weight, bias, a, b) + rows * o * x.element_size()
    name = f"{rows} rows, {k} to {o}, {adapters} adapters of rank {rank}"
    return [Case("lora_linear", name, (x, weight, bias, a, b, index), ours, eager, flops, moved, trained=(0, 3, 4))]


def _segmentation_loss(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    cases = []
    for objects, side in ((5, 128),) if small else ((5, 256), (25, 256)):
        logits = torch.randn(objects, side, side, device=device, dtype=dtype) * 4
        inputs = (logits, torch.rand(objects, side, side, device=device) > 0.7)
        ours = lambda logits, wanted: sum(segmentation_loss(logits, wanted))  # noqa: E731
        eager = lambda logits, wanted: sum(segmentation_loss_reference(logits, wanted))  # noqa: E731
        name = f"{objects} objects of {side}x{side}"
        cases.append(Case("segmentation_loss", name, inputs, ours, eager, 0.0, _size(*inputs), trained=(0,)))
    return cases


def _attention(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    heads, tokens = (4, 257) if small else (12, 2049)
    q, k, v = (torch.randn(1, heads, tokens, 64, device=device, dtype=dtype) for _ in range(3))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # As MONAI's SABlock.
        return torch.softmax(q @ k.transpose(-2, -1) * 0.125, -1) @ v

    flops = 4.0 * heads * tokens * tokens * 64
    name = f"{heads} heads, {tokens} tokens"
    library = F.scaled_dot_product_attention
    return [Case("attention", name, (q, k, v), attention, eager, flops, 4 * _size(q), library, trained=(0, 1, 2))]


def _float8_linear(small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    cases = []
    for rows, k, n in ((1, 128, 96), (64, 128, 96)) if small else ((1, 896, 4864), (8, 896, 4864), (32_768, 576, 2304)):
        # Values that float8 holds exactly with scales of a power of two: a bfloat16 layer must then give the same.
        x, weight = (torch.randn(size, device=device).to(FLOAT8).to(dtype) for size in ((rows, k), (n, k)))
        x[:, 0], weight[:, 0] = 448, 448
        exponents = torch.randint(-12, -8, (n,), device=device)
        scale, bias = torch.exp2(exponents.float()), torch.randn(n, device=device, dtype=dtype)
        wide = weight * scale[:, None].to(dtype)
        ours = lambda x, weight, scale, bias, wide: float8_linear(x, weight, scale, bias)  # noqa: E731
        eager = lambda x, weight, scale, bias, wide: F.linear(x, wide, bias)  # noqa: E731
        inputs = (x, weight.to(FLOAT8), scale, bias, wide)
        moved = _size(*inputs[:4]) + rows * n * x.element_size()
        name = f"{rows} rows, {k} to {n}"
        cases.append(Case("float8_linear", name, inputs, ours, eager, 2.0 * rows * k * n, moved))
    return cases


OPERATIONS = {
    "volume_ingest": _volume_ingest,
    "patch_embed3d": _patch_embed3d,
    "mixer": _mixer,
    "memory_attention": _memory_attention,
    "window_attention": _window_attention,
    "layer_norm": _layer_norm,
    "mask_encoding": _mask_encoding,
    "mask_epilogue": _mask_epilogue,
    "lora_linear": _lora_linear,
    "float8_linear": _float8_linear,
    "segmentation_loss": _segmentation_loss,
    "attention": _attention,
}


def chosen(operations: Sequence[str] | None) -> Sequence[str]:
    """The operations asked for; all of them for None.

    Raises:
        ValueError: There is no such operation.
    """
    if unknown := [name for name in operations or () if name not in OPERATIONS]:
        raise ValueError(f"bench kernels: expected an operation of {', '.join(OPERATIONS)}, got {unknown[0]!r}")
    return operations or tuple(OPERATIONS)


def cases(operation: str, *, small: bool, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Make the cases of one of `OPERATIONS`, with fresh random inputs."""
    return OPERATIONS[operation](small, device, dtype)
