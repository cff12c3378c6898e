"""Lines of a shell that load an artifact, one function an engine.

`make test-servers` runs them. Whether an engine takes the artifact at all is not known here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST, PORT = "127.0.0.1", 8000
"""Only this machine reaches a server there."""

GENAI_POOLINGS = {"mean": "MEAN", "cls": "CLS", "last": "LAST_TOKEN"}


@dataclass(frozen=True, kw_only=True)
class Served:
    """An artifact as a line of a shell names it.

    Args:
        folder: its path.
        content: its manifest.
        host: where a server is to listen.
        port: of that host.
    """

    folder: Path
    content: Mapping[str, Any]
    host: str = HOST
    port: int = PORT

    @property
    def path(self) -> str:
        """The folder, quoted for a shell."""
        return shlex.quote(str(self.folder))

    @property
    def literal(self) -> str:
        """The folder as a Python string."""
        return _literal(str(self.folder))

    @property
    def graph(self) -> str:
        """The file that the engine opens, as a Python string."""
        return _literal(str(self.folder / self.content["engine"]["files"][0]))

    @property
    def pooling(self) -> str:
        """How token vectors become one: 'mean', 'cls', 'last' ..."""
        return str(self.content["embedding"]["pooling"])

    @property
    def task(self) -> str:
        """The artifact's task, quoted for a shell."""
        return shlex.quote(self.content["embedding"]["task"])

    @property
    def prompt(self) -> str:
        """What belongs before each text."""
        return str(self.content["embedding"]["prompt"])

    @property
    def default_prompt_name(self) -> str:
        """The name of the prompt before each text, quoted for a shell; '' for none."""
        embedding = self.content["embedding"]
        of_old = embedding["task"] if embedding["prompt"] else ""  # manifests before format 3
        name = embedding.get("default_prompt_name", of_old)
        return shlex.quote(name) if name else ""

    @property
    def normalize(self) -> bool:
        """Whether the checkpoint's own vectors have length 1."""
        return bool(self.content["embedding"]["normalize"])

    @property
    def dtype(self) -> str:
        """The precision as torch names it."""
        return {"bf16": "bfloat16", "fp16": "float16"}.get(self.content["precision"], "float32")


def _literal(value: Any) -> str:
    """Strings, alone or in a list or dict, as Python: a shell's single quotes go around them."""
    return json.dumps(value, ensure_ascii=False)


def _python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


def sentence_transformers(options: str = "") -> Callable[[Served], str]:
    """SentenceTransformer, which pools, normalises and puts the prompt before each text.

    Args:
        options: further arguments as Python, from the comma on; '' for those of the precision.

    Returns:
        Gives the line for an artifact.
    """

    def line(one: Served) -> str:
        pooled_in_fp32 = ', model_kwargs={"dtype": "float32"}' if one.dtype == "bfloat16" else ""
        return _python(
            "from sentence_transformers import SentenceTransformer as S; "
            f'print(S({one.literal}{options or pooled_in_fp32}).encode(["a text"]))'
        )

    return line


def auto_model(one: Served) -> str:
    """AutoModel: token vectors.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return _python(
        f"from transformers import AutoModel as M, AutoTokenizer as T; f = {one.literal}; "
        'print(M.from_pretrained(f)(**T.from_pretrained(f)("a text", return_tensors="pt"))[0])'
    )


def optimum(one: Served) -> str:
    """Optimum's ONNX Runtime model: token vectors.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return _python(
        "from optimum.onnxruntime import ORTModelForFeatureExtraction as M; "
        f"from transformers import AutoTokenizer as T; f = {one.literal}; "
        'print(M.from_pretrained(f)(**T.from_pretrained(f)("a text", return_tensors="pt"))[0])'
    )


def langchain(one: Served) -> str:
    """HuggingFaceEmbeddings, a wrapper of sentence-transformers.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return _python(
        "from langchain_huggingface import HuggingFaceEmbeddings as E; "
        f'print(E(model_name={one.literal}).embed_query("a text"))'
    )


def llama_index(one: Served) -> str:
    """HuggingFaceEmbedding, which puts its own prompts in the place of the folder's.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    prompt = _literal(one.prompt)
    prompts = f", query_instruction={prompt}, text_instruction={prompt}" if one.prompt else ""
    own_length = "" if one.normalize else ", normalize=False"
    return _python(
        "from llama_index.embeddings.huggingface import HuggingFaceEmbedding as E; "
        f'print(E(model_name={one.literal}{prompts}{own_length}).get_query_embedding("a text"))'
    )


