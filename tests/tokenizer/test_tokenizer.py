"""Tokenizers against sentencepiece, transformers, and BPE written out plainly here."""

from __future__ import annotations

import io
import json
import os
import struct
import unicodedata
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.cache_directory import caching_in
from engine.errors import CheckpointError, ModelNotFoundError, RequestError
from engine.loading.gguf.file import GGUFFile
from engine.loading.resolve import resolve_model
from engine.tokenizer.gguf import _PRE_TOKENIZERS
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

CORPUS = [
    "Hello world, this is a test of the tokenizer; it isn't long.",
    "In 2024 the price rose from 1,234.56 to 98765 dollars!  We'll see...",
    "aaa aaaa aaaaa banana bandana ababab abababab",
    "the the then there these\tthose\n\nnew lines\r\n\r\n    indented    code",
    "def main(x): return x[0] + 'It's HELLO World/path'",
    "été naïve 日本語 текст हिन्दी e\u0301 ½ Ⅷ 𝕏",
] * 20

TEXTS = [
    *CORPUS[:6],
    "",
    " ",
    "In 2024",
    "  leading and trailing  ",
    "12 345 6789 ٣٤٥ x1y22z333",
    "I'M you'RE it's 'll '",
    "\n\n\n \n\t\t x \r\n",
    "emoji 👩‍👩‍👧 and 🇫🇷",
    "\x00\x01\x7f\u2028\u3000\ufeff",
]

RANDOM_TEXT = st.text(max_size=40) | st.text("ab 'tsSnN1239\n\t.,é語", max_size=40)


def for_texts(check: Callable[[str], None], more: st.SearchStrategy[str] = RANDOM_TEXT) -> None:
    """Run `check` on TEXTS and on random ones."""
    for text in TEXTS:
        check(text)
    settings(deadline=None, max_examples=150)(given(RANDOM_TEXT | more)(check))()


