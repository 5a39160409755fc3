"""Dense attention: SDPA against fp64 arithmetic, the packages against fakes with their documented signatures."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from medvl_sam2.kernels import attention as module
from medvl_sam2.kernels._common import disable, op_status
from medvl_sam2.kernels.attention import attention, attention_reference, attention_status, use_attention_backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """No remembered package, message or count, and no setting from outside."""
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    module._load.cache_clear()
    module._told.clear()
    module._uses.clear()
    yield
    module._load.cache_clear()


def inputs(b=2, h=3, n=7, m=11, d=8, dv=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(42)
    shapes = ((b, h, n, d), (b, h, m, d), (b, h, m, dv))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def double_oracle(q, k, v, scale=None, causal=False):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) * scale
    if causal:
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        scores = torch.where(column <= row, scores, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v.double())


class Recorder:
    """Stands for one package's function: (B, N, H, D) in, the package's own keyword names, fp64 arithmetic inside."""

    def __init__(self, returns_lse: bool = False):
        self.calls: list[dict] = []
        self.returns_lse = returns_lse

    def flash(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return self._run(q, k, v, softmax_scale, causal)

    def cute(self, q, k, v, qv=None, softmax_scale=None, causal=False):
        return self._run(q, k, v, softmax_scale, causal)

    def xformers(self, query, key, value, attn_bias=None, p=0.0, scale=None):
        return self._run(query, key, value, scale, attn_bias is not None)

    def _run(self, q, k, v, scale, causal):
        self.calls.append({"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape), "causal": causal})
        out = double_oracle(*(x.transpose(1, 2) for x in (q, k, v)), scale, causal).transpose(1, 2).to(q.dtype)
        return (out, out.new_zeros(1)) if self.returns_lse else out


def install_fake(monkeypatch: pytest.MonkeyPatch, flavour: str) -> Recorder:
    recorder = Recorder(returns_lse=flavour == "cute")
    for name in ("flash_attn", "flash_attn.cute", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    if flavour == "xformers":
        ops = types.ModuleType("xformers.ops")
        ops.memory_efficient_attention = recorder.xformers
        ops.LowerTriangularMask = lambda: "lower triangle"
        package = types.ModuleType("xformers")
        package.ops, package.__version__ = ops, "0.0.99"
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    else:
        package = types.ModuleType("flash_attn")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        if flavour == "flash":
            package.flash_attn_func, package.__version__ = recorder.flash, "2.8.3"
        else:
            cute = types.ModuleType("flash_attn.cute")
            cute.flash_attn_func, cute.__version__ = recorder.cute, "4.0.0"
            monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    return recorder


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for CUDA ones in the choice alone; the fakes then compute on the CPU."""
    unsupported, candidates = module._unsupported, module._candidates
    monkeypatch.setattr(module, "_unsupported", lambda name, _, q, k, v: unsupported(name, "cuda", q, k, v))
    monkeypatch.setattr(module, "_candidates", lambda wanted, _: candidates(wanted, "cuda"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_and_reference_equal_double_arithmetic(causal, scale):
    q, k, v = inputs(m=7, dv=5)
    expected = double_oracle(q, k, v, scale, causal)
    grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for function in (attention, attention_reference):
        out = function(q, k, v, scale=scale, causal=causal)
        assert out.shape == (2, 3, 7, 5)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flavour", ["flash", "cute", "xformers"])
@pytest.mark.parametrize("causal", [False, True])
def test_package_gets_its_own_layout_and_gives_the_right_answer(monkeypatch, flavour, causal):
    recorder = install_fake(monkeypatch, flavour)
    pretend_cuda(monkeypatch)
    m = 7 if causal else 11
    q, k, v = inputs(m=m, d=64, dv=64, dtype=torch.float16)
    out = attention(q, k, v, scale=0.2, causal=causal)
    assert recorder.calls == [{"q": (2, 7, 3, 64), "k": (2, m, 3, 64), "v": (2, m, 3, 64), "causal": causal}]
    torch.testing.assert_close(out.double(), double_oracle(q, k, v, 0.2, causal), rtol=2e-3, atol=2e-3)
    assert attention_status("cuda")["used"] == ("xformers" if flavour == "xformers" else "flash")


@pytest.mark.parametrize(
    ("flavour", "changes", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "takes fp16 and bf16"),
        ("flash", {"dv": 32}, "values as wide as keys"),
        ("flash", {"d": 264, "dv": 264}, "up to 256"),
        ("cute", {"d": 72, "dv": 72}, "takes head dims"),
        ("xformers", {"d": 20}, "no multiple of 8"),
        ("xformers", {"n": 0}, "empty input"),
    ],
)
def test_unsupported_input_falls_back_to_sdpa_and_says_so_once(monkeypatch, caplog, flavour, changes, reason):
    recorder = install_fake(monkeypatch, flavour)
    pretend_cuda(monkeypatch)
    q, k, v = inputs(**{"d": 64, "dv": 64, "dtype": torch.float16, **changes})
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        for _ in range(3):
            out = attention(q, k, v, backend="xformers" if flavour == "xformers" else "flash")
    assert recorder.calls == []
    assert [reason in record.message for record in caplog.records] == [True]
    torch.testing.assert_close(out.double(), double_oracle(q, k, v), rtol=2e-3, atol=2e-3)


def test_missing_package_is_silent_under_auto_and_said_when_asked_for(monkeypatch, caplog):
    for name in ("flash_attn", "flash_attn.cute", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    pretend_cuda(monkeypatch)
    tensors = inputs(dtype=torch.float16)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        attention(*tensors)
        assert not caplog.records
        attention(*tensors, backend="flash")
    assert "not installed" in caplog.text


def test_precedence_argument_context_environment(monkeypatch):
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "XFormers")
    assert module.requested_backend() == "xformers"
    with use_attention_backend("flash"):
        assert module.requested_backend() == "flash"
        assert attention_status("cpu")["source"] == "context"
        assert module.requested_backend("sdpa") == "sdpa"
    assert attention_status("cpu")["source"] == module.ENVIRONMENT_VARIABLE
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="MEDVL_SAM2_ATTENTION: expected one of"):
        attention(*inputs())
    with pytest.raises(ValueError, match="backend: expected one of"), use_attention_backend("cudnn"):
        pass


