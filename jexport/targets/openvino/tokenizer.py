"""An artifact's tokenizer.json -> openvino_tokenizer.xml and .bin, compared before it is kept.

OpenVINO GenAI and Model Server tokenise with this graph; jexport itself and sentence-transformers
use tokenizer.json. The converter is not exact for every tokenizer, so the graph is kept only when
it gives the same ids on every text of the parity set; on which odd texts and characters it differs,
the manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jexport.targets import PackageContext
from jexport.targets.openvino import names
from jexport.types import WINDOW_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GRAPH = "openvino_tokenizer.xml"
ODD_TEXTS = (
    " ",
    "\n\t ",
    "  two  spaces ",
    "don't  stop...!!",
    "x" * 3000,
    "\x00",
    "a\x00b",
    "tab\tnew\nline\r\n",
    "\ufeffbom",
    "\u00a0nbsp\u3000ideographic",
    "\u200bzero\u200d",
    "e\u0301 \u00e9 \ufb01 \u2460 \u00bd \uff21",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u0130stanbul \u00df \u1e9e \u01c5",
    "[CLS] x [SEP]",
    "<s> x </s>",
    "\U0001d400\U0001d401",
    "\u30a2" * 60,
    "\u00e9" * 101,
    "b" * 100,
    "\u65e5\u3005\u306b\u3007",
)
"""Texts that real inputs hold now and then, and that tokenizers disagree on."""

STAND_INS = {"\u03c2": "\u16f1", "\u3005": "\u16f2", "\u3006": "\u16f3", "\u3007": "\u16f4"}
"""Letters that the converter gets wrong where BERT's normaliser runs, and runes that texts do not
hold, in their place while it does. It folds case, so both small sigmas become one, and sets apart
three Japanese marks that are of the Han script and no ideograph to BERT.
"""

WORD_CHARACTERS = 100
LONG_WORD = r"[^\s\p{P}$+<=>^`|~\p{Han}]{101,}"
"""BERT's limit of a word, over which it is unknown: characters to it, bytes to the converter."""


def write(package: PackageContext) -> dict[str, Any]:
    """Convert, compare, and keep the graph when it is right.

    Of the conversions tried, the first without a difference is taken.

    Args:
        package: its tokenizer.json is converted, and gets the graph beside it.

    Returns:
        What the manifest says: whether it was written, how many texts were compared, and on which
        texts and characters it differs.
    """
    import openvino

    texts = list(
        dict.fromkeys([*package.texts, "", "word " * min(package.max_tokens, WINDOW_TOKENS)])
    )
    expected = dict(zip(texts, package.tokenize(texts), strict=True))
    lost: list[str] = []
    for source in _sources(package):
        graph = _converted(source, package)
        tokenize = _Opened(graph)
        wrong = [text for text in texts if tokenize(text) != expected[text]]
        if not wrong:
            names.settle(graph)
            openvino.save_model(graph, str(package.folder / GRAPH), compress_to_fp16=False)
            odd = _differing(tokenize, package, [*ODD_TEXTS, *package.edge])
            return {
                "written": True,
                "texts_compared": len(texts),
                "differs_on": [text[:40] for text in odd],
                "differs_on_characters": _characters(tokenize, package, odd),
            }
        lost = min(lost or wrong, wrong, key=len)
    return {
        "written": False,
        "texts_compared": len(texts),
        "differs_on": [text[:40] for text in lost[:10]],
    }


def _differing(tokenize: _Opened, package: PackageContext, texts: Sequence[str]) -> list[str]:
    """The texts for which the graph gives other ids than tokenizer.json."""
    several = list(dict.fromkeys(texts))
    pairs = zip(several, package.tokenize(several), strict=True)
    return [text for text, ids in pairs if list(tokenize(text)) != ids]


def _characters(tokenize: _Opened, package: PackageContext, texts: Sequence[str]) -> list[str]:
    """Code points ("U+200B") of these texts that alone make a difference in a plain text."""
    seen = sorted({letter for text in texts for letter in text})
    around = {f"a {letter} b{letter}c": letter for letter in seen}
    return [f"U+{ord(around[text]):04X}" for text in _differing(tokenize, package, [*around])]


def _sources(package: PackageContext) -> Iterator[Tokenizer]:
    """As it is; then, of BERT's kind, the same one said in steps that convert well."""
    from tokenizers import Regex, Tokenizer, normalizers

    path = str(package.folder / "tokenizer.json")
    plain = Tokenizer.from_file(path)
    yield plain
    config = json.loads(plain.to_str())
    if config["model"]["type"] != "WordPiece" or plain.normalizer is None:
        return
    there = [normalizers.Replace(letter, rune) for letter, rune in STAND_INS.items()]
    back = [normalizers.Replace(rune, letter) for letter, rune in STAND_INS.items()]
    steps = [*there, plain.normalizer, *back]
    if config["model"].get("max_input_chars_per_word") == WORD_CHARACTERS:
        steps.append(normalizers.Replace(Regex(LONG_WORD), STAND_INS["\u03c2"]))
    guarded = Tokenizer.from_file(path)
    guarded.normalizer = normalizers.Sequence(steps)
    yield guarded


def _converted(source: Tokenizer, package: PackageContext) -> Any:
    """Its graph: strings -> input_ids, attention_mask, cut to the length limit."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    source.no_padding()
    source.no_truncation()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=source,
        pad_token=source.id_to_token(package.pad_id),
        model_max_length=package.max_tokens,
        truncation_side=package.cut,
    )
    graph = convert_tokenizer(wrapped, with_detokenizer=False, truncation=True)
    for node in graph.get_ops():
        if node.get_type_name() == "WordpieceTokenizer":
            node.set_attribute("max_bytes_per_word", 4 * WORD_CHARACTERS)
    return graph


class _Opened:
    """A tokenizer graph, compiled: text -> ids."""

    def __init__(self, graph: Any) -> None:
        import openvino

        self._run = openvino.Core().compile_model(graph, "CPU")

    def __call__(self, text: str) -> Sequence[int]:
        """Its token ids; empty where the graph refuses the text."""
        try:
            ids: list[int] = self._run([text])["input_ids"][0].tolist()
        except (RuntimeError, IndexError):
            return []
        return ids
