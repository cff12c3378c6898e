"""What sentence-transformers' modules are that jexport does not export, in words for a refusal.

Knows no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

UNSUPPORTED: Mapping[str, str] = {
    "WordEmbeddings": "looks up whole words by a Python word tokenizer (GloVe, word2vec), which no "
    "engine and no tokenizer.json has",
    "BoW": "counts the words of a vocabulary, by Python code",
    "WordWeights": "weighs the token vectors of whole words (tf-idf) before they are pooled",
    "CNN": "a convolution over the vectors of whole words",
    "LSTM": "a recurrent network over the vectors of whole words",
    "WeightedLayerPooling": "takes a mean over the hidden states of several layers",
    "CLIPModel": "embeds images and texts",
    "CLIPTextModel": "embeds images and texts",
    "SparseStaticEmbedding": "gives sparse vectors, one weight a token of the vocabulary",
    "SpladePooling": "gives sparse vectors (SPLADE), as wide as the vocabulary",
    "SparseAutoEncoder": "gives sparse vectors",
    "CSR": "gives sparse vectors",
    "MLMTransformer": "gives sparse vectors (SPLADE), as wide as the vocabulary",
    "MultiVectorMask": "gives a vector for each token (late interaction)",
    "HierarchicalTokenPooling": "gives several vectors for each text (late interaction)",
    "LogitScore": "scores a pair of texts (reranker)",
}


def described(kinds: Iterable[str]) -> str:
    """The unsupported modules among some, each with what it is.

    Args:
        kinds: names of module classes.

    Returns:
        A line for each, '' where all are unknown.
    """
    named = [kind for kind in dict.fromkeys(kinds) if kind in UNSUPPORTED]
    return "\n".join(f"{kind} {UNSUPPORTED[kind]}" for kind in named)
