"""Prompts of a wanted token count, as text, so that they suit every server and tokenizer."""

from __future__ import annotations

import random

# Common words: one token each, leading space included, in most vocabularies.
_WORD_LIST = """
about above across action after again against age air all along also always among animal answer any area
around art ask away back base bed before began begin behind being best better between big bird black blue
board boat body book both bottom box boy bring brought build built business call came can car care carry case
cause center change check child city class clear close cold color come common complete could country course
cover cross cut dark day deep did different direct distance door down draw drive dry during early earth ease
east eat end energy enough even ever every example eye face fact fall family far farm fast father feel feet
few field figure fill final find fine fire first fish five floor fly follow food foot force form found four
free friend front full game gave general girl give gold gone good got govern great green ground group grow
had half hand happen hard has head hear heart heat heavy help here high hold home horse hot hour house
how hundred idea inch interest island just keep kind king knew know land language large last late laugh lay
lead learn leave left less letter life light like line list listen little live long look low machine made main
make man many map mark may mean measure men might mile mind minute miss money month moon more morning most
mother mountain move much music must name near need never new next night north note notice number object
"""
WORDS = _WORD_LIST.split()


class PromptMaker:
    """Seeded prompts of words; no two begin alike, in this run or in another one against the same server.

    The first words depend on `salt` too: a server that still holds the prompts of an earlier run with the
    same seed in its prefix cache would otherwise answer from there.
    """

    def __init__(self, seed: int, salt: int, tokens_per_word: float = 1.0) -> None:
        self._random = random.Random(seed)
        self._salted = random.Random(salt)
        self.tokens_per_word = tokens_per_word

    def make(self, num_tokens: int) -> str:
        """A prompt of about `num_tokens` tokens (at least one word)."""
        num_words = max(1, round(num_tokens / self.tokens_per_word))
        num_salted = min(8, num_words)
        words = self._salted.choices(WORDS, k=num_salted)
        words += self._random.choices(WORDS, k=num_words - num_salted)
        return " ".join(words)
