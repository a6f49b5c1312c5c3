"""Prompts of many kinds: prose, questions, code, lists, numbers, other languages and scripts."""

from __future__ import annotations

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village at the edge of a dark forest, there lived",
    "def fibonacci(n: int) -> int:\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
    "In 2024, the population of the city grew by 3.5% to 1,204,000. In 2025,",
    "Dear Professor Lindqvist,\n\nThank you for",
    "Q: What is the difference between a virus and a bacterium?\nA:",
    "Liebe Grüße aus München! Das Wetter ist heute",
    "La photosynthèse est le processus par lequel",
    "Ingredients:\n- 200 g flour\n- 3 eggs\n- a pinch of salt\n\nMethod:\n1.",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "<html>\n  <head>\n    <title>",
    "The three laws of motion were first written down by Isaac Newton in 1687. The first of them says that",
    "She opened the letter, read it twice, and",
    "日本の首都は",
    '{"name": "Ada Lovelace", "born": 1815, "occupation":',
    "Roses are red,\nViolets are blue,",
    "<|im_start|>user\nName three planets.<|im_end|>\n<|im_start|>assistant\n",
    "A",
]
