"""Offline generation with the real default model, as a user calls it; interrupts and threads with a tiny one."""

from __future__ import annotations

import _thread
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.errors import ConfigError, ModelNotFoundError, RequestError
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(model="llama", quant="int8", kv_cache_memory="64MiB", seed=1)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["The capital of France is", [504, 3575, 282, 4649, 314], "Two plus two is", "Once"]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (9, 5, 1, 3)]
    results = llm.generate(prompts, params, use_tqdm=False)
    assert [result.prompt for result in results] == [prompts[0], None, prompts[2], prompts[3]]
    assert results[0].prompt_token_ids == [504, 3575, 282, 4649, 314]
    assert [len(result.outputs[0].token_ids) for result in results] == [9, 5, 1, 3]
    assert results[0].outputs[0].text.startswith(" Paris")
    assert results[1].outputs[0].token_ids == results[0].outputs[0].token_ids[:5]
    assert all(result.finished and result.outputs[0].finish_reason == "length" for result in results)
    assert llm.core.stats.kv_cache_usage_perc == 0.0


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    (from_text,) = llm.generate("The capital of France is", GREEDY, use_tqdm=False)
    (from_ids,) = llm.generate(from_text.prompt_token_ids, GREEDY, use_tqdm=False)
    assert from_text.outputs[0].token_ids == from_ids.outputs[0].token_ids


def test_a_progress_bar_shows_tokens_per_second(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["One", "Two"], GREEDY)
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "tokens/s" in shown


def test_chat_uses_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    (result,) = llm.chat(messages, SamplingParams(max_tokens=20, temperature=0), use_tqdm=False)
    assert "Tokyo" in result.outputs[0].text
    assert result.outputs[0].finish_reason == "stop"
    assert result.outputs[0].stop_reason is None
    both = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert len(both) == 2


def test_stop_strings_and_stop_tokens(llm: LLM) -> None:
    whole = llm.generate(
        "The capital of France is", SamplingParams(max_tokens=12, temperature=0), use_tqdm=False
    )
    text, token_ids = whole[0].outputs[0].text, whole[0].outputs[0].token_ids
    stop = text[3:6]
    (result,) = llm.generate(
        "The capital of France is", SamplingParams(max_tokens=12, temperature=0, stop=(stop,)), use_tqdm=False
    )
    assert result.outputs[0].text == text[: text.index(stop)]
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", stop)
    third = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(token_ids[2],))
    (result,) = llm.generate("The capital of France is", third, use_tqdm=False)
    assert result.outputs[0].token_ids == token_ids[: token_ids.index(token_ids[2]) + 1]
    assert result.outputs[0].stop_reason == token_ids[2]
    assert not llm.core.has_work


def test_samples_differ_and_seeds_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5)
    first, again = (llm.generate("Once upon a", params, use_tqdm=False)[0] for _ in range(2))
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    assert [output.token_ids for output in first.outputs] == [output.token_ids for output in again.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2]


def test_the_engines_seed_gives_each_prompt_its_own_by_index(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0)
    together = llm.generate(["Once upon a"] * 2, params, use_tqdm=False)
    alone = llm.generate("Once upon a", params, use_tqdm=False)
    assert together[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert together[0].outputs[0].token_ids != together[1].outputs[0].token_ids


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=2)
    (result,) = llm.generate("The capital of France is", params, use_tqdm=False)
    output = result.outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == 3
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entries)) == token_id
        assert entries[token_id].rank == 1
        assert len(entries) == 2
    assert llm.generate("x", GREEDY, use_tqdm=False)[0].outputs[0].logprobs is None


def test_the_sum_of_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, temperature=1, seed=3, logprobs=0, n=2)
    (result,) = llm.generate("Once", sampling_params=params, use_tqdm=False)
    for output in result.outputs:
        assert output.logprobs is not None
        chosen = zip(output.token_ids, output.logprobs, strict=True)
        assert output.cumulative_logprob == pytest.approx(sum(entries[i].logprob for i, entries in chosen))
    assert llm.generate("x", GREEDY, use_tqdm=False)[0].outputs[0].cumulative_logprob is None


