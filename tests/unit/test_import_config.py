"""Settings of other programs as recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.foreign import PROGRAMS, imported
from configs.foreign.kdflow_flags import DIVERGENCES, KDFLOW
from configs.foreign.programs import read_settings
from configs.foreign.trl_gkd import TRL
from configs.load import ConfigError, load_run
from kdflow_core.losses import LOSSES
from kdflow_core.losses.base import Distributions
from kdflow_core.losses.vocabulary import WholeVocabulary
from tests.command import kdflow

OFF_POLICY = """
set -e  # --not_a_flag 1
# --nor_this 1
OPTS=""
OPTS+=" --num_gpus_per_node 8"
OPTS+=" --train_batch_size 64"
OPTS+=" --student_name_or_path Qwen/Qwen3-4B --teacher_name_or_path Qwen/Qwen3-30B-A3B"  # MoE
OPTS+=" --train_dataset_path rows.jsonl,more.parquet"
OPTS+=" --train_dataset_probs 0.3,0.7"
OPTS+=" --input_key question --output_key reply"
OPTS+=" --kd_loss_fn jsd"
OPTS+=" --jsd_beta 0.1"
OPTS+=" --teacher_tp_size 4"
OPTS+=" --teacher_enable_sleep True"
OPTS+=" --ring_attn_size 2"
python -m kdflow.cli.train_kd_off_policy $OPTS
"""
ON_POLICY = """
export MODELS=Qwen
STUDENT="${MODELS}/Qwen3-4B"
python -m kdflow.cli.train_kd_on_policy --kd_loss_fn rkl \\
  --student_name_or_path $STUDENT --teacher_name_or_path=${MODELS}/Qwen3-30B-A3B \\
  --train_dataset_path some/set --rollout_num_engines 8 --rollout_batch_size 1024 --bf16 \\
  --teacher_tp_size 4 --rollout_enable_sleep True --lora_rank 8
"""
GKD = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
teacher_model_name_or_path: Qwen/Qwen2-1.5B-Instruct
dataset_name: trl-lib/chatbot_arena_completions
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
output_dir: gkd-model
num_train_epochs: 1
lmbda: 0.0
beta: 0.25
"""
LAUNCHED = """accelerate launch --num_processes 4 gkd.py --model_name_or_path a/student \\
  --teacher_model_name_or_path a/teacher --dataset_name a/set --use_peft --max_steps 500 \\
  --lmbda 0.7 --warmup_ratio 0.1 --something_new 3
"""


def made(text: str, name: str, folder: Path) -> tuple[Any, list[str]]:
    """The run that a file becomes, and what a person is to look at."""
    found = imported(read_settings(text, name))
    path = folder / "made.yaml"
    path.write_text(json.dumps(found.recipe))
    return load_run(str(path), {}), found.warnings


def test_flags_of_kdflow_off_policy(tmp_path: Path) -> None:
    run, warnings = made(OFF_POLICY, "run.sh", tmp_path)
    assert warnings == ["ring_attn_size=2 has no counterpart that this command knows"]
    assert (run.mode, run.delivery, run.student.epochs) == ("offpolicy", "live", 1)
    assert run.student.model.path == "Qwen/Qwen3-4B"
    assert (run.teacher.type, run.teacher.num_ranks, run.teacher.tensor_parallel) == (
        "sglang",
        8,
        4,
    )
    assert run.teacher.sleep
    assert run.student.global_batch_size == 64
    assert run.student.min_lr_ratio == pytest.approx(1e-2)  # 1e-8 of the default 1e-6
    assert run.loss.kd_ratio == 0.5
    assert [source.weight for source in run.data.sources] == [0.3, 0.7]
    assert run.data.sources[0].columns == {"prompt": "question", "completion": "reply"}
    assert run.student.chat_template.args == {"enable_thinking": False}
    assert run.student.compute_dtype == "float32", "bf16 is off by default there"


def test_flags_of_kdflow_on_policy(tmp_path: Path) -> None:
    run, warnings = made(ON_POLICY, "run.sh", tmp_path)
    (warning,) = warnings
    assert "on_policy.rounds=100 stands for their epochs" in warning
    assert (run.mode, run.on_policy.prompts_per_round) == ("onpolicy", 1024)
    assert (run.on_policy.rollout.num_engines, run.on_policy.rollout.sleep) == (8, True)
    assert (run.student.lora.rank, run.student.lora.alpha) == (8, 16)
    assert run.student.compute_dtype == "bfloat16"
    assert run.data.sources[0].type == "hub"
    assert run.student.model.path == "Qwen/Qwen3-4B"
    assert run.teacher.model.path == "Qwen/Qwen3-30B-A3B"
    _, warnings = made(ON_POLICY.replace("MODELS=Qwen", "X=Qwen"), "run.sh", tmp_path)
    assert "student_name_or_path=${MODELS}/Qwen3-4B: the script does not set" in warnings[-2]


