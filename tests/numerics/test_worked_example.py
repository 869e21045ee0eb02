"""The README's "add your own divergence", run: its code against autograd, whole and in chunks."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses.chunked import distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from tests.readme import ROOT


def blocks() -> list[str]:
    """The README's Python code."""
    text = (ROOT / "kdflow_core/losses/README.md").read_text()
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n".join(line[len(indent) :] for line in code.splitlines()) for indent, code in found]


def test_the_divergence_trains() -> None:
    names: dict[str, object] = {"__name__": __name__}
    exec(compile(blocks()[0], "hellinger.py", "exec"), names)
    divergence = names["Hellinger"](temperature=2.0)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    hidden_TH, weight_VH, teacher_TG, teacher_VG = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 4), (19, 4), (7, 5), (19, 5))
    )
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    loss = distillation_loss(
        student_hidden_TH=hidden_TH,
        student_head=OutputHead(weight_VH=weight_VH),
        teacher=HiddenSignal(teacher_TG, OutputHead(weight_VH=teacher_VG)),
        target_ids_T=torch.zeros(7, dtype=torch.long),
        weights_T=torch.ones(7),
        spec=LossSpec(divergence=divergence, kd_ratio=1.0, logits_bytes=2 * 3 * 19 * 8),
    ).loss
    q_TV = torch.softmax(hidden_TH @ weight_VH.T / 2, -1)
    p_TV = torch.softmax(teacher_TG @ teacher_VG.T / 2, -1)
    expected = (1 - (p_TV * q_TV).sqrt().sum(-1)).sum()
    torch.testing.assert_close(loss, expected)
    leaves = (hidden_TH, weight_VH)
    pair = (torch.autograd.grad(x, leaves) for x in (loss, expected))
    for mine, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_schema_is_one() -> None:
    """Put into the module of the schemas, it takes its knobs and no others."""
    source = (ROOT / "configs/schema/loss.py").read_text()
    names: dict[str, object] = {"__name__": "loss_with_hellinger"}
    exec(compile(source + "\n\n" + blocks()[1], str(Path("loss.py")), "exec"), names)
    schema = TypeAdapter(names["HellingerConfig"])
    assert schema.validate_python({"temperature": 2.0}).temperature == 2.0  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="unknown key 'tau'"):
        schema.validate_python({"tau": 2.0})
