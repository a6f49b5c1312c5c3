"""The measures by hand, and the command on a tiny model beside transformers' own."""

from __future__ import annotations

import json
import math
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from tokenizers.processors import TemplateProcessing

from engine.compression.recipe import Recipe
from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.quality.__main__ import cut_prompts, main
from engine.quality.making import Job, checkpoint_directory, make_checkpoint
from engine.quality.measure import count_weights
from engine.quality.metrics import (
    Scores,
    first_divergence,
    kl_divergence,
    make_windows,
    median_divergence,
    pareto_front,
)
from engine.quality.report import Result, format_table, plot
from engine.quality.variant import parse_variant, parse_variants
from engine.tokenizer.files import byte_tokenizer
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint

WINDOW, STRIDE = 64, 24
TEXT = " ".join(f"{number} squared is {number * number}." for number in range(17))
BOS = 300
"""A token that no byte has."""


def usual_starts(num_tokens: int, size: int, stride: int) -> dict[int, int]:
    """The start of the window that each token is scored in, as the usual loop over windows has it."""
    starts = {}
    scored_before = 1
    for start in range(0, num_tokens, stride):
        end = min(start + size, num_tokens)
        starts |= dict.fromkeys(range(scored_before, end), start)
        scored_before = end
        if end == num_tokens:
            break
    return starts


@pytest.mark.parametrize(("size", "stride"), [(8, 4), (8, 7), (8, 3), (8, 1), (2, 1), (100, 30)])
def test_every_token_but_the_first_is_scored_once(size: int, stride: int) -> None:
    for num_tokens in range(1, 40):
        windows = make_windows(num_tokens, size, stride)
        scored = [(t, window.start) for window in windows for t in range(window.first_scored, window.end)]
        assert [token for token, _ in scored] == list(range(1, num_tokens))
        assert dict(scored) == usual_starts(num_tokens, size, stride)
        assert all(window.end - window.start <= size for window in windows)
        assert all(window.end - window.first_scored <= stride for window in windows)


def test_kl_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(4)]
    found = kl_divergence(p.clamp(min=1e-30).log(), q.log())
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_scores_by_hand() -> None:
    uniform, skewed = torch.full((1, 4), 0.25), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    scores = Scores.empty(3)
    scores.add([2, 0], [1, 3], torch.cat([uniform, skewed]).log(), torch.cat([skewed, skewed]).log())
    assert math.isnan(scores.perplexity)
    scores.add([1], [0], skewed.log(), uniform.log())
    # A geometric mean of inverse probabilities.
    assert scores.perplexity == pytest.approx((4 * 2.5 * 10) ** (1 / 3), rel=1e-6)
    from_skewed = sum(p * math.log(p / 0.25) for p in (0.1, 0.2, 0.3, 0.4))
    from_uniform = sum(0.25 * math.log(0.25 / p) for p in (0.1, 0.2, 0.3, 0.4))
    assert scores.kl_divergence == pytest.approx((from_skewed + from_uniform) / 3, rel=1e-5)
    # Of equal ones the first counts: 0 beside 3.
    assert scores.agreement == pytest.approx(1 / 3)


def test_divergence_of_continuations() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert median_divergence([[1, 2], [3, 4]], [[1, 2], [0, 4]]) == 1.0
    assert median_divergence([[1, 2], [3, 4], [5, 6]], [[1, 2], [0, 4], [5, 0]]) == 1.0