def write_gguf(path: Path, model: str, tokens: list[str], types: list[int], **metadata: object) -> Path:
    """A GGUF file with a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class ByteLevel:
    """A small byte-level vocabulary, and its tokenization written out plainly."""

    def __init__(self) -> None:
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(CORPUS, trainer)
        model = json.loads(trained.to_str())["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        self.merges: list[tuple[str, str]] = [tuple(merge) for merge in model["merges"]]
        self.ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self.byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def write(self, path: Path, **metadata: object) -> Path:
        tokens = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        types = [CONTROL if token.startswith("<|") else NORMAL for token in tokens]
        merges = [" ".join(merge) for merge in self.merges]
        return write_gguf(path, "gpt2", tokens, types, token_merges=merges, **metadata)

    def encode(self, words: Iterable[str], ignore_merges: bool) -> list[int]:
        ids = []
        for word in words:
            ((symbols, _),) = self.byte_level.pre_tokenize_str(word) if word else [("", 0)]
            is_token = ignore_merges and symbols in self.vocabulary
            parts = [symbols] if is_token else list(symbols)
            while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
                best = min(pairs, key=self.ranks.__getitem__)
                at = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == best)
                parts[at : at + 2] = ["".join(best)]
            ids += [self.vocabulary[part] for part in parts]
        return ids


BYTE_LEVEL = ByteLevel()

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHARED = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASELESS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_of(name: str, text: str) -> list[str]:
    """The words of `text` as the published definition of a pre-tokenizer cuts them."""
    if name in ("smollm", "starcoder", "refact"):
        pieces = regex.findall(r"\p{N}|\P{N}+", text)
        return [word for piece in pieces for word in regex.findall(GPT2, piece)]
    pattern = {
        "gpt-2": GPT2,
        "llama-bpe": CASELESS + r"|\p{N}{1,3}" + SHARED,
        "qwen2": CASELESS + r"|\p{N}" + SHARED,
        "tekken": TEKKEN,
    }[name]
    return regex.findall(pattern, text)


PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe", "tekken"]


@pytest.fixture(scope="module")
def byte_level_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("byte-level")
    return {
        name: load_tokenizer(BYTE_LEVEL.write(directory / f"{name}.gguf", tokenizer_pre=name))
        for name in [*PRE_TOKENIZERS, "qwen2"]
    }


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe(byte_level_tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = byte_level_tokenizers[name]

    def check(text: str) -> None:
        if "<|endoftext|>" in text:
            return  # it is a token of its own, and no words
        expected = BYTE_LEVEL.encode(words_of(name, text), name in ("llama-bpe", "tekken"))
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == text

    for_texts(check)


def test_qwen2_is_the_tokenizer_of_transformers(byte_level_tokenizers: dict[str, Tokenizer]) -> None:
    from transformers import Qwen2Tokenizer

    reference = Qwen2Tokenizer(vocab=BYTE_LEVEL.vocabulary, merges=BYTE_LEVEL.merges)
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False)
        assert byte_level_tokenizers["qwen2"].encode(text) == expected


def test_smollm2_splits_numbers_digit_by_digit() -> None:
    tokenizer = load_tokenizer(resolve_model("llama"))
    tokens = [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("In 2024")]
    assert tokens == [b"In", b" ", b"2", b"0", b"2", b"4"]
    assert tokenizer.encode("In 2024") == [788, 216, 34, 32, 34, 36]
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id) == (49152, 1)
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.special_token_ids == frozenset(range(17))


def test_bos_follows_the_metadata_and_then_the_family(tmp_path: Path) -> None:
    def encode(**metadata: object) -> list[int]:
        path = BYTE_LEVEL.write(tmp_path / "model.gguf", bos_token_id=1, eos_token_id=2, **metadata)
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode("a", add_special_tokens=False) == [BYTE_LEVEL.vocabulary["a"]]
        return tokenizer.encode("a")

    a = BYTE_LEVEL.vocabulary["a"]
    assert encode(tokenizer_pre="smollm") == [a]
    assert encode(tokenizer_pre="llama-bpe") == [1, a]
    assert encode(tokenizer_pre="llama-bpe", add_bos_token=False) == [a]
    assert encode(tokenizer_pre="smollm", add_bos_token=True, add_eos_token=True) == [1, a, 2]


def test_special_tokens_in_text_become_their_ids(byte_level_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = byte_level_tokenizers["smollm"]
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert ids == [1, BYTE_LEVEL.vocabulary["a"], 2]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"


def test_unsupported_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="kimi-k2"):
        load_tokenizer(BYTE_LEVEL.write(tmp_path / "a.gguf", tokenizer_pre="kimi-k2"))
    with pytest.raises(CheckpointError, match="rwkv"):
        load_tokenizer(write_gguf(tmp_path / "b.gguf", "rwkv", ["a"], [NORMAL]))


def test_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    unknown_piece = {"token_merges": ["a zz"], "tokenizer_pre": "gpt-2"}
    no_such_token = {"token_merges": [], "tokenizer_pre": "gpt-2", "bos_token_id": 7}
    for metadata in (unknown_piece, no_such_token):
        path = write_gguf(tmp_path / "model.gguf", "gpt2", ["a", "b"], [NORMAL, NORMAL], **metadata)
        with pytest.raises(CheckpointError, match="damaged"):
            load_tokenizer(path)


def test_malformed_text_is_a_request_error(byte_level_tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="surrogate") as caught:
        byte_level_tokenizers["smollm"].encode("a\ud800b")
    assert caught.value.field == "prompt"


def test_ids_without_a_token_have_no_text(byte_level_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = byte_level_tokenizers["smollm"]
    assert tokenizer.decode([tokenizer.vocab_size, 10**12, -1]) == ""
    assert tokenizer.token_bytes(2**40) == b""


USER_DEFINED_PIECES = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<tag>"]


def train_sentencepiece(dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=[] if dummy_prefix else USER_DEFINED_PIECES,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentencepiece(path: Path, model: sentencepiece.SentencePieceProcessor, dummy_prefix: bool) -> Path:
    """The model as llama.cpp's converter writes it."""
    tokens, scores, types = [], [], []
    for index in range(model.get_piece_size()):
        piece = model.id_to_piece(index)
        kind = (
            BYTE
            if model.is_byte(index)
            else CONTROL
            if model.is_control(index)
            else UNKNOWN
            if model.is_unknown(index)
            else USER_DEFINED
            if not dummy_prefix and piece in USER_DEFINED_PIECES
            else NORMAL
        )
        tokens.append(piece.replace("▁", " ") if kind == USER_DEFINED else piece)
        scores.append(model.get_score(index) if kind == NORMAL else -1000.0)
        types.append(kind)
    return write_gguf(
        path,
        "llama",
        tokens,
        types,
        token_scores=scores,
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        add_bos_token=False,
        add_space_prefix=dummy_prefix,
    )


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_bpe(tmp_path: Path, dummy_prefix: bool) -> None:
    """Llama 2 puts a space before the text; Gemma has user-defined pieces instead."""
    reference = train_sentencepiece(dummy_prefix)
    path = write_sentencepiece(tmp_path / "model.gguf", reference, dummy_prefix)
    with caching_in(str(tmp_path / "cache")):
        tokenizer = load_tokenizer(path)
        assert len(list((tmp_path / "cache" / "vocabularies").iterdir())) == 1
        kept = load_tokenizer(path)

    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert kept.encode(text) == ids
        assert tokenizer.decode(ids) == text

    for_texts(check, st.text("ab \n", max_size=40))


