"""The harness's questions to a model that engines run, whatever it is spread over: likelihoods come
from its hidden states, answers from an engine that writes. With `harness`, what knows `lm_eval`.

Dimensions: N scored tokens of a request, C those of a chunk, H hidden size, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kdflow_core.contracts import OutputHead, TokenSequence
from kdflow_core.data.chat import ChatFormat
from kdflow_core.errors import DataError
from kdflow_core.losses.logits import LogitProducer
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.sinks import Reporter

ANSWER_TOKENS = 256  # where a task does not say; the harness's own default
ROWS_AT_ONCE = 256  # of logits


class Asked(Protocol):
    """A model that is asked. Where it is spread over ranks, all of them ask together."""

    @property
    def max_length(self) -> int:
        """The longest sequence it takes, in tokens."""
        ...

    @property
    def head(self) -> OutputHead:
        """What turns its states into logits."""
        ...

    def states(self, sequences: Sequence[TokenSequence]) -> Iterator[torch.Tensor]:
        """The states [N, H] before the supervised tokens of each sequence, in order."""
        ...

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
        """The ids of an answer to each prompt."""
        ...


class EngineModel(TemplateLM):  # type: ignore[misc]
    """Such a model, as the harness asks it; every request is progress."""

    def __init__(self, asked: Asked, chat: ChatFormat, *, reporter: Reporter, title: str) -> None:
        super().__init__()
        self.tokenizer = chat.tokenizer
        self._asked = asked
        self._end_ids = chat.end_ids
        self._reporter = reporter
        self._title = title
        self._prefix = self.tokenizer.decode(self.prefix_token_id)
        self._done = self._total = 0

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's records."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """See `TemplateLM`."""
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """See `LM`."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # Requests that differ in their last token alone, as choices of a letter do, are read once.
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        targets: list[list[int]] = []
        for number, (_text, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-self._asked.max_length :]
            count = min(len(continuation), len(ids) - 1)
            targets.append(ids[-count:] if count else [])
            alike[count, tuple(ids[:-1])].append(number)
        self._total += len(requests)
        found = [(0.0, True)] * len(requests)
        sequences = [
            _sequence([*ids, targets[numbers[0]][-1]], count)
            for (count, ids), numbers in alike.items()
            if count
        ]
        groups = [numbers for (count, _), numbers in alike.items() if count]
        for numbers, states_NH in zip(groups, self._asked.states(sequences), strict=True):
            scores = _scores(states_NH, self._asked.head, [targets[number] for number in numbers])
            for number, score in zip(numbers, scores, strict=True):
                found[number] = score
            self._tell(len(numbers))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """See `LM`: of whole texts, in windows."""
        windows, text = [], []
        for number, request in enumerate(requests):
            (string,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._asked.max_length - 1,  # the last token of a window goes with it
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                text.append(number)
        sums = [0.0] * len(requests)
        for number, (score, _) in zip(text, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += score
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """See `LM`. What comes behind a stop string is written, and cut off."""
        self._total += len(requests)
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        for numbers in alike.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], ANSWER_TOKENS)
            stops = handle_stop_sequences(options["until"], eos=None)
            prompts = [self._prompt(requests[n].args[0], options["max_gen_toks"]) for n in numbers]
            answers = self._asked.answers(prompts, self._sampling(options))
            for number, ids in zip(numbers, answers, strict=True):
                text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, stops, None)
            self._tell(len(numbers))
        return texts

    def _prompt(self, text: str, max_new_tokens: int) -> Prompt:
        room = self._asked.max_length - max_new_tokens
        if room < 1:
            raise DataError(
                f"eval.lm_eval.tasks: a task asks for answers of {max_new_tokens} tokens, and the "
                f"model takes {self._asked.max_length} in all; leave it out"
            )
        ids_T = np.array(self.tok_encode(text)[-room:], np.int64)
        return Prompt(ids_T=ids_T, max_new_tokens=max_new_tokens)

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        return Sampling(
            stop_ids=self._end_ids,
            log_probs=False,
            temperature=options["temperature"] if options["do_sample"] else 0.0,
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
        )

    def _tell(self, count: int) -> None:
        self._done += count
        self._reporter.progress(
            done=self._done, total=self._total, unit="requests", detail=self._title
        )


def _sequence(ids: list[int], count: int) -> TokenSequence:
    """Ids whose last `count` are scored."""
    supervised_T = np.zeros(len(ids), bool)
    supervised_T[-count:] = True
    return TokenSequence(ids_T=np.array(ids, np.int64), supervised_T=supervised_T)


@torch.inference_mode()
def _scores(
    states_NH: torch.Tensor, head: OutputHead, targets: Sequence[list[int]]
) -> list[tuple[float, bool]]:
    """Of each list of N targets the sum of their log-probabilities, in nats, and whether each of
    them is the most probable token.
    """
    device, logits = head.weight_VH.device, LogitProducer(head, torch.float32)
    targets_RN = torch.tensor(targets, device=device)
    sums_R = torch.zeros(len(targets), dtype=torch.float64, device=device)
    is_top_R = torch.ones(len(targets), dtype=torch.bool, device=device)
    for begin in range(0, len(states_NH), ROWS_AT_ONCE):
        logits_CV = logits.logits(states_NH[begin : begin + ROWS_AT_ONCE].to(device))
        targets_RC = targets_RN[:, begin : begin + ROWS_AT_ONCE]
        total_C = logits_CV.logsumexp(-1)
        own_RC = logits_CV.gather(1, targets_RC.T).T - total_C
        sums_R += own_RC.double().sum(-1)
        is_top_R &= (targets_RC == logits_CV.argmax(-1)).all(-1)
    return list(zip(sums_R.tolist(), is_top_R.tolist(), strict=True))
