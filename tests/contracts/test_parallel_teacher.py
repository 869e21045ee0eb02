"""One copy of an SGLang teacher over two real ranks."""

import logging
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import zarr

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import ModelError
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_config
from kdflow_core.teacher import build_engine
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests.conftest import VOCABULARY, make_tokenizer, run_inline
from tests.contracts.test_teacher import CPU, MODELS, relative_error


def stored(ref: ArtifactRef) -> torch.Tensor:
    """All rows, as float32, in the order of the shards."""
    bits = np.asarray(zarr.open_group(Path(ref.uri) / "states.zarr", mode="r")["hidden"][:, 0])
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()


def extracted(run: RunConfig) -> ArtifactRef:
    """The states, by ranks of their own."""
    refs = run_inline(run, until="tokenize")
    spec = StageSpec(identity=plan_stages(run)["extract"], run=run, inputs=refs)
    return launch_stage(spec, logging.getLogger("test"))


@pytest.mark.ranks
def test_two_pipeline_stages_give_the_states_of_transformers(
    make_recipe: Callable[..., Path],
) -> None:
    recipe = str(make_recipe())
    expected = run_inline(load_run(recipe), until="extract")["states"]
    stages = {"teacher.type": "sglang", "teacher.num_ranks": 2, "teacher.pipeline_parallel": 2}
    given = extracted(load_run(recipe, stages))
    assert given.digest != expected.digest
    assert relative_error([stored(given)], [stored(expected)]) < 2**-8


@pytest.mark.ranks
def test_each_expert_over_two_ranks_gives_the_states_of_transformers(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moe"
    torch.manual_seed(3)
    MODELS["qwen3-moe"]().save_pretrained(folder)
    make_tokenizer(folder, texts=list(topics.values()))
    recipe, model = str(make_recipe()), {"teacher.model.path": str(folder)}
    expected = run_inline(load_run(recipe, model), until="extract")["states"]

    parallel = {"teacher.type": "sglang", "teacher.num_ranks": 2, "teacher.tensor_parallel": 2}
    given = extracted(load_run(recipe, model | parallel))
    assert given.digest != expected.digest
    assert relative_error([stored(given)], [stored(expected)]) < 2**-8

    apart = load_run(recipe, model | parallel | {"teacher.expert_parallel": 2})
    with pytest.raises(ModelError, match=r"on a CPU .* set teacher\.expert_parallel=1"):
        build_engine(
            apart.teacher,
            folder=folder,
            head=load_head(folder, load_config(folder), VOCABULARY),
            longest=64,
            device=CPU,
        )
