"""Measures the operations of `kernels/` beside plain PyTorch.

A row is one provider of one operation at one shape: ``ours`` (the public function; its path is Triton on CUDA, plain
torch elsewhere), ``eager`` (the chain of the public reference code), ``compile`` (that chain under `torch.compile`),
``library`` (PyTorch's best kernels). Every provider is held to the chain in higher precision first, on the inputs that
are timed; one that fails keeps its error and gets no ratio.

On CUDA a time is the median of `triton.testing.do_bench` (L2 flushed, launch included), and for launches below 50 us
also that of a graph's replay. On a CPU the providers take turns, so that other load meets all of them alike.
"""

import logging
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.bench.files import RESULTS, Row, append_csv
from medvl_sam2.bench.operations import Case, cases, chosen
from medvl_sam2.engine.info import cpu_name
from medvl_sam2.kernels._common import why_not_triton
from medvl_sam2.kernels._tuning import gpu_name
from medvl_sam2.kernels.attention import attention_status

logger = logging.getLogger(__name__)

PROVIDERS = ("ours", "eager", "compile", "library")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "full")
_GRAPH_BELOW_MS = 0.05
# Of what the baselines are made of; their columns came later, so they are the last.
PACKAGES = ("transformers", "peft", "sam2", "vllm")
ENVIRONMENT = ("gpu", "cpu", "threads", "torch", "triton", "version", "commit", "time", *PACKAGES)


