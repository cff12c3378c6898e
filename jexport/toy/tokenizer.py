"""The tokenizer of a toy checkpoint: a byte-level BPE trained on the spot, or a given one checked.

Small, trained on sentences in 19 languages, and always the same. Knows no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jexport.errors import TokenizerError

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first four tokens, in the order of their ids (`<mask>` is the last token)."""

SENTENCES = (
    "The lighthouse keeper writes down the weather every morning before breakfast.",
    "Which of these two roads leads to the harbour, and which one to the market?",
    "Who repairs the clock in the tower when it stops during the winter?",
    "Represent the question, the document and the answer in the same space.",
    "Der Gärtner gießt die Rosen am Abend, wenn die Sonne nicht mehr brennt.",
    "La bibliothèque prête des livres, des cartes et quelques instruments de musique.",
    "El puente de madera cruza el río justo antes de la vieja fábrica.",
    "Il treno per la montagna parte ogni mattina alle sette e mezza.",
    "O mercado abre cedo e fecha quando acaba o peixe.",
    "De fietsenmaker op de hoek heeft altijd een pomp buiten staan.",
    "Zegar na wieży spóźnia się o pięć minut, ale nikomu to nie przeszkadza.",
    "Bahçedeki ceviz ağacı bu yıl çok meyve verdi.",
    "Người thợ mộc làm một chiếc bàn mới cho trường học.",
    "Старый мост через реку открыли после долгого ремонта.",
    "Το καράβι φτάνει στο νησί λίγο πριν νυχτώσει.",
    "المكتبة مفتوحة كل يوم من الصباح حتى المساء.",
    "הספרייה פתוחה כל יום מהבוקר עד הערב.",
    "गाँव का पुस्तकालय हर सुबह खुलता है।",
    "ตลาดเปิดแต่เช้าและปิดตอนบ่าย",
    "港の灯台は夜になると光ります。",
    "图书馆每天早上八点开门，晚上九点关门。",
    "도서관은 매일 아침 여덟 시에 문을 엽니다.",
)


def train() -> bytes:
    """A byte-level BPE as tokenizer.json: any text in, no `<unk>` out, and decoding gives it back.

    All 256 bytes are in its alphabet. Training on `SENTENCES` breaks ties by id, so that it gives
    the same merges every time.

    Returns:
        The file's bytes, UTF-8.
    """
    import tokenizers
    from tokenizers import pre_tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)
    tokenizer.add_special_tokens([mask])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return f"{tokenizer.to_str(pretty=True)}\n".encode()


SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
"""Words with the space before them, single digits, signs, white space: each is encoded alone."""


def train_byte_level(special_tokens: Sequence[str]) -> bytes:
    """A tokenizer of Qwen's kind: NFC, byte-level BPE, and nothing put around a text.

    Args:
        special_tokens: put after the vocabulary.

    Returns:
        The bytes of tokenizer.json, UTF-8.
    """
    import tokenizers
    from tokenizers import pre_tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    return f"{tokenizer.to_str(pretty=True)}\n".encode()


def read(path: Path) -> bytes:
    """A tokenizer.json as it is.

    Args:
        path: of the file.

    Returns:
        Its bytes.

    Raises:
        TokenizerError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"toy: cannot read the tokenizer {path}",
            evidence=str(error),
            fix="give the path of a tokenizer.json, or none for the built-in one",
        ) from error


def rows(tokenizer_json: bytes, path: Path | None) -> int:
    """How many rows the embedding table needs.

    Args:
        tokenizer_json: the file's bytes.
        path: where they were read, None for the built-in one; only errors name it.

    Returns:
        One more than the highest token id.

    Raises:
        TokenizerError: no tokenizer.json, or its special tokens are not XLM-R's.
    """
    everything = ids(tokenizer_json, path)
    special = {token: everything.get(token) for token in (*SPECIAL_TOKENS, "<mask>")}
    expected = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    if special["<mask>"] is None or any(special[token] != expected[token] for token in expected):
        raise TokenizerError(
            f"toy: {path} does not have the special tokens of XLM-R",
            evidence=f"it has {special}, wanted are {expected} and a <mask>",
            fix="give the tokenizer.json of an XLM-R model, or none for the built-in one",
        )
    return 1 + max(everything.values())


def ids(tokenizer_json: bytes, path: Path | None) -> dict[str, int]:
    """Every token's id.

    Args:
        tokenizer_json: the file's bytes.
        path: where they were read, None for the built-in one; only errors name it.

    Returns:
        By token, added ones too.

    Raises:
        TokenizerError: no tokenizer.json.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # ValueError here, but the library also raises bare Exception
        raise TokenizerError(
            f"toy: {path} is not a tokenizer.json",
            evidence=str(error),
            fix="give the path of a tokenizer.json, or none for the built-in one",
        ) from error
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary
