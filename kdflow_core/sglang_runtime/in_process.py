"""SGLang's model runner inside the calling process, for prefill only.

No scheduler, no tokenizer process, no sockets: ids go in as arrays, and the model's own output
tensor comes back. With `attention.py`, `parallel.py` and `platform.py` this is all of SGLang's
private API that kdflow uses; `versions.py` refuses versions that it was not tested with.

Dimensions: R tokens of a batch, back to back, H hidden size.
"""

import gc
import io
import warnings
from array import array
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.environ import envs
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    PPProxyTensors,
)
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from kdflow_core.errors import ModelError
from kdflow_core.sglang_runtime import parallel
from kdflow_core.sglang_runtime.attention import PrefillAttention
from kdflow_core.sglang_runtime.platform import PlainCpuPlatform

UNUSED_PORT = 1  # of a rendezvous that does not happen: the world exists already


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """What of SGLang's many options we set; None leaves the choice to SGLang."""

    folder: Path
    trust_remote_code: bool
    dtype: str
    tensor_parallel: int
    expert_parallel: int
    pipeline_parallel: int
    quantization: str | None
    attention_backend: str | None
    memory_fraction: float
    context_length: int | None
    deterministic: bool
    max_tokens: int
    max_sequences: int


class _StatesOnly(torch.nn.Module):
    """Replaces SGLang's logits processor: hands on the states and computes no logits."""

    def forward(
        self,
        input_ids: torch.Tensor,  # noqa: ARG002 - SGLang's signature
        hidden_states: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> LogitsProcessorOutput:
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden_states)


