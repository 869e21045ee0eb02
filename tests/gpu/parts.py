"""The parts, each by itself: machine, loss, teacher engine. A step returns figures, or raises."""

import gc
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from configs.schema.teacher import Teacher
from kdflow_core.contracts import HiddenSignal, OutputHead, TeacherEngine, TokenSequence
from kdflow_core.losses.chunked import distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.streaming import stream_states
from tasks.forecast.doctor import examine
from tests.conftest import VOCABULARY
from tests.contracts.test_teacher import LENGTHS, MODELS, relative_error
from tests.gpu.place import Place
from tests.readme import ROOT
from tests.tiny_models import tiny_model

MB = 10**6
# A relative error of states in bfloat16 against float32; that of transformers' own is near 0.01.
BFLOAT16 = 0.03


def machine(place: Place) -> dict[str, Any]:
    """What doctor finds; nothing that is needed may be missing."""
    found = examine(place.folder)
    broken = [f"{f.what}: {f.detail}" for f in found if f.works is False]
    assert not broken, broken
    return {f.what: f.detail for f in found if f.what.startswith(("GPU", "torch", "sglang"))}


def lock(_: Place) -> dict[str, Any]:
    """Installed are the versions of the lock that has this torch; some may be of another build."""
    locks = {
        name: dict(
            re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", (ROOT / name).read_text(), re.MULTILINE)
        )
        for name in ("requirements.lock", "requirements-cuda.lock")
    }
    torch_version = metadata.version("torch").partition("+")[0]
    used = [name for name, pins in locks.items() if pins["torch"] == torch_version]
    assert used, f"torch {torch_version} is in none of {', '.join(locks)}"
    pins, other = locks[used[0]], {}
    for name, version in pins.items():
        try:
            installed = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            installed = "none"
        if installed != version:
            other[name] = f"{installed}, not {version}"
    for name in ("torch", "transformers", "prefect", "zarr"):
        assert name not in other, f"{name}: {other.get(name)}"
    return {"lock": used[0], "pinned": len(pins), "other": ", ".join(sorted(other)) or "none"}


def _peak(place: Place) -> float:
    return torch.cuda.max_memory_allocated() / MB if place.on_gpu else 0.0


def loss(place: Place) -> dict[str, Any]:
    """Chunks of several sizes against full logits in float64; peak memory and compilations."""
    tokens, width, vocabulary = (2048, 1024, 151_936) if place.on_gpu else (96, 32, 3000)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    hidden, other = (torch.randn(tokens, width, device=place.device).to(dtype) for _ in range(2))
    weight, teacher = (
        (torch.randn(vocabulary, width, device=place.device) / width**0.5).to(dtype)
        for _ in range(2)
    )
    few = slice(0, 64)  # full logits of all would not fit
    p_NV = (other[few].double() @ teacher.double().T).log_softmax(-1)
    q_NV = (hidden[few].double() @ weight.double().T).log_softmax(-1)
    expected = float((p_NV.exp() * (p_NV - q_NV)).sum())
    del p_NV, q_NV
    figures: dict[str, Any] = {}
    head = OutputHead(weight_VH=weight.requires_grad_())
    signal = HiddenSignal(other, OutputHead(weight_VH=teacher))
    targets = torch.zeros(tokens, dtype=torch.long, device=place.device)
    for megabytes in (1, 8, 64) if not place.on_gpu else (64, 512, 2048):
        weights = torch.zeros(tokens, device=place.device)
        weights[few] = 1
        spec = LossSpec(divergence=ForwardKL(), kd_ratio=1.0, logits_bytes=megabytes * MB)
        if place.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = _peak(place)
        begin = time.perf_counter()
        output = distillation_loss(
            student_hidden_TH=hidden.requires_grad_(),
            student_head=head,
            teacher=signal,
            target_ids_T=targets,
            weights_T=weights,
            spec=spec,
        )
        output.loss.backward()
        error = abs(float(output.loss.detach()) / expected - 1)
        assert error < 1e-2 if place.on_gpu else error < 1e-4, (megabytes, error)
        seconds = time.perf_counter() - begin
        assert hidden.grad is not None
        assert bool(hidden.grad.isfinite().all())
        hidden.grad = weight.grad = None
        figures[f"{megabytes} MB"] = f"{seconds:.2f} s, peak +{_peak(place) - before:,.0f} MB"
    compiled = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return figures | {"graphs compiled": compiled}


