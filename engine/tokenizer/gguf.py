"""The vocabulary in a GGUF file's metadata as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError
from engine.loading.gguf.file import GGUFFile

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a family of byte-level tokenizers cuts text into words before merging.

    Attributes:
        pattern: Cuts words in place of GPT-2's pattern; None keeps GPT-2's.
        split_digits: Every digit is a word of its own.
        normalize: Unicode NFC first.
        ignore_merges: A word that is a token becomes that token, whatever the merges say.
        add_bos: Whether text begins with BOS where the metadata does not say.
    """

    pattern: str | None = None
    split_digits: bool = False
    normalize: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _PreTokenizer(_LLAMA3_PATTERN, ignore_merges=True, add_bos=True)
_DIGITS = _PreTokenizer(split_digits=True)

# By tokenizer.ggml.pre, as the models' own tokenizer.json files define them.
_PRE_TOKENIZERS = {
    "default": _PreTokenizer(),
    "gpt-2": _PreTokenizer(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _PreTokenizer(_QWEN2_PATTERN, normalize=True),
    "tekken": _PreTokenizer(_TEKKEN_PATTERN, ignore_merges=True, add_bos=True),
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
    else:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported (gpt2, llama are)"
        )
    tokens = file["tokenizer.ggml.tokens"]
    types = file["tokenizer.ggml.token_type"]
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type != _USER_DEFINED)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    _add_post_processor(tokenizer, file, tokens, add_bos)
    return tokenizer


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
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.split_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece_bpe(file: GGUFFile) -> Tokenizer:
    tokens = file["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges_by_score(tokens, file["tokenizer.ggml.scores"], file["tokenizer.ggml.token_type"]),
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


def _merges_by_score(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The merges that make BPE choose as SentencePiece does.

    SentencePiece joins the neighbours whose joint piece has the highest score. So every way to split a
    piece in two pieces is a merge, and merges are ranked by the score of what they make.
    """
    normal = [index for index, token_type in enumerate(types) if token_type == _NORMAL]
    normal.sort(key=lambda index: -scores[index])
    pieces = {tokens[index] for index in normal}
    return [
        (piece[:cut], piece[cut:])
        for piece in (tokens[index] for index in normal)
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _add_post_processor(tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], add_bos: bool) -> None:
    """Make the tokenizer begin text with BOS and end it with EOS where the metadata says so."""
    template, special_tokens = ["$A"], []
    bos, eos = file.get("tokenizer.ggml.bos_token_id"), file.get("tokenizer.ggml.eos_token_id")
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
