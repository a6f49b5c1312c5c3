"""lm-eval on a task of ours: the model of a directory in its hf backend, and the server's by local-completions."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import lm_eval

url, key, model = sys.argv[1:]
documents = Path(tempfile.mkdtemp()) / "documents.jsonl"
texts = [
    ("The sky is", " blue."),
    ("One, two, three,", " four, five, six, seven and so on, as long as you like."),
    ("Ça va", " très bien, merci 😀"),
    ("", "Nothing stands before this."),
]
documents.write_text("\n".join(json.dumps({"context": a, "continuation": b}) for a, b in texts))
task = {
    "task": "continuations",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(documents)}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "target_delimiter": "",
}


def likelihoods(backend: str, **arguments: object) -> list[tuple[float, bool]]:
    """Of each document, the log-probability of its continuation, and whether that is the likeliest."""
    results = lm_eval.simple_evaluate(
        model=backend, model_args=arguments, tasks=[dict(task)], log_samples=True, bootstrap_iters=0
    )
    samples = sorted(results["samples"]["continuations"], key=lambda sample: sample["doc_id"])
    return [tuple(sample["filtered_resps"][0]) for sample in samples]


served = {
    "model": model,
    "base_url": f"{url}/completions",
    "tokenizer_backend": "huggingface",
    "header": {"Authorization": f"Bearer {key}"},
}
print(
    json.dumps(
        {
            "hf": likelihoods("hf", pretrained=model, dtype="float32", device="cpu"),
            "token ids": likelihoods("local-completions", **served),
            "batches of texts": likelihoods(
                "local-completions", **served, tokenized_requests=False, batch_size=4, num_concurrent=2
            ),
        }
    )
)