def _engine(place: Place, folder: Path, **options: Any) -> TeacherEngine:
    config = {"type": "sglang", "model": {"type": "pretrained", "path": str(folder)}}
    defaults = {"dtype": "bfloat16", "tokens_per_batch": 512}
    return build_engine(
        TypeAdapter(Teacher).validate_python(config | defaults | options),
        folder=folder,
        head=load_head(folder, load_config(folder), VOCABULARY),
        longest=max(LENGTHS),
        device=place.device,
    )


def _sequences(lengths: tuple[int, ...] = LENGTHS) -> list[TokenSequence]:
    rng, found = np.random.default_rng(0), []
    for length in lengths:
        supervised_T = np.ones(length, bool)
        supervised_T[0] = False
        ids_T = rng.integers(0, 90, length).astype(np.int32)
        found.append(TokenSequence(ids_T=ids_T, supervised_T=supervised_T))
    return found


def _states(engine: TeacherEngine, sequences: list[TokenSequence]) -> list[torch.Tensor]:
    found = stream_states(engine, sequences, window_tokens=10_000)
    return [states_NH.float().cpu() for states_NH in found]


def _teacher_models(place: Place) -> dict[str, Path]:
    """Dense, capped, mixture of experts; on a GPU also latent attention and gpt-oss."""
    folders = {}
    for name, make in MODELS.items():
        folders[name] = place.folder / name
        if not folders[name].is_dir():
            torch.manual_seed(3)
            make().save_pretrained(folders[name])
    folders.pop("gemma2")  # SGLang reads a field that only its published checkpoints have
    if place.on_gpu:
        for architecture in ("DeepseekV2ForCausalLM", "GptOssForCausalLM"):
            folders[architecture] = place.folder / architecture
            tiny_model(architecture, folders[architecture])
    return folders


def teachers(place: Place) -> dict[str, Any]:
    """States of each family against transformers in float32, whose weights these are."""
    errors = {}
    for name, folder in _teacher_models(place).items():
        model = load_causal_lm(folder, dtype=torch.float32, attention="eager")
        with torch.no_grad():
            expected = [
                model.base_model(
                    input_ids=torch.from_numpy(s.ids_T).long()[None]
                ).last_hidden_state[0, :-1]
                for s in _sequences()
            ]
        engine = _engine(place, folder)
        given = _states(engine, _sequences())
        engine.close()
        errors[name] = relative_error(given, expected)
        assert errors[name] < BFLOAT16, errors
    return {name: f"{error:.4f}" for name, error in errors.items()}


def many_batches(place: Place) -> dict[str, Any]:
    """256 short sequences at once; 50 batches in flat memory; rows that are held do not change; and
    a sleep gives the same states again.
    """
    engine = _engine(place, place.model("teacher", layers=3, seed=1))
    short = _sequences((5,) * 256)
    assert len(_states(engine, short)) == 256
    held = engine.forward(_sequences()[:3])
    kept = [rows.buffer_RH.clone() for rows in held]
    memory = []
    for _ in range(50):
        _states(engine, _sequences())
        gc.collect()
        memory.append(torch.cuda.memory_allocated() if place.on_gpu else 0)
    assert len(set(memory[5:])) <= 1, memory
    assert all(torch.equal(rows.buffer_RH, old) for rows, old in zip(held, kept, strict=True))
    before = _states(engine, short)
    awake = torch.cuda.memory_allocated() if place.on_gpu else 0
    engine.sleep()
    asleep = torch.cuda.memory_allocated() if place.on_gpu else 0
    engine.wake()
    again = _states(engine, short)
    engine.close()
    assert all(torch.equal(one, two) for one, two in zip(before, again, strict=True))
    return {"freed asleep": f"{(awake - asleep) / MB:,.0f} MB"}


def attention_backends(place: Place) -> dict[str, Any]:
    """The states by each of SGLang's backends of attention that is installed here."""
    folder, found = place.model("teacher", layers=3, seed=1), {}
    reference: list[torch.Tensor] = []
    for backend in ("triton", "flashinfer", "fa3", "torch_native"):
        try:
            engine = _engine(place, folder, attention_backend=backend)
        except Exception as error:  # noqa: BLE001 - which of them there are is what is asked
            found[backend] = f"not here: {type(error).__name__}"
            continue
        states = _states(engine, _sequences())
        engine.close()
        reference = reference or states
        distance = relative_error(states, reference)
        assert distance < BFLOAT16, (backend, distance)
        found[backend] = f"{distance:.4f}"
    assert reference, found
    return found
