"""BERT's forward pass: Devlin et al. 2018, arXiv 1810.04805, section 3; Vaswani et al. 2017.

    x_0 = LN(word[id] + position[i] + type[0])
    y = LN(x + W_o attention(W_q x, W_k x, W_v x)),  x' = LN(y + W_2 gelu(W_1 y))

with norms after the sums, the exact GELU, learned absolute positions, and heads that attend with
softmax(q k / sqrt(d)). Keys of the weights as transformers writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-12  # of the norms


@dataclass(frozen=True, eq=False)
class Bert:
    """A network.

    Args:
        weights: float32, by key.
        heads: of each layer.
        layers: number of layers.
    """

    weights: Mapping[str, Tensor]
    heads: int
    layers: int

    def __call__(self, ids: Tensor) -> Tensor:
        """Last hidden states.

        Args:
            ids: int64 (B, l) of pieces, without padding.

        Returns:
            float32 (B, l, E).
        """
        words, places, types = (
            self.weights[f"embeddings.{kind}_embeddings.weight"]
            for kind in ("word", "position", "token_type")
        )
        x = words[ids.to(words.device)] + places[: ids.shape[1]] + types[0]
        x = self._normed("embeddings.LayerNorm", x)
        for layer in range(self.layers):
            x = self._layer(f"encoder.layer.{layer}", x)
        return x

    def _layer(self, key: str, x: Tensor) -> Tensor:
        q, k, v = (
            self._linear(f"{key}.attention.self.{kind}", x)
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            for kind in ("query", "key", "value")
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        seen = self._linear(f"{key}.attention.output.dense", seen)
        y = self._normed(f"{key}.attention.output.LayerNorm", x + seen)
        hidden = F.gelu(self._linear(f"{key}.intermediate.dense", y))
        return self._normed(
            f"{key}.output.LayerNorm", y + self._linear(f"{key}.output.dense", hidden)
        )

    def _linear(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"])

    def _normed(self, key: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)
