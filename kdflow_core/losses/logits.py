"""The products between states and heads, in full precision.

bfloat16 logits would put an error of tens of percent on the gradient of a small KL. So logits and
weight gradients are float32 (float64 for float64 inputs). On a GPU, products of bfloat16 come out
in float32. A CPU has no such product: weights are widened a block of the vocabulary at a time, and
the product of what was bfloat16 may take bfloat16 instructions, which lose nothing of it. The
logit gradient, too, enters its products as bfloat16 where the other factor is.

Dimensions: C tokens of a chunk, V vocabulary, W rows of a block of it, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdflow_core.contracts import OutputHead

WIDENED_BYTES = 2**26  # of weights, at a time
# Of weights at a time on a CPU, where a product rearranges both factors first: in its caches.
CACHED_BYTES = 2**22


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class LogitProducer:
    """Logits of one head, chunk by chunk, and the way back through it."""

    def __init__(self, head: OutputHead, dtype: torch.dtype) -> None:
        self.head = head
        self._dtype = dtype
        self._weight_VH = head.weight_VH.detach()
        self._bias_V = None if head.bias_V is None else head.bias_V.detach().to(dtype)

    def logits(self, hidden_CH: torch.Tensor, out_CV: torch.Tensor | None = None) -> torch.Tensor:
        """softcap(scale * (h W^T + b)), [C, V], written to `out_CV` where it is given."""
        head, hidden_CH = self.head, hidden_CH.detach()
        if out_CV is None:
            out_CV = hidden_CH.new_empty(len(hidden_CH), len(self._weight_VH), dtype=self._dtype)
        if widening_product(hidden_CH, self._weight_VH):
            torch.mm(hidden_CH, self._weight_VH.T, out_dtype=self._dtype, out=out_CV)
        else:
            wide_CH = hidden_CH.to(self._dtype)
            with bfloat16_products(hidden_CH, self._weight_VH):
                for rows, weight_WH in self._blocks(cached=hidden_CH.device.type == "cpu"):
                    torch.mm(wide_CH, weight_WH.T, out=out_CV[:, rows])
        if self._bias_V is not None:
            out_CV += self._bias_V
        if head.logit_scale != 1.0:
            out_CV *= head.logit_scale
        if head.softcap is not None:
            out_CV.div_(head.softcap).tanh_().mul_(head.softcap)
        return out_CV

    def through_head_(self, grad_CV: torch.Tensor, logits_CV: torch.Tensor) -> None:
        """Turn, in place, a gradient for the logits into one for h W^T + b."""
        head = self.head
        if head.softcap is not None:
            grad_CV *= 1 - (logits_CV / head.softcap).square()  # d tanh = 1 - tanh^2
        if head.logit_scale != 1.0:
            grad_CV *= head.logit_scale

    def hidden_gradient(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """The gradient for the states, [C, H], from one for h W^T + b."""
        weight_VH = self._weight_VH
        if grad_CV.is_cuda and is_half(weight_VH):
            grad_CH = torch.mm(grad_CV.to(weight_VH.dtype), weight_VH, out_dtype=self._dtype)
        else:
            grad_CH = grad_CV.new_zeros(len(grad_CV), weight_VH.shape[1])
            with bfloat16_products(weight_VH):
                for rows, weight_WH in self._blocks():
                    grad_CH.addmm_(grad_CV[:, rows], weight_WH)
        return grad_CH

    def _blocks(self, *, cached: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight in the dtype of the logits, rows by rows; where it has that dtype, whole, or
        as much as is `cached`.
        """
        weight_VH = self._weight_VH
        size = len(weight_VH)
        if cached or weight_VH.dtype != self._dtype:
            most = CACHED_BYTES if weight_VH.dtype == self._dtype else WIDENED_BYTES
            size = max(1, most // (weight_VH.shape[1] * self._dtype.itemsize))
        for begin in range(0, len(weight_VH), size):
            rows = slice(begin, begin + size)
            yield rows, weight_VH[rows].to(self._dtype)


def row_chunks(
    num_rows: int, vocabulary: int, logits_bytes: int, dtype: torch.dtype
) -> Iterator[slice]:
    """Rows at a time, as many as there is room for, of two models' logits."""
    size = max(1, logits_bytes // (2 * vocabulary * dtype.itemsize))
    for begin in range(0, num_rows, size):
        yield slice(begin, min(begin + size, num_rows))


def is_half(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a 16-bit floating point type."""
    return tensor.dtype in {torch.bfloat16, torch.float16}


def widening_product(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether there is a matrix product of these that comes out in float32: on GPUs alone."""
    return a.is_cuda and is_half(a) and a.dtype == b.dtype


def add_weight_gradient_(
    grad_VH: torch.Tensor, grad_CV: torch.Tensor, hidden_CH: torch.Tensor, *, fresh: bool
) -> None:
    """Add G^T h to a gradient in full precision; a `fresh` one is overwritten."""
    beta = 0 if fresh else 1
    if hidden_CH.is_cuda and is_half(hidden_CH):
        left_VC = grad_CV.to(hidden_CH.dtype).T
        torch.addmm(grad_VH, left_VC, hidden_CH, beta=beta, out_dtype=grad_VH.dtype, out=grad_VH)
    else:
        with bfloat16_products(hidden_CH):
            grad_VH.addmm_(grad_CV.T, hidden_CH.to(grad_VH.dtype), beta=beta)


@contextmanager
def bfloat16_products(*factors: torch.Tensor) -> Iterator[None]:
    """Let a CPU multiply float32 as bfloat16, with sums in float32, where the factors are widened
    bfloat16.
    """
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = backend.fp32_precision
    if all(factor.dtype == torch.bfloat16 for factor in factors):
        backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = precision