def test_vllms_name_of_the_parameters(llm: LLM) -> None:
    by_place, by_name = (
        llm.generate("x", GREEDY, use_tqdm=False),
        llm.generate("x", sampling_params=GREEDY, use_tqdm=False),
    )
    assert by_name[0].outputs == by_place[0].outputs
    messages = [{"role": "user", "content": "Hello"}]
    assert len(llm.chat(messages, sampling_params=GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8
    with pytest.raises(RequestError, match="two names of one argument"):
        llm.generate("x", GREEDY, sampling_params=GREEDY)
    assert llm.get_tokenizer().decode(llm.get_tokenizer().encode("Hello")) == "Hello"


def test_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=2, n=2)
    (result,) = llm.generate("The capital of France is", params, use_tqdm=False)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    for token_id, entries in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True):
        assert entries is not None
        assert next(iter(entries)) == token_id
        assert 2 <= len(entries) <= 3
        assert sorted(entry.rank for entry in entries.values())[:2] == [1, 2]
    # A draw after so much of the prompt finds the same.
    part = result.prompt_token_ids[:3]
    (drawn,) = llm.generate(part, SamplingParams(max_tokens=1, temperature=0, logprobs=2), use_tqdm=False)
    assert drawn.outputs[0].logprobs is not None
    likeliest = drawn.outputs[0].logprobs[0]
    assert {i: result.prompt_logprobs[3][i] for i in likeliest} == likeliest  # type: ignore[index]
    (plain,) = llm.generate("x", GREEDY, use_tqdm=False)
    assert plain.prompt_logprobs is None
    (alone,) = llm.generate([5], SamplingParams(max_tokens=0, prompt_logprobs=1), use_tqdm=False)
    assert (alone.prompt_logprobs, alone.outputs[0].token_ids) == ([None], [])


def test_a_score_is_the_log_probability_of_a_continuation(llm: LLM) -> None:
    prompt, encode = "The capital of France is", llm.get_tokenizer().encode
    right, wrong = llm.score(prompt, [" Paris, of course", " Rome"], use_tqdm=False)
    assert right.token_ids == encode(" Paris, of course")
    assert right.logprob == sum(right.token_logprobs)
    assert right.token_logprobs[0] > -1 > wrong.logprob
    assert not wrong.is_greedy
    greedy = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    (ids,) = llm.score(encode(prompt), greedy, use_tqdm=False)
    assert ids.token_ids == greedy
    assert ids.is_greedy
    # "is" and "land" are one token together: what follows the common start is scored.
    (joined,) = llm.score("The is", "land", use_tqdm=False)
    assert joined.token_ids == encode("The island")[1:]
    for prompts, continuations, words in [
        ("x", "", "adds no token"),
        ("", "x", "none may be empty"),
        (["a", "b"], ["c", "d", "e"], "2 prompts and 3 continuations"),
    ]:
        with pytest.raises(RequestError, match=words):
            llm.score(prompts, continuations)
    assert llm.score([], []) == []


def test_an_equal_prompt_comes_from_the_cache(llm: LLM) -> None:
    prompt = "A prompt that fills more than one block of sixteen tokens, " * 3
    first, again = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens >= 16
    assert first.outputs[0].token_ids == again.outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("", GREEDY, "prompt"),
        ([49152], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([1] * 9000, GREEDY, "prompt"),
        ("x", SamplingParams(stop_token_ids=(50000,)), "stop_token_ids"),
        ("x", SamplingParams(logit_bias={50000: 1.0}), "logit_bias"),
    ],
)
def test_refusals_name_the_field(
    llm: LLM, prompt: str | list[int], params: SamplingParams, field: str
) -> None:
    with pytest.raises(RequestError) as raised:
        llm.generate(["fine", prompt], params, use_tqdm=False)  # type: ignore[list-item]
    assert raised.value.field == field
    assert not llm.core.has_work


def test_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])


