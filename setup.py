"""Build script: maps the five top-level folders into one package, ``medvl_sam2``.

The folders carry no ``__init__.py``, so a checkout on ``sys.path`` never hides a package that happens to be called
``kernels`` or ``training``; installed, everything imports as ``medvl_sam2.kernels``, ``medvl_sam2.engine`` and so on.
"""

from pathlib import Path

from setuptools import setup

NAME, FOLDERS = "medvl_sam2", ("kernels", "engine", "model", "training", "bench")
ROOT = Path(__file__).resolve().parent


def _packages() -> list[str]:
    packages = [NAME]
    for folder in FOLDERS:
        packages.append(f"{NAME}.{folder}")
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_dir() and any(path.glob("*.py")):
                packages.append(".".join((NAME, *path.relative_to(ROOT).parts)))
    return packages


setup(packages=_packages(), package_dir={NAME: NAME, **{f"{NAME}.{folder}": folder for folder in FOLDERS}})
