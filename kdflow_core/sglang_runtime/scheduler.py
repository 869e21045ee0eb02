"""What we add to SGLang's scheduler process: the true vocabulary, seeds, a check of new weights."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers import sampler
from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process
from sglang.srt.model_loader import weight_utils
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from tqdm import tqdm

from kdflow_core.sglang_runtime.cpu_decoding import decode_together
from kdflow_core.sglang_runtime.platform import leave_nccl_out
from kdflow_core.sglang_runtime.sampling import seeded_choice
from kdflow_core.weight_buckets import Bucket, missing_text


def scheduler_for(vocabulary_size: int) -> "partial[None]":
    """The entry of a scheduler process that samples from the first tokens of the head alone."""
    return partial(_run, vocabulary_size)


def _run(vocabulary_size: int, *args: Any, **kwargs: Any) -> None:
    _mask_padding(vocabulary_size)
    _sample_by_seeds()
    # Only the ids that a request names end its answer, not those of the model's own files too.
    ModelConfig._get_hf_eos_token_id = lambda _self: set()
    Scheduler.kdflow_expect_weights = _on_all_ranks(_expect_weights)
    Scheduler.kdflow_load_bucket = _on_all_ranks(_load_bucket)
    Scheduler.kdflow_check_weights = _on_all_ranks(_check_weights)
    Scheduler.kdflow_serve_weights = _on_all_ranks(_serve_weights)
    weight_utils.tqdm = _Silent
    if not torch.cuda.is_available():
        leave_nccl_out()
        decode_together()
    run_scheduler_process(*args, **kwargs)


class _Silent(tqdm):
    """A progress bar that nobody sees: the lines of this process are logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _on_all_ranks(work: Callable[..., None]) -> Callable[..., None]:
    """What fails on one rank of an engine fails on all of them. SGLang answers for the first one
    alone, and would serve what the others lack.
    """

    @wraps(work)
    def everywhere(scheduler: Scheduler, **parameters: Any) -> None:
        failure = None
        try:
            work(scheduler, **parameters)
        except Exception as error:  # noqa: BLE001 - raised again, on every rank
            failure = f"{type(error).__name__}: {error}"
        group = scheduler.tp_group.cpu_group
        failures: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, failure, group=group)
        texts = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
        if texts:
            raise RuntimeError("; ".join(texts))

    return everywhere


def _mask_padding(vocabulary_size: int) -> None:
    """Rows of the head beyond the vocabulary are no tokens, and get no probability."""
    prepare = sampler.Sampler._preprocess_logits

    def masked(self: Any, logits: torch.Tensor, sampling_info: Any) -> torch.Tensor:
        logits = prepare(self, logits, sampling_info)
        logits[:, vocabulary_size:] = float("-inf")
        return logits

    sampler.Sampler._preprocess_logits = masked


def _sample_by_seeds() -> None:
    """Every request brings a seed, and its tokens depend on that alone."""
    gather = SamplingBatchInfo.from_schedule_batch.__func__

    def seeded(cls: Any, batch: Any, vocab_size: int) -> Any:
        info = gather(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(seeded)
    sampler.multinomial_with_seed = seeded_choice


def _parameters(scheduler: Scheduler) -> dict[str, torch.Tensor]:
    named = scheduler.tp_worker.model_runner.model.named_parameters()
    return {name: p.data for name, p in named if p.is_floating_point()}


@torch.no_grad()
def _expect_weights(scheduler: Scheduler) -> None:
    """Make every parameter not-a-number: what does not arrive stays so."""
    for parameter in _parameters(scheduler).values():
        parameter.fill_(float("nan"))


def _load_bucket(scheduler: Scheduler, bucket: dict[str, Any]) -> None:
    """Copy a bucket's tensors into the model. Raises RuntimeError."""
    updater = scheduler.weight_updater
    named = Bucket.from_plain(bucket).open()
    for _, runner in updater._select_runners():
        success, message = runner.weight_updater.load_weights_from_distributed(named)
        if not success:
            raise RuntimeError(message)
    updater._session = msgspec.structs.replace(updater._session, loaded_weights=True)


@torch.no_grad()
def _check_weights(scheduler: Scheduler) -> None:
    """Raises RuntimeError, naming them, when parameters have not arrived."""
    # A sum is not-a-number where a summand is, and six times as fast as looking at each.
    named = _parameters(scheduler).items()
    missing = [name for name, p in named if bool(p.sum(dtype=torch.float32).isnan())]
    if missing:
        raise RuntimeError(f"{missing_text(missing)}, or are not finite")


def _serve_weights(scheduler: Scheduler, version: str) -> None:
    """Forget what the old weights have cached. Raises RuntimeError when the engine is at work."""
    if not scheduler.flush_cache(empty_cache=False):
        raise RuntimeError("the engine is at work; new weights have to wait")
    scheduler.record_weight_version_change(new_version=version)