def test_a_row_that_fails_in_the_model_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = llm.core.model.runner.execute

    def broken(batch: object) -> object:
        if any(row.token_ids[0] == 17 for row in batch.rows):  # type: ignore[attr-defined]
            raise RuntimeError("no luck with 17")
        return execute(batch)  # type: ignore[arg-type]

    (expected,) = llm.generate([20, 21], GREEDY, use_tqdm=False)
    monkeypatch.setattr(llm.core.model.runner, "execute", broken)
    bad, good = llm.generate([[17, 18, 19], [20, 21]], GREEDY, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert bad.error == "RuntimeError in a step; the log has the details"
    assert good.outputs[0].token_ids == expected.outputs[0].token_ids
    assert llm.core.stats.kv_cache_usage_perc == 0.0


def test_context_shrinks_to_the_cache(capfd: pytest.CaptureFixture[str]) -> None:
    small = LLM(model="llama", quant="int8", kv_cache_memory="2MiB")
    assert "max_model_len was 8192" in capfd.readouterr().err
    assert small.core.info.max_model_len < 8192
    assert "raise --kv-cache-memory" in small.core.info.memory_plan
    with pytest.raises(RequestError, match=f"the context holds {small.core.info.max_model_len}"):
        small.generate([5] * 600, GREEDY)
    (result,) = small.generate([5] * (small.core.info.max_model_len - 2), GREEDY, use_tqdm=False)
    assert (len(result.outputs[0].token_ids), result.outputs[0].finish_reason) == (2, "length")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quant": "int3"},
            "quant: must be one of none, int8, int4, nf4, codebook4, sparse24:int8, sparse24:int4, "
            "lowrank:none, lowrank:int8, lowrank:int4, got 'int3'",
        ),
        (
            {"quant": "int4:g48"},
            "'g48' in 'int4:g48' is not known; after int4 there may be g32, g64, g128, g0",
        ),
        ({"quant": "int4,*.w1=int8"}, r"no module matches '\*\.w1'; there are lm_head, model.layers.9"),
        (
            {"quant": "int4,*.q_proj=int8"},
            r"layers.0.self_attn.q_proj int8, .*k_proj int4:g32.*multiplied as one matrix",
        ),
        ({"quant": "int4,model.embed_tokens=int4"}, "a table is none or int8"),
        ({"kv_cache_memory": "lots"}, "write it like 512MiB"),
        ({"kv_cache_memory": "1KiB"}, "two blocks"),
        ({"quant": "none", "kv_cache_memory": "900GiB"}, "do not fit"),
        ({"max_model_len": 9999}, "exceeds the model's context of 8192"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "max_num_seqs"),
        ({"block_size": 0}, "block_size"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"temperature": 1}, "unknown option 'temperature'"),
    ],
)
def test_options_are_refused_with_what_would_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(model="llama", **options)


def test_an_unknown_model_says_what_to_do() -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM(model="/nowhere/at/all")


def tiny_llm(path: Path, **options: Any) -> LLM:
    write_checkpoint(path, TINY_CONFIGS["llama"])
    return LLM(str(path), load_format="dummy", kv_cache_memory="4MiB", **options)


LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def tokens(llm: LLM, prompt: Any, params: SamplingParams = SHORT) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(prompt, params, use_tqdm=False)]


def is_interrupted(llm: LLM, seconds: float) -> bool:
    """Whether a Ctrl-C after so long ends a call: Python drops one that comes amid the end of an object."""
    timer = threading.Timer(seconds, _thread.interrupt_main)
    try:
        timer.start()
        while timer.is_alive():
            llm.generate(["abc"] * 8, LONG, use_tqdm=False)
        llm.generate("abc", SHORT, use_tqdm=False)
    except KeyboardInterrupt:
        return True
    return False


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts: a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_call_leaves_the_llm_whole(tmp_path: Path, overlap: bool) -> None:
    llm = tiny_llm(tmp_path, overlap=overlap)
    expected = tokens(llm, "abc")
    num_interrupted = 0
    for seconds in (0.001, 0.01, 0.02, 0.05, 0.2):
        num_interrupted += is_interrupted(llm, seconds)
        assert tokens(llm, "abc") == expected
    assert num_interrupted > 0
    assert not llm.core.has_work


def test_a_step_that_fails_anywhere_leaves_the_llm_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm(tmp_path)
    expected = tokens(llm, "abc")
    for place in ("schedule", "draws", "update"):
        with monkeypatch.context() as patch:
            patch.setattr(llm.core.scheduler, place, Mock(side_effect=MemoryError(place)))
            with pytest.raises(MemoryError, match=place):
                tokens(llm, ["abc", "d"])
        assert not llm.core.has_work
        assert tokens(llm, "abc") == expected


def test_calls_of_threads_share_steps(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path)
    prompts = [f"prompt {index}" for index in range(6)]
    alone = [tokens(llm, prompt, LONG) for prompt in prompts]
    before = llm.core.stats.num_steps
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: tokens(llm, prompt, LONG), prompts))
    assert together == alone
    # One after the other they would take 200 steps each.
    assert llm.core.stats.num_steps - before < 200 * len(prompts) / 2


def test_two_llms_of_a_process_generate_at_once(tmp_path: Path) -> None:
    """Their steps run on the same threads."""
    llms = [tiny_llm(tmp_path, num_threads=2) for _ in range(2)]
    prompts = ["abc", "another prompt", "d"]
    expected = [tokens(llm, prompts, LONG) for llm in llms]
    with ThreadPoolExecutor(len(llms)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda llm: tokens(llm, prompts, LONG), llms)) == expected


