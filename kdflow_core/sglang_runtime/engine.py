"""SGLang's engine for generation: ids in, ids out, new weights in.

The engine runs in processes of its own, one scheduler a rank; here are its front and what of its
private API that takes. `scheduler.py` is our part inside its process.
"""

import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import init_custom_process_group

from kdflow_core.errors import ModelError
from kdflow_core.sglang_runtime.scheduler import scheduler_for

UPDATE_GROUP = "kdflow-weights"
CORES = "SGLANG_CPU_OMP_THREADS_BIND"
REAPING_S = 10.0  # for killed processes to be gone
WHOLE_ANSWER = 10**9  # tokens after which a part of an answer would be sent
CACHE_SLACK = 4096  # cache tokens beyond those that running answers may take


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What of SGLang's many options we set; None leaves the choice to SGLang."""

    folder: Path
    trust_remote_code: bool
    dtype: str
    vocabulary_size: int
    max_length: int
    tensor_parallel: int
    first_gpu: int
    max_running: int | None
    cache_tokens: int | None
    memory_fraction: float | None
    attention_backend: str | None
    sleep: bool


class GenerationEngine:
    """One engine; its processes end with this one. Call it from the process's main thread.

    Raises ModelError when SGLang cannot run the model, or not with these options.
    """

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        class MaskedEngine(Engine):
            run_scheduler_process_func = staticmethod(scheduler_for(options.vocabulary_size))

            @classmethod
            def _launch_detokenizer_subprocesses(cls, **_: Any) -> tuple[list[Any], list[str]]:
                """None: without a tokenizer, the scheduler's answers come here directly."""
                return [], []

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = _server_args(options, device)
            try:
                _check_architecture(ServerArgs(**arguments))
                with _cores_of_ranks(options.tensor_parallel, device):
                    self._engine = MaskedEngine(**arguments)
            except (RuntimeError, ValueError, AssertionError, OSError) as error:
                raise ModelError(
                    f"SGLang cannot serve {options.folder}: {error}. Where memory is short, lower "
                    "cache_tokens or memory_fraction; where the model is the matter, set the "
                    "engine's type to transformers"
                ) from error
        self._loop = self._engine.loop
        self._requests = 0
        self._asleep = frozenset[str]()  # which parts of its memory

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[Mapping[str, Any]],
        *,
        log_probs: bool,
        enough: float,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """SGLang's answers with the number of their prompt, as they come; the last share beyond
        `enough` is aborted.

        The requests go to the scheduler as one message: which of them it computes together then
        depends on them alone, and not on when each arrives.
        """
        if not prompts:
            return
        first, self._requests = self._requests, self._requests + len(prompts)
        names = [f"kdflow-{first + number}" for number in range(len(prompts))]
        stream = self._loop.run_until_complete(
            self._engine.async_generate(
                input_ids=list(prompts),
                sampling_params=[dict(one) for one in sampling],
                return_logprob=log_probs,
                rid=names,
                stream=True,
            )
        )
        waiting, aborted = set(range(len(prompts))), False
        try:
            while waiting:
                result = self._loop.run_until_complete(anext(stream))
                if result["meta_info"]["finish_reason"] is None:
                    continue  # its beginning alone
                waiting.discard(result["index"])
                yield result["index"], result
                if not aborted and len(prompts) - len(waiting) >= enough * len(prompts):
                    aborted = True
                    for number in waiting:
                        self._engine.tokenizer_manager.abort_request(names[number])
        finally:
            self._loop.run_until_complete(stream.aclose())

    def begin_weights(self) -> None:
        """Open an update; every parameter is not-a-number until it arrives."""
        _require(self._engine.begin_weight_update())
        self._remote("kdflow_expect_weights")

    def load_weights(self, bucket: dict[str, Any]) -> None:
        """Have every scheduler process open a bucket and copy its tensors into the model."""
        self._remote("kdflow_load_bucket", bucket=bucket)

    def join_broadcast(self, address: str, port: int, *, first: int, ranks: int) -> None:
        """Meet rank 0 of a group of so many `ranks`, of which the engine's begin with `first`."""
        backend = "nccl" if self._engine.server_args.device == "cuda" else "gloo"
        _require(
            self._engine.init_weights_update_group(
                address, port, first, ranks, UPDATE_GROUP, backend
            )
        )

    def receive_weights(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Take tensors that rank 0 of the group broadcasts."""
        _require(
            self._engine.update_weights_from_distributed(
                names, dtypes, shapes, UPDATE_GROUP, flush_cache=False
            )
        )

    def end_weights(self, version: int) -> None:
        """Close the update. Raises ModelError that names what has not arrived."""
        self._remote("kdflow_check_weights")
        _require(self._engine.end_weight_update())
        self._remote("kdflow_serve_weights", version=str(version))

    def sleep(self) -> None:
        """Give weights, cache and graphs back to the device. For engines with `sleep` alone.
        Nothing to do when asleep.
        """
        if awake := [part for part in GPU_MEMORY_ALL_TYPES if part not in self._asleep]:
            self._engine.release_memory_occupation(awake)
        self._asleep = frozenset(GPU_MEMORY_ALL_TYPES)

    def wake_weights(self) -> None:
        """Take the memory of the weights again, which come anew. Nothing to do when awake."""
        self._wake(frozenset({GPU_MEMORY_TYPE_WEIGHTS}))

    def wake(self) -> None:
        """Take all memory again; the cache is empty. Nothing to do when awake."""
        self._wake(frozenset(GPU_MEMORY_ALL_TYPES))

    def _wake(self, parts: frozenset[str]) -> None:
        if asleep := sorted(self._asleep & parts):
            self._engine.resume_memory_occupation(asleep)
        self._asleep -= parts

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()  # kills them, and waits until they hold nothing
        for process in multiprocessing.active_children():
            process.join(REAPING_S)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # SGLang ends all children of this process, with them one that Python needs again.
            resource_tracker.ensure_running()

    def _remote(self, method: str, **parameters: Any) -> None:
        try:
            self._engine.collective_rpc(method, **parameters)
        except AssertionError as error:  # this is how the engine hands on a scheduler's error
            raise ModelError(str(error)) from error


def join_as_sender(address: str, port: int, ranks: int, device: torch.device) -> Any:
    """The other end of `join_broadcast`: the process group, in which this is rank 0."""
    return init_custom_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{address}:{port}",
        world_size=ranks,
        rank=0,
        group_name=UPDATE_GROUP,
    )


@contextmanager
def _cores_of_ranks(ranks: int, device: torch.device) -> Iterator[None]:
    """On a CPU, the cores of each rank of an engine that is started within, where the environment
    does not say them: SGLang gives each a memory node, and ends where there are fewer.
    """
    if device.type != "cpu" or ranks == 1 or CORES in os.environ:
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    parts = [cores[rank % len(cores) :: ranks] for rank in range(ranks)]
    os.environ[CORES] = "|".join(",".join(map(str, part)) for part in parts)
    try:
        yield
    finally:
        del os.environ[CORES]


def _require(outcome: tuple[bool, str]) -> None:
    success, message = outcome
    if not success:
        raise ModelError(f"SGLang did not take the new weights: {message}")


def _check_architecture(args: Any) -> None:
    architecture = ModelConfig.from_server_args(args).hf_config.architectures[0]
    if not ModelRegistry.is_arch_supported(architecture):
        raise ModelError(
            f"SGLang does not run {architecture}; set the engine's type to transformers"
        )


def _server_args(options: EngineOptions, device: torch.device) -> dict[str, Any]:
    cpu = device.type == "cpu"
    running = options.max_running or (32 if cpu else None)
    cache = options.cache_tokens
    if cache is None and cpu and running is not None:
        cache = running * options.max_length + CACHE_SLACK
    chosen = {
        "max_running_requests": running,
        "max_total_tokens": cache,
        "mem_fraction_static": options.memory_fraction or (0.8 if cpu else None),
        "attention_backend": options.attention_backend or ("torch_native" if cpu else None),
        "chunked_prefill_size": -1 if cpu else None,
    }
    return {
        "model_path": str(options.folder),
        "trust_remote_code": options.trust_remote_code,
        "device": device.type,
        "dtype": options.dtype,
        "tp_size": options.tensor_parallel,
        "base_gpu_id": 0 if cpu else options.first_gpu,  # of a CPU it would be the NUMA node
        "context_length": options.max_length,
        "grammar_backend": "none",
        "sampling_backend": "pytorch",  # the one that knows seeds
        "disable_cuda_graph": cpu,
        "disable_radix_cache": cpu,
        "skip_tokenizer_init": True,
        "stream_interval": WHOLE_ANSWER,
        "skip_server_warmup": True,
        "enable_memory_saver": options.sleep,
        # Between rounds the scheduler would otherwise spin, on a core that training needs.
        "sleep_on_idle": True,
        "log_level": "error",
        **{name: value for name, value in chosen.items() if value is not None},
    }
