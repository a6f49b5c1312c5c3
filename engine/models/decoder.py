"""Decoder: the transformer of every supported family, written once.

x = embedding(tokens)
for each layer:   x += [norm] attention(norm(x))
                  x += [norm] mlp(norm(x))              [norm]: Gemma 3 only
logits = lm_head(norm(x))
"""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.attention.kv_layer import KVCache, KVLayer
from engine.kernels.norm import add, rms_norm
from engine.models.attention import Attention, PagedInputs
from engine.models.config import ModelConfig
from engine.models.linear import Embedding, Linear, ReadWeight, StoredLayer
from engine.models.mlp import MLP
from engine.models.modules import NORMS, ROLES, Block, readers
from engine.models.norm import RMSNorm
from engine.models.splits import ColumnParallel
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.quant.plan import QuantizationPlan
from engine.quant.scheme import Matmul
from engine.quant_spec import EMBEDDING, LM_HEAD


class DecoderLayer(nn.Module):
    """One layer: attention and MLP, each behind a norm and around a residual sum."""

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        quantization: QuantizationPlan,
        dtype: torch.dtype,
        group: TensorGroup,
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}"

        def norm(name: str) -> RMSNorm:
            source = f"{prefix}.{name}_layernorm"
            return RMSNorm(source, config.hidden_size, config.norm_epsilon, config.norm_offset, dtype)

        self.attention = Attention(prefix, layer, config, quantization, dtype, group)
        self.mlp = MLP(prefix, config, quantization, group)
        self.attention_norm = norm("input")
        if config.has_post_norms:
            self.attention_post_norm: nn.Module = norm("post_attention")
            self.mlp_norm = norm("pre_feedforward")
            self.mlp_post_norm: nn.Module = norm("post_feedforward")
        else:
            self.attention_post_norm = self.mlp_post_norm = nn.Identity()
            self.mlp_norm = norm("post_attention")

    @property
    def linears(self) -> dict[str, Linear]:
        """Its projections, by role."""
        blocks: dict[Block, nn.Module] = {"attention": self.attention, "MLP": self.mlp}
        found = {role.name: blocks[role.block].get_submodule(role.name) for role in ROLES}
        return {name: linear for name, linear in found.items() if isinstance(linear, Linear)}

    @property
    def norms(self) -> dict[str, RMSNorm]:
        """The norms that give projections their inputs, by name."""
        found = {name: self.get_submodule(name) for name in NORMS}
        return {name: norm for name, norm in found.items() if isinstance(norm, RMSNorm)}

    def bind(self) -> None:
        """Lets the norms write what the products behind them take."""
        linears = self.linears
        for name, norm in self.norms.items():
            formats = {linears[role.name].matmul.format for role in readers(name)}
            # Products that want different things make them of floats.
            norm.format = formats.pop() if len(formats) == 1 else None
        self.mlp.format = self.mlp.down.matmul.format

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, cache: KVLayer, inputs: PagedInputs
    ) -> torch.Tensor:
        """What the layer adds to x [T, hidden], less what it has added already.

        Args:
            delta: What the layer before adds; its sum with x, in place, is done with this layer's norm.
        """
        attended = self.attention(self.attention_norm(x, delta), cache, inputs)
        added = self.mlp(self.mlp_norm(x, self.attention_post_norm(attended)))
        output: torch.Tensor = self.mlp_post_norm(added)
        return output


