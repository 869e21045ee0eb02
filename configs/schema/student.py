"""The student and how it is trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.models import Attention, ChatTemplate, Dtype, StudentModel

FLOAT8_GROUP = 128  # numbers of a row that share a scale
Schedule = Literal[
    "cosine", "linear", "constant", "wsd", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(StrictModel):
    """Low-rank adapters (arXiv 2106.09685) on linear layers; the result has them merged."""

    rank: int = Field(default=16, gt=0, le=MOST)
    """The rank of the adapters."""
    alpha: int = Field(default=32, gt=0, le=MOST)
    """The adapters' product is scaled by `alpha` / `rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    """Names of linear layers that get adapters; by default all but the output head."""

    @property
    def scale(self) -> float:
        """What a product of adapters is multiplied by."""
        return self.alpha / self.rank


class ParameterGroup(StrictModel):
    """Some of the student's parameters, and how they are trained otherwise than the rest."""

    names: str = Field(min_length=1)
    """Which they are: their name, or a pattern with `*`, as `model.embed_tokens.*`. A parameter is
    in the first group that it fits.
    """
    lr: float | None = Field(default=None, gt=0)
    """Their peak learning rate, in place of `student.lr`; it follows the same schedule."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Their weight decay, in place of `student.weight_decay`, and of none for norms and biases."""
    frozen: bool = False
    """They keep their values."""

    @model_validator(mode="after")
    def _says_something(self) -> "ParameterGroup":
        rates = self.lr is not None or self.weight_decay is not None
        if rates == self.frozen:
            raise ValueError(
                f"parameters '{self.names}': give either `frozen: true`, or lr or weight_decay"
            )
        return self


class AdamWConfig(StrictModel):
    """AdamW (arXiv 1711.05101); its betas are `student.adam_betas`."""

    type: Literal["adamw"] = "adamw"
    moments_dtype: Dtype | Literal["float8"] = "float32"
    """The dtype of its two moments of every weight. `bfloat16` halves their memory, `float8` (of
    matrices, with a scale for every 128 numbers: arXiv 2410.19313) quarters it; both are rounded at
    random, so that they are right on average.
    """


class MuonConfig(StrictModel):
    """Muon on the matrices of the decoder layers, scaled so that learning rate and weight decay are
    AdamW's (arXiv 2502.16982, equation 4); AdamW on the rest.
    """

    type: Literal["muon"]
    momentum: Beta = 0.95
    """How much of the mean gradient a step keeps."""


Optimizer = Annotated[AdamWConfig | MuonConfig, Field(discriminator="type")]


