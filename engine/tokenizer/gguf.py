"""The vocabulary in a GGUF file's metadata as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError
from engine.loading.gguf.config import end_token_ids, token_id
from engine.loading.gguf.file import GGUFFile
from engine.tokenizer.score_merges import merges_by_score

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_PATTERN = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3_PATTERN = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek's first: letters that have two cases, as its tokenizer.json lists them.
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_BLOOM_PATTERN = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a family of byte-level tokenizers cuts text into words before merging.

    Attributes:
        patterns: Each cuts the pieces that those before it have left, and what lies between its matches.
        normalize: Unicode NFC first.
        ignore_merges: A word that is a token becomes that token, whatever the merges say.
        add_bos: Whether text begins with BOS where the metadata does not say.
    """

    patterns: tuple[str, ...] = (_GPT2,)
    normalize: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _PreTokenizer((_LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)
_LLAMA3_MERGES = _PreTokenizer((_LLAMA3_PATTERN,))
_DIGITS = _PreTokenizer((r"\p{N}", _GPT2))
_PLAIN = _PreTokenizer()
_QWEN2 = _PreTokenizer((_QWEN2_PATTERN,), normalize=True)
_GPT4O = _PreTokenizer((_GPT4O_PATTERN,))
_DEEPSEEK3 = _PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3_PATTERN))
_BLOOM = _PreTokenizer((_BLOOM_PATTERN,))

# By tokenizer.ggml.pre, as the models' own tokenizer.json files define them.
_PRE_TOKENIZERS = {
    # Files from before the key was there, of whatever model.
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"], _PLAIN),
    **dict.fromkeys(["gigachat", "a.x-4.0", "mellum", "exaone4"], _PLAIN),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"], _DIGITS),
    **dict.fromkeys(["minerva-7b", "mellum2"], _DIGITS),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"], _LLAMA3),
    **dict.fromkeys(["midm-2.0"], _LLAMA3),
    **dict.fromkeys(["smaug-bpe", "dbrx", "chatglm-bpe"], _LLAMA3_MERGES),
    **dict.fromkeys(["glm4", "glm5"], _PreTokenizer((_LLAMA3_PATTERN,), ignore_merges=True)),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "solar-open"], _QWEN2),
    "stablelm2": _PreTokenizer((_QWEN2_PATTERN,)),
    "grok-2": _PreTokenizer((_QWEN2_PATTERN,)),
    "qwen35": _PreTokenizer((_QWEN35_PATTERN,)),
    "tekken": _PreTokenizer((_TEKKEN_PATTERN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "minimax-m2"], _GPT4O),
    "deepseek-llm": _PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_CASED}+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-\ud7ff]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": _PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
    ),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "joyai-llm"], _DEEPSEEK3),
    "falcon": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], _BLOOM),
    "viking": _PreTokenizer((_BLOOM_PATTERN, r"\p{N}")),
    **dict.fromkeys(
        ["bailingmoe", "bailingmoe2", "llada-moe"],
        _PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    "seed-coder": _PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
            r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "superbpe": _PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "minicpm5": _PreTokenizer((r"\p{N}{1,3}", _LLAMA3_PATTERN.replace(r"{1,3}", "+")), ignore_merges=True),
}


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The file's tokenizer, with its added tokens, decoder and BOS/EOS rule.

    Raises:
        CheckpointError: The file's kind of tokenizer or its pre-tokenizer is not supported.
    """
    kind = file["tokenizer.ggml.model"]
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(file)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece_bpe(file), True
    elif kind == "gemma4":
        tokenizer, add_bos = _merged_sentencepiece(file), True
    else:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported (gpt2, llama, gemma4 are)"
        )
    tokens, types = file["tokenizer.ggml.tokens"], _token_types(file)
    # What ends a text is never a part of it, whatever the file says that it is.
    ends = set(end_token_ids(file))
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type != _USER_DEFINED or index in ends)
            for index, (token, token_type) in enumerate(zip(tokens, types, strict=True))
            if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED) or index in ends
        ]
    )
    _add_post_processor(tokenizer, file, tokens, add_bos)
    return tokenizer


def _token_types(file: GGUFFile) -> list[int]:
    """The type of each token; normal where the file says none, but for what it names by role."""
    tokens = file["tokenizer.ggml.tokens"]
    types: list[int] | None = file.get("tokenizer.ggml.token_type")
    if types is None:
        types = [_NORMAL] * len(tokens)
        for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
            index = token_id(file, key)
            if index is not None:
                types[index] = _CONTROL
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type: expected {len(tokens)}, one a token, found {len(types)}"
        )
    return types


def _byte_level_bpe(file: GGUFFile) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {name!r} is not supported (supported: {', '.join(_PRE_TOKENIZERS)})"
        )
    pre = _PRE_TOKENIZERS[name]
    vocabulary = {token: token_id for token_id, token in enumerate(file["tokenizer.ggml.tokens"])}
    # Token texts hold no space: the byte-level alphabet writes it as "Ġ".
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    if pre.normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _merged_sentencepiece(file: GGUFFile) -> Tokenizer:
    """Gemma 4's: SentencePiece's spaces and bytes, merges of its own, and words that may have spaces in them."""
    tokens = file["tokenizer.ggml.tokens"]
    unknown = token_id(file, "unknown_token_id")
    # A merge is two tokens with a space between them, and tokens have no spaces.
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _sentencepiece_bpe(file: GGUFFile) -> Tokenizer:
    tokens = file["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = token_id(file, "unknown_token_id")
    pieces = [index for index, token_type in enumerate(_token_types(file)) if token_type == _NORMAL]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges_by_score(tokens, file["tokenizer.ggml.scores"], pieces),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    decoder_steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        decoder_steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(decoder_steps)
    return tokenizer


def _add_post_processor(tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], add_bos: bool) -> None:
    """Make the tokenizer begin text with BOS and end it with EOS where the metadata says so."""
    template, special_tokens = ["$A"], []
    bos, eos = token_id(file, "bos_token_id"), token_id(file, "eos_token_id")
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", add_bos):
        template.insert(0, tokens[bos])
        special_tokens.append((tokens[bos], bos))
    if eos is not None and file.get("tokenizer.ggml.add_eos_token", False):
        template.append(tokens[eos])
        special_tokens.append((tokens[eos], eos))
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special_tokens
        )
