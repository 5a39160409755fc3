"""Dense attention for the ViT, SAM2 and the decoders: flash-attn, xformers and PyTorch's SDPA behind one function.

    out = softmax(scale * q k^T) v          q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv) -> (B, H, N, Dv)

Dense attention at head dims 64-128 is where the libraries are at their best, so there is no kernel of our own here:
one choice, one place to make it, and one place to ask what was chosen (`attention_status`). The choice comes from, in
this order, the `backend` argument, the switch that every operation has (off: SDPA), the `use_attention_backend` context
manager, the variable `MEDVL_SAM2_ATTENTION`, and `auto` (on CUDA the first of flash, xformers, SDPA that is installed
and takes the inputs; on the CPU SDPA, except for small problems in bf16, which matrix products with a softmax between
train several times faster; SDPA elsewhere). A backend that cannot take the inputs gives way to SDPA, which is told once
per reason through `logging`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl_sam2.kernels._common import DISABLE_VARIABLE, is_disabled, match_autocast, register_operation
from medvl_sam2.kernels.linear import is_fast, product

logger = logging.getLogger(__name__)

# Below these scores per head a batched product is as fast.
_PRODUCTS_ONE_BY_ONE = 128 * 128
_HELD_SCORES = 2 << 20
BACKENDS = ("auto", "flash", "xformers", "sdpa", "matmul")
ENVIRONMENT_VARIABLE = "MEDVL_SAM2_ATTENTION"

# Head dims that flash-attn 4's CuTe kernels list for Hopper and Blackwell alike.
_CUTE_HEAD_DIMS = (64, 96, 128)
# Scores per head up to which matrix products beat SDPA on the CPU in bf16 (forward and backward, torch 2.13). Beyond,
# the score matrix leaves the cache.
_MATMUL_SCORES = 2**19

_override: str | None = None
_told: set[str] = set()
_uses: dict[str, int] = {}


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """Attention in plain fp32 arithmetic with the whole score matrix, cast back to the dtype of `v`.

    Args:
        q: (B, H, N, D). k: (B, H, M, D). v: (B, H, M, Dv).
        scale: factor on the scores, 1/sqrt(D) by default.
        causal: hide keys with an index above the query's; needs N == M.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(q.float(), k.float().transpose(-2, -1)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.matmul(scores.softmax(-1), v.float()).to(v.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention through the fastest backend that takes the inputs.

    Args:
        q: (B, H, N, D). k: (B, H, M, D). v: (B, H, M, Dv); Dv may differ from D (SDPA and xformers only).
        scale: factor on the scores, 1/sqrt(D) by default.
        causal: hide keys with an index above the query's. Needs N == M, because the libraries align other shapes
            differently (flash-attn to the last key, SDPA and xformers to the first).
        dropout: share of the attention weights that is dropped.
        backend: "auto", "flash" (flash-attn 2, or flash-attn 4's CuTe interface), "xformers", "sdpa" or "matmul".

    Returns:
        (B, H, N, Dv) in the dtype of `v`.

    Raises:
        ValueError: a shape, dtype or device that disagrees between the inputs, or an unknown backend name.
    """
    q, k, v = match_autocast(q, k, v)
    _check_inputs(q, k, v, causal)
    wanted = requested_backend(backend)
    if wanted == "auto" and (causal or dropout) and q.device.type == "cpu" and q.dtype == torch.float32:
        wanted = "sdpa"
    # flash-attn 4's interface has no dropout.
    chosen = _choose("sdpa" if dropout and wanted in ("auto", "flash") and q.is_cuda else wanted, q, k, v)
    if not torch.compiler.is_compiling():
        _uses[chosen] = _uses.get(chosen, 0) + 1
    if chosen == "flash":
        return _run_flash(q, k, v, scale, causal)
    if chosen == "xformers":
        return _run_xformers(q, k, v, scale, causal, dropout)
    if chosen == "matmul":
        return _run_matmul(q, k, v, scale, causal, dropout)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, dropout_p=dropout)


def requested_backend(backend: str = "auto") -> str:
    """The backend that argument, switch, context manager and environment ask for together, in that precedence.

    Raises:
        ValueError: a name that is not one of `BACKENDS`, with the place it came from.
    """
    if backend != "auto":
        return _known(backend, "backend")
    if is_disabled("attention"):
        return "sdpa"
    if _override is not None:
        return _override
    return _known(os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto", ENVIRONMENT_VARIABLE)


@contextmanager
def use_attention_backend(backend: str) -> Iterator[None]:
    """Ask for one backend in a block, over the environment variable; an explicit `backend=` argument still wins.

    The setting is the process's, not the thread's.
    """
    global _override
    before, _override = _override, _known(backend, "backend")
    try:
        yield
    finally:
        _override = before


def attention_status(device: str | torch.device = "cuda") -> dict[str, Any]:
    """What is installed, what is asked for, and what fp16/bf16 attention would run on a device, and why.

    Returns:
        `setting` (the name asked for), `source` (the switch, "context", the variable's name or "default"),
        `installed` (backend -> version text or None), `device`, `used` (the backend), `why` (one sentence),
        `calls` (backend -> number of calls so far in this process).
    """
    device = torch.device(device)
    setting = requested_backend()
    if is_disabled("attention"):
        source = f"{DISABLE_VARIABLE} or disable()"
    elif _override is not None:
        source = "context"
    else:
        source = ENVIRONMENT_VARIABLE if os.environ.get(ENVIRONMENT_VARIABLE) else "default"
    probe = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="meta")
    reasons = {name: _unsupported(name, device.type, probe, probe, probe) for name in _candidates(setting, device.type)}
    used = next(name for name, reason in reasons.items() if reason is None)
    passed_over = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    why = "; ".join(passed_over) if passed_over else ("asked for" if setting == used else "first choice on this device")
    return {
        "setting": setting,
        "source": source,
        "installed": {"flash": _version("flash"), "xformers": _version("xformers"), "sdpa": torch.__version__},
        "device": device.type,
        "used": used,
        "why": why,
        "calls": dict(_uses),
    }


def _describe() -> tuple[str, str]:
    status = attention_status("cuda" if torch.cuda.is_available() else "cpu")
    return status["used"], "switched off" if is_disabled("attention") else status["why"]


register_operation("attention", _describe)


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected (B, H, N, D), got {tuple(x.shape)}; add the missing axes")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}; cast it")
    if k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected (B, H, M, D) to match q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected (B, H, M, Dv) to match k {tuple(k.shape)}, got {tuple(v.shape)}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal: expected as many keys as queries, got {k.shape[2]} and {q.shape[2]}; pass a slice")


def _candidates(wanted: str, device_type: str) -> tuple[str, ...]:
    if wanted == "auto":
        return ("flash", "xformers", "sdpa") if device_type == "cuda" else ("matmul", "sdpa")
    return ("sdpa",) if wanted == "sdpa" else (wanted, "sdpa")


def _choose(wanted: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    for name in _candidates(wanted, q.device.type):
        reason = _unsupported(name, q.device.type, q, k, v)
        if reason is None:
            return name
        # Under `auto` a package that is not there is the normal case, not news; nor are inputs that SDPA does better.
        if wanted != "auto" or (reason != "not installed" and name != "matmul"):
            _tell_once(f"attention: {name} gives way ({reason})")
    raise AssertionError("SDPA takes every input")


def _unsupported(name: str, device_type: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a backend cannot take these inputs, or None if it can; the package's own documented limits."""
    if name == "sdpa":
        return None
    if name == "matmul":
        scores = q.shape[2] * k.shape[2]
        if scores >= _PRODUCTS_ONE_BY_ONE and is_fast(q, k, v):
            return None
        if device_type != "cpu" or q.dtype != torch.bfloat16:
            return f"pays on the CPU in bf16 and with many fp32 scores, got {device_type} and {q.dtype}"
        return None if scores <= _MATMUL_SCORES else f"pays up to {_MATMUL_SCORES} scores per head, got {scores}"
    function, flavour = _load(name)
    if function is None:
        return "not installed"
    if device_type != "cuda":
        return f"needs CUDA, got {device_type}"
    width, value_width = q.shape[-1], v.shape[-1]
    if 0 in (q.numel(), k.numel(), v.numel()):
        return "empty input"
    if name == "xformers":
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"takes fp16, bf16 and fp32, got {q.dtype}"
        return None if width % 8 == 0 and value_width % 8 == 0 else f"head dim {width} is no multiple of 8"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, got {q.dtype}"
    if value_width != width:
        return f"needs values as wide as keys ({width}), got {value_width}"
    if flavour == "cute":
        return None if width in _CUTE_HEAD_DIMS else f"takes head dims {_CUTE_HEAD_DIMS}, got {width}"
    return None if width <= 256 else f"takes head dims up to 256, got {width}"


@functools.cache
def _load(name: str) -> tuple[Callable[..., Any] | None, str]:
    """The package's function and its flavour; a broken install counts as missing, said once."""
    places = {
        "flash": (("flash_attn", "flash_attn_func", "fa2"), ("flash_attn.cute", "flash_attn_func", "cute")),
        "xformers": (("xformers.ops", "memory_efficient_attention", "xformers"),),
    }[name]
    for module_name, attribute, flavour in places:
        try:
            # flash-attn 4 alone leaves `flash_attn` a namespace package, so the attribute decides, not the import.
            function = getattr(importlib.import_module(module_name), attribute, None)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            _tell_once(f"attention: {module_name} is installed but does not load: {error}")
            continue
        if function is not None:
            return function, flavour
    return None, "none"


def _version(name: str) -> str | None:
    function, flavour = _load(name)
    if function is None:
        return None
    module = importlib.import_module({"fa2": "flash_attn", "cute": "flash_attn.cute", "xformers": "xformers"}[flavour])
    version = getattr(module, "__version__", "unknown version")
    return f"{version} (CuTe)" if flavour == "cute" else version


def _run_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    function, _ = _load("flash")
    assert function is not None
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=causal)
    # flash-attn 4 returns (out, log-sum-exp), flash-attn 2 the output alone.
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2)


def _run_matmul(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, dropout: float) -> Tensor:
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if not causal and not dropout and q.shape[2] * k.shape[2] >= _PRODUCTS_ONE_BY_ONE and is_fast(q, k, v):
        # Part of one head at a time, its scores stay in the cache, and oneDNN takes the products.
        rows = max(64, _HELD_SCORES // k.shape[2])
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for head, b, c, target in zip(*(x.flatten(0, 1) for x in (q, k, v, out))):
            b, c = b.contiguous(), c.mT.contiguous()
            for a, part in zip(head.split(rows), target.split(rows)):
                part.copy_(product(product(a, b).softmax(-1), c))
        return out
    scores = torch.matmul(q, k.transpose(-2, -1))
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v)


def _run_xformers(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, dropout: float) -> Tensor:
    function, _ = _load("xformers")
    assert function is not None
    bias = importlib.import_module("xformers.ops").LowerTriangularMask() if causal else None
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias, p=dropout, scale=scale)
    return out.transpose(1, 2)


def _tell_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _told:
        return
    _told.add(message)
    logger.warning(message)