def run(
    operations: Sequence[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    small: bool | None = None,
    seconds: float = 1.0,
) -> list[Row]:
    """Measure operations beside their rivals.

    Args:
        operations: Names as in `medvl_sam2.bench.operations.OPERATIONS`; all by default.
        device: The GPU where there is one, else the CPU.
        dtypes: Of ``"float32"``, ``"bfloat16"``, ``"float16"``; bfloat16 on CUDA and float32 on a CPU by default.
        modes: ``"forward"``, and ``"full"`` for forward and backward of the operations that training uses; both on
            CUDA by default, ``"forward"`` on a CPU.
        providers: Of `PROVIDERS`; on a CPU all but ``"compile"`` by default, whose first call takes many seconds.
        small: Small shapes instead of the model's; by default on a CPU.
        seconds: Time for one case on a CPU.

    Returns:
        One dict per provider and case, see `COLUMNS`.

    Raises:
        ValueError: An unknown operation, dtype, mode or provider.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = device.type == "cuda"
    dtypes = dtypes or (["bfloat16"] if on_cuda else ["float32"])
    modes = modes or (MODES if on_cuda else MODES[:1])
    providers = providers or (PROVIDERS if on_cuda else ("ours", "eager", "library"))
    for what, given, known in (("dtype", dtypes, DTYPES), ("mode", modes, MODES), ("provider", providers, PROVIDERS)):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"bench kernels: expected a {what} of {', '.join(known)}, got {', '.join(unknown)}")
    operations = chosen(operations)
    about, found = environment(device), []
    ceilings = {dtype: measure_ceilings(device, DTYPES[dtype]) for dtype in dtypes}
    for name, dtype in product(operations, dtypes):
        torch.manual_seed(42)
        for case in cases(name, small=not on_cuda if small is None else small, device=device, dtype=DTYPES[dtype]):
            for mode in modes:
                if mode == "full" and not case.trained:
                    continue
                measured = _measure(case, mode, providers, device, seconds)
                found += [{**row, "dtype": dtype, **_rates(row, *ceilings[dtype]), **about} for row in measured]
    return found


COLUMNS = (
    *("operation", "shape", "mode", "dtype", "provider", "path", "p50_ms", "p20_ms", "p80_ms", "graph_ms"),
    *("ratio_to_eager", "correct", "error", "allowed_error", "first_call_ms", "peak_mb", "gflop", "mbytes"),
    *("tflops", "tbytes", "floor_ms", "over_floor", "ceiling_tflops", "ceiling_tbytes"),
    *ENVIRONMENT,
)


def _measure(case: Case, mode: str, providers: Sequence[str], device: torch.device, seconds: float) -> list[Row]:
    exact = results(case.eager, case, mode, wide=True)
    runs, rows, yardstick = {}, [], [0.0] * len(exact)
    for provider in ("eager", *(p for p in providers if p != "eager")):
        function = _provider(case, provider, device)
        if function is None:
            continue
        row: Row = {"operation": case.operation, "shape": case.shape, "mode": mode, "provider": provider}
        row["path"] = _path(case.operation, device) if provider == "ours" else ""
        row |= {"gflop": case.flops / 1e9, "mbytes": case.bytes / 1e6}
        _synchronise(device)
        start = time.perf_counter()
        got = results(function, case, mode)
        _synchronise(device)
        row["first_call_ms"] = (time.perf_counter() - start) * 1e3
        errors = [difference(mine, true) for mine, true in zip(got, exact, strict=True)]
        if provider == "eager":
            yardstick = errors
        allowed = [2 * plain + _slack(true) for plain, true in zip(yardstick, exact)]
        worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i])
        row |= {"error": errors[worst], "allowed_error": allowed[worst], "correct": errors[worst] <= allowed[worst]}
        if provider in providers:
            runs[provider] = bind(function, case, mode)
            rows.append(row)
    timer = _time_on_cuda if device.type == "cuda" else _time_in_turns
    for row, times in zip(rows, timer([runs[row["provider"]] for row in rows], seconds)):
        row |= times
    base = next((row["p50_ms"] for row in rows if row["provider"] == "eager"), None)
    for row in rows:
        row["ratio_to_eager"] = base / row["p50_ms"] if base and row["correct"] else None
        if not row["correct"]:
            logger.warning("%s %s by %s is wrong: %s", case.operation, case.shape, row["provider"], row["error"])
    return rows


def _path(operation: str, device: torch.device) -> str:
    if operation == "attention":
        return attention_status(device)["used"]
    return "reference" if why_not_triton(operation, device) else "triton"


def _provider(case: Case, provider: str, device: torch.device) -> Callable[..., Any] | None:
    if provider == "compile":
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
        torch._dynamo.reset()
        return torch.compile(case.eager, dynamic=False, mode=mode)
    return {"ours": case.ours, "eager": case.eager, "library": case.library}[provider]


def bind(function: Callable[..., Any], case: Case, mode: str) -> Callable[[], Any]:
    """Bind the inputs; in mode "full" one call is a forward and a backward."""
    if mode == "forward":
        return torch.no_grad()(lambda: function(*case.inputs))
    inputs = [t.detach().requires_grad_() if i in case.trained else t for i, t in enumerate(case.inputs)]
    leaves = [inputs[i] for i in case.trained]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs).sum(), leaves)

    return both


def results(function: Callable[..., Any], case: Case, mode: str, *, wide: bool = False) -> list[Tensor]:
    """Run once and give what comes out: the output, or the gradients in mode "full"; in higher precision if `wide`."""
    inputs = tuple(_widen(x) for x in case.inputs) if wide else case.inputs
    found = bind(function, replace(case, inputs=inputs), mode)()
    return list(found) if isinstance(found, tuple) else [found]


def _widen(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.to(torch.float64 if x.dtype == torch.float32 else torch.float32)


def difference(got: Tensor, exact: Tensor) -> float:
    """Largest difference; for labels the share of voxels that differ. Not a number counts as infinite."""
    if not exact.is_floating_point():
        return float((got != exact).float().mean())
    error = float((got.to(exact.dtype) - exact).abs().max())
    return error if error == error else float("inf")


def _slack(exact: Tensor) -> float:
    return 1e-5 * float(exact.abs().max()) + 1e-12 if exact.is_floating_point() else 1e-4


def _time_in_turns(runs: Sequence[Callable[[], Any]], seconds: float) -> list[Row]:
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 200):
        for run_once, spent in zip(runs, times):
            start = time.perf_counter()
            run_once()
            spent.append((time.perf_counter() - start) * 1e3)
    found = []
    for spent in times:
        low, *_, high = statistics.quantiles(spent, n=5)
        found.append({"p50_ms": statistics.median(spent), "p20_ms": low, "p80_ms": high})
    return found


def _time_on_cuda(runs: Sequence[Callable[[], Any]], seconds: float) -> list[Row]:
    from triton.testing import do_bench, do_bench_cudagraph

    found = []
    for run_once in runs:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once()
        peak = torch.cuda.max_memory_allocated() - before
        p50, p20, p80 = do_bench(run_once, quantiles=(0.5, 0.2, 0.8))
        row = {"p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "peak_mb": peak / 1e6}
        if p50 < _GRAPH_BELOW_MS:
            try:
                row["graph_ms"] = do_bench_cudagraph(run_once, quantiles=(0.5,))
            # What a library refuses to capture is its own affair; the other time stands.
            except RuntimeError as error:
                logger.info("no graph: %s", error)
        found.append(row)
    return found


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure what the machine gives to a large product (FLOP/s) and to a copy (bytes/s, read and write counted)."""
    n, length = (8192, 1 << 29) if device.type == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = (lambda: a @ b, lambda: target.copy_(source))
    # What else runs on the machine only makes it look slower, so the fastest counts, not the median.
    timer = _time_on_cuda if device.type == "cuda" else _time_in_turns
    product_ms, copy_ms = (min(row["p20_ms"], row["p50_ms"]) for row in timer(runs, 0.2))
    return 2e3 * n**3 / product_ms, 2e3 * length / copy_ms


def _rates(row: Row, flops_ceiling: float, bytes_ceiling: float) -> Row:
    passes = 3 if row["mode"] == "full" else 1
    flops, moved, seconds = passes * row["gflop"] * 1e9, row["mbytes"] * 1e6, row["p50_ms"] / 1e3
    found: Row = {"ceiling_tflops": flops_ceiling / 1e12, "ceiling_tbytes": bytes_ceiling / 1e12}
    found |= {"tflops": flops / seconds / 1e12}
    if row["mode"] == "forward":
        floor = max(flops / flops_ceiling, moved / bytes_ceiling)
        found |= {"tbytes": moved / seconds / 1e12, "floor_ms": floor * 1e3, "over_floor": seconds / floor}
    return found


def environment(device: torch.device | str) -> Row:
    """Name what a time depends on: device, threads, versions, commit; keys as in `ENVIRONMENT`."""
    return {
        "gpu": gpu_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "version": _version("medvl-sam2") or "checkout",
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        # vLLM's CPU build has a name of its own.
        **{name: _version(name) or _version(f"{name}-cpu") for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """Commit of the running code, with a plus where files differ from it; empty outside a repository.

    Read once, to be called before anything is measured: the code in memory is that of the start, whatever is committed
    meanwhile. Results, which a benchmark itself writes, do not count as a difference.
    """
    folder = RESULTS.parent
    try:
        name = _git("-C", str(folder), "rev-parse", "--short", "HEAD")
        changed = _git(
            "-C", str(folder.parent), "status", "--porcelain", "-uno", "--", ".", f":!{folder.name}/{RESULTS.name}"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{name}+" if changed else name


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    return found.stdout.strip()


def write_csv(rows: Sequence[Row], path: Path | str | None = None) -> Path:
    """Append rows to a CSV file, ``bench/results/kernels.csv`` by default, and return its path."""
    return append_csv(rows, path or "kernels.csv", COLUMNS)


def table(rows: Sequence[Row]) -> str:
    """Lay rows out for reading: time, spread, ratio to eager, distance to the floor, and whether it was right."""
    lines = [
        f"{'operation':18} {'mode':8} {'provider':9} {'ms':>9} {'p20-p80':>17} {'x eager':>8} {'x floor':>8}  error"
    ]
    shape = None
    for row in rows:
        if (row["operation"], row["shape"], row["dtype"]) != shape:
            shape = (row["operation"], row["shape"], row["dtype"])
            lines.append(f"{row['operation']}: {row['shape']}, {row['dtype']}, {row['gpu']}")
        ratio = f"{row['ratio_to_eager']:.2f}" if row["ratio_to_eager"] else "-"
        floor = f"{row['over_floor']:.1f}" if "over_floor" in row else "-"
        spread = f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}"
        verdict = f"{row['error']:.1e}" if row["correct"] else f"WRONG {row['error']:.1e} > {row['allowed_error']:.1e}"
        named = f"{'':18} {row['mode']:8} {row['provider']:9}"
        lines.append(f"{named} {row['p50_ms']:9.3f} {spread:>17} {ratio:>8} {floor:>8}  {verdict}")
    return "\n".join(lines)
