"""Whether clients were told the same beside disturbances as without: nothing lost, doubled or changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.client import Log
from tests.chaos.load import Planned


@dataclass(slots=True)
class Sample:
    """What a client was told of one sample, joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def starts(self, other: Sample) -> bool:
        """Whether `other` goes on from here."""
        return (
            other.token_ids[: len(self.token_ids)] == self.token_ids
            and other.text.startswith(self.text)
            and other.logprobs[: len(self.logprobs)] == self.logprobs
            and other.reasons[: len(self.reasons)] == self.reasons
        )


def samples_of(log: Log) -> dict[int, Sample]:
    """The samples of an answer, by index."""
    samples: dict[int, Sample] = {}
    for event in log.events:
        for choice in event.get("choices", ()):
            sample = samples.setdefault(choice["index"], Sample())
            sample.token_ids += choice.get("token_ids") or []
            sample.text += choice["text"]
            logprobs = choice.get("logprobs") or {}
            sample.logprobs += zip(
                logprobs.get("tokens", ()),
                logprobs.get("token_logprobs", ()),
                logprobs.get("top_logprobs") or (),
                strict=False,
            )
            if choice["finish_reason"] is not None:
                sample.reasons.append(choice["finish_reason"])
    return samples


def num_tokens(log: Log, before: float) -> int:
    """How many tokens the prompt of a request has, and all its samples had at a time of `time.monotonic`.

    That of a request that left before its first event, or was refused, counts nothing.
    """
    count = 0
    for at, event in zip(log.times, log.events, strict=True):
        for choice in event.get("choices", ()):
            if choice["index"] == 0:
                count += len(choice.get("prompt_token_ids") or ())
            if at < before:
                count += len(choice.get("token_ids") or ())
    return count


def find_faults(
    requests: Iterable[Planned], expected: Mapping[str, Log], seen: Mapping[str, Log]
) -> list[str]:
    """What is not as in the undisturbed run, in a line each.

    Args:
        expected: The logs of the undisturbed run, by the names of the requests.
        seen: Those of the other.
    """
    faults = []
    for planned in requests:
        log = seen.get(planned.name)
        problem = "lost: never sent" if log is None else _fault(planned, expected[planned.name], log)
        if problem is not None:
            faults.append(f"{planned.name} ({planned.behaviour}): {problem}")
    return faults


def _fault(planned: Planned, expected: Log, seen: Log) -> str | None:
    if seen.error is not None:
        return f"lost: {seen.error}"
    if seen.status != expected.status:
        return f"changed: status {seen.status} instead of {expected.status}: {seen.events[-1:]}"
    if planned.behaviour == "invalid":
        message = str(seen.events[-1].get("error", {}).get("message"))
        return None if planned.field in message else f"changed: {planned.field!r} is not in {message!r}"
    errors = [event["error"] for event in seen.events if "error" in event]
    if errors:
        return f"lost: {errors[0]}"
    wanted, got = samples_of(expected), samples_of(seen)
    if planned.behaviour == "leaves":
        # Events may be cut elsewhere; what was told is the beginning of one answer, whoever saw more of it.
        for index in wanted.keys() & got.keys():
            if not (got[index].starts(wanted[index]) or wanted[index].starts(got[index])):
                return f"changed: sample {index} begins {got[index].text!r} instead of {wanted[index].text!r}"
        return None
    num_dones = int(planned.body["stream"])
    if seen.num_dones != num_dones:
        return (
            f"{'lost' if seen.num_dones < num_dones else 'duplicated'}: {seen.num_dones} ends of the stream"
        )
    for index, sample in wanted.items():
        told = got.pop(index, Sample())
        if told == sample:
            continue
        if told.starts(sample):
            return f"lost: {len(told.token_ids)} of {len(sample.token_ids)} tokens of sample {index}"
        if sample.starts(told) or len(told.reasons) > 1:
            return f"duplicated: {told.text[len(sample.text) :]!r} after the end of sample {index}"
        return f"changed: sample {index} is {told.text!r} instead of {sample.text!r}"
    return f"duplicated: samples {sorted(got)}" if got else None