def protobuf_field(number: int, value: bytes | str | float | int) -> bytes:
    """One field in protobuf's wire format."""

    def varint(value: int) -> bytes:
        data = bytearray()
        while value >= 0x80:
            data.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*data, value])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece_of(file: GGUFFile) -> sentencepiece.SentencePieceProcessor:
    """The vocabulary of a GGUF file as a SentencePiece BPE model."""
    tokens, scores = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.scores"]
    types = list(file["tokenizer.ggml.token_type"])
    types[file["tokenizer.ggml.unknown_token_id"]] = UNKNOWN
    pieces = (
        protobuf_field(1, token.replace(" ", "▁") if kind == USER_DEFINED else token)
        + protobuf_field(2, score)
        + protobuf_field(3, kind)
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    bpe, byte_fallback = protobuf_field(3, 2), protobuf_field(35, 1)
    normalizer = protobuf_field(1, "identity") + protobuf_field(3, 0) + protobuf_field(4, 0)
    proto = b"".join(protobuf_field(1, piece) for piece in pieces)
    proto += protobuf_field(2, bpe + byte_fallback) + protobuf_field(3, normalizer)
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def test_gemma_encodes_as_sentencepiece() -> None:
    try:
        path = resolve_model("gemma")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(path)
    reference = sentencepiece_of(GGUFFile(path))

    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text

    for_texts(check, st.text("ab \n\t<>", max_size=80))
    for text in ["<table><tr><td>x</td></tr>", " " * 100 + "\n" * 100, "hahaha" * 50, "----====" * 9]:
        check(text)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 2
    assert tokenizer.eos_token_ids == (1, 106)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def save_directory(path: Path, **config: object) -> tokenizers.Tokenizer:
    """A model directory with a tokenizer.json that carries training settings, as some do."""
    backend = tokenizers.Tokenizer(models.BPE(BYTE_LEVEL.vocabulary, BYTE_LEVEL.merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra|>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


def test_directory(tmp_path: Path) -> None:
    save_directory(tmp_path, eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == BYTE_LEVEL.encode(words_of("gpt-2", text), ignore_merges=False)
    assert tokenizer.vocab_size == len(BYTE_LEVEL.vocabulary) + 1
    assert tokenizer.eos_token_ids == (0, 3, 2)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.special_token_ids == {0, 1, 2, len(BYTE_LEVEL.vocabulary)}
    assert not tokenizer.has_chat_template
    (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_token_ids == (7, 2)


def test_directory_with_sentencepiece_model_only(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers converts tokenizer.model through protobuf")
    reference = train_sentencepiece(dummy_prefix=True)
    (tmp_path / "tokenizer.model").write_bytes(reference.serialized_model_proto())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False, "unk_token": "<unk>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    # The conversion puts no space before a text that begins with one; SentencePiece does.
    for text in [text for text in TEXTS if not text.startswith(" ")]:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def test_directories_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no decoder"):
        load_tokenizer(tmp_path)
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="WordPiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pre", sorted(_PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BYTE_LEVEL.write(tmp_path / "a.gguf", tokenizer_pre=pre, add_bos_token=False))
    for text in ("Don't  stop\n\n\t1234567 is 3.5€, 你好 e\u0301 — f(x) == {y};\r\n  end  ", "", " ", "'S"):
        expected = unicodedata.normalize("NFC", text) if _PRE_TOKENIZERS[pre].normalize else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("kind", [CONTROL, 4, NORMAL], ids=["control", "user-defined", "normal"])
def test_what_ends_a_turn_whatever_its_type(kind: int, tmp_path: Path) -> None:
    tokens = ["a", "b", "<|im_end|>", "ab", "</s>"]
    tokenizer = load_tokenizer(
        write_gguf(
            tmp_path / "a.gguf", "gpt2", tokens, [NORMAL, NORMAL, kind, NORMAL, NORMAL], token_merges=["a b"]
        )
    )
    assert tokenizer.eos_token_ids == (2,)
    assert 2 in tokenizer.special_token_ids
    assert tokenizer.encode("ab<|im_end|>") == [3, 2]


def test_types_are_optional_and_ids_of_nothing_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<end>", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2**32 - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode("ab<end>") == [3, 2]
    assert "padding_token_id: 4294967295 is no token" in caplog.text


VOCABULARIES = Path(os.environ.get("GGUF_VOCABULARIES", "absent"))
"""The models directory of llama.cpp, which has vocabularies with golden encodings beside them."""


@pytest.mark.slow
@pytest.mark.skipif(not VOCABULARIES.exists(), reason="GGUF_VOCABULARIES names no directory")
def test_golden_encodings() -> None:
    for path in sorted(VOCABULARIES.glob("ggml-vocab-*.gguf")):
        texts = path.with_name(f"{path.name}.inp")
        if not texts.exists() or "bert" in path.name:
            continue
        tokenizer = load_tokenizer(path)
        golden = path.with_name(f"{path.name}.out").read_text().splitlines()
        with texts.open(encoding="utf-8", newline="") as file:
            pieces = file.read().split("\n__ggml_vocab_test__\n")
        for text, ids in zip(pieces, golden, strict=False):
            assert tokenizer.encode(text, add_special_tokens=False) == [
                int(index) for index in ids.split()
            ], path