def test_the_pareto_front_is_what_nothing_beats() -> None:
    assert pareto_front([(4, 0), (1, 3), (2, 3), (2, 1), (3, 2), (2, 1)]) == [1, 3, 5, 0]
    source = random.Random(0)
    for _ in range(200):
        points = [(source.randrange(5), source.randrange(5)) for _ in range(source.randrange(9))]
        beaten = {
            index
            for index, (x, y) in enumerate(points)
            for other in points
            if other != (x, y) and other[0] <= x and other[1] <= y
        }
        front = pareto_front([(float(x), float(y)) for x, y in points])
        assert sorted(front) == [index for index in range(len(points)) if index not in beaten]
        assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_prompts_are_cut_evenly() -> None:
    assert cut_prompts(range(10), 3, 4) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut_prompts(range(10), 1, 10) == [list(range(10))]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("none", {"quant": "none"}),
        ("int8:kv=bfloat16", {"quant": "int8", "kv_cache_dtype": "bfloat16"}),
        ("int4", {"quant": "int4"}),
        ("int4:g128", {"quant": "int4:g128"}),
        ("int4:kv=int8:g32", {"quant": "int4:g32", "kv_cache_dtype": "int8"}),
        ("int4:g64,*.down_proj=int8,lm_head=none", {"quant": "int4:g64,*.down_proj=int8,lm_head=none"}),
    ],
)
def test_variants_name_options(text: str, options: dict[str, Any]) -> None:
    variant = parse_variant(text)
    assert (variant.name, variant.options) == (text, options)
    config = variant.config("m", max_num_seqs=3)
    assert (config.model, config.max_num_seqs) == ("m", 3)
    assert all(getattr(config, name) == value for name, value in options.items())


def test_a_directory_is_a_variant_as_it_is(tmp_path: Path) -> None:
    assert parse_variant(str(tmp_path)).config("m").model == str(tmp_path)
    variant = parse_variant(f"dir={tmp_path}:kv=int8")
    assert variant.options == {"model": str(tmp_path), "kv_cache_dtype": "int8"}


def test_an_algorithm_is_a_recipe() -> None:
    plain, mixed, rounded, smooth = parse_variants(
        "int4:g64,int4:g64:hadamard+gptq:kv=int8:seed=7,*.down_proj=int8,int4:g128:rtn,int8:token:smoothquant"
    )
    assert plain.recipe is None
    assert mixed.options == {"quant": "int4:g64,*.down_proj=int8", "kv_cache_dtype": "int8"}
    assert mixed.recipe == Recipe.parse("int4:g64,*.down_proj=int8", "hadamard+gptq")
    assert rounded.recipe == Recipe.parse("int4:g128", "rtn")
    # How activations are quantized is said when serving only.
    assert smooth.recipe == Recipe.parse("int8", "smoothquant")
    assert smooth.options == {"quant": "int8:token"}
    assert [variant.seeds(3) for variant in (plain, mixed, rounded, smooth)] == [[0], [7], [0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "int5",
            "'int5' is neither known nor a directory; known are auto, none, int8, int4, nf4, codebook4, "
            "sparse24:int8, sparse24:int4, lowrank:none, lowrank:int8, lowrank:int4, a directory",
        ),
        ("dir=/nowhere/at/all", "neither known nor a directory"),
        ("nf4:g32", "'g32' in 'nf4:g32' is not known"),
        ("int4:g48", "there may be g32, g64, g128, g0"),
        ("int4:g32:g128", "two words for one thing"),
        ("int4:kv=int8:kv=int8", "'kv=int8' is the second of its kind"),
        ("none:kv=int3", "kv must be one of auto, float32"),
        ("dir=.:int8", "after a directory there may be kv=TYPE only"),
        ("int8:gptq", "gptq is for int4"),
        ("int4:gptq:awq", "'awq' is the second of its kind"),
        ("int4:gptq+hadamard", "write hadamard + gptq"),
        ("int4:seed=3", "seed=3 is of a calibration: name an algorithm, hadamard"),
        ("int4:rtn:seed=3", "seed=3 must be a number, and rtn one that calibrates"),
        ("int4:gptq:seed=x", "seed=x must be a number"),
        ("", "known are auto, none"),
        ("none,,int8", "known are auto, none"),
        ("none,none", "'none' is there twice"),
    ],
)
def test_what_is_no_variant_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^variant") as error:
        parse_variants(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "smollm2", "qwen2"])
def test_weights_are_counted_as_transformers_counts_them(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, TINY_CONFIGS[family])
    # A tied head is no parameter of its own there either.
    expected = sum(parameter.numel() for parameter in load_reference(tmp_path).parameters())
    config = ModelConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert count_weights(config) == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def run(path: Path, variants: str, out: Path, *options: str) -> dict[str, Any]:
    """What the command writes."""
    text = out.parent / f"{out.name}.txt"
    text.write_text(TEXT)
    words = [str(path), "--variants", variants, "--text", str(text), "--out", str(out), "--device", "cpu"]
    sizes = ["--window", str(WINDOW), "--stride", str(STRIDE), "--continuation", "12"]
    assert main([*words, *sizes, *options]) == 0
    result: dict[str, Any] = json.loads((out / "quality.json").read_text())
    return result


