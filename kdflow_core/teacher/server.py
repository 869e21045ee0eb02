"""The teacher in an SGLang server that the user runs, over HTTP: each number travels as text.

Dimensions: N supervised tokens, T tokens, H hidden size, V vocabulary, K most likely tokens.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import torch

from configs.patience import STATUSES, patient
from configs.schema.teacher import SglangServerTeacher
from configs.secrets import public
from kdflow_core.batching import pack_by_tokens
from kdflow_core.contracts import HiddenRows, OutputHead, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.heads import apply_head
from kdflow_core.models.loading import DTYPES, load_config
from kdflow_core.teacher import longest_allowed

FLAGS = "--enable-return-hidden-states --disable-radix-cache --chunked-prefill-size -1"
MAX_SEQUENCES = 64
MOST_LIKELY = 256


class SglangServerEngine:
    """A client of one server. The model's files are here too: for its head and its tokenizer."""

    def __init__(
        self,
        config: SglangServerTeacher,
        *,
        folder: Path,
        head: OutputHead,
        longest: int,
        device: torch.device,
    ) -> None:
        self._url = config.url
        self._device = device
        self._hidden_size = head.weight_VH.shape[1]
        self._tokens_per_batch = config.tokens_per_batch
        self._client: httpx.Client | None = httpx.Client(
            base_url=config.url, timeout=config.timeout_s
        )
        try:
            info = self._ask("GET", "/server_info")
            check_flags(info, config, folder)
            self.max_length = min(longest_allowed(config, folder), int(info["max_req_input_len"]))
            self._verify_head(head)
            rate = self._measure(min(longest, self.max_length), vocabulary=head.weight_VH.shape[0])
        except BaseException:
            self.close()
            raise
        self.remark = (
            f"the teacher's states come over HTTP as text, at about {rate:,.0f} tokens/s; "
            "teacher.type=sglang passes them on in memory"
        )

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        if self._client is None:
            raise ModelError("the teacher engine is closed")
        client = self._client

        def ask() -> httpx.Response:
            response = client.request(method, path, json=body)
            if response.status_code in STATUSES:
                response.raise_for_status()
            return response

        try:
            response = patient(f"teacher.url={public(self._url)}")(ask)
        except httpx.HTTPStatusError as error:
            response = error.response
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ModelError(
                f"no answer from the SGLang server at teacher.url={self._url} "
                f"({type(error).__name__}: {error}). Start one with `python -m "
                f"sglang.launch_server --model-path ... {FLAGS}`, or raise "
                "teacher.timeout_s; finished shards are kept"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise ModelError(
                f"the server at teacher.url={self._url} refuses {path} "
                f"(status {response.status_code}): {response.text[:500]}"
            )
        return orjson.loads(response.content)

    def _prefill(self, batch: Sequence[np.ndarray], **wanted: int | bool) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self._ask(
            "POST",
            "/generate",
            {
                "input_ids": [ids_T.tolist() for ids_T in batch],
                "sampling_params": {"temperature": 0, "max_new_tokens": 1},
                "return_hidden_states": True,
                **wanted,
            },
        )
        return [answer["meta_info"] for answer in answers]

    def _states(self, meta: dict[str, Any], length: int) -> np.ndarray:
        states_TH = np.asarray(meta["hidden_states"][0], dtype=np.float32)
        if states_TH.shape != (length, self._hidden_size):
            raise ModelError(
                f"the server at teacher.url={self._url} gave states of shape {states_TH.shape} for "
                f"{length} tokens of {self._hidden_size} values: is it another model than "
                f"teacher.model, or was it started without `{FLAGS}`?"
            )
        return states_TH

    def _verify_head(self, head: OutputHead) -> None:
        """Compare the most likely next tokens' log-probabilities, up to their common offset."""
        size = head.weight_VH.shape[0]
        ids_T = np.random.default_rng(0).integers(0, size, 8)
        (meta,) = self._prefill([ids_T], return_logprob=True, top_logprobs_num=MOST_LIKELY)
        top = [(value, token) for value, token, _ in meta["output_top_logprobs"][0] if token < size]
        own_K = torch.tensor([value for value, _ in top])
        states_TH = torch.from_numpy(self._states(meta, len(ids_T))).to(head.weight_VH)
        rebuilt_V = apply_head(states_TH[-1:], head)[0].float().cpu()
        rebuilt_K = rebuilt_V[[token for _, token in top]]
        own_K, rebuilt_K = own_K - own_K.mean(), rebuilt_K - rebuilt_K.mean()
        error = ((rebuilt_K - own_K).norm() / own_K.norm()).item()
        if not error < 0.1:  # bfloat16 logits; another head is off by about 1
            raise ModelError(
                f"logits rebuilt from the hidden states of the server at teacher.url={self._url} "
                f"differ from its own (relative error {error:.3g}): it serves another model than "
                "teacher.model, or its states are not those before the head"
            )

    def _measure(self, length: int, *, vocabulary: int) -> float:
        """Tokens per second of one sequence."""
        began = time.monotonic()
        (meta,) = self._prefill([np.random.default_rng(0).integers(0, vocabulary, length)])
        self._states(meta, length)
        return length / (time.monotonic() - began)

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `TeacherEngine`: the sequences of one request."""
        return pack_by_tokens(lengths, self._tokens_per_batch, max_sequences=MAX_SEQUENCES)

    def forward(self, sequences: Sequence[TokenSequence]) -> list[HiddenRows]:
        """See `TeacherEngine`."""
        answers = self._prefill([s.ids_T for s in sequences])
        result = []
        for sequence, meta in zip(sequences, answers, strict=True):
            states_TH = self._states(meta, len(sequence.ids_T))
            # The state before a supervised token predicts it.
            states_NH = torch.from_numpy(states_TH[sequence.target_positions_N - 1])
            result.append(
                HiddenRows(
                    buffer_RH=states_NH.to(self._device, torch.bfloat16),
                    index_N=torch.arange(len(states_NH), device=self._device),
                )
            )
        return result

    def sleep(self) -> None:
        """See `TeacherEngine`; the server is not ours to put to sleep."""

    def wake(self) -> None:
        """See `TeacherEngine`."""

    def close(self) -> None:
        """See `TeacherEngine`; the server runs on."""
        if self._client is not None:
            self._client.close()
            self._client = None


def check_flags(info: dict[str, Any], config: SglangServerTeacher, folder: Path) -> None:
    """Raises ModelError where the server was started in a way that loses or changes states."""
    if not info["enable_return_hidden_states"] or not info["disable_radix_cache"]:
        raise ModelError(
            f"the server at teacher.url={config.url} cannot give the states of whole sequences; "
            f"start it with `{FLAGS}`"
        )
    model_config = load_config(folder, trust_remote_code=config.model.trust_remote_code)
    model_dtype = model_config.dtype or torch.float32
    dtype = {"auto": model_dtype, "half": torch.float16, "float": torch.float32}.get(
        info["dtype"], DTYPES.get(info["dtype"])
    )
    if dtype != DTYPES[config.dtype]:
        raise ModelError(
            f"the server at teacher.url={config.url} computes in {info['dtype']} ({dtype}), and "
            f"teacher.dtype={config.dtype}; make them equal"
        )
