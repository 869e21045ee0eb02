"""Tiny real models, a real tokenizer and small real data for all tests."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.load import load_run
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.jobs.stage_host import job_of
from tasks.jobs.stage_run import StageRun
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.readme import ROOT
from tests.terminal import fresh_home

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 400
# Loaded once for all processes that tests fork by themselves: before the first of them is.
multiprocessing.set_forkserver_preload(["tests.small_training", "tests.stored"])


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests touch no user's Prefect database and no data-set cache, and reach for no hub."""
    home = tmp_path_factory.mktemp("home")
    os.environ["PREFECT_HOME"] = str(home / "prefect")
    os.environ["HF_DATASETS_CACHE"] = str(home / "datasets")


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Prefect home as its first start makes it, which takes a while: to be copied."""
    folder = tmp_path_factory.mktemp("migrated")
    starter = "from flows.prefect_api import prefect_api\nwith prefect_api(print): pass"
    subprocess.run([sys.executable, "-c", starter], cwd=ROOT, env=fresh_home(folder), check=True)
    return folder / "prefect"


def make_tokenizer(folder: Path, *, texts: list[str], template: str = CHATML) -> None:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def make_llama(
    folder: Path, *, hidden: int, layers: int, rows: int, seed: int, tied: bool = False
) -> None:
    """A random Llama; `rows` of its vocabulary may go beyond the tokenizer's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=rows,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # distributions far from uniform, unlike each other
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_tokenizer(folder, texts=list(topics.values()))
    make_llama(folder, hidden=48, layers=3, rows=448, seed=1)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    make_tokenizer(folder, texts=list(topics.values()))
    make_llama(folder, hidden=32, layers=2, rows=416, seed=2)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 sums, as prompt, completion and answer."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "prompt": f"{a} plus {b}?",
            "completion": f"It is {a + b}." * (1 + a % 3),
            "answer": str(a + b),
        }
        for a in range(12)
        for b in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_recipe(
    tmp_path: Path, teacher_folder: Path, student_folder: Path, data_file: Path
) -> Callable[..., Path]:
    """Writes a recipe over the tiny models, its store in this test's folder."""

    def make(**student: object) -> Path:
        recipe = {
            "name": "tiny",
            "data": {
                "sources": [{"type": "files", "path": str(data_file)}],
                "max_length": 128,
                "heldout_fraction": 0.2,
            },
            "teacher": {
                "type": "transformers",
                "model": {"type": "pretrained", "path": str(teacher_folder)},
                "dtype": "float32",
                "tokens_per_batch": 512,
            },
            "student": {
                "model": {"type": "pretrained", "path": str(student_folder)},
                "compute_dtype": "float32",
                "save_dtype": "float32",
                "lr": 0.003,
                "max_steps": 6,
                "global_batch_size": 8,
                "micro_batch_tokens": 256,
                "checkpoint_every": 2,
            }
            | student,
            "loss": {"logits_memory_mb": 1},
            "storage": {
                "root": str(tmp_path / "store"),
                "scratch": str(tmp_path / "scratch"),
                "shard_rows": 256,
                "chunk_rows": 32,
            },
            "eval": {"max_generations": 4, "max_new_tokens": 8},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


class SilentReporter:
    """A `Reporter` that keeps messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def progress(
        self,
        *,
        done: int,
        total: int,
        unit: str,
        detail: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)


def run_inline(
    run: RunConfig, *, until: str, launched: Collection[str] = ()
) -> dict[str, ArtifactRef]:
    """The stages before and including `until`, without Prefect, in this process; those in
    `launched` (`train` must be) in worker processes.
    """
    done: dict[str, ArtifactRef] = {}
    for stage, identity in plan_stages(run).items():
        spec = stage_spec(identity, run, done)
        stage_run = StageRun(spec, SilentReporter())
        ref = stage_run.store.find(identity.kind, identity.digest)
        if ref is None and stage in launched:
            ref = launch_stage(spec, logging.getLogger("test"))
        ref = ref or job_of(identity.stage)(stage_run)
        assert ref is not None
        done = done | {identity.output: ref}
        if stage == until:
            return done
    raise AssertionError(f"no stage {until}")


@pytest.fixture
def tiny_run(make_recipe: Callable[..., Path]) -> RunConfig:
    return load_run(str(make_recipe()))