def usual_perplexity(path: Path, token_ids: list[int], bos: int | None = None) -> float:
    """By transformers' model, each window at once."""
    model = load_reference(path)
    starts = usual_starts(len(token_ids), WINDOW, STRIDE)
    total = 0.0
    for start in sorted(set(starts.values())):
        window = token_ids[start : start + WINDOW]
        if bos is not None:
            window[0] = bos
        log_probs = reference_logits(model, window).double().log_softmax(dim=-1)
        for token in (token for token, its_start in starts.items() if its_start == start):
            total -= float(log_probs[token - start - 1, token_ids[token]])
    return math.exp(total / (len(token_ids) - 1))


def test_the_command_measures_and_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = run(checkpoint, f"int8,dir={checkpoint}", out)
    reference, int8, again = found["variants"]
    assert [row["variant"] for row in found["variants"]] == ["none", "int8", f"dir={checkpoint}"]
    token_ids = byte_tokenizer().encode(TEXT).ids
    assert found["text"]["num_tokens"] == len(token_ids) > 4 * WINDOW
    assert (found["window"], found["stride"], found["reference"]) == (WINDOW, STRIDE, "none")
    assert reference["perplexity"] == pytest.approx(usual_perplexity(checkpoint, token_ids), rel=1e-3)
    # The same weights in another process, beside what the first one wrote.
    for row in (reference, again):
        assert (row["kl_divergence"], row["agreement"], row["first_divergence"]) == (0.0, 1.0, 12)
        assert row["bits_per_weight"] == 32.0
    assert again["perplexity"] == reference["perplexity"]
    assert 0 < int8["kl_divergence"] < 0.5
    assert 0.5 < int8["agreement"] <= 1
    assert int8["perplexity"] != reference["perplexity"]
    assert 8 < int8["bits_per_weight"] < 12
    for row in found["variants"]:
        assert min(row["decode_rate"], row["prefill_rate"]) > 0
        assert 2**24 < row["peak_bytes"] < 2**34
    shown = capsys.readouterr().out
    table = format_table([Result(**row) for row in found["variants"]])
    assert table in shown
    assert table in (out / "quality.md").read_text()
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left of the reference's log-probabilities.
    assert sorted(path.name for path in out.iterdir()) == ["quality.json", "quality.md", "quality.png"]


def test_checkpoints_are_made_once_for_each_seed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calibration = tmp_path / "out", tmp_path / "calibration"
    calibration.write_text("".join(f"{number} and {number + 1}, " for number in range(200)))
    options = ["--num-tokens", "120", "--prompts", "2", "--seeds", "2", "--calibration", str(calibration)]
    found = run(checkpoint, "int4:g32:gptq", out, "--reference", "int4:g32:rtn", *options)
    rounded, calibrated = found["variants"]
    assert [row["seeds"] for row in (rounded, calibrated)] == [[0], [0, 1]]
    for name in ("perplexity", "kl_divergence"):
        low, high = calibrated["spread"][name]
        assert low < calibrated[name] < high
        assert calibrated[name] == pytest.approx((low + high) / 2)
        assert rounded["spread"][name] == [rounded[name]] * 2
    made = sorted((out / "checkpoints").iterdir())
    names = ["int4-g32-gptq-0", "int4-g32-gptq-1", "int4-g32-rtn-0"]
    assert [path.name.rpartition("-")[0] for path in made] == names
    recipe = Recipe.parse("int4:g32", "gptq")
    text = calibration.read_text()
    assert checkpoint_directory(out / "checkpoints", checkpoint, recipe, text, seed=1) == made[1]
    assert checkpoint_directory(out / "checkpoints", checkpoint, recipe, text + ".", seed=1) not in made
    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in made[1].iterdir()}
    make_checkpoint(
        Job(title="again", model=str(checkpoint), recipe=recipe, calibration=text, seed=1, directory=made[1])
    )
    assert "again: is there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in made[1].iterdir()} == before


