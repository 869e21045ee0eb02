"""The chunked loss against other libraries' losses on the same states and heads."""

import warnings
from pydoc_data.topics import topics

import pytest
import torch

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.chunked import distillation_loss
from kdflow_core.losses.elementwise import LossSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

TOKENS, VOCABULARY, STUDENT, TEACHER = 37, 211, 16, 24


class Case:
    """Float32 states and heads of a student and a larger teacher."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden_TH = random(TOKENS, STUDENT).requires_grad_()
        self.weight_VH = (random(VOCABULARY, STUDENT) / 4).requires_grad_()
        self.teacher_TG, self.teacher_VG = random(TOKENS, TEACHER), random(VOCABULARY, TEACHER) / 4
        self.targets_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)

    def ours(self, beta: float, *, temperature: float = 1.0, kd_ratio: float = 1.0) -> torch.Tensor:
        """The mean over tokens."""
        divergence = LOSSES["generalized_jsd"](beta=beta, temperature=temperature)
        output = distillation_loss(
            student_hidden_TH=self.hidden_TH,
            student_head=OutputHead(weight_VH=self.weight_VH),
            teacher=HiddenSignal(self.teacher_TG, OutputHead(weight_VH=self.teacher_VG)),
            target_ids_T=self.targets_T,
            weights_T=torch.full((TOKENS,), 1 / TOKENS),
            spec=LossSpec(divergence=divergence, kd_ratio=kd_ratio, logits_bytes=2 * 5 * 4 * 211),
        )
        return output.loss

    def assert_equal(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """In value and in the gradients of states and head."""
        leaves = (self.hidden_TH, self.weight_VH)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        grads = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs))
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_generalized_jsd_is_trls(beta: float, temperature: float) -> None:
    case = Case()
    theirs = GKDTrainer.generalized_jsd_loss(
        (case.hidden_TH @ case.weight_VH.T)[None],
        (case.teacher_TG @ case.teacher_VG.T)[None],
        labels=case.targets_T[None],
        beta=beta,
        temperature=temperature,
    )
    case.assert_equal(case.ours(beta, temperature=temperature), theirs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_is_trls_chunked_one(beta: float) -> None:
    case = Case()
    theirs_T, _ = ChunkedDivergenceFunction.apply(
        case.hidden_TH, case.weight_VH, None, case.teacher_TG, case.teacher_VG, None, beta
    )
    case.assert_equal(case.ours(beta), theirs_T.mean())


@pytest.mark.parametrize("beta", [0.3, 0.5])
@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
def test_mixed_loss_is_liger_kernels(beta: float, kd_ratio: float) -> None:
    case = Case()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - kd_ratio,
        weight_soft_loss=kd_ratio,
        beta=beta,
        compiled=False,
        chunk_size=8,
    )
    theirs = loss(case.hidden_TH, case.weight_VH, case.teacher_TG, case.teacher_VG, case.targets_T)
    case.assert_equal(case.ours(beta, kd_ratio=kd_ratio), theirs)


@pytest.mark.parametrize(("name", "swapped"), [("forward_kl", False), ("reverse_kl", True)])
def test_kl_is_torchs(name: str, swapped: bool) -> None:
    """`kl_div(input, target)` is KL(target || input)."""
    case = Case()
    log_q_TV = torch.log_softmax(case.hidden_TH @ case.weight_VH.T, -1)
    log_p_TV = torch.log_softmax(case.teacher_TG @ case.teacher_VG.T, -1)
    pair = (log_p_TV, log_q_TV) if swapped else (log_q_TV, log_p_TV)
    theirs = torch.nn.functional.kl_div(*pair, reduction="batchmean", log_target=True)
    case.assert_equal(case.ours({"forward_kl": 0.0, "reverse_kl": 1.0}[name]), theirs)
    output = distillation_loss(
        student_hidden_TH=case.hidden_TH,
        student_head=OutputHead(weight_VH=case.weight_VH),
        teacher=HiddenSignal(case.teacher_TG, OutputHead(weight_VH=case.teacher_VG)),
        target_ids_T=case.targets_T,
        weights_T=torch.full((TOKENS,), 1 / TOKENS),
        spec=LossSpec(divergence=LOSSES[name](), kd_ratio=1.0, logits_bytes=10**4),
    )
    case.assert_equal(output.loss, theirs)


@pytest.mark.parametrize("pair", [("gpt2", "qwen"), ("qwen", "deepseek"), ("deepseek", "gpt2")])
def test_spans_of_two_tokenizers_are_trls(pair: tuple[str, str]) -> None:
    """TRL 1.16.0 aligns byte-level tokenizers by character offsets turned into bytes."""
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets

    from kdflow_core.alignment.boundaries import common_boundaries
    from kdflow_core.alignment.token_bytes import token_bytes
    from tests.real_tokenizers import real_tokenizer

    texts = [
        topics["assert"] * 3,
        "def f(x):\n    return  x + 1\n\n\nclass A: pass  # done",
        "hi 😊 to 你好，世界 👍🏽 naïve café",  # noqa: RUF001 - text of all scripts
    ]
    backends = [real_tokenizer(name).backend_tokenizer for name in pair]
    encoded = [encode_with_byte_offsets(backend, texts) for backend in backends]
    for (own_ids, own_offsets), (other_ids, other_offsets) in zip(*encoded, strict=True):
        lengths = [
            token_bytes(real_tokenizer(name), name).length_V[ids]
            for name, ids in zip(pair, (own_ids, other_ids), strict=True)
        ]
        spans = common_boundaries(*lengths).groups_S4.tolist()
        ours = [(list(range(a, b)), list(range(c, d))) for a, b, c, d in spans]
        theirs = ULDLoss._align_by_byte_offsets(own_offsets, other_offsets)
        assert ours == list(zip(*theirs, strict=True))
