"""Anywhere with a network: pack what a GPU machine without one lacks, into .gpu (ignored by git).

    python tests/gpu/provider/prepare.py [--out .gpu] [--onnxruntime 1.30.0] [--python 3.12]
        [--capability 90]

.gpu/provider: ONNX Runtime's CUDA provider, pruned to one compute capability (90: H100, H200) and
packed, and the module that knows it: both must be of the version that is installed there. .gpu/
wheels: pytest and what it needs, for a machine that has none. About 60 MB together; a minute or
two. `make gpu-check` unpacks both there.
"""

from __future__ import annotations

import argparse
import lzma
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import fatbin  # beside this script

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64")
PROVIDER = "libonnxruntime_providers_cuda.so"
BINDINGS = "onnxruntime_pybind11_state"
FOLDER = "onnxruntime/capi/"
TESTING = ("pytest>=9", "pytest-asyncio")
"""pyproject.toml's pytest options name asyncio's."""


def main() -> None:
    """Download, prune, pack."""
    asked = _asked()
    provider, wheels = asked.out / "provider", asked.out / "wheels"
    provider.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _pip(
            "download",
            "--no-deps",
            *_for(asked.python),
            "--dest",
            folder,
            f"onnxruntime-gpu=={asked.onnxruntime}",
        )
        (wheel,) = Path(folder).glob("onnxruntime_gpu-*.whl")
        pack(wheel, provider, asked.capability)
    (provider / "VERSION").write_text(asked.onnxruntime + "\n", encoding="utf-8")
    _pip("download", *_for(asked.python), "--dest", str(wheels), *TESTING)
    size = sum(path.stat().st_size for path in (*provider.iterdir(), *wheels.iterdir()))
    print(f"{asked.out}: {size / 2**20:.1f} MiB")


def pack(wheel: Path, out: Path, capability: int) -> None:
    """Write the provider, pruned, and the bindings out of a wheel as .xz files."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(FOLDER)]
        (bindings,) = [name for name in names if Path(name).name.startswith(BINDINGS)]
        data = bytearray(archive.read(FOLDER + PROVIDER))
        kept, zeroed = fatbin.prune(data, capability)
        print(f"{PROVIDER}: kept {kept:,} bytes of code, zeroed {zeroed:,}")
        _pack(bytes(data), out / f"{PROVIDER}.xz")
        _pack(archive.read(bindings), out / f"{Path(bindings).name}.xz")


def _pack(data: bytes, path: Path) -> None:
    with lzma.open(path, "wb", preset=8) as stream:
        stream.write(data)


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)


def _for(python: str) -> list[str]:
    """Wheels for the GPU machine's Python, whatever runs this."""
    platforms = [word for one in PLATFORMS for word in ("--platform", one)]
    return ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]


def _asked() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path(".gpu"))
    parser.add_argument("--onnxruntime", default="1.30.0", metavar="VERSION")
    parser.add_argument("--python", default="3.12", metavar="VERSION")
    parser.add_argument("--capability", type=int, default=90, help="90 for 9.0")
    return parser.parse_args()


if __name__ == "__main__":
    main()