class Decoder(nn.Module):
    """The model on the meta device until `load` or `load_state_dict(assign=True)`, then `bind`.

    Args:
        group: The ranks that share its layers.
        pipeline: The stage whose layers these are; the embedding is the first one's, norm and head are the last's.

    Attributes:
        shares_table: Whether the embedding's table is the head, too, which then has no layer of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        quantization: QuantizationPlan,
        dtype: torch.dtype,
        group: TensorGroup,
        pipeline: Pipeline,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.group, self.pipeline = config, dtype, group, pipeline
        head, table = quantization.head, quantization.table
        self.embedding: Embedding | None = None
        if pipeline.is_first:
            self.embedding = Embedding(
                EMBEDDING,
                config.vocab_size,
                config.hidden_size,
                table,
                dtype,
                config.embedding_scale,
                group,
            )
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config, quantization, dtype, group)
            for layer in pipeline.layers(config.num_layers)
        )
        self.norm: RMSNorm | None = None
        self.lm_head: Linear | None = None
        is_alike = config.ties_embeddings and head == table
        self.shares_table = is_alike and pipeline.is_first and pipeline.is_last
        if pipeline.is_last:
            self.norm = RMSNorm(
                "model.norm", config.hidden_size, config.norm_epsilon, config.norm_offset, dtype
            )
        if pipeline.is_last and not self.shares_table:
            source = EMBEDDING if config.ties_embeddings else LM_HEAD
            self.lm_head = Linear(
                [source],
                config.hidden_size,
                [config.vocab_size],
                [head],
                has_bias=False,
                split=ColumnParallel(group),
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def num_weights(self) -> int:
        """How many tensors of a checkpoint `load` reads."""
        return sum(
            len(module.sources) * (1 + module.has_bias) if isinstance(module, Linear) else 1
            for module in self.modules()
            if isinstance(module, StoredLayer)
        )

    def load(self, read: ReadWeight, binds: bool = False) -> None:
        """Quantizes the checkpoint's weights into the layers.

        Args:
            binds: Each product is prepared once it has its weight, and all else that `bind` does.
        """
        # The largest first, while there is room for what its loading takes besides.
        table = None if self.embedding is None else self.embedding.table
        largest = (table, self.lm_head)
        for module in sorted(self.modules(), key=lambda module: module not in largest):
            if isinstance(module, (Linear, RMSNorm)):
                module.load(read)
            if binds and isinstance(module, Linear):
                module.bind()
        if binds:
            self._bind_norms()

    def randomize(self, device: torch.device) -> None:
        """Random weights, made as they are stored."""
        for module in self.modules():
            if isinstance(module, (Linear, RMSNorm)):
                module.randomize(device)

    def bind(self) -> None:
        """Prepares every product; call once the tensors are on their device."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.bind()
        self._bind_norms()

    def _bind_norms(self) -> None:
        """What norms write follows from the products behind them."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.bind()
        if self.norm is not None:
            self.norm.format = self.head_matmul.format

    @property
    def head_matmul(self) -> Matmul:
        """The product with the vocabulary, once bound; on the last stage."""
        if self.lm_head is not None:
            return self.lm_head.matmul
        assert self.embedding is not None
        return self.embedding.table.matmul

    def forward(self, token_ids: torch.Tensor, cache: KVCache, inputs: PagedInputs) -> torch.Tensor:
        """Hidden states [T, hidden] of the flat batch token_ids [T]; the step's keys and values are written.

        They come from the stage before, and go to the next one, if there is one.
        """
        if self.embedding is not None:
            x = self.embedding(token_ids)
        else:
            x = self.pipeline.receive(token_ids, token_ids.shape[0], self.config.hidden_size, self.dtype)
        delta = None
        for index, layer in enumerate(self.layers):
            delta = layer(x, delta, cache.layer(index), inputs)
        hidden = x if delta is None else add(x, delta)
        if not self.pipeline.is_last:
            self.pipeline.send(hidden)
        return hidden

    def final_states(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, hidden] behind the final norm, as floats; on the last stage."""
        assert self.norm is not None
        states = rms_norm(hidden, self.norm.weight, self.norm.epsilon)
        assert isinstance(states, torch.Tensor)
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] float32 of hidden states [rows, hidden]."""
        return self.head(hidden).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in the activations' type; on the last stage."""
        assert self.norm is not None
        return self.group.gather(self.head_matmul(self.norm(hidden)), self.config.vocab_size)
