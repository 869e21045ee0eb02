"""What kdflow knows of a family of models: one record, read by all that handle models.

Loads no model library: configs come as objects of transformers or as the plain values of a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Under which names configs have the context length; the first one counts.
CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
# Under which names configs have the number of decoder layers.
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Under which names configs have the number of attention heads, of those that keys and values have,
# and the width of the hidden states.
HEAD_FIELDS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
KEPT_HEAD_FIELDS = ("num_key_value_heads", "num_kv_heads")
WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")
# Under which names configs say how many of the first layers are dense.
LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Rotary frequencies that go by the longest position of a batch, once that is beyond the length that
# the model was first trained for: a short row then depends on the rows beside it.
BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

# Buffers that layers multiply states with, and that have to have the dtype of these.
BUFFERS_OF_STATES = frozenset(
    {"mup_vector", "slope_rate", "query_decay", "key_decay", "diagonal_decay"}
)


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """Names of a family's head tensors, and of the config fields that change logits."""

    weight: str = "lm_head.weight"
    bias: str = "lm_head.bias"
    embedding: str = "model.embed_tokens.weight"
    multiplier: str | None = None
    divisor: str | None = None
    softcap: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders, by the `architectures` that its configs name.

    `layers` is the module of the base model that holds the decoder layers. With
    `capped_attention`, a config field, attention scores are capped, which `sdpa` leaves out. SGLang
    loads the tensors under the names that `head` has, or also without their prefix where it
    `loads_bare_names`. In the `unpacked` architectures a row reads what stands before it in the
    same row of a batch: a recurrent state, a convolution, distances by place, a window by mask
    alone. What no model of the family has is left at its default.
    """

    name: str
    architectures: tuple[str, ...]
    head: HeadRule = HeadRule()
    layers: str = "layers"
    capped_attention: str | None = None
    loads_bare_names: bool = False
    unpacked: tuple[str, ...] = ()

    def inexact_attention(self, config: Any) -> dict[str, str]:
        """The implementations of attention that are not exact for a model, and what they miss."""
        if self.capped_attention and getattr(config, self.capped_attention, None):
            return {"sdpa": "caps its attention scores, which attention=sdpa leaves out"}
        return {}

    def scale_and_softcap(self, config: Any) -> tuple[float, float | None]:
        """The factor on the logits and their soft-cap, as the family applies them."""
        rule = self.head
        scale = float(getattr(config, rule.multiplier)) if rule.multiplier else 1.0
        if rule.divisor:
            scale /= float(getattr(config, rule.divisor))
        softcap = getattr(config, rule.softcap) if rule.softcap else None
        return scale, None if softcap is None else float(softcap)


def context_field(config: Mapping[str, Any]) -> str | None:
    """The field of a config that has the model's context length, if one has."""
    return next((name for name in CONTEXT_FIELDS if config.get(name) is not None), None)


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The width of a model's hidden states, its attention heads, those that keys and values have,
    and the width of each; 0 where a config does not say.
    """

    width: int
    heads: int
    kept_heads: int
    head: int


def attention_shape(config: Mapping[str, Any]) -> AttentionShape:
    """The shape of a model's attention, by its text config."""
    width, heads = _first(config, WIDTH_FIELDS), _first(config, HEAD_FIELDS)
    kept = _first(config, KEPT_HEAD_FIELDS) or heads
    # Falcon's newer architecture has groups of heads; the older ones have one for all, or each.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kept = min(1, heads)
    head = int(config.get("head_dim") or (width // heads if heads else 0))
    return AttentionShape(width=width, heads=heads, kept_heads=kept, head=head)


def cached_values(config: Mapping[str, Any]) -> int:
    """The keys and values that a model keeps of a token, if it has attention in all layers and
    shares none between them: else it keeps less. 0 where a config does not say.
    """
    shape = attention_shape(config)
    layers = _first(config, LAYER_FIELDS) or len(config.get("layers_block_type") or ())
    if not shape.width:
        return 0
    return 2 * layers * shape.kept_heads * shape.head


def attention_length(config: Mapping[str, Any]) -> int | None:
    """The length, in tokens, at which attention costs a decoder as much as its weights; None where
    a config does not say. Of a layer of width H the weights take about 12 H^2 multiplications a
    token, and attention 2 H for each token that it reads, which is half of all on average.
    """
    width = attention_shape(config).width
    return 12 * width if width else None


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of some fields that a config has; 0 where it has none."""
    return int(next((config[name] for name in names if config.get(name)), 0))


def batched_length(config: Mapping[str, Any]) -> int | None:
    """The longest sequences, in tokens, that may be a batch with others: padding on the right up to
    there leaves the states of the shorter ones as they are alone. None where there is no limit.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Some families have parameters for each kind of layer.
    parts = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    limits = []
    for part in parts:
        if (part.get("rope_type") or part.get("type")) in BATCH_DEPENDENT_ROPE:
            original = part.get("original_max_position_embeddings") or config.get(
                "original_max_position_embeddings"
            )
            limits.append(int(original or config.get("max_position_embeddings") or 0))
    return min(limits, default=None)
