"""`one_thread` keeps to the thread that asks for it, however many ask at once."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Any

import pytest
import torch

from medvl_sam2.kernels import volume_ingest as module
from medvl_sam2.kernels._common import one_thread
from medvl_sam2.kernels.mask_epilogue import mask_epilogue
from medvl_sam2.kernels.volume_ingest import ingest_volume

USUAL = 5


@pytest.fixture(autouse=True)
def usual_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(USUAL)
    yield
    torch.set_num_threads(before)


def fresh(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread begun for it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_it_holds_for_the_caller_alone_and_only_within():
    with one_thread():
        assert torch.get_num_threads() == 1
        assert fresh(torch.get_num_threads) == USUAL
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == fresh(torch.get_num_threads) == USUAL
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == fresh(torch.get_num_threads) == USUAL


def test_a_thread_that_leaves_last_does_not_leave_one_behind():
    # The second begins, and so first asks for its count, while the first is within; it leaves after it.
    within, left, seen = Event(), Event(), []

    def second() -> None:
        with one_thread():
            within.set()
            left.wait(60)
        seen.append(torch.get_num_threads())

    other = Thread(target=second)
    with one_thread():
        other.start()
        assert within.wait(60)
    left.set()
    other.join()
    assert seen == [USUAL]
    assert torch.get_num_threads() == fresh(torch.get_num_threads) == USUAL


def test_kernels_called_at_once_leave_the_count_of_later_threads(monkeypatch):
    monkeypatch.setattr(module, "_SHARED", 0)
    voxels = torch.randint(-1000, 1000, (12, 40, 40)).short()
    logits = torch.randn(3, 2, 16, 16)

    def work(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        masks = mask_epilogue(logits, (6, 40, 40))
        return masks, ingest_volume(voxels, (10, 24, 24))

    expected = fresh(lambda: work(0))
    for _ in range(60):
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(work, range(6)):
                assert all(map(torch.equal, found, expected))
        assert torch.get_num_threads() == fresh(torch.get_num_threads) == USUAL
