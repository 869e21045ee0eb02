"""The student with its algorithm and loss, as a run's config has them."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from configs.schema.loss import ComparedBy
from configs.schema.run import RunConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Algorithm, Ingredients
from kdflow_core.alignment.tokenizer_pair import TokenizerPair
from kdflow_core.batching import Division
from kdflow_core.contracts import OutputHead
from kdflow_core.losses import build_divergence
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.folding import Comparison, Folding, ranks
from kdflow_core.losses.surrogate import PolicyGradient
from kdflow_core.losses.token_weights import build_token_weight
from kdflow_core.losses.vocabulary import WholeVocabulary
from kdflow_core.models.checkpoints import read_checkpoint
from kdflow_core.models.folders import text_config
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import DTYPES, load_causal_lm, load_config
from kdflow_core.models.packing import PACKED, model_division
from kdflow_core.models.partial_loading import fill_own_part_, unfilled_causal_lm
from kdflow_core.models.routing import routing_of
from kdflow_core.models.structure import decoder_layers
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.student.head_part import HeadPart, part_of, teacher_part
from kdflow_core.student.lora import add_adapters
from kdflow_core.student.module import DistillationModule, shard, student_mesh
from kdflow_core.student.optim import freeze_, hold_
from tasks.jobs import chats
from tasks.jobs.stage_run import StageRun


def build_module(
    stage: StageRun,
    heads: Mapping[str, OutputHead],
    folding: Comparison | None,
    device: torch.device,
    *,
    views: Mapping[str, str] | None = None,
    foldings: Mapping[str, Comparison | None] | None = None,
    pair: TokenizerPair | None = None,
) -> DistillationModule:
    """The student with its algorithm, sharded over all ranks; `heads` are the teachers' by name.
    `views` and `foldings` are of those that read otherwise than the run's own (see
    `Ingredients`); `pair` are the tokenizers, where there are two.
    """
    config = stage.run.student
    folder = stage.model_folder("student")
    packed = division_of(stage).packed
    model, in_parts = _load(stage, folder, PACKED if packed else config.attention)
    if config.lora is not None:
        # The adapters' first weights are random, on all ranks alike.
        torch.manual_seed(stage.run.seed)
        add_adapters(model, config.lora)
    freeze_(model, config)
    compute_dtype = DTYPES[config.compute_dtype]
    _hold_weights_(model, stage, filled=not in_parts)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    vocabulary_size = true_vocabulary_size(chats.tokenizer(stage, "student"))
    mesh = student_mesh(device, replicas=config.replicas)
    part = None
    if config.vocabulary_parallel:
        part = part_of(
            model, vocabulary_size=vocabulary_size, mesh=mesh, compute_dtype=compute_dtype
        )
        heads = {name: teacher_part(head, part) for name, head in heads.items()}
    ingredients = Ingredients(
        spec=loss_spec(stage.run, part, folding),
        model=model,
        heads=heads,
        vocabulary_size=vocabulary_size,
        views=views or {},
        foldings=foldings or {},
        first_head=lambda: load_head(folder, model.config, vocabulary_size),
        shared_O2=lambda: shared_tokens(pair),
    )
    module = DistillationModule(
        model=model,
        algorithm=build_algorithm(stage.run.algorithm, ingredients),
        vocabulary_size=vocabulary_size,
        head_part=part,
        packed=packed,
        routing=routing_of(model, config.router_aux_loss_coef, compiled=config.compile),
        product_dtype=compute_dtype if config.float32_residual else None,
    )
    _hold_algorithm_(module.algorithm, config.weights_dtype, filled=not in_parts)
    shard(
        module,
        mesh=mesh,
        compute_dtype=compute_dtype,
        reshard_after_forward=config.reshard_after_forward,
        offload=config.offload,
    )
    if in_parts:
        for own in (module.model, *module.algorithm.models):
            fill_own_part_(own, folder)
    return module


def _hold_weights_(model: PreTrainedModel, stage: StageRun, *, filled: bool) -> None:
    """Have the weights in the dtype of training, frozen ones in a narrower one that is exact."""
    config = stage.run.student
    hold_(model.parameters(), DTYPES[config.weights_dtype], filled=filled)
    checkpoint = read_checkpoint(stage.model_folder("student"))
    if not config.float32_residual and checkpoint.exact_in(config.compute_dtype):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        hold_(frozen, DTYPES[config.compute_dtype], filled=filled)


def _hold_algorithm_(algorithm: Algorithm, dtype: str, *, filled: bool) -> None:
    """What an algorithm trains is sharded with the student's weights, and has their dtype. What it
    averages changes too slowly for a narrow one.
    """
    own = list(algorithm.parameters())
    hold_([p for p in own if p.requires_grad], DTYPES[dtype])
    hold_([p for p in own if not p.requires_grad], torch.float32, filled=filled)


def division_of(stage: StageRun) -> Division:
    """How the student's sequences are divided into micro-batches."""
    config, folder = stage.run.student, stage.model_folder("student")
    trusts = stage.trusts("student")
    return model_division(
        load_config(folder, trust_remote_code=trusts),
        text_config(folder),
        tokens=config.micro_batch_tokens,
        packing=config.packing,
        attention=config.attention,
        trust_remote_code=trusts,
    )


