"""Compile the kernels for GPUs that are not at hand, and read what the compiler made of them.

Every kernel file lists its compile variants in a module constant ``AOT_VARIANTS``. `inspect_variant` runs Triton's own
pipeline for a target, ``ptxas`` included, and reads the binary with ``cuobjdump``, both bundled with it. The findings
are kept as a golden file that a test compares with; after a change that is meant, rewrite it with::

    python -m medvl_sam2.kernels._aot tests/kernels/aot_golden.json [file ...]

naming the files of `kernels/` that changed, or none for all.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from medvl_sam2.kernels._common import HAS_TRITON, INTERPRETED

SHARED_LIMIT = {80: 166_912, 90: 232_448}


@dataclass(frozen=True)
class Variant:
    """One way a kernel is compiled.

    Attributes:
        name: Unique within the kernel file, for instance ``"fwd-bf16"``.
        kernel: The ``@triton.jit`` function.
        signature: Type of each run-time argument: ``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``. A trailing ``":16"``
            tells the compiler that the pointer or number is divisible by 16, as Triton finds out at a launch.
        constexprs: Value of each compile-time argument.
        num_warps: Warps per program.
        num_stages: Software pipeline depth.
        wgmma: Whether Hopper's matrix instructions must appear on sm_90.
        capability: The oldest target that has all of its instructions.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    wgmma: bool = False
    capability: int = 80


def all_variants() -> dict[str, Variant]:
    """Collect ``AOT_VARIANTS`` of every kernel file, keyed ``file/variant``."""
    variants = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for variant in getattr(import_module(f"medvl_sam2.kernels.{path.stem}"), "AOT_VARIANTS", ()):
            key = f"{path.stem}/{variant.name}"
            assert key not in variants, f"two compile variants are called {key}"
            variants[key] = variant
    return variants


def all_targets() -> dict[str, tuple[Variant, int]]:
    """Each variant with every target that it compiles for, keyed ``file/variant@sm_<capability>``."""
    return {
        f"{key}@sm_{capability}": (variant, capability)
        for key, variant in all_variants().items()
        for capability in SHARED_LIMIT
        if capability >= variant.capability
    }


def inspect_variant(variant: Variant, capability: int) -> dict[str, int]:
    """Compile one variant for ``sm_<capability>`` and count what matters.

    Returns:
        registers, spills (bytes of stack, where spilled registers go), shared (bytes), instructions, and the numbers of
        HGMMA (wgmma), HMMA (mma.sync), local loads and stores, and 128-bit global loads (synchronous or not).
    """
    if not HAS_TRITON or INTERPRETED:
        raise RuntimeError("compiling ahead of time needs triton, and not its interpreter")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, argument in enumerate(variant.kernel.arg_names):
        kind = variant.signature.get(argument, "constexpr")
        if kind.endswith(":16"):
            kind = kind.removesuffix(":16")
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[argument] = kind
    source = ASTSource(variant.kernel, signature, variant.constexprs, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": compiled.metadata.shared, **_read_binary(compiled.asm["cubin"])}


def write_golden(path: Path, files: Collection[str] = ()) -> None:
    """Inspect variants for every target and keep the findings in `path`.

    Args:
        path: The golden file.
        files: Kernel files to inspect again, without ``.py``; findings of others are kept. All of them by default.
    """
    import triton

    known = json.loads(path.read_text())["findings"] if files else {}
    findings: dict[str, dict[str, int]] = {}
    targets = all_targets()
    for name, target in targets.items():
        keep = name in known and name.split("/")[0] not in files
        findings[name] = known[name] if keep else inspect_variant(*target)
        # Written as it grows: what a run that is cut short has found, the next one keeps.
        later = {other: known[other] for other in known if other not in findings and other in targets}
        lines = ",\n".join(f" {json.dumps(n)}: {json.dumps(found)}" for n, found in {**findings, **later}.items())
        path.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "findings": {{\n{lines}\n}}}}\n')


def _tool(name: str) -> str:
    from triton.backends import nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def _read_binary(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [_tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", str(binary)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    heads = Counter(name.split(".")[0] for name in instructions)
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spills": int(re.search(r"STACK:(\d+)", text)[1]),
        "instructions": len(instructions),
        "hgmma": heads["HGMMA"],
        "hmma": heads["HMMA"],
        "local": heads["LDL"] + heads["STL"],
        "wide_loads": sum(1 for n in instructions if n.startswith(("LDG", "LDGSTS")) and ".128" in n),
    }


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]), sys.argv[2:])
