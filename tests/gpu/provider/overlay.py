"""On a GPU machine without a network: the installed onnxruntime with the packed CUDA provider.

    python tests/gpu/provider/overlay.py .gpu/provider SITE
    PYTHONPATH=SITE python ...

Copies the installed package (the one for CPUs, of the same version) into the folder SITE, and
unpacks what prepare.py made into it. The installed package is left as it is. CUDA and cuDNN come
from torch's wheels: import torch, or call onnxruntime.preload_dlls(), before the first session.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import lzma
import shutil
import sys
from pathlib import Path

CUDA = "CUDAExecutionProvider"


def overlay(packed: Path, site: Path) -> Path:
    """Make SITE/onnxruntime out of the installed one and the packed files; returns its folder.

    Raises SystemExit where nothing is packed, nothing is installed, or another version is.
    """
    files = sorted(packed.glob("*.xz"))
    if not files:
        raise SystemExit(f"{packed} holds no .xz file: run tests/gpu/provider/prepare.py")
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("onnxruntime is not installed here")
    wanted = (packed / "VERSION").read_text(encoding="utf-8").strip()
    installed = importlib.metadata.version("onnxruntime")
    if installed != wanted:
        raise SystemExit(f"packed for onnxruntime {wanted}, and {installed} is installed here")
    folder = site / "onnxruntime"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(spec.origin).parent, folder)
    for path in files:
        with lzma.open(path) as stream, (folder / "capi" / path.stem).open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
    return folder


def main(packed: str, site: str) -> None:
    """Overlay, and see that the provider is there now."""
    print(overlay(Path(packed), Path(site)))
    sys.path.insert(0, site)
    import onnxruntime

    available = onnxruntime.get_available_providers()
    print(f"onnxruntime {onnxruntime.__version__}: {', '.join(available)}")
    if CUDA not in available:
        raise SystemExit(f"the overlaid onnxruntime has no {CUDA}")


if __name__ == "__main__":
    main(*sys.argv[1:])
