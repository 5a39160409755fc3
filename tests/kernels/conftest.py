"""Fixtures of the kernel tests, and the way tests marked ``interpret`` run.

Triton decides at import whether it interprets, so a test marked ``interpret`` runs in a second pytest process with
``TRITON_INTERPRET=1``: one process per test file, whose outcomes are reported under the tests' own names.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).resolve().parent.parent
for _folder in (_TESTS, _TESTS / "kernels"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_outcomes: dict[Path, dict[str, tuple[str, str]]] = {}

if INTERPRETED:
    from triton.runtime import interpreter as _interpreter

    _patch_lang_tensor = _interpreter._patch_lang_tensor

    def _patch_lang_tensor_for_numpy(tensor, scope):
        # Triton 3.6 takes int() of a one-element array for loop bounds, which NumPy 2.4 no longer allows.
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    _interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy


def _run_interpreted(item: pytest.Function) -> dict[str, tuple[str, str]]:
    chosen = [i.nodeid for i in item.session.items if i.path == item.path and i.get_closest_marker("interpret")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        run = subprocess.run(command, cwd=item.config.rootpath, env=environment, capture_output=True, text=True)
        if not report.exists():
            return {"": ("failure", (run.stdout + run.stderr)[-4000:])}
        outcomes = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            text = "" if problem is None else f"{problem.get('message')}\n{problem.text}"
            outcomes[case.get("name", "")] = ("passed" if problem is None else problem.tag, text)
        return outcomes


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or pyfuncitem.get_closest_marker("interpret") is None:
        return None
    pytest.importorskip("triton")
    if pyfuncitem.path not in _outcomes:
        _outcomes[pyfuncitem.path] = _run_interpreted(pyfuncitem)
    outcomes = _outcomes[pyfuncitem.path]
    if "" in outcomes:
        pytest.fail(f"the interpreting process ended early: {outcomes[''][1]}", pytrace=False)
    outcome, text = outcomes.get(pyfuncitem.name, ("failure", "did not run"))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta" or not tensor.numel():
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty`, `torch.empty_like` and `Tensor.new_empty` give with NaN (integers: their maximum)."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _original=original, **o: _poison(_original(*a, **o)))
