"""What stands in `docs`: links lead somewhere, recipes load, jobs tell ranks their place."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import load_run, parse_overrides
from tasks.execution.scheduled_rank import MEETING, NUMBERS
from tests.readme import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
RANK_ENVIRONMENT = {*NUMBERS, *MEETING}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's part as overrides; what has a type is given whole."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        whole = not isinstance(value, dict) or "type" in value
        found |= {f"{prefix}{name}": value} if whole else dotted(value, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
    if path.name == "README.md":
        assert {link for link in links if link.endswith(".md") and "/" not in link} == {
            other.name for other in DOCS if other != path
        }


@pytest.mark.parametrize(
    ("path", "part"),
    [
        pytest.param(path, part, id=f"{path.name}-{number}")
        for path in DOCS
        for number, part in enumerate(blocks(path, "yaml"))
        if "apiVersion" not in part
    ],
)
def test_parts_of_recipes_are_valid(path: Path, part: str) -> None:
    """On top of the recipe for own models."""
    tree = yaml.safe_load(part)
    base = yaml.safe_load((ROOT / "configs/recipes/own-models.yaml").read_text())
    for side in ("teacher", "student"):
        if "type" in tree.get(side, {}):  # then it stands for all of it
            tree[side] = {"model": base[side]["model"]} | tree[side]
    run = load_run("own-models", dotted(tree))
    assert run.name == "own-models"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_are_of_recipes_that_there_are(path: Path) -> None:
    lines = [line for block in blocks(path, "bash") for line in block.splitlines() if line.strip()]
    for line in lines:
        kdflow, command, recipe, *overrides = shlex.split(line, comments=True)
        assert (kdflow, command) == ("kdflow", "run")
        load_run(recipe, parse_overrides(overrides))


def test_the_kubernetes_job_tells_ranks_their_place() -> None:
    (text,) = [part for part in blocks(ROOT / "docs/machines.md", "yaml") if "apiVersion" in part]
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (rank,) = pod["containers"]
    shell, flag, command = rank["command"]
    assert (shell, flag) == ("sh", "-c")
    told = {entry["name"]: entry["value"] for entry in rank["env"]}
    told |= dict(re.findall(r"(\w+)=(\$\w+)", command))
    assert set(told) == RANK_ENVIRONMENT
    ranks = job["spec"]["completions"]
    assert told["WORLD_SIZE"] == str(ranks)
    assert job["spec"]["parallelism"] == ranks, "all at once, as they wait for one another"
    assert f"student.num_ranks={ranks}" in command
    assert told["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]


def test_the_slurm_script_tells_ranks_their_place() -> None:
    text, _ = slurm_scripts()
    told = set(re.findall(r"\b([A-Z_]+)=\$", text)) | set(re.findall(r"export (\w+)=", text))
    assert told >= RANK_ENVIRONMENT
    nodes, tasks = (int(n) for n in re.findall(r"--(?:nodes|ntasks-per-node)=(\d+)", text))
    assert f"student.num_ranks={nodes * tasks}" in text


def test_the_slurm_script_for_ray_has_a_head_a_token_and_all_nodes() -> None:
    _, text = slurm_scripts()
    assert set(re.findall(r"(RAY_AUTH_\w+)=\S", text)) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert '--min-nodes "$SLURM_JOB_NUM_NODES"' in text
    command = text.replace("\\\n", " ").partition(" -- ")[2]
    _, _, recipe, *overrides = shlex.split(command)
    run = load_run(recipe, parse_overrides(overrides))
    nodes, gpus = (int(n) for n in re.findall(r"--(?:nodes|gpus-per-node)=(\d+)", text))
    assert (run.student.num_ranks, run.student.replicas) == (nodes * gpus, nodes)
    assert run.workers.type == "ray"


def slurm_scripts() -> list[str]:
    return [part for part in blocks(ROOT / "docs/machines.md", "sh") if "#SBATCH" in part]
