"""`make bench-build`: a full-size checkpoint through `jexport build`, against one plain export.

Writes a seeded checkpoint (24 layers x 1,024, 250,002 tokens, five adapters, bf16), builds
retrieval.passage in fp32, exports the same merged model with torch.onnx alone, and embeds one text
of 8,192 tokens. Each step is a process of its own; its peak memory is the kernel's own figure.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import table
from benchmarks.process import measured
from benchmarks.weights import TASK, xlm_r_tokenizer
from jexport.artifacts import store

LONG_TOKENS = 8192


def plain_export(checkpoint: str, out: str) -> None:
    """One torch.onnx.export of the merged model as it is, saved with external data."""
    import torch

    from jexport.recipe import LoadSpec
    from jexport.stages import load, merge

    merged = merge.run(load.run(LoadSpec(model=checkpoint), task=TASK))
    model = merged.assemble(merged.weights)
    ids = torch.full((2, 16), 4)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    names = ("input_ids", "attention_mask")
    begin = time.perf_counter()
    program = torch.onnx.export(
        model,
        (),
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamo=True,
        opset_version=20,
        verbose=False,
        dynamic_shapes={name: {0: batch, 1: sequence} for name in names},
    )
    program.save(Path(out) / "plain.onnx", external_data=True)
    print(json.dumps({"seconds": time.perf_counter() - begin}))


def embed_long(artifact: str) -> None:
    """Embed one text of exactly the length limit."""
    import jexport

    with jexport.open_artifact(artifact, device="cpu") as model:
        assert model.embedding.max_tokens == LONG_TOKENS
        begin = time.perf_counter()
        vector = model.encode("one long text of many words " * LONG_TOKENS)
        assert model.truncated == 1, "the text should fill the window"
        print(json.dumps({"seconds": time.perf_counter() - begin, "dimension": len(vector)}))


def main() -> None:
    """Run the three steps and write the table."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        toy = str(Path(folder) / "toy")
        tokenizer = str(xlm_r_tokenizer())
        measured("-m", "jexport", "toy", toy, "--full-size", "--tokenizer", tokenizer)
        _, export_gb, output = measured("-m", "benchmarks.build", "plain-export", toy, folder)
        export_s = json.loads(output.splitlines()[-1])["seconds"]
        (Path(folder) / "plain.onnx").unlink()
        (Path(folder) / "plain.onnx.data").unlink(missing_ok=True)
        build_s, build_gb, output = measured(
            "-m",
            "jexport",
            "build",
            "--model",
            toy,
            "--task",
            TASK,
            "--target",
            "onnx",
            "--out",
            folder,
        )
        artifact = output.splitlines()[-1]
        stages = store.measured(Path(artifact))["stages"]
        _, long_gb, output = measured("-m", "benchmarks.build", "embed-long", artifact)
        long_s = json.loads(output.splitlines()[-1])["seconds"]
    rows = [
        ["`jexport build`, validation included", f"{build_s:.0f}", f"{build_gb:.2f}"],
        *[
            [
                f"... {s['stage']}",
                f"{s['seconds']:.0f}",
                f"{s['peak_memory_mib'] * 2**20 / 1e9:.2f}",
            ]
            for s in stages
        ],
        [
            "one `torch.onnx.export(dynamo=True)` of the merged model",
            f"{export_s:.0f}",
            f"{export_gb:.2f}",
        ],
        ["the artifact embeds one text of 8,192 tokens", f"{long_s:.0f}", f"{long_gb:.2f}"],
    ]
    note = (
        f"Full-size seeded checkpoint (559 M parameters and five adapters), {TASK}, fp32. "
        f"Build time over export time: **{build_s / export_s:.1f}**. "
        f"Peak memory of the build: **{build_gb:.2f} GB**."
    )
    table.write(
        "Building at full size", "make bench-build", note, ["", "seconds", "peak memory, GB"], rows
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain-export"]:
        plain_export(*sys.argv[2:])
    elif sys.argv[1:2] == ["embed-long"]:
        embed_long(*sys.argv[2:])
    else:
        main()
