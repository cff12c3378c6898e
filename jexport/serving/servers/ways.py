"""What an engine takes: targets, versions, poolings, and who puts the prompt before a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jexport.serving.servers import lines
from jexport.serving.servers.lines import Served


@dataclass(frozen=True, kw_only=True)
class Way:
    """How one engine loads the artifacts of one target.

    Args:
        line: builds the line.
        needs: packages with the versions that can, as pip writes them.
        jina: more of them, only for jina-embeddings-v3.
        prompts: whether the line makes the engine put the prompt before each text.
        poolings: those that it has, empty for all.
        note: what else to know.
        named: how a caller chooses another prompt of the artifact by its name, '' where none can.
        normalizes: of an engine that normalises every vector, what can be done about it; '' where
            it does as the artifact says.
        cuts: whether it knows truncate_dim.
        pools_itself: whether it asks for token vectors, and so does not load an artifact whose
            engine gives text vectors alone (`modules` of its manifest).
    """

    line: Callable[[Served], str]
    needs: Mapping[str, str] = field(default_factory=dict)
    jina: Mapping[str, str] = field(default_factory=dict)
    prompts: bool = False
    poolings: tuple[str, ...] = ()
    note: str = ""
    named: str = ""
    normalizes: str = ""
    cuts: bool = False
    pools_itself: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A program or library that loads artifacts.

    Args:
        title: its own name.
        ways: by target.
    """

    title: str
    ways: Mapping[str, Way]


TRANSFORMERS_5 = {"transformers": ">=5.4"}
"""The first with the class of jina-embeddings-v3."""

OPTIMUM_ONNX = {"optimum-onnx": ">=0.1", "transformers": ">=4.36,<4.58"}

BY_SIDE = "encode_query, encode_document, and prompt_name"
"""How sentence-transformers and jexport choose a prompt."""

TEI_NAMED = (
    "prompt_name in a request to /embed, or --default-prompt-name NAME when it starts; its /v1 "
    "route cannot choose"
)
TEI_NORMALIZES = 'send "normalize": false to /embed; its /v1 route always normalises'

LEFT = "pooling and the length limit are left to you"

STRIPS = (
    "strips white space off prompt and text together: after a prompt that ends in a space, an "
    "empty text gets another vector"
)

ENGINES: Mapping[str, Engine] = {
    "jexport": Engine(
        title="jexport",
        ways={
            target: Way(line=lines.jexport, prompts=True, named=BY_SIDE, cuts=True)
            for target in ("onnx", "openvino", "trt", "hf", "vllm")
        },
    ),
    "sentence-transformers": Engine(
        title="sentence-transformers",
        ways={
            "hf": Way(
                line=lines.sentence_transformers(),
                jina={"sentence-transformers": ">=5.2", **TRANSFORMERS_5},
                prompts=True,
                named=BY_SIDE,
                cuts=True,
            ),
            "openvino": Way(
                line=lines.sentence_transformers(', backend="openvino"'),
                pools_itself=True,
                needs={"sentence-transformers": ">=3.2", "openvino": ">=2026.4"},
                prompts=True,
                named=BY_SIDE,
                cuts=True,
            ),
            "onnx": Way(
                line=lines.sentence_transformers(
                    ', backend="onnx", model_kwargs={"provider": "CPUExecutionProvider"}'
                ),
                pools_itself=True,
                needs={"sentence-transformers": ">=3.2,<6", **OPTIMUM_ONNX},
                prompts=True,
                named=BY_SIDE,
                cuts=True,
                note=STRIPS,
            ),
        },
    ),
    "transformers": Engine(
        title="transformers",
        ways={"hf": Way(line=lines.auto_model, jina=TRANSFORMERS_5, note=LEFT, pools_itself=True)},
    ),
    "optimum": Engine(
        title="Optimum",
        ways={"onnx": Way(line=lines.optimum, needs=OPTIMUM_ONNX, note=LEFT, pools_itself=True)},
    ),
    "langchain": Engine(
        title="LangChain",
        ways={
            "hf": Way(
                line=lines.langchain,
                needs={"langchain-huggingface": ">=1.2"},
                jina={"sentence-transformers": ">=5.2", **TRANSFORMERS_5},
                prompts=True,
                cuts=True,
            )
        },
    ),
    "llama-index": Engine(
        title="LlamaIndex",
        ways={
            "hf": Way(
                line=lines.llama_index,
                needs={"llama-index-embeddings-huggingface": ">=0.8"},
                jina={"sentence-transformers": ">=5.2", **TRANSFORMERS_5},
                prompts=True,
                cuts=True,
            )
        },
    ),
    "fastembed": Engine(
        title="fastembed",
        ways={
            "onnx": Way(
                line=lines.fastembed,
                pools_itself=True,
                needs={"fastembed": ">=0.9"},
                poolings=("mean", "cls"),
            )
        },
    ),
    "onnxruntime": Engine(
        title="ONNX Runtime",
        ways={
            "onnx": Way(
                line=lines.onnxruntime,
                needs={"onnxruntime": ">=1.27"},
                note=LEFT,
            )
        },
    ),
    "openvino": Engine(
        title="OpenVINO",
        ways={
            "openvino": Way(
                line=lines.openvino,
                needs={"openvino": ">=2026.4"},
                note=LEFT,
            )
        },
    ),
    "openvino-genai": Engine(
        title="OpenVINO GenAI",
        ways={
            "openvino": Way(
                line=lines.openvino_genai,
                pools_itself=True,
                needs={"openvino-genai": ">=2026.4"},
                poolings=tuple(lines.GENAI_POOLINGS),
                prompts=True,
            )
        },
    ),
    "infinity": Engine(
        title="Infinity",
        ways={
            "onnx": Way(
                line=lines.infinity,
                pools_itself=True,
                needs={"infinity-emb": ">=0.0.78"},
                poolings=("mean", "cls"),
                note=STRIPS,
                normalizes="it has no way to leave it",
            )
        },
    ),
    "vllm": Engine(
        title="vLLM",
        ways={
            "vllm": Way(
                line=lines.vllm,
                needs={"vllm": ">=0.32"},
                jina={"transformers": ">=5"},
                normalizes='send "use_activation": false with each request',
            )
        },
    ),
    "tei": Engine(
        title="Text Embeddings Inference",
        ways={
            "onnx": Way(
                line=lines.tei,
                needs={"text-embeddings-inference": ">=1.9"},
                poolings=("mean", "cls"),
                prompts=True,
                named=TEI_NAMED,
                normalizes=TEI_NORMALIZES,
            ),
            "vllm": Way(
                line=lines.tei,
                needs={"text-embeddings-inference": ">=1.9"},
                prompts=True,
                named=TEI_NAMED,
                normalizes=TEI_NORMALIZES,
                note="its candle backend computes GELU by the tanh formula",
            ),
        },
    ),
    "openvino-model-server": Engine(
        title="OpenVINO Model Server",
        ways={
            "openvino": Way(
                line=lines.model_server,
                pools_itself=True,
                needs={"openvino-model-server": ">=2026.4"},
                poolings=tuple(lines.GENAI_POOLINGS),
            )
        },
    ),
    "triton": Engine(
        title="Triton",
        ways={
            "onnx": Way(line=lines.triton, note="the client tokenises: examples/triton_client.py"),
            "trt": Way(line=lines.triton, note="the client tokenises: examples/triton_client.py"),
        },
    ),
}
