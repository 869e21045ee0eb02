"""A Markov chain over four letters, with a teacher that has its exact law in tokens of two letters.

A student whose tokens are single letters has to reach the chain's entropy in bits per byte. It is a
table: its state is the token before, so that it can hold the chain and nothing else.

Dimensions: S letters (states of the chain), V and W ids of student and teacher, N tokens.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.schema.algorithm import VanillaKDConfig
from configs.schema.loss import ComparedBy
from kdflow_core.algorithms.base import Ingredients, Student
from kdflow_core.algorithms.vanilla_kd import VanillaKD
from kdflow_core.alignment.tokenizer_pair import TokenizerPair, vocabulary
from kdflow_core.contracts import Example, HiddenRows, OutputHead, TokenSequence
from kdflow_core.losses import LOSSES
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.student.step import collate
from tasks.jobs.student_module import build_comparison

LETTERS = "abcd"
SEQUENCES, LENGTH, STEPS = 8, 400, 400
END = "<|end|>"


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Every token has so many letters, or one where the text ends; ids in the order of letters."""
    tokens = [END, *LETTERS, *("".join(pair) for pair in product(LETTERS, repeat=2))]
    kept = tokens if size == 2 else tokens[: 1 + len(LETTERS)]
    merges = [tuple(token) for token in kept if len(token) == 2 and token != END]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(kept)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("." * size), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


@dataclass(frozen=True)
class Chain:
    """Where a letter goes, and how often each is there."""

    next_SS: np.ndarray
    often_S: np.ndarray

    @classmethod
    def draw(cls) -> "Chain":
        next_SS = np.random.default_rng(0).dirichlet([0.5] * len(LETTERS), len(LETTERS)) + 0.02
        next_SS /= next_SS.sum(1, keepdims=True)
        values, vectors = np.linalg.eig(next_SS.T)
        often_S = np.real(vectors[:, np.argmax(np.real(values))])
        return cls(next_SS, often_S / often_S.sum())

    def text(self, rng: np.random.Generator) -> str:
        state, letters = rng.choice(len(LETTERS), p=self.often_S), []
        for _ in range(LENGTH):
            letters.append(LETTERS[state])
            state = rng.choice(len(LETTERS), p=self.next_SS[state])
        return "".join(letters)

    def bits(self, law_SS: np.ndarray) -> float:
        """Bits per letter of a law for the next letter."""
        return float(-(self.often_S[:, None] * self.next_SS * np.log2(law_SS)).sum())

    def teacher_head(self) -> OutputHead:
        """Logits of the next pair [W] by the token before [W]: those of its last letter."""
        count = 1 + len(LETTERS) + len(LETTERS) ** 2
        law_WW = np.full((count, count), 1e-12)
        first = len(LETTERS) + 1
        for before in range(count):
            begin_S = self.often_S if before == 0 else self.next_SS[(before - 1) % len(LETTERS)]
            law_WW[before, first:] = (begin_S[:, None] * self.next_SS).ravel()
        return OutputHead(weight_VH=torch.from_numpy(np.log(law_WW.T)).float())


class TokenBefore:
    """The teacher's states: which token stood before, as a row of the identity."""

    hidden_size = 1 + len(LETTERS) + len(LETTERS) ** 2

    def begin_step(self, step: int) -> None:
        del step

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        before_N = torch.from_numpy(sequence.ids_T[sequence.target_positions_N - 1]).long()
        identity_RH = torch.eye(self.hidden_size, dtype=torch.bfloat16)
        return HiddenRows(buffer_RH=identity_RH, index_N=before_N)


def sequence_of(own: PreTrainedTokenizerFast, text: str) -> TokenSequence:
    ids = [own.eos_token_id, *own(text, add_special_tokens=False)["input_ids"]]
    supervised_T = np.ones(len(ids), bool)
    supervised_T[0] = False
    return TokenSequence(ids_T=np.array(ids, np.int32), supervised_T=supervised_T)


def learned_bits(chain: Chain, by: ComparedBy, **changed: Any) -> float:
    """Bits per byte of the student's table after training on the teacher alone."""
    torch.manual_seed(0)
    sides = [tokenizer(1), tokenizer(2)]
    pair = TokenizerPair(
        vocabularies=tuple(  # type: ignore[arg-type]
            vocabulary(own, [own.eos_token_id], len(own), "side") for own in sides
        )
    )
    rng, examples = np.random.default_rng(1), []
    for text in (chain.text(rng) for _ in range(SEQUENCES)):
        views = {
            name: sequence_of(own, text)
            for name, own in zip(("student", "teacher"), sides, strict=True)
        }
        aligned = pair.align(views["student"], views["teacher"], [text])
        examples.append(Example(source="s", views=views, alignments={"teacher": aligned}))
    comparison = build_comparison(pair, by, torch.device("cpu"))
    divergence = LOSSES[changed.pop("divergence", "forward_kl")]()
    spec = LossSpec(
        divergence=divergence, kd_ratio=1.0, logits_bytes=10**6, folding=comparison, **changed
    )
    algorithm = VanillaKD(
        VanillaKDConfig(),
        Ingredients(
            spec=spec,
            model=None,  # type: ignore[arg-type]
            heads={"teacher": chain.teacher_head()},
            vocabulary_size=len(sides[0]),
        ),
    )
    batch = collate(
        examples,
        algorithm,
        [TokenBefore()],
        weight=1 / sum(len(e.student.target_ids_N) for e in examples),
        empty=False,
        device=torch.device("cpu"),
    )
    before_N = batch.student.ids_BT[batch.student.row_N, batch.student.position_N]
    states_NV = torch.eye(len(sides[0]))[before_N]
    table_VV = torch.zeros(len(sides[0]), len(sides[0]), requires_grad=True)
    optimizer = torch.optim.Adam([table_VV], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        head = OutputHead(weight_VH=table_VV)
        student = Student(model=None, hidden_NH=states_NV, head=head)  # type: ignore[arg-type]
        algorithm.loss(student, batch).loss.backward()
        optimizer.step()
    law_VV = table_VV.detach().T.softmax(-1)[1:, 1:].double().numpy()
    return chain.bits(law_VV)


@pytest.mark.parametrize("span_share", [0.0, 0.5, 1.0])
def test_the_student_reaches_the_entropy_of_the_chain(span_share: float) -> None:
    """By classes, by the likelihood of spans, and by both."""
    chain = Chain.draw()
    entropy = chain.bits(chain.next_SS)
    assert 0.5 < entropy < 0.9 * np.log2(len(LETTERS))
    assert entropy <= learned_bits(chain, "folded", span_share=span_share) < 1.01 * entropy


@pytest.mark.parametrize(
    ("by", "divergence"), [("shared_tail", "forward_kl"), ("ranks", "total_variation")]
)
def test_maps_that_contradict_the_text_do_not(by: ComparedBy, divergence: str) -> None:
    """Beside them: the teacher's tokens are no letters, and their order says nothing of letters."""
    chain = Chain.draw()
    assert learned_bits(chain, by, divergence=divergence) > 1.2 * chain.bits(chain.next_SS)
