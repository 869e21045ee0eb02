"""What SGLang may take of a device for weights and cache, when it only reads prompts.

SGLang's own share leaves room for the activations of its largest prefill as if that were chunked,
about 25 GB where it is not, and refuses models that fit. Ours leaves what a batch of ours takes.
"""

from collections.abc import Mapping
from typing import Any

from kdflow_core.models.families.base import attention_shape

# Contexts of kernels, workspaces of matrix products, fragments: what no formula has.
RESERVE_BYTES = 10**9
# Tensors of a token's width that live at once in a layer: the residual, the norm's output, the
# attention's output and the block's, and what a sum of them makes.
STREAMS = 6
LEAST, MOST = 0.05, 0.98


def activation_bytes(config: Mapping[str, Any], *, tokens: int, itemsize: int) -> int:
    """The most that the activations of a batch of `tokens` take, in bytes, by a text config: those
    of one layer, its attention's or its experts', as no gradient keeps those of others.
    """
    shape = attention_shape(config)
    chosen = int(config.get("num_experts_per_tok") or 0)
    expert = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or 0)
    dense = int(config.get("intermediate_size") or 4 * shape.width)
    attention = (2 * shape.heads + 2 * shape.kept_heads) * shape.head
    # Gate and up, their product, and with experts a token's copies before and after.
    block = max(3 * dense, chosen * (3 * expert + 2 * shape.width))
    return tokens * (STREAMS * shape.width + max(attention, block)) * itemsize


def static_fraction(*, free_bytes: int, activations: int) -> float:
    """SGLang's `mem_fraction_static`: the share of the `free_bytes` of a device for weights and
    cache. The cache is as large as a batch, so this only says what must be left.
    """
    fraction = 1 - (activations + RESERVE_BYTES) / free_bytes
    return min(MOST, max(LEAST, fraction))