def _load(stage: StageRun, folder: Path, attention: str) -> tuple[PreTrainedModel, bool]:
    """The student, and whether its weights are yet to be read, by each rank its own."""
    config, trusts = stage.run.student, stage.trusts("student")
    dtype = DTYPES[config.weights_dtype]
    if dist.get_world_size() > 1 or config.compute_dtype != "float32" or config.offload:
        # Else it is not sharded.
        unfilled = unfilled_causal_lm(
            folder, dtype=dtype, attention=attention, trust_remote_code=trusts
        )
        if unfilled is not None:
            return unfilled, True
    model = load_causal_lm(folder, dtype=dtype, attention=attention, trust_remote_code=trusts)
    return model, False


def build_comparison(
    pair: TokenizerPair | None, by: ComparedBy, device: torch.device
) -> Comparison | None:
    """What two vocabularies are compared by; None where they are the same. Takes seconds."""
    if pair is None or not pair.has_classes:
        return None
    if by == "ranks":
        return ranks(pair.sizes, torch.zeros(0, 2, dtype=torch.int64), device)
    classes = pair.classes(by)
    student_V, teacher_W = (
        torch.from_numpy(c).to(device) for c in (classes.student_V, classes.teacher_W)
    )
    return Folding(student_V=student_V, teacher_W=teacher_W, count=classes.count)


def shared_tokens(pair: TokenizerPair | None) -> torch.Tensor | None:
    """The ids [O, 2] of the tokens of two vocabularies; None where they are the same."""
    if pair is None or not pair.has_classes:
        return None
    return torch.from_numpy(pair.shared_ids)


def loss_spec(run: RunConfig, part: HeadPart | None, folding: Comparison | None) -> LossSpec:
    """The run's loss, over the whole vocabulary or this rank's part of it."""
    loss, gradient = run.loss, None
    if run.on_policy is not None and run.on_policy.reward is not None:
        reward = run.on_policy.reward
        gradient = PolicyGradient(
            weight=reward.weight, clip_low=reward.clip_low, clip_high=reward.clip_high
        )
    return LossSpec(
        divergence=build_divergence(loss.divergence),
        kd_ratio=loss.kd_ratio,
        logits_bytes=loss.logits_memory_mb * 10**6,
        token_weight=build_token_weight(loss.token_weight),
        policy_gradient=gradient,
        vocabulary=WholeVocabulary() if part is None else part.vocabulary,
        folding=folding,
        span_share=loss.span_share,
        within_classes=loss.within_classes,
    )
