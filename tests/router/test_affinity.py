"""Which replica a prompt goes to: prefixes against queues."""

from __future__ import annotations

from engine.core.sampling_params import SamplingParams
from engine.router import affinity
from engine.router.affinity import PrefixAffinity, Resumable

PREFIX = list(range(64))
NAMES = ["a", "b", "c"]


def request(*tail: int, max_tokens: int | None = 8, lost: tuple[str, ...] = ()) -> Resumable:
    return Resumable("r", PREFIX + list(tail), SamplingParams(max_tokens=max_tokens), lost=lost)


def test_a_prefix_stays_where_it_is_until_its_queue_outweighs_it() -> None:
    known = PrefixAffinity(block_size=16)
    known.send(request(1), "b", "first")
    # 73 tokens wait at b; a has to compute 65, b 1.
    assert known.order(request(2), NAMES)[0] == "a"
    known.end("b", "first")
    assert known.order(request(2), NAMES)[0] == "b"
    for number in range(7):
        known.send(request(number), "b", f"{number}")  # 1 to compute and 8 to generate each
    assert known.order(request(9), NAMES)[0] == "b"  # 63 + 1 against 65
    known.send(request(8), "b", "8")
    assert known.order(request(9), NAMES)[0] == "a"


def test_new_prefixes_spread_over_idle_replicas() -> None:
    known = PrefixAffinity(block_size=16)
    for group in range(6):
        prompt = Resumable("r", [100 * group + i for i in range(64)], SamplingParams())
        best = known.order(prompt, NAMES)[0]
        assert best == NAMES[group % 3]
        known.send(prompt, best, "r")
        known.end(best, "r")


def test_prefixes_differ_from_their_first_difference() -> None:
    known = PrefixAffinity(block_size=16)
    known.send(request(), "b", "r")
    known.end("b", "r")
    other = Resumable("r", [7, *PREFIX[1:]], SamplingParams())
    assert known.order(other, NAMES)[0] == "a"


def test_lost_replicas_are_left_out_and_forgotten() -> None:
    known = PrefixAffinity(block_size=16)
    known.send(request(), "b", "r")
    known.end("b", "r")
    assert known.order(request(lost=("b",)), NAMES) == ["a", "c"]
    known.keep({"a", "c"})
    assert known.order(request(), NAMES)[0] == "a"
    known.end("b", "unknown")


def test_what_is_remembered_is_bounded() -> None:
    known = PrefixAffinity(block_size=16)
    size = affinity.MAX_BLOCKS * 16
    known.send(request(), "b", "r")
    known.send(Resumable("r", list(range(1000, 1000 + size)), SamplingParams()), "b", "s")
    known.end("b", "r")
    known.end("b", "s")
    assert known.order(request(), NAMES)[0] == "a"


def test_the_tokens_that_a_request_may_still_generate() -> None:
    def remaining(max_tokens: int | None, resumed: list[list[int] | None]) -> int:
        params = SamplingParams(max_tokens=max_tokens, n=max(1, len(resumed)))
        return Resumable("r", [1], params, resumed_token_ids=resumed).num_output_tokens

    assert remaining(8, []) == 8
    assert remaining(None, []) == affinity.EXPECTED_TOKENS
    assert remaining(8, [[1, 2, 3], None, []]) == 13
