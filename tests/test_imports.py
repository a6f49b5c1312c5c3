"""What the engine needs: no web or messaging package for LLM and the offline benchmarks, and no Triton on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

PROGRAM = """
import sys
REFUSED = {
    "gguf", "httpx", "msgspec", "prometheus_client", "psutil", "starlette", "triton", "uvicorn", "uvloop", "zmq"
}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import benchmarks.throughput
from pathlib import Path
from engine.executor.start import start_engine
from engine.config import EngineConfig
from engine.core.request import Request
from engine.core.sampling_params import EXAMPLES, SamplingParams

params = SamplingParams(max_tokens=4, logprobs=2, **EXAMPLES)
for options in ({}, {"dtype": "bfloat16"}, {"quant": "int4"}):
    options = {"device": "cpu", "kv_cache_memory": "4MiB", "cache_dir": sys.argv[2], **options}
    core = start_engine(EngineConfig(model=sys.argv[1], **options), Path(sys.argv[1]), ())
    core.add_request(Request(request_id="0", prompt_token_ids=[5, 6, 7], params=params, seed=0))
    while core.has_work:
        print(sum(len(output.tokens) for output in core.step()))
"""


def test_generates_without_web_and_messaging_packages_and_triton(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TINY_CONFIGS["llama"])
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / "cache")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [int(line) for line in result.stdout.split()] == [1, 1, 1, 1] * 3
