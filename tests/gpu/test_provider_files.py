"""The scripts that take the CUDA provider along: what they prune, pack and overlay.

The library is a made-up ELF file of the layout that nvcc writes; that a real one comes out as it
should was seen once (DECISIONS.md).
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "provider"
PTX, MACHINE_CODE = 1, 2


@pytest.fixture(scope="module")
def fatbin() -> ModuleType:
    return load("fatbin")


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(FOLDER))


def entry(kind: int, capability: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x0101, 64, len(code)) + bytes(12)
    return (header + struct.pack("<I", capability)).ljust(64, b"\1") + code


def container(*entries: bytes) -> bytes:
    inner = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(inner)) + inner


def elf(fatbins: bytes) -> bytes:
    """A 64-bit ELF file with the sections '', .text, .nv_fatbin and .shstrtab."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    parts = [b"", b"the host's code!", fatbins, names]
    offsets, body = [], bytearray(64)
    for part in parts:
        offsets.append(len(body))
        body += part.ljust(-(-len(part) // 8) * 8, b"\0")
    table = len(body)
    for name, offset, part in zip((0, 1, 7, 18), offsets, parts, strict=True):
        body += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, len(part), 0, 0, 8, 0)
    body[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", body, 0x28, table)
    struct.pack_into("<HHH", body, 0x3A, 64, 4, 3)
    return bytes(body)


KEPT, OTHER, SOURCE = b"ninety" * 4, b"eighty" * 4, b"text of PTX here" * 2
LIBRARY = elf(
    container(entry(MACHINE_CODE, 80, OTHER), entry(MACHINE_CODE, 90, KEPT))
    + bytes(16)
    + container(entry(PTX, 90, SOURCE))
    + container(entry(MACHINE_CODE, 90, KEPT[::-1]))
)


def test_only_one_capability_stays(fatbin: ModuleType) -> None:
    data = bytearray(LIBRARY)
    assert fatbin.prune(data, 90) == (2 * len(KEPT), len(OTHER) + len(SOURCE))
    wanted = LIBRARY.replace(OTHER, bytes(len(OTHER))).replace(SOURCE, bytes(len(SOURCE)))
    assert bytes(data) == wanted
    assert len(data) == len(LIBRARY)


def test_what_would_leave_nothing_is_refused(fatbin: ModuleType) -> None:
    with pytest.raises(ValueError, match="capability 10"):
        fatbin.prune(bytearray(LIBRARY), 100)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"rubbish" * 30, "ELF"),
        (LIBRARY.replace(b".nv_fatbin", b".nv_other\0"), "no section"),
        (LIBRARY.replace(struct.pack("<I", 0xBA55ED50), b"\1\2\3\4", 1), "no container"),
    ],
)
def test_another_layout_is_refused(data: bytes, why: str, fatbin: ModuleType) -> None:
    with pytest.raises(ValueError, match=why):
        fatbin.prune(bytearray(data), 90)


BINDINGS = "onnxruntime_pybind11_state.cpython-312-x86_64-linux-gnu.so"


def packed(folder: Path) -> Path:
    """What prepare.py makes of a wheel with that library."""
    wheel, out = folder / "onnxruntime_gpu.whl", folder / "provider"
    out.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("onnxruntime/capi/libonnxruntime_providers_cuda.so", LIBRARY)
        archive.writestr(f"onnxruntime/capi/{BINDINGS}", b"the bindings that know CUDA")
        archive.writestr("onnxruntime/__init__.py", b"")
    load("prepare").pack(wheel, out, 90)
    (out / "VERSION").write_text("9.9.9\n", encoding="utf-8")
    return out


def test_a_wheel_is_packed(tmp_path: Path, fatbin: ModuleType) -> None:
    out = packed(tmp_path)
    wanted = bytearray(LIBRARY)
    fatbin.prune(wanted, 90)
    with lzma.open(out / "libonnxruntime_providers_cuda.so.xz") as stream:
        assert stream.read() == wanted
    with lzma.open(out / f"{BINDINGS}.xz") as stream:
        assert stream.read() == b"the bindings that know CUDA"


def installed(folder: Path, version: str) -> None:
    """A stand-in for the installed package, whose provider list is what its bindings say."""
    package = folder / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "capi" / BINDINGS).write_bytes(b"the bindings of the CPU")
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        f"__version__ = {version!r}\n"
        f"state = Path(__file__).parent / 'capi' / {BINDINGS!r}\n"
        "def get_available_providers():\n"
        "    return ['CUDAExecutionProvider'] * (b'CUDA' in state.read_bytes())\n",
        encoding="utf-8",
    )
    about = folder / f"onnxruntime-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: onnxruntime\nVersion: {version}\n", encoding="utf-8")


def overlaid(tmp_path: Path, provider: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "overlay.py"), str(provider), str(tmp_path / "site")],
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )


def test_the_installed_package_is_overlaid_and_left_alone(tmp_path: Path) -> None:
    installed(tmp_path / "installed", "9.9.9")
    answer = overlaid(tmp_path, packed(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert "CUDAExecutionProvider" in answer.stdout
    capi = Path("onnxruntime") / "capi"
    assert (tmp_path / "site" / capi / "libonnxruntime_providers_cuda.so").is_file()
    old = (tmp_path / "installed" / capi / BINDINGS).read_bytes()
    assert old == b"the bindings of the CPU"


def test_another_version_is_not_overlaid(tmp_path: Path) -> None:
    installed(tmp_path / "installed", "9.9.8")
    answer = overlaid(tmp_path, packed(tmp_path))
    assert answer.returncode == 1
    assert "packed for onnxruntime 9.9.9, and 9.9.8 is installed" in answer.stderr
    assert not (tmp_path / "site").exists()
