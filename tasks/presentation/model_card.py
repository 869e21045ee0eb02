"""The model card of a trained student: what it is, and how to make it again."""

from importlib.metadata import version

import yaml

from configs.secrets import public_config
from tasks.stages.identity import StageSpec


def model_card(spec: StageSpec) -> str:
    """Markdown with the front matter that the hub reads, the run's provenance and its config."""
    run = spec.run
    teacher = public_config(run.teacher.model)
    kd_ratio = 0 if run.algorithm.type == "sft" else run.loss.kd_ratio
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "kdflow"],
    }
    inputs = "\n".join(f"| {name} | `{key}` |" for name, key in spec.identity.inputs.items())
    packages = ", ".join(f"{name} {version(name)}" for name in ("kdflow", "torch", "transformers"))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {run.name}

A student distilled by kdflow from the last hidden states of its teacher
(`{teacher.get("path") or teacher.get("file")}`), algorithm `{run.algorithm.type}`, loss
`{1 - kd_ratio:g} * cross-entropy + {kd_ratio:g} * {run.loss.divergence.type}`.

## Provenance

Artifact `{spec.identity.digest}`; made with {packages}.

| input | digest |
|---|---|
{inputs}

```yaml
{yaml.safe_dump(public_config(run), sort_keys=False).strip()}
```
"""
