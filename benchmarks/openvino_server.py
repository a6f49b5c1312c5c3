"""A server of streamed /v1/completions over OpenVINO GenAI, which has none: `python openvino_server.py MODEL`.

It needs the package `openvino-genai` and nothing of this project, and serves what benchmarks.cpu asks for. A thread
steps OpenVINO's continuous batching; each connection has one that writes a token's text as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import openvino
import openvino_genai


class Engine:
    """Steps all open requests together."""

    def __init__(self, model: str, cache_gib: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gib
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = True
        threads = len(os.sched_getaffinity(0))
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.tokenizer = self._pipeline.get_tokenizer()
        self._ids = count()
        self._open: list[tuple[Any, queue.SimpleQueue[list[int] | None]]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, prompt: openvino.Tensor, config: Any) -> queue.SimpleQueue[list[int] | None]:
        """Begins a request; its new tokens come through the queue, and None behind the last."""
        tokens: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        with self._changed:
            self._open.append((self._pipeline.add_request(next(self._ids), prompt, config), tokens))
            self._changed.notify()
        return tokens

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._open)
            self._pipeline.step()
            with self._changed:
                for handle, tokens in self._open:
                    while handle.can_read():
                        for output in handle.read().values():
                            tokens.put(list(output.generated_ids))
                    if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                        tokens.put(None)
                self._open = [
                    (handle, tokens)
                    for handle, tokens in self._open
                    if handle.get_status() == openvino_genai.GenerationStatus.RUNNING
                ]


def generation_config(body: dict[str, Any]) -> Any:
    """OpenVINO's form of a request's fields."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = body["max_tokens"]
    config.ignore_eos = body.get("ignore_eos", False)
    config.do_sample = body.get("temperature", 1.0) > 0
    if config.do_sample:
        config.temperature = body.get("temperature", 1.0)
        config.top_p = body.get("top_p", 1.0)
        if body.get("top_k", 0) > 0:
            config.top_k = body["top_k"]
    config.repetition_penalty = body.get("repetition_penalty", 1.0)
    config.logprobs = body.get("logprobs", 0)
    return config


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "openvino"}], "version": openvino_genai.__version__}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = self.engine.tokenizer.encode(body["prompt"]).input_ids
        tokens = self.engine.add(prompt, generation_config(body))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        num_tokens = 0
        while (new := tokens.get()) is not None:
            num_tokens += len(new)
            is_last = num_tokens >= body["max_tokens"]
            text = self.engine.tokenizer.decode(new)
            self._send({"choices": [{"text": text, "finish_reason": "length" if is_last else None}]})
        usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": num_tokens}
        self._send({"choices": [], "usage": usage})
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: it would take time."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve a model with OpenVINO GenAI, to measure it.")
    parser.add_argument("model", help="a GGUF file, or a directory of OpenVINO's")
    parser.add_argument("--port", type=int, default=8104)
    parser.add_argument("--cache-gib", type=int, default=2, help="size of the KV cache")
    options = parser.parse_args()
    Handler.engine = Engine(options.model, options.cache_gib)
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
