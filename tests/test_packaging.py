"""The house's rules: floors, package layout, what an import loads, what a wheel holds."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "engine", "training", "bench", "medvl_sam2")
FLOOR = {"kernels": 0, "model": 1, "engine": 2, "training": 3, "bench": 3, "medvl_sam2": 4}
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# The version is a constant of the front door that any floor may name.
OPEN = {"__version__"}


def imported_folders(source: str) -> set[str]:
    """Folders of the house that a file imports, wherever in the file; the front door is "medvl_sam2"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in OPEN]
            names = names if node.module == "medvl_sam2" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "medvl_sam2":
                second = name.split(".")[1] if "." in name else "medvl_sam2"
                found.add(second if second in FOLDERS else "medvl_sam2")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_lower_floors(path):
    own = path.parts[0]
    allowed = {folder for folder in FOLDERS if FLOOR[folder] < FLOOR[own]} | {own}
    assert imported_folders((ROOT / path).read_text()) <= allowed


def test_the_rule_sees_an_import_from_above():
    source = "def f():\n    from medvl_sam2.training.phantom import x\n    import medvl_sam2.engine.engine\n"
    assert imported_folders(source) == {"training", "engine"}
    assert imported_folders("from medvl_sam2 import MedVLEngine") == {"medvl_sam2"}
    assert imported_folders("from medvl_sam2 import __version__\nimport torch") == set()


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "medvl_sam2"])
def test_folders_carry_no_init(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_file_is_longer_than_500_lines():
    long = [str(path) for path in FILES if len((ROOT / path).read_text().splitlines()) > 500]
    assert not long


def test_import_is_light_and_names_are_lazy():
    code = (
        "import sys, medvl_sam2\n"
        "assert not {'torch', 'transformers', 'nibabel', 'triton'} & set(sys.modules), 'import medvl_sam2 is heavy'\n"
        "assert {'MedVLEngine', 'Volume', 'read_volume'} <= set(dir(medvl_sam2))\n"
        "from medvl_sam2 import cli\n"
        "cli.parser().format_help()\n"
        "assert 'torch' not in sys.modules, 'the command line is heavy before it has work'\n"
        "assert medvl_sam2.Volume.__module__ == 'medvl_sam2.engine.geometry'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_wheel_holds_one_top_level_package(tmp_path):
    # From a copy, since a build leaves its own folder beside the sources.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(copy)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"medvl_sam2"}
    for path in FILES:
        inside = path if path.parts[0] == "medvl_sam2" else Path("medvl_sam2") / path
        assert str(inside) in names
    assert "medvl_sam2/engine/assets/page.html" in names
    assert "medvl_sam2/training/configs/tiny.yaml" in names
