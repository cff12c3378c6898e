"""Every key of a checkpoint's files, and what becomes of it: honoured, refused or harmless.

docs/checkpoint-keys.md is made from these tables (`keys_page`). A test reads the sources of the
installed sentence-transformers, transformers and peft, and fails for a key that they read and no
table has. Knows no weight and no layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jexport.errors import UnsupportedCheckpointError, nearest

Effect: TypeAlias = Literal["honoured", "refused", "harmless"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """What becomes of one key.

    Args:
        effect: 'honoured', 'refused' or 'harmless'.
        why: of a refused or harmless key the reason, of an honoured one what it does.
        accepted: values of a refused key that ask for nothing, and so are no reason to refuse.
    """

    effect: Effect
    why: str
    accepted: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class File:
    """The keys of one file, or of one table in a file.

    Args:
        title: how the documentation names it.
        keys: each known key by its name in the file.
        unknown: what becomes of a key that is not listed.
    """

    title: str
    keys: Mapping[str, Key]
    unknown: Key


def honoured(what: str) -> Key:
    """A key that takes effect.

    Args:
        what: it does, as docs/checkpoint-keys.md says it.

    Returns:
        A row of a File.
    """
    return Key(effect="honoured", why=what)


def refused(why: str, *accepted: Any) -> Key:
    """A key that is refused, unless its value is one of `accepted`, None or empty.

    Args:
        why: the reason; evidence of the error, and in docs/checkpoint-keys.md.
        accepted: values that ask for nothing; compared by type too, so that 1 is not True.

    Returns:
        A row of a File.
    """
    return Key(effect="refused", why=why, accepted=accepted)


def harmless(why: str) -> Key:
    """A key that changes no vector.

    Args:
        why: the reason, for docs/checkpoint-keys.md.

    Returns:
        A row of a File.
    """
    return Key(effect="harmless", why=why)


def check(file: File, settings: Mapping[str, Any], *, where: str) -> None:
    """Refuse the first key that would change a vector and is not honoured.

    Args:
        file: what is known of the file's keys.
        settings: the file's content, or that of a table in it.
        where: the file's path inside the checkpoint, for the message.

    Raises:
        UnsupportedCheckpointError: names file, key and value.
    """
    for name, value in settings.items():
        key = file.keys.get(name, file.unknown)
        if key.effect != "refused" or (name in file.keys and _asks_nothing(value, key)):
            continue
        known = name in file.keys
        near = "" if known else nearest(str(name), file.keys)
        raise UnsupportedCheckpointError(
            f"{where}: '{name}' is " + ("not supported" if known else "a key that nobody knows"),
            evidence=f"{name} = {value!r:.200}\n{key.why}",
            fix=("" if known or not near.startswith("did") else f"{near} Else ")
            + "remove the key, if vectors without it are what you want",
        )


def _asks_nothing(value: Any, key: Key) -> bool:
    empty = value is None or (isinstance(value, (dict, list, str)) and not value)
    return empty or any(type(value) is type(one) and value == one for one in key.accepted)


NOT_READ = harmless("not read by sentence-transformers")
RAISES = refused("sentence-transformers 6.2 raises for a key that it does not know")
NEW = refused("sentence-transformers 6.2 does not read it; a later one may let it change vectors")
HUB = harmless("where to fetch from; sentence-transformers puts its own value over it")

MODULES = File(
    title="modules.json, of each entry",
    keys={
        "type": honoured(
            "Transformer or StaticEmbedding or a Router of them, then Pooling, then Dense, "
            "LayerNorm, Normalize and Dropout in any order; other modules are refused"
        ),
        "path": honoured("the module's folder"),
        "name": honoured("names must differ, as the modules of one name replace each other"),
        "idx": NOT_READ,
        "kwargs": harmless(
            "arguments of `encode` that a module accepts; none of these modules' "
            "results depend on one that is not given"
        ),
    },
    unknown=NEW,
)

SENTENCE_TRANSFORMER = File(
    title="config_sentence_transformers.json",
    keys={
        "prompts": honoured(
            "`encode(prompt_name=)`, `encode_query`, `encode_document`; a null "
            "prompt is the empty one"
        ),
        "default_prompt_name": honoured("the prompt before every text; an unknown name is refused"),
        "similarity_fn_name": honoured(
            "kept; a name that sentence-transformers does not support is cosine, as there"
        ),
        "truncate_dim": honoured("vectors are cut after normalisation, and not normalised again"),
        "model_type": refused(
            "the modules are those of another class: as a SentenceTransformer "
            "they would be dropped for mean pooling",
            "SentenceTransformer",
        ),
        "requirements": honoured("unmet ones are refused, as sentence-transformers raises"),
        "__version__": harmless("only a warning depends on it"),
        "max_active_dims": harmless("read by SparseEncoder only"),
        "activation_fn": harmless("read by CrossEncoder only"),
        "keep_in_fp32_modules": harmless("read by CrossEncoder only"),
        **dict.fromkeys(
            (
                "query_prefix",
                "document_prefix",
                "query_length",
                "document_length",
                "query_expansion",
                "do_query_expansion",
                "attend_to_expansion_tokens",
                "attend_to_mask_tokens",
                "skiplist_words",
            ),
            harmless("read by MultiVectorEncoder only"),
        ),
    },
    unknown=NEW,
)

TRANSFORMER = File(
    title="sentence_bert_config.json (or sentence_roberta_config.json and the five other old "
    "names; the first that is not empty)",
    keys={
        "max_seq_length": honoured(
            "the length limit, unless processor_kwargs.model_max_length "
            "is there; a learned table of positions caps it"
        ),
        "do_lower_case": honoured(
            "Lowercase is put before the tokenizer's normaliser, unless it has one"
        ),
        "transformer_task": refused("another head or class", "feature-extraction"),
        "modality_config": honoured(
            "of text only; `message` sends every text through a chat template and is refused"
        ),
        "module_output_name": refused("the token vectors go elsewhere", "token_embeddings"),
        "processing_kwargs": honoured("`text.max_length`; whatever else is in it is refused"),
        "unpad_inputs": harmless("packs batches without padding; the same vectors"),
        "query_length": refused("a length limit of queries alone"),
        "document_length": refused("a length limit of documents alone"),
        "query_expansion": refused("queries padded with mask tokens, for late interaction"),
        "tokenizer_name_or_path": refused("a tokenizer from somewhere else"),
        "cache_dir": HUB,
        "backend": harmless("sentence-transformers puts its own value over it"),
        "model_kwargs": honoured("see its own table"),
        "model_args": honoured("old name of model_kwargs; wins over it where both are there"),
        "processor_kwargs": honoured("given to AutoTokenizer"),
        "tokenizer_args": honoured("old name of processor_kwargs; wins where both are there"),
        "config_kwargs": honoured("given to AutoConfig"),
        "config_args": honoured("old name of config_kwargs; wins where both are there"),
    },
    unknown=RAISES,
)

_SAME = harmless("the same vectors, up to rounding")
_FETCH = {
    name: HUB
    for name in (
        "revision",
        "subfolder",
        "token",
        "cache_dir",
        "local_files_only",
        "trust_remote_code",
    )
}

MODEL_KWARGS = File(
    title="sentence_bert_config.json: model_kwargs",
    keys={
        **_FETCH,
        "torch_dtype": harmless("artifacts are built, and judged, in float32 arithmetic"),
        "dtype": harmless("artifacts are built, and judged, in float32 arithmetic"),
        "attn_implementation": _SAME,
        "device_map": _SAME,
        "low_cpu_mem_usage": _SAME,
        "use_safetensors": harmless("the same weights in another file format"),
        "add_pooling_layer": harmless("the pooler's output is not used"),
        "provider": harmless("of ONNX Runtime only"),
        "file_name": harmless("of ONNX and OpenVINO only"),
        "export": harmless("of ONNX and OpenVINO only"),
    },
    unknown=refused("it may change how the model is loaded"),
)

PROCESSOR_KWARGS = File(
    title="sentence_bert_config.json: processor_kwargs",
    keys={
        **_FETCH,
        "model_max_length": honoured("beats max_seq_length"),
        "truncation_side": honoured("the end that a long text loses"),
        "use_fast": harmless("transformers 5 has fast tokenizers only"),
        "chat_template": harmless("no text goes through it without the message modality"),
        "gguf_file": refused("a tokenizer from a GGUF file"),
        "code_revision": refused("a tokenizer of another commit's code"),
        "split_special_tokens": refused("special tokens in a text are split", False),
    },
    unknown=honoured("given to AutoTokenizer, whose backend becomes the artifact's tokenizer.json"),
)

CONFIG_KWARGS = File(
    title="sentence_bert_config.json: config_kwargs",
    keys={
        **_FETCH,
        "gguf_file": refused("a config from a GGUF file"),
        "code_revision": refused("a config of another commit's code"),
        "quantization_config": refused("the float checkpoint is needed"),
    },
    unknown=honoured("given to AutoConfig: what the config class knows takes effect"),
)

PROCESSING_TEXT = File(
    title="sentence_bert_config.json: processing_kwargs.text",
    keys={
        "max_length": honoured("the length limit, over all others"),
        "padding": refused(
            "padding changes batches, not vectors, only where it is to the longest", True, "longest"
        ),
        "truncation": refused("another truncation", True, "longest_first"),
        "return_tensors": harmless("numbers are the same in any container"),
        "logits_to_keep": harmless("of text generation only"),
    },
    unknown=refused("an argument of the tokenizer's call that jexport does not have"),
)

PROCESSING = File(
    title="sentence_bert_config.json: processing_kwargs",
    keys={
        "text": honoured("see its own table"),
        "common": refused("arguments of the tokenizer's call"),
        "audio": harmless("no text"),
        "image": harmless("no text"),
        "video": harmless("no text"),
        "chat_template": harmless("no text goes through it without the message modality"),
        "restore_suffix": harmless("of chat templates only"),
    },
    unknown=refused("sentence-transformers warns of it"),
)

POOLING = File(
    title="1_Pooling/config.json",
    keys={
        "embedding_dimension": honoured("must be the model's width"),
        "word_embedding_dimension": honoured("old name of embedding_dimension"),
        "pooling_mode": honoured(
            "cls, mean, max, mean_sqrt_len_tokens, weightedmean or lasttoken, or a list of them, "
            "whose vectors are joined in its order"
        ),
        **{
            f"pooling_mode_{mode}": honoured(
                "old form of pooling_mode; not read beside it. Several are joined in the order "
                "cls, max, mean, mean_sqrt_len, weightedmean, last"
            )
            for mode in (
                "cls_token",
                "mean_tokens",
                "max_tokens",
                "mean_sqrt_len_tokens",
                "lasttoken",
                "weightedmean_tokens",
            )
        },
        "include_prompt": honoured(
            "false leaves the prompt's tokens out of the pooling; refused where more than a "
            "normalisation follows the pooling, or several poolings are joined"
        ),
    },
    unknown=RAISES,
)

NORMALIZE = File(
    title="2_Normalize/config.json",
    keys={
        "module_input_name": refused("another vector than the text's", "sentence_embedding"),
        "module_output_name": refused("another vector than the text's", "sentence_embedding"),
    },
    unknown=harmless("the module reads its own two keys and drops all others"),
)

DENSE = File(
    title="2_Dense/config.json",
    keys={
        "in_features": honoured("must be the size of the vectors before it"),
        "out_features": honoured("the size of the vectors after it"),
        "bias": honoured("as in torch.nn.Linear; absent: true"),
        "activation_function": honoured(
            "a class of torch; absent, or a path that is not torch's: Tanh, as in "
            "sentence-transformers without trust_remote_code"
        ),
        "use_residual": honoured(
            "adds the vector before it, by residual.weight where the sizes differ"
        ),
        "module_input_name": refused("another vector than the text's", "sentence_embedding"),
        "module_output_name": refused("another vector than the text's", "sentence_embedding"),
        "init_weight": refused("a start value, no part of what is saved"),
        "init_bias": refused("a start value, no part of what is saved"),
    },
    unknown=harmless("sentence-transformers warns of it, and drops it"),
)

LAYER_NORM = File(
    title="config.json of a LayerNorm module",
    keys={"dimension": honoured("must be the size of the vectors before it")},
    unknown=RAISES,
)

DROPOUT = File(
    title="config.json of a Dropout module",
    keys={"dropout": harmless("nothing is dropped outside of training")},
    unknown=RAISES,
)

ROUTER = File(
    title="router_config.json (or config.json) of a Router module",
    keys={
        "types": honoured("the class of each module"),
        "structure": honoured("the modules of each route; routes may share some"),
        "parameters": honoured("see its own table"),
    },
    unknown=NOT_READ,
)

ROUTER_PARAMETERS = File(
    title="router_config.json: parameters",
    keys={
        "default_route": honoured("built without `--use`"),
        "allow_empty_key": honoured("true (and missing): the first route is the default one"),
        "route_mappings": honoured("the route of a task, for texts; other modalities are left out"),
    },
    unknown=RAISES,
)

_BACKEND = honoured("through the backend of AutoTokenizer, which becomes tokenizer.json")
TOKENIZER = File(
    title="tokenizer_config.json",
    keys={
        "model_max_length": honoured("the length limit where nothing else states one"),
        "max_len": honoured("old name of model_max_length"),
        "truncation_side": honoured("the end that a long text loses"),
        "padding_side": refused(
            "on the left of learned positions the vectors of sentence-transformers depend on the "
            "other texts of the batch; harmless for every other model",
            "right",
            "left",
        ),
        "pad_token": honoured("what fills short rows of a batch"),
        "model_input_names": harmless("a text alone has segment 0, checked with the tokenizer"),
        "chat_template": harmless(
            "no text goes through it without the message modality; without "
            "modules.json sentence-transformers takes it: refused"
        ),
        "split_special_tokens": refused("special tokens in a text are split", False),
        "auto_map": honoured(
            "refused without --trust-remote-code, unless transformers has the tokenizer"
        ),
        "tokenizer_class": _BACKEND,
        "added_tokens_decoder": _BACKEND,
        "add_prefix_space": _BACKEND,
        "add_bos_token": _BACKEND,
        "add_eos_token": _BACKEND,
        "do_lower_case": _BACKEND,
        "strip_accents": _BACKEND,
        "tokenize_chinese_chars": _BACKEND,
        "extra_special_tokens": _BACKEND,
        "additional_special_tokens": _BACKEND,
        **dict.fromkeys(
            (f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "cls", "mask")), _BACKEND
        ),
        **dict.fromkeys(
            ("stride", "truncation_strategy", "pad_token_type_id", "pad_to_multiple_of"),
            harmless("each call states its own truncation and padding"),
        ),
        "post_processor": _BACKEND,
        "unk_id": _BACKEND,
        "fix_mistral_regex": _BACKEND,
        "model_specific_special_tokens": _BACKEND,
        **dict.fromkeys(
            (
                "vocab",
                "merges",
                "vocab_file",
                "merges_file",
                "tokenizer_file",
                "tokenizer_object",
                "gguf_file",
                "init_inputs",
            ),
            _BACKEND,
        ),
        **dict.fromkeys(
            ("tokenizer_truncation", "tokenizer_padding"),
            harmless("each call states its own truncation and padding"),
        ),
        **dict.fromkeys(
            (
                "name_or_path",
                "processor_class",
                "verbose",
                "clean_up_tokenization_spaces",
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
                "response_template",
                "response_schema",
                "chat_control_tokens",
                "backend",
                "files_loaded",
                "_commit_hash",
                "is_local",
                "use_fast",
            ),
            harmless("of decoding, chats or bookkeeping"),
        ),
    },
    unknown=honoured(
        "reaches nothing but the tokenizer's class, whose backend becomes the "
        "artifact's tokenizer.json"
    ),
)

SPECIAL_TOKENS = File(
    title="special_tokens_map.json, added_tokens.json, vocab.txt, *.model",
    keys={},
    unknown=_BACKEND,
)

GENERATION = File(
    title="generation_config.json, chat_template.jinja, chat_template.json",
    keys={},
    unknown=harmless(
        "of text generation and chats; without modules.json a chat template is refused"
    ),
)

CONFIG = File(
    title="config.json",
    keys={
        "model_type": honoured("the class that transformers has for it"),
        "architectures": honoured(
            "without modules.json: a name that ends in ForCausalLM means the "
            "last token, as in sentence-transformers"
        ),
        "auto_map": honoured(
            "not read where transformers has the architecture, as there; else "
            "refused without --trust-remote-code"
        ),
        "quantization_config": refused("the float checkpoint is needed"),
        "torch_dtype": harmless("artifacts are built, and judged, in float32 arithmetic"),
        "dtype": harmless("artifacts are built, and judged, in float32 arithmetic"),
        "is_encoder_decoder": honoured(
            "of T5, mT5 and UMT5 the encoder alone is taken, as in sentence-transformers; other "
            "encoder-decoders are refused"
        ),
        "max_position_embeddings": honoured(
            "caps the length limit where nothing else states one; "
            "also under its name in the architecture's "
            "attribute_map, such as n_positions"
        ),
        "matryoshka_dimensions": honoured("the sizes that `dimensions` offers"),
    },
    unknown=honoured(
        "config.json goes as a whole to transformers' class, the same that "
        "sentence-transformers takes; what the class does not know is ignored there, too"
    ),
)

_PLAIN_LORA = "only plain LoRA is merged"
ADAPTER = File(
    title="adapter_config.json",
    keys={
        "peft_type": refused(_PLAIN_LORA, "LORA"),
        "base_model_name_or_path": honoured("the base, unless its files are in the same folder"),
        "r": honoured("the rank"),
        "lora_alpha": honoured("the scale is lora_alpha / r"),
        "use_rslora": honoured("the scale is lora_alpha / sqrt(r)"),
        "rank_pattern": honoured("the rank of single modules"),
        "alpha_pattern": honoured("lora_alpha of single modules"),
        "target_modules": harmless("the file of weights has the matrices of exactly these"),
        "exclude_modules": harmless("the file of weights has no matrices of these"),
        "layers_to_transform": harmless("the file of weights has the matrices of exactly these"),
        "layers_pattern": harmless("the file of weights has the matrices of exactly these"),
        "bias": refused("the adapter brings biases", "none"),
        "fan_in_fan_out": refused("weights are stored transposed", False),
        "modules_to_save": refused("the adapter brings whole modules"),
        "init_lora_weights": refused(
            "this start changes the base's weights as well", True, False, "gaussian"
        ),
        "use_dora": refused(_PLAIN_LORA, False),
        "use_qalora": refused(_PLAIN_LORA, False),
        "use_bdlora": refused(_PLAIN_LORA, False),
        "lora_bias": refused("the adapter brings biases", False),
        "layer_replication": refused("layers are repeated"),
        "trainable_token_indices": refused("the adapter brings rows of the embedding table"),
        "target_parameters": refused("single parameters are adapted"),
        "alora_invocation_tokens": refused("the adapter acts from a token on"),
        "arrow_config": refused(_PLAIN_LORA),
        "kasa_config": refused(_PLAIN_LORA),
        "velora_config": refused(_PLAIN_LORA),
        "monteclora_config": refused(_PLAIN_LORA),
        "ensure_weight_tying": refused("tied weights are adapted together", False),
        "qalora_group_size": harmless("of QALoRA only"),
        "lora_dropout": harmless("nothing is dropped outside of training"),
        "inference_mode": harmless("of training only"),
        "task_type": harmless("names the head, which is not used"),
        "auto_mapping": harmless("names the base's class, which its config.json names"),
        "peft_version": harmless("who wrote it"),
        "revision": harmless("not passed on for the base by sentence-transformers"),
        "megatron_config": harmless("of training in parallel only"),
        "megatron_core": harmless("of training in parallel only"),
        "runtime_config": harmless("of memory only"),
        **dict.fromkeys(
            ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
            harmless("of the start of training, which init_lora_weights names"),
        ),
    },
    unknown=refused("peft of today does not read it; a later one may let it change vectors"),
)

FILES: tuple[File, ...] = (
    MODULES,
    SENTENCE_TRANSFORMER,
    TRANSFORMER,
    MODEL_KWARGS,
    PROCESSOR_KWARGS,
    CONFIG_KWARGS,
    PROCESSING,
    PROCESSING_TEXT,
    POOLING,
    DENSE,
    LAYER_NORM,
    NORMALIZE,
    DROPOUT,
    ROUTER,
    ROUTER_PARAMETERS,
    TOKENIZER,
    SPECIAL_TOKENS,
    GENERATION,
    CONFIG,
    ADAPTER,
)
"""In the order of the documentation."""