def test_max_tokens_beyond_the_context_are_lowered_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = tiny_llm(tmp_path)
    params = SamplingParams(max_tokens=10_000, ignore_eos=True)
    results = llm.generate([[1] * 250, [1] * 251], params, use_tqdm=False)
    assert [(len(result.outputs[0].token_ids), result.outputs[0].finish_reason) for result in results] == [
        (6, "length"),
        (5, "length"),
    ]
    (record,) = caplog.records
    assert "max_tokens of 2 of 2 prompts" in record.getMessage()


FORKED = """
import multiprocessing, sys
from engine import LLM, SamplingParams
from engine.errors import ConfigError

def child(path):
    for use in (lambda: LLM(path, load_format="dummy"), lambda: llm.generate("a", use_tqdm=False)):
        try:
            use()
        except ConfigError as error:
            print(error)

llm = LLM(sys.argv[1], load_format="dummy", kv_cache_memory="1MiB")
process = multiprocessing.get_context("fork").Process(target=child, args=sys.argv[1:])
process.start()
process.join()
"""


def test_a_forked_process_is_told_to_spawn(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_CONFIGS["llama"])
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.count('multiprocessing.get_context("spawn")') == 2, done.stderr


def test_other_params_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected SamplingParams, found"):
        tiny_llm(tmp_path).generate("a", {"max_tokens": 4})  # type: ignore[arg-type]


def test_embeddings(llm: LLM) -> None:
    prompts = [
        "The capital of France is",
        [504, 3575, 282, 4649, 314],
        "A dog",
        "A puppy",
        "Stock prices fell",
    ]
    results = llm.embed(prompts, use_tqdm=False)
    assert [result.prompt for result in results] == [prompts[0], None, *prompts[2:]]
    assert results[0].prompt_token_ids == prompts[1]
    vectors = np.array([result.outputs.embedding for result in results])
    assert vectors.shape == (5, 576)
    assert np.allclose(np.square(vectors).sum(1), 1)
    assert np.array_equal(vectors[0], vectors[1])
    means = np.array([result.outputs.embedding for result in llm.embed(prompts, "mean", use_tqdm=False)])
    assert np.array_equal(means[0], means[1])
    assert not np.allclose(means, vectors)
    # What is alike lies closer together.
    assert means[2] @ means[3] > means[2] @ means[4]
    # Interleaved with others, and with generation, they are the same.
    assert llm.embed(prompts[2], "mean", use_tqdm=False)[0].outputs.embedding == means[2].tolist()
    assert llm.embed([], use_tqdm=False) == []


def test_embeddings_are_cut_before_they_get_their_length(llm: LLM) -> None:
    whole, cut, raw = (
        np.array(llm.embed("A dog", use_tqdm=False, **options)[0].outputs.embedding)
        for options in ({"normalize": False}, {"dimensions": 64}, {"dimensions": 64, "normalize": False})
    )
    assert np.array_equal(raw, whole[:64])
    np.testing.assert_allclose(cut, raw / np.linalg.norm(raw), rtol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "prompt must hold at least one token"),
        ([50000], {}, "prompt holds token id 50000"),
        ([1] * 9000, {}, "prompt has 9000 tokens; the context holds"),
        ("A dog", {"pooling": "max"}, "pooling must be 'last' or 'mean', got 'max'"),
        ("A dog", {"dimensions": 0}, "dimensions must be at least 1, got 0"),
        ("A dog", {"dimensions": 577}, "dimensions must be at most 576, the model's, got 577"),
    ],
)
def test_an_embedding_that_cannot_be_made_is_refused(
    llm: LLM, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.embed(prompt, use_tqdm=False, **options)
    assert not llm.core.has_work


def test_bad_words_and_allowed_tokens(llm: LLM) -> None:
    prompt = "The capital of France is"
    free = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0]
    assert free.text.startswith(" Paris")
    # As it follows a space, and in several tokens.
    for word in ("Paris", " Paris", free.text[1:12]):
        params = SamplingParams(max_tokens=8, temperature=0, bad_words=word)
        assert word not in llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text
    allowed = free.token_ids[1:4]
    params = SamplingParams(max_tokens=8, temperature=0, allowed_token_ids=allowed)
    assert set(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids) <= set(allowed)
    params = SamplingParams(allowed_token_ids=llm.tokenizer.encode(" Paris"), bad_words=["Paris"])
    with pytest.raises(RequestError, match="all of allowed_token_ids are banned: by bad_words"):
        llm.generate(prompt, params)
    params = SamplingParams(allowed_token_ids=llm.tokenizer.eos_token_ids, min_tokens=1)
    with pytest.raises(RequestError, match="before min_tokens as the end"):
        llm.generate(prompt, params)