def fastembed(one: Served) -> str:
    """TextEmbedding with a model of one's own.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    embedding = one.content["embedding"]
    name = _literal(f"{one.content['name']}-{embedding['task']}")
    graph, *more = one.content["engine"]["files"]
    return _python(
        "from fastembed import TextEmbedding as E; from fastembed.common.model_description import "
        f"ModelSource as S, PoolingType as P; E.add_custom_model(model={name}, "
        f"pooling=P.{one.pooling.upper()}, normalization={embedding['normalize']}, "
        f"sources=S(hf={name}), dim={embedding['dimension']}, model_file={_literal(graph)}, "
        f"additional_files={_literal(more)}); "
        f'print(*E({name}, specific_model_path={one.literal}).embed(["a text"]))'
    )


def openvino_genai(one: Served) -> str:
    """TextEmbeddingPipeline, with the tokenizer that is a graph.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    hint = one.content["engine"]["facts"]["properties"]
    return _python(
        "import openvino_genai as g; c = g.TextEmbeddingPipeline.Config(); "
        f"c.pooling_type = g.TextEmbeddingPipeline.PoolingType.{GENAI_POOLINGS[one.pooling]}; "
        f"c.normalize = {one.content['embedding']['normalize']}; "
        f"c.query_instruction = c.embed_instruction = {_literal(one.prompt)}; "
        f'e = g.TextEmbeddingPipeline({one.literal}, "CPU", c, **{_literal(hint)}); '
        'print(e.embed_query("a text"))'
    )


def _tokens(one: Served) -> str:
    tokenizer = _literal(str(one.folder / "tokenizer.json"))
    return (
        "from tokenizers import Tokenizer; "
        f't = Tokenizer.from_file({tokenizer}).encode("a text"); '
        "x = dict(input_ids=n.array([t.ids]), attention_mask=n.array([t.attention_mask])); "
    )


def onnxruntime(one: Served) -> str:
    """The graph itself: token vectors.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    cuda = one.content["engine"]["facts"].get("cuda")
    options = _literal(cuda["provider_options"]) if cuda else ""
    where = f', providers=[("CUDAExecutionProvider", {options})]' if cuda else ""
    return _python(
        f"import numpy as n, onnxruntime as o; {_tokens(one)}"
        f"print(o.InferenceSession({one.graph}{where}).run(None, x))"
    )


def openvino(one: Served) -> str:
    """The graph itself: token vectors.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    hint = one.content["engine"]["facts"]["properties"]
    return _python(
        f"import numpy as n, openvino as o; {_tokens(one)}"
        f'print(o.compile_model({one.graph}, "CPU", {_literal(hint)})(x))'
    )


def jexport(one: Served) -> str:
    """The runtime of jexport itself.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return f"jexport embed {one.path} --input texts.txt --output vectors.npy"


def infinity(one: Served) -> str:
    """A server of OpenAI's /embeddings, on ONNX Runtime.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    # A path other than `.` makes it look for the graph under a name that is not there (0.0.78 with
    # optimum-onnx 0.1.0). Its own optimizer, and without INFINITY_HOME its cache, would write into
    # the folder, which is then no longer what was built.
    return (
        f"cd {one.path} && INFINITY_HOME=~ infinity_emb v2 --model-id . --engine optimum "
        f"--device cpu --pooling-method {one.pooling} --onnx-disable-optimize "
        f"--host {one.host} --port {one.port}"
    )


def vllm(one: Served) -> str:
    """A server of OpenAI's /v1/embeddings.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return f"vllm serve {one.path} --dtype {one.dtype} --host {one.host} --port {one.port}"


def tei(one: Served) -> str:
    """A server of /embed and of OpenAI's /v1/embeddings.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    name = one.default_prompt_name
    prompted = f" --default-prompt-name {name}" if name else ""
    # ONNX Runtime's backend has float32 only, whatever the graph computes in.
    return (
        f"text-embeddings-router --model-id {one.path} --dtype float32{prompted} "
        f"--hostname {one.host} --port {one.port}"
    )


def model_server(one: Served) -> str:
    """A server of OpenAI's /v3/embeddings.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return (
        f"ovms --task embeddings --model_name {one.task} --model_path {one.path} "
        f"--pooling {GENAI_POOLINGS[one.pooling]} {'' if one.normalize else '--normalize false '}"
        f"--rest_bind_address {one.host} --rest_port {one.port}"
    )


def triton(one: Served) -> str:
    """A server of tensors, from a model repository.

    Args:
        one: the artifact.

    Returns:
        The line.
    """
    return (
        f"jexport package --layout triton {one.path} --out models "
        f"&& tritonserver --model-repository=models "
        f"--http-address={one.host} --http-port={one.port}"
    )