@pytest.mark.parametrize("causal", [False, True])
def test_small_bf16_on_the_cpu_goes_by_matrix_products(causal):
    q, k, v = inputs(n=16, m=16, d=32, dv=32, dtype=torch.bfloat16)
    expected = double_oracle(q, k, v, causal=causal)
    grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    results = {}
    for backend in ("auto", "sdpa"):
        out = attention(q, k, v, causal=causal, backend=backend)
        results[backend] = (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    assert attention_status("cpu")["calls"] == {"matmul": 1, "sdpa": 1}
    for ours, sdpa, exact in zip(results["auto"], results["sdpa"], (expected, *grads)):
        assert (ours - exact).abs().max() <= 2 * (sdpa - exact).abs().max() + 1e-2
    large = [x.detach()[:1, :1].repeat(1, 1, 64, 1) for x in (q, k, v)]
    assert module._choose("auto", *large) == "sdpa"


@pytest.mark.parametrize("suits", [True, False])
def test_many_float32_scores_on_the_cpu_go_to_the_library_that_suits_it(suits, monkeypatch):
    monkeypatch.setattr("medvl_sam2.kernels.linear._BLAS_SUITS", suits)
    monkeypatch.setattr(module, "_HELD_SCORES", 100 * 140)
    q, k, v = (x.detach() for x in inputs(n=150, m=140, d=24, dv=16))
    torch.testing.assert_close(attention(q, k, v).double(), double_oracle(q, k, v), rtol=1e-5, atol=1e-5)
    assert attention_status("cpu")["calls"] == {"sdpa" if suits else "matmul": 1}


def test_dropped_weights_are_scaled_up():
    q, k, v = (x.detach() for x in inputs(n=64, m=64, d=8, dv=8, dtype=torch.bfloat16))
    for backend in ("matmul", "sdpa"):
        torch.manual_seed(0)
        out = torch.stack([attention(q, k, v, dropout=0.5, backend=backend) for _ in range(300)]).float()
        assert out.std(0).mean() > 0.05
        # The mean of 300 draws lies within five standard errors nearly everywhere.
        error = (out.mean(0) - attention(q, k, v).float()).abs()
        assert (error < 5 * out.std(0) / 300**0.5 + 0.01).float().mean() > 0.99


def test_status_on_cpu_names_matrix_products_and_counts_calls():
    attention(*inputs())
    status = attention_status("cpu")
    assert (status["used"], status["calls"]) == ("matmul", {"sdpa": 1})
    assert status["installed"]["sdpa"] == torch.__version__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q: expected"),
        (lambda q, k, v: (q, k[..., :4], v), "k: expected"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "v: expected"),
        (lambda q, k, v: (q, k.half(), v), "k: expected torch.float32"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*inputs()))
    with pytest.raises(ValueError, match="causal: expected"):
        attention(*inputs(), causal=True)


def test_compiles_in_one_graph():
    tensors = inputs()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, scale=0.4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), attention(*tensors, scale=0.4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "xformers", "sdpa"])
def test_every_installed_backend_agrees_on_a_gpu(backend):
    if backend != "sdpa" and module._load(backend)[0] is None:
        pytest.skip(f"{backend} is not installed")
    q, k, v = (x.detach().cuda().bfloat16() for x in inputs(n=257, m=257, d=64, dv=64))
    out = attention(q, k, v, backend=backend)
    expected = double_oracle(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_the_switch_of_every_operation_leaves_sdpa():
    q = torch.randn(1, 2, 40, 16, dtype=torch.bfloat16)
    with disable("attention"):
        attention(q, q, q)
        status = attention_status("cpu")
        assert (status["used"], status["calls"]) == ("sdpa", {"sdpa": 1}) and "disable" in status["source"]
        assert next(s for s in op_status() if s.name == "attention").reason == "switched off"
    attention(q, q, q)
    assert attention_status("cpu")["calls"] == {"sdpa": 1, "matmul": 1}
