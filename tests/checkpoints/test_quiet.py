"""Nothing that loads writes a line: stdout is for paths, stderr for jexport's own progress."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jexport.toy import checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = FIXTURES / "jina_original_small"

SCRIPT = """
import sys
import numpy as np
from jexport.errors import StateDictError
from jexport.recipe import LoadSpec
from jexport.stages import load, merge

for argument in sys.argv[1:]:
    folder, task, trust = argument.split("|")
    model = load.run(LoadSpec(model=folder, trust_remote_code=bool(trust)), task=task)
    merged = merge.run(model) if model.adapter else model
    try:
        merged.assemble(merged.weights)
    except StateDictError:
        assert "half" in folder
        continue
    (ids,) = model.tokenize_reference(["the harbour at night " * 4000])
    with model.reference() as run:
        feed = np.array([ids[:16]])
        run({"input_ids": feed, "attention_mask": np.ones_like(feed)})
"""


def test_loading_says_nothing(
    tmp_path: Path,
    minilm: Path,
    write_unknown: Callable[..., Path],
    edit_json: Callable[..., None],
) -> None:
    native = checkpoint.write(
        tmp_path / "native", layout="native", tokenizer=SMALL / "tokenizer.json"
    )
    coded = Path(shutil.copytree(SMALL, tmp_path / "coded"))
    for path in (FIXTURES / "remote_original").glob("*.py"):
        shutil.copy(path, coded)
    named = {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": "modeling_lora.XLMRobertaLoRA",
    }
    edit_json(coded / "config.json", auto_map=named)
    half = Path(shutil.copytree(minilm, tmp_path / "half"))
    edit_json(half / "config.json", num_hidden_layers=3, intermediate_size=8)
    unknown = write_unknown(tmp_path / "unknown")
    cache = tmp_path / "hub" / "models--someone--minilm"
    shutil.copytree(minilm, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            f"{SMALL}|separation|",
            f"{native}|separation|",
            f"{minilm}|none|",
            f"{half}|none|",
            "someone/minilm|none|",
            f"{unknown}|none|yes",
            f"{coded}|separation|yes",
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ
        | {
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