def test_what_is_scored_is_no_calibration(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "calibration").write_text(f"Before. {TEXT} And after.")
    words = [str(checkpoint), "--variants", "int4:gptq", "--text", str(tmp_path / "text")]
    words += ["--out", str(tmp_path / "out"), "--window", "64", "--stride", "32"]
    assert main([*words, "--calibration", str(tmp_path / "calibration")]) == 1
    assert "calibration holds the text that is scored" in capsys.readouterr().err


def test_names_in_the_plot_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    results = [
        Result(
            variant=f"int4:g{32 * number}:hadamard+gptq",
            bits_per_weight=4.5 + 0.1 * (number % 3),
            perplexity=15.0,
            kl_divergence=0.1 + 0.01 * (number % 4),
            agreement=0.9,
            first_divergence=3.0,
            peak_bytes=None,
            decode_rate=100.0 + number % 2,
            prefill_rate=500.0,
            seeds=[0],
            spread={"kl_divergence": [0.1, 0.15]},
        )
        for number in range(12)
    ]
    plot(tmp_path / "plot.png", results)
    for panel in figures[0].axes:
        labels = [label for label in panel.texts if isinstance(label, Annotation)]
        assert [label.get_text() for label in labels] == [result.variant for result in results]
        boxes = [Text.get_window_extent(label) for label in labels]
        for index, box in enumerate(boxes):
            assert panel.bbox.x0 <= box.x0 < box.x1 <= panel.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:index])


def test_every_window_begins_with_the_bos_that_the_tokenizer_adds(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    backend = byte_tokenizer()
    while backend.get_vocab_size() <= BOS:
        backend.add_special_tokens([f"<{backend.get_vocab_size()}>"])
    backend.post_processor = TemplateProcessing(single=f"<{BOS}> $A", special_tokens=[(f"<{BOS}>", BOS)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": f"<{BOS}>"}))
    found = run(path, "none", tmp_path / "out", "--num-tokens", "150")
    token_ids = [BOS, *byte_tokenizer().encode(TEXT).ids][:150]
    assert found["text"]["num_tokens"] == 150
    expected = usual_perplexity(path, token_ids, BOS)
    assert found["variants"][0]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert usual_perplexity(path, token_ids) != pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--variants": "int5"}, "'int5'"),
        ({"--window": "1024"}, "window: must be from 2 to the model's context of 256 tokens, got 1024"),
        ({"--stride": "64"}, "stride: must be at least 1 and less than the window's 64 tokens, got 64"),
        ({"--text": "/nowhere/at/all"}, "/nowhere/at/all cannot be read"),
        ({"--num-tokens": "1"}, "num_tokens: must be at least 2"),
        ({"--seeds": "0"}, "seeds: must be at least 1"),
        ({"--prompts": "0"}, "prompts: must be at least 1"),
        ({"--continuation": "256"}, "continuation: must be from 1"),
    ],
)
def test_what_cannot_work_is_one_line(
    checkpoint: Path, tmp_path: Path, options: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    given = {
        "--variants": "none",
        "--text": str(tmp_path / "text"),
        "--out": str(tmp_path / "out"),
        "--window": str(WINDOW),
        "--stride": str(STRIDE),
        "--device": "cpu",
    }
    assert main([str(checkpoint), *(word for pair in (given | options).items() for word in pair)]) == 1
    shown = capsys.readouterr().err.strip()
    assert said in shown
    assert "\n" not in shown


def test_other_vocabularies_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    config = deepcopy(TINY_CONFIGS["llama"])
    config.vocab_size = 321
    write_checkpoint(other, config)
    (tmp_path / "text").write_text(TEXT)
    words = [str(checkpoint), "--variants", str(other), "--text", str(tmp_path / "text")]
    assert main([*words, "--out", str(tmp_path / "out"), "--window", "64", "--stride", "32"]) == 1
    assert "its vocabulary has 321 tokens" in capsys.readouterr().err