def test_the_config_of_gkd(tmp_path: Path) -> None:
    run, warnings = made(GKD, "gkd.yaml", tmp_path)
    assert not warnings
    assert (run.mode, run.student.global_batch_size, run.student.epochs) == ("offpolicy", 32, 1)
    assert (run.loss.kd_ratio, run.loss.divergence.beta) == (1.0, 0.25)
    assert (run.student.lr, run.student.lr_schedule, run.student.min_lr_ratio) == (
        2e-5,
        "linear",
        0,
    )


def test_flags_of_gkd(tmp_path: Path) -> None:
    run, warnings = made(LAUNCHED, "run.sh", tmp_path)
    assert warnings == ["something_new=3 has no counterpart that this command knows"]
    assert (run.mode, run.on_policy.rounds, run.on_policy.fraction.value) == ("onpolicy", 500, 0.7)
    assert (run.student.num_ranks, run.student.global_batch_size) == (4, 32)
    assert run.student.lora.rank == 16
    assert run.student.warmup_fraction == 0.1


@pytest.mark.filterwarnings("ignore")
def test_the_defaults_of_gkd_are_those_of_trl(tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDConfig

    theirs = GKDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    for name, value in TRL.defaults.items():
        given = getattr(theirs, name, None)
        assert (given or 0) == (value or 0), name  # a warm-up ratio of None is 0


def test_every_setting_has_one_place() -> None:
    for program in PROGRAMS:
        assert not program.rules.keys() & program.left_out.keys()


def test_divergences_of_kdflow_are_these() -> None:
    """By their definitions there, in float64, of a student q and a teacher p."""
    torch.manual_seed(0)
    p, q = (torch.randn(5, 30, dtype=torch.float64).softmax(-1) for _ in range(2))

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    beta, skew = 0.2, 0.3
    mixed = beta * q + (1 - beta) * p
    ordered, places = p.sort(-1)
    tail = (ordered.cumsum(-1) <= 0.4).double()
    gap = (ordered - q.gather(-1, places)).abs()
    head_gap, tail_gap = (gap * (1 - tail)).sum(-1), (gap * tail).sum(-1)
    share = head_gap / (head_gap + tail_gap)
    expected = {
        "kl": kl(p, q),
        "rkl": kl(q, p),
        "jsd": beta * kl(q, mixed) + (1 - beta) * kl(p, mixed),
        "skl": kl(p, skew * p + (1 - skew) * q),
        "srkl": kl(q, skew * q + (1 - skew) * p),
        "akl": share * kl(p, q) + (1 - share) * kl(q, p),
    }
    given = dict(KDFLOW.defaults) | {"jsd_beta": beta, "skew_lambda": skew, "adaptive_alpha": 0.4}
    d = Distributions(q.log(), q, p.log(), p, WholeVocabulary(), torch.zeros(5).long(), None)
    for name, values in expected.items():
        fields = DIVERGENCES[name](given)
        divergence = LOSSES[fields.pop("type")](**fields)
        torch.testing.assert_close(divergence.value_and_gradient(d)[0], values, msg=name)


def test_the_command(tmp_path: Path) -> None:
    script, recipe = tmp_path / "run.sh", tmp_path / "mine.yaml"
    script.write_text(OFF_POLICY)
    said = kdflow("import-config", str(script), str(recipe))
    assert "loss.divergence=" in said
    assert "look at this: ring_attn_size=2" in said
    assert load_run(str(recipe), {}).name == "imported"
    assert "is there already" in kdflow("import-config", str(script), str(recipe), code=1)
    script.write_text(OFF_POLICY.replace("--train_dataset_path", "--other"))
    said = kdflow("import-config", str(script), str(tmp_path / "new.yaml"), code=1)
    assert "no train_dataset_path: set data.sources" in said
    assert "is written, and not complete yet" in said


def test_a_script_that_no_shell_would_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read as a shell would"):
        read_settings("python x.py --a 'b", "run.sh")


@pytest.mark.parametrize("text", ["python train.py --lr 1", "", "a: 1"])
def test_settings_of_neither_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no settings of KDFlow, nor of TRL's GKD"):
        imported(read_settings(text, "run.sh"))
