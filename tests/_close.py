"""Comparisons that say how far off, and where.

* `assert_close`: elementwise, with a tolerance per dtype;
* `assert_no_worse`: for attention and fused chains in low precision, where plain torch in the same dtype is the
  yardstick: ``err(ours, fp32) <= 2 * err(plain, fp32) + atol``;
* `assert_rms_close`: for gradients, the ratio of root mean squares.
"""

import torch

TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (2e-2, 2e-2),
}
RMS_RATIO = {torch.float64: 1e-8, torch.float32: 0.0005, torch.float16: 0.006, torch.bfloat16: 0.01}


def _describe(got: torch.Tensor, want: torch.Tensor) -> str:
    error = (got.double() - want.double()).abs()
    error = torch.where(error.isnan(), torch.inf, error)
    flat = int(error.argmax())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    return (
        f"max error {error.max():.3e}, mean {error.mean():.3e}, worst at {worst}: "
        f"got {got.flatten()[flat]:.8g}, want {want.flatten()[flat]:.8g}"
    )


def assert_close(
    got: torch.Tensor, want: torch.Tensor, *, dtype: torch.dtype | None = None, rtol: float = -1, atol: float = -1
) -> None:
    """Hold ``|got - want| <= atol + rtol * |want|`` for every element; the tolerance is that of `dtype` (got's)."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if not got.numel():
        return
    default = TOLERANCE.get(dtype or got.dtype, (0.0, 0.0))
    rtol, atol = (rtol if rtol >= 0 else default[0]), (atol if atol >= 0 else default[1])
    ok = (got.double() - want.double()).abs() <= atol + rtol * want.double().abs()
    assert bool(ok.all()), f"{int((~ok).sum())} of {ok.numel()} off (rtol {rtol}, atol {atol}): {_describe(got, want)}"


def assert_no_worse(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, *, atol: float = 1e-5) -> None:
    """Hold the largest error of `got` to twice that of `plain` (same dtype, plain torch), both against `exact`."""
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, want {tuple(exact.shape)}"
    if not got.numel():
        return
    assert bool(torch.isfinite(got).all()), "not finite"
    allowed = 2 * float((plain.double() - exact.double()).abs().max()) + atol
    assert float((got.double() - exact.double()).abs().max()) <= allowed, (
        f"allowed {allowed:.3e}: {_describe(got, exact)}"
    )


def assert_rms_close(got: torch.Tensor, want: torch.Tensor, *, ratio: float | None = None, floor: float = 1e-6) -> None:
    """Hold ``rms(got - want) < ratio * rms(want)``, or below `floor` where the wanted values are about nothing."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if not got.numel():
        return
    ratio = RMS_RATIO[got.dtype] if ratio is None else ratio
    error = float((got.double() - want.double()).square().mean().sqrt())
    scale = float(want.double().square().mean().sqrt())
    assert error < max(ratio * scale, floor), f"rms error {error:.3e} of rms {scale:.3e}: {_describe(got, want)}"