class PrefillRunner:
    """A model under SGLang. One at a time in a process: SGLang's state is global.

    Raises:
        ModelError: SGLang cannot run the model, or not with these options.
    """

    def __init__(self, options: RunnerOptions, device: torch.device) -> None:
        self.device = device
        parallel.join_world(device)
        args = _server_args(options, device)
        publish(
            args,
            role="scheduler",
            ranks=SpawnRanks(
                world_rank=dist.get_rank() % (options.tensor_parallel * options.pipeline_parallel),
                gpu_id=device.index or 0,
            ),
        )
        self._config = ModelConfig.from_server_args(args)
        architecture = self._config.hf_config.architectures[0]
        if not ModelRegistry.is_arch_supported(architecture):
            raise ModelError(f"SGLang does not run {architecture}; set teacher.type=transformers")
        with (
            parallel.replicas_in_this_world(),
            # Other ranks' devices may hold other parts of a run.
            envs.SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK.override(False),
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),  # progress bars
        ):
            warnings.simplefilter("ignore")
            self._runner = self._start(args)
        self.model: torch.nn.Module = self._runner.model
        self.page_size = int(self._runner.page_size or 1)

    def _start(self, args: Any) -> ModelRunner:
        threads = torch.get_num_threads()
        try:
            bootstrap.init_parallel_runtime(
                server_args=args, device=self.device.type, dist_port=UNUSED_PORT
            )
            bootstrap.init_layer_runtime(model_config=self._config)
            runner = ModelRunner(
                model_config=self._config,
                mem_fraction_static=resolving_view(args).mem_fraction_static,
                gpu_id=self.device.index or 0,
                nccl_port=UNUSED_PORT,
                server_args=args,
            )
            runner.alloc_memory_pool()
            page = runner.page_size or 1
            whole_pages = args.max_total_tokens // page * page
            if runner.max_total_num_tokens < whole_pages:
                raise MemoryError(
                    f"memory has room for a batch of {runner.max_total_num_tokens} tokens, not of "
                    f"{args.max_total_tokens}"
                )
            runner.init_attention_backends()
            runner.init_cuda_graphs()
        except Exception as error:
            parallel.leave()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                f"SGLang cannot load {args.model_path}: {type(error).__name__}: {error}. Where "
                "memory is short, lower teacher.tokens_per_batch, set teacher.memory_fraction, or "
                "spread the model with teacher.tensor_parallel; where the model is the matter, set "
                "teacher.type=transformers"
            ) from error
        finally:
            torch.set_num_threads(threads)  # SGLang loads with one, and leaves it at that
        if isinstance(current_platform, PlainCpuPlatform) and args.attention_backend in (
            None,
            "torch_native",
        ):
            runner.attn_backend = PrefillAttention(runner)
        return runner

    def logits_of_last_rows(self, batch: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """States [R, H] and the model's own logits of each sequence's last row. For a check."""
        processor: Any = self.model.logits_processor
        cap = getattr(processor, "final_logit_softcapping", None)
        if cap is None or self.device.type == "cuda":
            output = self._forward(batch)
            return output.hidden_states, output.next_token_logits
        processor.final_logit_softcapping = None  # a Triton kernel, which a CPU cannot run
        output = self._forward(batch)
        processor.final_logit_softcapping = cap
        return output.hidden_states, cap * torch.tanh(output.next_token_logits.float() / cap)

    def drop_logits(self) -> None:
        """From now on compute no logits at all."""
        self.model.logits_processor = _StatesOnly()

    def states(self, batch: Sequence[np.ndarray]) -> torch.Tensor:
        """Post-norm states [R, H] of whole sequences: the very tensor that the model returned."""
        states_RH: torch.Tensor = self._forward(batch).hidden_states
        return states_RH

    @torch.no_grad()
    def _forward(self, batch: Sequence[np.ndarray]) -> LogitsProcessorOutput:
        runner = self._runner
        sampling = SamplingParams(temperature=0, max_new_tokens=1)
        requests = [_request(str(i), ids, sampling) for i, ids in enumerate(batch)]
        schedule = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=_no_prefix_cache(runner),
            model_config=self._config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        schedule.prepare_for_extend()
        schedule.input_ids = schedule.prefill_input_ids_cpu.to(self.device, non_blocking=True)
        forward_batch = ForwardBatch.init_new(
            schedule,
            runner,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
        )
        try:
            return self._through_stages(forward_batch)
        finally:
            runner.req_to_token_pool.clear()
            runner.token_to_kv_pool_allocator.clear()

    def _through_stages(self, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        """The last pipeline stage's output, on the ranks of every stage."""
        stages = get_parallel().pp_group
        if stages.world_size == 1:
            return self._runner.forward(forward_batch).logits_output
        before = None if stages.is_first_rank else PPProxyTensors(stages.recv_tensor_dict())
        output = self._runner.forward(forward_batch, pp_proxy_tensors=before).logits_output
        last = stages.world_size - 1
        if not stages.is_last_rank:
            stages.send_tensor_dict(output.tensors)
            return LogitsProcessorOutput(**stages.broadcast_tensor_dict(src=last))
        names = ("next_token_logits", "hidden_states")
        stages.broadcast_tensor_dict({name: getattr(output, name) for name in names}, src=last)
        return output

    def close(self) -> None:
        """Free model and groups; another runner may be started then."""
        del self._runner, self.model
        parallel.leave()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _server_args(options: RunnerOptions, device: torch.device) -> Any:
    chosen = {
        "tp_size": options.tensor_parallel,
        "ep_size": options.expert_parallel,
        "pp_size": options.pipeline_parallel,
        "quantization": options.quantization,
        "attention_backend": options.attention_backend,
        "mem_fraction_static": options.memory_fraction,
        "context_length": options.context_length,
    }
    try:
        args = ServerArgs(
            model_path=str(options.folder),
            trust_remote_code=options.trust_remote_code,
            device=device.type,
            dtype=options.dtype,
            sampling_backend="pytorch",
            grammar_backend="none",
            disable_cuda_graph=True,
            disable_radix_cache=True,
            chunked_prefill_size=-1,
            skip_tokenizer_init=True,
            log_level="error",
            max_total_tokens=options.max_tokens,
            max_running_requests=options.max_sequences,
            enable_return_hidden_states=True,
            enable_deterministic_inference=options.deterministic and device.type == "cuda",
            **{name: value for name, value in chosen.items() if value is not None},
        )
        args.resolve_once()
    except (ValueError, AssertionError) as error:
        raise ModelError(f"SGLang refuses the teacher's options: {error}") from error
    return args


def _request(name: str, ids: np.ndarray, sampling: SamplingParams) -> Req:
    request = Req(
        rid=name,
        origin_input_text="",
        origin_input_ids=array("q", ids.astype(np.int64).tobytes()),
        sampling_params=sampling,
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    if hasattr(request, "set_extend_range"):  # 0.5.21
        request.set_extend_range(0, len(ids))
    else:
        request.extend_end = len(ids)
    return request


def _no_prefix_cache(runner: ModelRunner) -> SimpleNamespace:
    """What a batch asks of a prefix cache when there is none."""
    return SimpleNamespace(
        page_size=runner.page_size,
        device=runner.device,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        supports_swa=lambda: False,
        supports_mamba=lambda: False,
        is_chunk_cache=lambda: False,
        is_tree_cache=lambda: True,
        supports_prefix_sharing=lambda: False,
        maybe_hand_to_session=lambda request: None,  # noqa: ARG005
        evict=lambda params: None,  # noqa: ARG005
    )
