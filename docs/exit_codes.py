"""docs/troubleshooting.md, made from jexport/errors.py and the ways out below.

    python docs/exit_codes.py     # writes the page; tests/docs checks that it is current

The name, the code and what an error means come from its class; HINTS says what usually helps. A
class without a hint, and a hint without a class, is a KeyError.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from jexport import errors

PAGE = Path(__file__).with_name("troubleshooting.md")
HEAD = """\
# Troubleshooting by exit code

This page is made from `jexport/errors.py` by `python docs/exit_codes.py`.

Every foreseen failure has an exit code of its own and a text of three parts: what happened, the evidence, and the
way out (`fix:`). In Python it is an exception of the class named here, with `what`, `evidence` and `fix`; see
[errors](reference/python.md#errors). Begin with the `fix:` line: it knows more of your case than this page.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a bug: there is a traceback; report it with the command and `jexport doctor --json` |
| 2 | wrong flags: `jexport COMMAND --help` |
| 130 | interrupted (Ctrl-C); nothing half-made was left |
| 141 | the reader of a pipe went away |

"""
HINTS = {
    "UnknownTaskError": "`jexport recipe show NAME` lists a recipe's tasks; a checkpoint without adapters has the task "
    "`none` only.",
    "UnknownTargetError": "`jexport doctor` lists the targets and what each needs.",
    "RecipeError": "The text names the key and the file; `jexport recipe show` prints every key with its value.",
    "ParityError": "Read the report beside the versions (`<version>.failed.json`): it names the worst text, both sides' "
    "token ids and the likely key of the checkpoint. For fp16 and int8 try fp32 first: if that holds, it is rounding.",
    "CheckpointError": "Fetch the file again; a truncated safetensors file is the usual cause.",
    "AdapterError": "Adapters have to be saved with PEFT as plain LoRA of one rank; merge any other kind first.",
    "TokenizerError": "The tokenizer and the weights come from two models, or a special token is missing.",
    "NotFiniteError": "The checkpoint itself has the NaN; train or fetch it again.",
    "TextInputError": "The line is named. `--format` says what the input is where its name does not.",
    "DiskFullError": "`jexport build --plan` says how much a build needs; `jexport cache gc` frees what can be made again.",
    "ArtifactError": "A file is not what was built: pull or build it again. `jexport verify` names each file.",
    "StateDictError": "Weights and config.json are of two models, or of two versions of one.",
    "DependencyError": 'The extra to install is named: `pip install "jexport[...]"`.',
    "UnsupportedGraphError": "The node is named. `jexport lint MODEL.onnx --target TARGET` lists all that an engine "
    "would refuse.",
    "PrecisionError": "See the table of [targets](targets.md); a quantized checkpoint is not quantized again.",
    "HubError": "Check the id and the network; a gated model needs a login (`hf auth login`).",
    "RemoteCodeError": "`--trust-remote-code` with `--revision COMMIT` and `--code-revision COMMIT`, if you trust it.",
    "OverflowRangeError": "Use fp32, or bf16 where the target has it.",
    "TextTooLongError": "Leave out `--no-truncate`, or split the text (`late_chunking`).",
    "UnsupportedCheckpointError": "The key or layout is named; see [keys of a checkpoint](checkpoint-keys.md).",
    "DimensionError": "`jexport inspect` lists the dimensions that an artifact offers.",
    "CalibrationError": "See [INT8](int8.md) for the form of a text set.",
    "QuantizationError": "`--effort full`, your own texts (`--calibration`), or `int8-weights`; a recipe can lower a goal.",
    "OutputPathError": "Name another folder with `--out`; or two checkpoints share a name: `--name`, `--replace`.",
    "ProfileError": "The profile is named; `--profile-from FILE` chooses them by your texts.",
    "DeviceError": "`jexport doctor` shows the GPUs and drivers that it sees.",
    "EngineError": "The engine's own message is the evidence. A portable artifact builds one on this machine: "
    "`jexport compile`.",
    "LayoutError": "`jexport package --help` lists the layouts; each version must be of one checkpoint.",
    "PairError": "Build both artifacts from the same checkpoint and revision.",
    "ServingError": "[Servers](servers.md) says which engine loads which target.",
    "RegistryError": "Check the login of that registry (docker, AWS, hf) and the ref: `jexport list DEST`.",
    "SignatureError": "The signature is missing or somebody else's: ask whoever published it. Never skip the check.",
    "MatrixError": "The limit and the system are named; split the matrix with `--task` or `--target`.",
    "ClusterError": "`ray status` on the head node; the job's last lines are the evidence.",
    "CacheError": "`jexport cache verify` names the entries; the cache may be removed at any time.",
    "MemoryNeedError": "Close other programs, take a larger machine, or set `--memory-budget` if you know better.",
    "DiskError": "The disk, not jexport: look at the system's log.",
    "DeviceMemoryError": "Smaller batches: `--batch-tokens`, or free the GPU.",
    "PromptError": "`jexport inspect` lists the prompts of an artifact.",
}


def text() -> str:
    """The whole page, as Markdown, by exit code."""
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.JexportError) and kind is not errors.JexportError
    ]
    if unknown := set(HINTS) - {kind.__name__ for kind in kinds}:
        raise KeyError(f"no such error: {sorted(unknown)}")
    parts = [HEAD]
    for kind in sorted(kinds, key=lambda kind: kind.exit_code):
        meaning = inspect.getdoc(kind)
        parts.append(
            f"## {kind.exit_code}: {kind.__name__}\n\n{meaning}\n\n{HINTS[kind.__name__]}\n\n"
        )
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
