"""Folders that are replaced whole or not at all."""

from pathlib import Path

import pytest

from medvl_sam2.engine.files import new_folder
from medvl_sam2.engine.geometry import InputError


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_a_replacement_that_fails_at_the_last_step_leaves_the_old_folder(tmp_path, monkeypatch, error):
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    rename = Path.rename

    def fails(self, target):
        if target == path and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    with pytest.raises((InputError, KeyboardInterrupt)), new_folder(path, replace=True) as part:
        (part / "weights").write_text("new")
        monkeypatch.setattr(Path, "rename", fails)
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
    assert (path / "weights").read_text() == "old"
    monkeypatch.undo()
    with new_folder(path, replace=True) as part:
        (part / "weights").write_text("new")
    assert [one.name for one in tmp_path.iterdir()] == ["model"] and (path / "weights").read_text() == "new"


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "model", replace=True) as part:
        (part / "weights").write_text("new")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "weights").read_text() == "new"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk", "model"]
