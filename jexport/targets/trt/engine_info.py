"""Where a plan was built and what for; whether it may be opened here, asked before TensorRT is.

TensorRT has no such check of its own: a plan is native code, a wrong one may crash, and a changed
one runs whatever it was changed to. Reads the plan only to hash it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.errors import ArtifactError, DeviceError, EngineError
from jexport.targets.trt import profiles
from jexport.targets.trt.device import Machine
from jexport.targets.trt.profiles import Profile

AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What a manifest says of a plan.

    Args:
        tensorrt: full version that built it.
        gpu: name of the GPU it was built on.
        capability: compute capability of that GPU, like '8.6'.
        system: like 'linux-x86_64'.
        hardware_compatible: other GPUs it runs on, as in building.Options.
        version_compatible: whether later TensorRT versions of its major run it.
        profiles: those of the engine, in its order.
        sha256: of the plan's bytes.
    """

    tensorrt: str
    gpu: str
    capability: str
    system: str
    hardware_compatible: str
    version_compatible: bool
    profiles: tuple[Profile, ...]
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """As a manifest writes it; `from_facts` reads it back."""
        return {
            "tensorrt": self.tensorrt,
            "gpu": self.gpu,
            "capability": self.capability,
            "system": self.system,
            "hardware_compatible": self.hardware_compatible,
            "version_compatible": self.version_compatible,
            "profiles": [profile.plain() for profile in self.profiles],
            "sha256": self.sha256,
        }


def from_facts(facts: Mapping[str, Any], *, max_tokens: int = 1 << 30) -> EngineInfo:
    """Read what a manifest says of a plan.

    Args:
        facts: the manifest's engine facts.
        max_tokens: the longest text, for profiles without a bound.

    Returns:
        The same, its profiles checked.

    Raises:
        ArtifactError: something is missing there.
        ProfileError: its profiles contradict themselves.
    """
    texts = ("tensorrt", "gpu", "capability", "system", "hardware_compatible", "sha256")
    absent = [key for key in texts if not isinstance(facts.get(key), str)]
    absent += [] if isinstance(facts.get("version_compatible"), bool) else ["version_compatible"]
    absent += [] if isinstance(facts.get("profiles"), list) else ["profiles"]
    if absent:
        raise ArtifactError(
            "the manifest does not say what this plan was built for",
            evidence=f"without a usable value: {', '.join(absent)}",
            fix="compile it again: jexport compile ARTIFACT",
        )
    return EngineInfo(
        **{key: facts[key] for key in texts},
        version_compatible=facts["version_compatible"],
        profiles=profiles.from_tables(facts["profiles"], max_tokens=max_tokens),
    )


def check(info: EngineInfo, machine: Machine, *, path: Path) -> None:
    """Refuse a plan that is for another machine; each error says how to compile it again.

    Args:
        info: what the manifest says of the plan.
        machine: this one.
        path: of the plan, for the message.

    Raises:
        DeviceError: another system or GPU architecture.
        EngineError: another TensorRT.
    """
    again = f"compile it again on this machine: jexport compile {path.parent}"
    if info.system != machine.system:
        raise DeviceError(
            f"{path.name} was built for another operating system or processor",
            evidence=f"built on {info.system}, this is {machine.system}",
            fix=again,
        )
    if not _gpu_fits(info, machine):
        allowed = info.hardware_compatible or "that architecture only"
        raise DeviceError(
            f"{path.name} was built for another GPU architecture",
            evidence=f"built on {info.gpu} (compute capability {info.capability}) for "
            f"{allowed}; this is {machine.gpu.name} ({machine.gpu.capability})",
            fix=f"{again} (or build it with compile.hardware_compatible)",
        )
    if not _tensorrt_fits(info, machine):
        how = "and later ones of that major" if info.version_compatible else "only"
        raise EngineError(
            f"{path.name} was built with another TensorRT",
            evidence=f"built with {info.tensorrt}, for its version {how}; "
            f"installed is {machine.tensorrt}",
            fix=f"{again} (or install that TensorRT)",
        )


def _gpu_fits(info: EngineInfo, machine: Machine) -> bool:
    if info.hardware_compatible == "ampere_plus":
        return _numbers(machine.gpu.capability) >= AMPERE
    return info.capability == machine.gpu.capability


def _tensorrt_fits(info: EngineInfo, machine: Machine) -> bool:
    """Same major and minor; a version-compatible plan takes later minors of its major too."""
    built, here = _numbers(info.tensorrt)[:2], _numbers(machine.tensorrt)[:2]
    if info.version_compatible:
        return built[0] == here[0] and built <= here
    return built == here


def _numbers(version: str) -> tuple[int, ...]:
    """'11.4.0.106' -> (11, 4, 0, 106); what is not a number ends it."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def read(info: EngineInfo, path: Path) -> bytes:
    """The plan's bytes, once their digest is the manifest's.

    Args:
        info: what the manifest says of the plan.
        path: of the plan.

    Returns:
        The bytes.

    Raises:
        ArtifactError: the file cannot be read, or is not that plan.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path.name} cannot be read", evidence=str(error), fix=_again(path)
        ) from error
    digest = hashlib.sha256(plan).hexdigest()
    if digest != info.sha256:
        raise ArtifactError(
            f"{path.name} is not the plan that its manifest describes",
            evidence=f"SHA-256 {digest[:16]}..., {len(plan)} bytes; the manifest says "
            f"{info.sha256[:16]}...",
            fix=_again(path),
        )
    return plan


def _again(path: Path) -> str:
    return f"fetch the artifact again, or compile it again: jexport compile {path.parent}"
