"""The log of a phase: what reaches Weights & Biases, and that nothing asks for it unasked."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch

from medvl_sam2.training.distributed import World
from medvl_sam2.training.log import Log


class Board:
    """Stands for a run of Weights & Biases."""

    def __init__(self):
        self.begun, self.logged, self.finished = None, [], False

    def init(self, **settings):
        self.begun = settings
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def write_two_rows(out, project: str) -> None:
    with Log(out, "stage1", 0, World(), project) as log:
        for step, losses in ((1, (2.0, 4.0)), (2, (1.0,))):
            for loss in losses:
                log.add({"loss": torch.tensor(loss)}, tokens=5)
            log.steps = 1
            log.write(step, 0.1)


def test_a_project_gets_the_rows_of_the_log(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=board.init))
    write_two_rows(tmp_path / "run", "ct")
    assert board.begun["project"] == "ct" and board.begun["name"] == "run/stage1" and board.finished
    assert [row["stage1/loss"] for row in board.logged] == [3.0, 1.0]
    assert all(row["stage1/tokens_per_second"] > 0 for row in board.logged)
    with open(tmp_path / "run" / "logs" / "stage1.csv") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [3.0, 1.0]


@pytest.mark.parametrize(("platform", "gigabytes"), [("linux", 2.048), ("darwin", 0.002)])
def test_peak_memory_is_in_the_systems_own_unit(platform, gigabytes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=2_000_000))
    write_two_rows(tmp_path / "run", "")
    with open(tmp_path / "run" / "logs" / "stage1.csv") as file:
        assert {float(row["peak_memory_gb"]) for row in csv.DictReader(file)} == {gigabytes}


def test_without_a_project_the_package_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_two_rows(tmp_path / "run", "")
    assert (tmp_path / "run" / "logs" / "stage1.csv").read_text().count("\n") == 3
