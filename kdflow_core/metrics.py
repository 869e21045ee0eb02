"""The metrics of a training step: the one list that training, sinks, report and plots go by."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric by its `name` in the records of steps; the title of the figure that it is plotted
    in, and its legend there.
    """

    name: str
    figure: str
    legend: str


LOSS = "loss (nats/token)"
# Means over the supervised tokens of a step. `kd` is the divergence that is trained, at its
# temperature; all others are at temperature 1.
TOKEN_TERMS = (
    Metric("loss", LOSS, "total"),
    Metric("kd", LOSS, "divergence"),
    Metric("cross_entropy", LOSS, "cross-entropy"),
    Metric("forward_kl", "KL to the teacher (nats/token)", "forward KL"),
    Metric("student_entropy", "entropy (nats/token)", "student"),
    Metric("teacher_entropy", "entropy (nats/token)", "teacher"),
    Metric("agreement", "same top-1 token", "share of tokens"),
)
# Those that compare the student with a teacher: where tokens are aligned, of some tokens alone.
TAUGHT_TERMS = ("kd", "forward_kl", "teacher_entropy", "agreement")
# Beside them where two tokenizers are aligned: means over spans of tokens that spell the same.
SPAN_TERM = Metric("span", "likelihood of spans (nats/span)", "divergence")
WITHIN_TERM = Metric("within_classes", "reverse KL within classes (nats/span)", "estimate")
# Beside them where each model is compared in the other's space.
PROJECTED_TERM = Metric("projected_cross_entropy", LOSS, "cross-entropy, teacher projected")
TEACHER_SPACE_TERM = Metric("teacher_space", LOSS, "divergence in the teacher's space")
# Of a student with experts: 1 for each expert that a token goes to, where all have as much to do.
BALANCE_TERM = Metric("router_balance", "load of the experts (even: experts per token)", "balance")
TERM_NAMES = tuple(term.name for term in TOKEN_TERMS)
STEP_METRICS = (
    *TOKEN_TERMS,
    SPAN_TERM,
    WITHIN_TERM,
    PROJECTED_TERM,
    TEACHER_SPACE_TERM,
    BALANCE_TERM,
    Metric("grad_norm", "gradient norm (before clipping)", "gradient norm"),
    Metric("lr", "learning rate", "lr"),
    Metric("tokens_per_s", "throughput (tokens/s)", "tokens/s"),
    Metric("padding", "padding (share of positions)", "padding"),
    Metric("waiting", "waiting for the teacher (share of a step, of rank 0)", "waiting"),
)