class StudentConfig(StrictModel):
    """The student and its optimization."""

    model: StudentModel
    """The student's initial weights: a folder or hub name, a GGUF file, the teacher without some
    layers, or a model under another tokenizer. Its tokenizer may be another than the teacher's.
    """
    start: Literal["fresh", "latest", "continue"] = "fresh"
    """Begin with `model`, or with the `latest` promoted student of the runs of this name where
    there is one (see `promotion`): each night goes on where the last one ended. With nothing new
    since then, there is nothing to do. `continue` takes up that student's training itself, with
    optimizer and step count, for more epochs, rounds or data (it has to be there: `keep_final`).
    """
    continues: str | None = Field(default=None, pattern=r"^student/[0-9a-f]+$")
    """With `start: continue`: the student whose training goes on, as `student/digest`; by default
    the promoted one.
    """
    lora: LoraConfig | None = None
    """`{rank: 16}`: train low-rank adapters, which the result has merged (and by themselves, in
    `adapter/`, where PEFT reads them right).
    """
    chat_template: ChatTemplate = Field(default_factory=ChatTemplate)
    """How the student's conversations are rendered; the student is exported with it."""
    compute_dtype: Dtype = "bfloat16"
    """The dtype that layers compute in."""
    float32_residual: bool = False
    """Beside `compute_dtype: bfloat16`, keep what is summed from layer to layer in float32, as
    autocast does: gradients nearer to those of float32, for more time and memory.
    """
    weights_dtype: Dtype = "float32"
    """The dtype of the weights in training (frozen ones, beside adapters say, are bfloat16 anyway
    where they are so in the student's files). `bfloat16` takes half the memory of weights and
    gradients; each step is rounded at random, right on average (arXiv 2010.06192).
    """
    save_dtype: Dtype = "bfloat16"
    """The dtype of the exported weights."""
    attention: Attention = "sdpa"
    """The implementation of attention."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, in less memory."""
    optimizer: Optimizer = Field(default_factory=AdamWConfig)
    """`{type: adamw}` (in half the memory with `moments_dtype: bfloat16`, a quarter with `float8`),
    or `{type: muon}`: Muon on the matrices of the decoder layers, one moment a weight in place of
    two, and AdamW on the rest, at the same learning rate.
    """
    compile: bool = False
    """Compile the decoder layers: a minute or more at the start, then faster steps on a GPU."""
    lr: float = Field(default=2e-5, gt=0)
    """The peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """How the learning rate goes on after its rise: down along a `cosine` or a line, `constant`,
    `wsd` (constant, then down a line in the last `decay_fraction` of the steps),
    `cosine_with_restarts` (`lr_cycles` times from the peak), `polynomial` (of degree `lr_power`),
    or `inverse_sqrt` (with the root of the steps, whatever their number).
    """
    lr_cycles: int = Field(default=1, gt=0, le=MOST)
    """For `cosine_with_restarts`, how often the rate goes down."""
    lr_power: float = Field(default=1.0, gt=0)
    """For `polynomial`, its degree: 1 is a line, with more the rate falls earlier."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate, as a share of the peak; a `constant` one stays at the peak."""
    warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """The share of the steps in which the learning rate rises; 0.03, unless `warmup_steps` says how
    many.
    """
    warmup_steps: int | None = Field(default=None, ge=0, le=MOST)
    """The same as a number of steps, in place of the share."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """For `wsd`, the share of the steps after the rise in which the learning rate falls."""
    weight_decay: float = Field(default=0.0, ge=0)
    """The optimizer's weight decay, of matrices alone."""
    parameter_groups: tuple[ParameterGroup, ...] = Field(default=(), strict=False)
    """Parameters with a learning rate or a weight decay of their own, or none: `[{names:
    "model.embed_tokens.*", lr: 1e-5}, {names: "*.layers.0.*", frozen: true}]`.
    """
    adam_betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's betas."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """The norm that gradients are clipped to; `null` does not clip."""
    max_skipped_steps: int = Field(default=0, ge=0, le=MOST)
    """How many steps whose loss or gradient is not finite are left out, weights untouched, before
    training ends with an error that names the samples.
    """
    epochs: int | None = Field(default=None, gt=0, le=MOST)
    """How often training sees the data; give this or `max_steps`."""
    max_steps: int | None = Field(default=None, gt=0, le=MOST)
    """How many optimizer steps training has; give this or `epochs`."""
    global_batch_size: int = Field(default=64, gt=0, le=MOST)
    """Sequences of an optimizer step, over all ranks."""
    shuffle_window_shards: int | None = Field(default=None, gt=0, le=MOST)
    """Shuffle within so many shards of the stored states at a time, for a store that is larger than
    memory or remote; by default an epoch is shuffled as a whole.
    """
    micro_batch_tokens: int = Field(default=8192, gt=0, le=MOST)
    """The tokens of one forward pass of one rank, padding included; lower it when memory runs out.
    """
    packing: bool | Literal["auto"] = "auto"
    """Put the sequences of a forward pass behind one another, without padding, each with attention
    to itself alone: `auto` does it where that is exact (`attention: sdpa`, and the family).
    """
    num_ranks: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Processes that train together: the number of GPUs."""
    replicas: int = Field(default=1, gt=0, le=MOST_RANKS)
    """How many groups of ranks hold the student whole, each spread over its `num_ranks / replicas`
    ranks: with one a machine, only gradients travel between machines.
    """
    reshard_after_forward: bool = True
    """Free each layer's gathered weights behind its forward pass, and gather them again for the
    backward pass: less memory, more to send.
    """
    reduce_gradients: Literal["every_micro_batch", "every_step"] = "every_micro_batch"
    """When gradients are summed over the ranks: `every_micro_batch` (each rank holds its part of
    them) or `every_step` (less to send, but each rank holds all of them in float32 until then).
    """
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Of a student with experts, the weight of their even load in the loss (arXiv 2101.03961,
    equation 4); by default what its own config says, 0 leaves it out.
    """
    vocabulary_parallel: bool = False
    """Spread large output heads over the ranks, each with a part of the vocabulary, where they are
    not tied to the embedding.
    """
    offload: bool = False
    """Keep weights, gradients and optimizer states in host memory, where the optimizer steps;
    layers come to the GPU one after another: for students that its memory does not hold, slower.
    """
    log_every: int = Field(default=1, gt=0, le=MOST)
    """Optimizer steps between two records of loss, speed and the like, each with the means over its
    steps.
    """
    sleep: bool = False
    """On-policy: wait in host memory while the others work."""
    checkpoint_every: int = Field(default=100, gt=0, le=MOST)
    """Optimizer steps between two checkpoints."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Also a checkpoint after the first step that ends so many minutes after the last one."""
    keep_checkpoints: int = Field(default=2, gt=0, le=MOST)
    """How many checkpoints are kept."""
    keep_final: bool = False
    """Keep the last checkpoint in the store when training is done, for as long as its student is
    there, so that it can go on (`start: continue`).
    """

    def rising_steps(self, num_steps: int) -> int:
        """In how many of so many steps the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((0.03 if self.warmup_fraction is None else self.warmup_fraction) * num_steps)

    @model_validator(mode="after")
    def _rise_fits(self) -> "StudentConfig":
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError(
                "give one of warmup_steps and warmup_fraction, and null for the other one"
            )
        most = self.max_steps
        if self.warmup_steps is not None and most is not None and self.warmup_steps > most:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than max_steps={most}: the learning "
                "rate would never reach its peak"
            )
        return self

    @model_validator(mode="after")
    def _residual_is_wider(self) -> "StudentConfig":
        if self.float32_residual and self.compute_dtype == "float32":
            raise ValueError(
                "float32_residual=true is beside compute_dtype=bfloat16; in float32 all is"
            )
        if self.float32_residual and self.weights_dtype != "float32":
            raise ValueError(
                "float32_residual=true needs weights_dtype=float32; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _continues_something(self) -> "StudentConfig":
        if self.continues is not None and self.start != "continue":
            raise ValueError(
                f"continues={self.continues} needs start=continue, which is {self.start}"
            )
        return self

    @model_validator(mode="after")
    def _narrow_weights_train(self) -> "StudentConfig":
        if self.weights_dtype == "float32":
            return self
        for field, wanted, unfit in (
            ("compute_dtype", "bfloat16", self.compute_dtype != "bfloat16"),
            ("optimizer.type", "adamw", not isinstance(self.optimizer, AdamWConfig)),
            ("lora", "null", self.lora is not None),
            ("vocabulary_parallel", "false", self.vocabulary_parallel),
        ):
            if unfit:
                raise ValueError(
                    f"weights_dtype=bfloat16 needs {field}={wanted}; set that, or weights_dtype="
                    "float32"
                )
        return self

    @model_validator(mode="after")
    def _can_be_offloaded(self) -> "StudentConfig":
        if not self.offload:
            return self
        for field, wanted, unfit, why in (
            ("sleep", "false", self.sleep, "an offloaded student is never on the device"),
            (
                "vocabulary_parallel",
                "false",
                self.vocabulary_parallel,
                "each rank computes with its part of the head on the device",
            ),
            (
                "optimizer.type",
                "adamw",
                not isinstance(self.optimizer, AdamWConfig),
                "Muon's products of matrices would be the host's",
            ),
        ):
            if unfit:
                raise ValueError(
                    f"offload=true needs {field}={wanted}: {why}; set that, or offload=false"
                )
        return self

    @model_validator(mode="after")
    def _groups_are_of_weights(self) -> "StudentConfig":
        if self.lora is not None and self.parameter_groups:
            raise ValueError(
                "parameter_groups are of the student's own weights, of which lora trains none; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _replicas_share_the_ranks(self) -> "StudentConfig":
        if self.num_ranks % self.replicas:
            raise ValueError(
                f"num_ranks={self.num_ranks} is no multiple of replicas={self.replicas}; each "
                "replica of the student has as many ranks"
            )
        if self.replicas > 1 and self.vocabulary_parallel:
            raise ValueError(
                "vocabulary_parallel spreads the head over all ranks, and so needs replicas=1"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_work(self) -> "StudentConfig":
        if self.global_batch_size < self.num_ranks:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} sequences are fewer than num_ranks="
                f"{self.num_ranks}, and a rank without any waits for the others; raise the one or "
                "lower the other"
            )
        return self
