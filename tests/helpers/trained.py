"""Small models that were trained as floats and have outlier channels, and what compressing them costs.

Checkpoints whose weights come from a grid of four bits say little about algorithms for four bits: rounding them to
nearest loses next to nothing. So a model is trained here, for seconds, on a source of known probabilities: each
token's logits are the sum of two random tables' rows, of the token before it and of the one before that. It starts
with what large language models come to have. Every norm makes a few channels of the activations loud, which
calibration finds; and a few quiet, for which the weights that read them make up, so that the weights have outliers
too, which a rotation spreads. (Without these a rotation changes what GPTQ loses by less than a tenth, either way.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from engine.compression.calibration import CalibrationText
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.loading.checkpoint import open_checkpoint
from engine.quant.weight import to_float

VOCABULARY = 64
LAYERS = 2
NUM_OUTLIERS, LOUD, QUIET = 4, 30.0, 1 / 8
BATCH, LENGTH = 16, 48
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Source:
    """Tokens of which each depends on the two before it.

    Attributes:
        tables: [2, vocabulary, vocabulary], the logits that the last token and the one before it add.
    """

    tables: torch.Tensor

    def probabilities(self, last: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """[…] and […] int64 → [… , vocabulary]."""
        return (self.tables[0][last] + self.tables[1][before]).softmax(dim=-1)

    def draw(self, rows: int, length: int, seed: int) -> torch.Tensor:
        """[rows, length] int64."""
        generator = torch.Generator().manual_seed(seed)
        columns = list(torch.randint(VOCABULARY, (2, rows), generator=generator))
        while len(columns) < length:
            likely = self.probabilities(columns[-1], columns[-2])
            columns.append(torch.multinomial(likely, 1, generator=generator)[:, 0])
        return torch.stack(columns, dim=1)


def train(source: Source, hidden: int, steps: int, seed: int) -> PreTrainedModel:
    """A model that has learnt some of the source."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3 + seed)
    loud, quiet = torch.randperm(hidden, generator=generator)[: 2 * NUM_OUTLIERS].view(2, -1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(
                    parameter.shape[1] ** -0.5 * torch.randn(parameter.shape, generator=generator)
                )
            if "layernorm" in name:
                parameter[loud] *= LOUD
                parameter[quiet] *= QUIET
            if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                parameter[:, quiet] /= QUIET
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    batches = source.draw(steps * BATCH, LENGTH, seed=7 + seed).split(BATCH)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


class Bench:
    """A model, and what it loses on the source's held-out text.

    Args:
        directory: Where checkpoints go.
        seed: Another one makes another source and another model.
    """

    def __init__(self, directory: Path, hidden: int = 192, steps: int = 100, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(1 + seed)
        scales = torch.tensor([2.0, 1.0])[:, None, None]
        self.source = Source(scales * torch.randn(2, VOCABULARY, VOCABULARY, generator=generator))
        self.directory = directory
        self.held_out = self.source.draw(64, 64, seed=13)
        self.calibration = CalibrationText(self.source.draw(64, 64, seed=11), "the source")
        self.model = train(self.source, hidden, steps, seed)
        self.model.save_pretrained(directory / "float")
        self.float_log_probs = self.log_probs()

    @torch.no_grad()
    def log_probs(self) -> torch.Tensor:
        """[texts, positions, vocabulary] float64, of what follows two tokens or more."""
        logits: torch.Tensor = self.model(self.held_out).logits
        return logits[:, 1:].double().log_softmax(dim=-1)

    def compressed(self, scheme: str, algorithm: str) -> torch.Tensor:
        """The log-probabilities of the checkpoint that the command makes, as transformers computes them."""
        directory = self.directory / f"{scheme} {algorithm}"
        quantize_checkpoint(
            open_checkpoint(self.directory / "float"),
            Recipe.parse(scheme, algorithm),
            self.calibration,
            directory,
            lambda line: None,
        )
        written = open_checkpoint(directory)
        floats = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict({name: to_float(written.tensor(name)).float() for name in floats})
        log_probs = self.log_probs()
        self.model.load_state_dict(floats)
        return log_probs

    def loss(self, log_probs: torch.Tensor) -> float:
        """The expected -log p of the token that the source draws next, in nats: exact, not of a sample."""
        true = self.source.probabilities(self.held_out[:, 1:], self.held_out[:, :-1])
        return -float((true * log_probs).sum(dim=-1).mean())

    def divergence(self, log_probs: torch.Tensor) -> float:
        """KL divergence from the float model, in nats."""
        difference = self.float_log_probs - log_probs
        return float((self.float_log_probs.exp() * difference).sum(dim=-1).mean())
