"""What this machine offers the engine: device, paths of the kernels, optional packages, and what is missing and why."""

import os
import platform
from dataclasses import asdict
from importlib import import_module, metadata
from typing import Any

import torch

from medvl_sam2 import __version__
from medvl_sam2.kernels._common import op_status
from medvl_sam2.kernels.attention import attention_status

REQUIRED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "scipy", "nibabel", "SimpleITK")
OPTIONAL = {
    "triton": ("triton", "kernels on CUDA; without it their plain torch form runs"),
    "flash-attn": ("flash_attn", "attention on CUDA; without it torch's own"),
    "xformers": ("xformers", "attention on CUDA; without it torch's own"),
    "vllm": ("vllm", "language_backend='vllm' and the server's batching"),
    "sam2": ("sam2", "the reference that tests and benchmarks compare with"),
    "accelerate": ("accelerate", "training on several GPUs"),
    "tensorboard": ("tensorboard", "training curves"),
    "pycocoevalcap": ("pycocoevalcap", "evaluate: BLEU, METEOR, ROUGE-L, CIDEr"),
    "rouge-score": ("rouge_score", "evaluate: ROUGE-1"),
    "nltk": ("nltk", "evaluate: METEOR without Java"),
    "matplotlib": ("matplotlib", "plots of benchmarks and evaluations"),
    "pytest-benchmark": ("pytest_benchmark", "benchmarks under pytest"),
    "fastapi": ("fastapi", "the server"),
    "uvicorn": ("uvicorn", "the server's HTTP"),
    "python-multipart": ("python_multipart", "the server's uploads"),
    "prometheus-client": ("prometheus_client", "the server's metrics"),
    "ray": ("ray", "serve --ray and batch --workers above 1"),
    "slicerio": ("slicerio", "the demo's real chest CT"),
}


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that results depend on."""
    found = {"medvl-sam2": __version__, "python": platform.python_version()}
    for name in (*REQUIRED, "triton", "sam2"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_info() -> dict[str, Any]:
    """CPU, threads, memory and, where there are any, CUDA devices."""
    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "cuda": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            info["cuda"].append(
                {
                    "name": properties.name,
                    "memory_gb": round(properties.total_memory / 1e9, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    else:
        info["cuda_missing"] = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        )
    return info


def optional_packages() -> list[dict[str, str | None]]:
    """For each optional package its version, or why it is not in use, and what it is for."""
    rows = []
    for name, (module, purpose) in OPTIONAL.items():
        version, reason = None, None
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            reason = "not installed"
        if version is not None and name in ("triton", "flash-attn", "xformers"):
            reason = _why_unusable(module)
        rows.append({"name": name, "version": version, "unused_because": reason, "purpose": purpose})
    return rows


def collect() -> dict[str, Any]:
    """Everything that `medvl-sam2 info` shows."""
    return {
        "versions": versions(),
        "device": device_info(),
        "kernels": [asdict(status) for status in op_status()],
        "attention": attention_status("cuda" if torch.cuda.is_available() else "cpu"),
        "packages": optional_packages(),
        "environment": {
            # Output of `info` is pasted into bug reports: secrets stay out of it.
            key: "(set)" if key.endswith("_KEYS") else value
            for key, value in sorted(os.environ.items())
            if key.startswith("MEDVL_SAM2_")
        },
    }


def _why_unusable(module: str) -> str | None:
    try:
        import_module(module)
    # A package built for another torch can fail with any error at import; the message is what the user needs.
    except Exception as error:
        return f"import fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None if torch.cuda.is_available() else "no CUDA device"


def cpu_name() -> str:
    """Name of the processor, as precise as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(document: dict[str, Any]) -> str:
    """Readable form of `collect`."""
    device = document["device"]
    lines = [" ".join(f"{name} {version}" for name, version in list(document["versions"].items())[:5])]
    lines.append(
        f"CPU: {device['cpu']}, {device['cores']} cores, {device['threads']} threads, {device['cpu_capability']}, "
        f"{device['memory_gb']} GB"
    )
    for gpu in device["cuda"]:
        lines.append(f"CUDA: {gpu['name']}, {gpu['memory_gb']} GB, capability {gpu['capability']}")
    if not device["cuda"]:
        lines.append(f"CUDA: none ({device['cuda_missing']})")
    lines += ["", "Kernels:"]
    lines += [f"  {k['name']:<22} {k['path']:<10} {k['reason']}" for k in document["kernels"]]
    lines += ["", "Optional packages:"]
    for package in document["packages"]:
        state = package["version"] or ""
        if package["unused_because"]:
            state = f"{state} not used: {package['unused_because']}".strip()
        lines.append(f"  {package['name']:<17} {state} ({package['purpose']})")
    return "\n".join(lines)
