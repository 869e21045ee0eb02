"""What can be known from configs and headers is known at planning: before tokens, before the
teacher, without a GPU.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import ModelError
from kdflow_core.models.folders import context_length
from kdflow_core.models.structure import meta_model
from storage.artifact import ArtifactRef
from tasks.checks.run_check import checked_plan
from tasks.stages.slices import tokens_slice
from tests.command import kdflow
from tests.conftest import CHATML, VOCABULARY, make_llama, make_tokenizer, run_inline
from tests.small_training import NARROW
from tests.tiny_models import tiny_model

Make = Callable[..., RunConfig]
Fields = dict[str, Any]
NARROWED = {f"student.{name}": value for name, value in NARROW.items()}


@pytest.fixture
def student(tmp_path: Path, teacher_folder: Path) -> Path:
    """A student with the teacher's tokenizer, which a test may break."""
    folder = tmp_path / "own-student"
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    make_llama(folder, hidden=32, layers=2, rows=416, seed=3)
    return folder


@pytest.fixture
def make(make_recipe: Callable[..., Path], student: Path) -> Make:
    def run(overrides: dict[str, Any] | None = None) -> RunConfig:
        own = {"student.model.path": str(student)}
        return load_run(str(make_recipe()), own | (overrides or {}))

    return run


def refused(run: RunConfig, message: str) -> None:
    """Planning refuses, and leaves no artifact."""
    with pytest.raises(ModelError, match=message):
        checked_plan(run, download=False)
    assert not (Path(run.storage.root) / "artifacts").exists()


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_in_order_is_planned_twice_and_looked_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    checked_plan(run, download=False)
    looked = []
    monkeypatch.setattr("tasks.checks.model_check.check_model", lambda *_: looked.append(1))
    checked_plan(run, download=False)
    assert not looked
    checked_plan(make({"student.lora": {"rank": 4}}), download=False)
    assert len(looked) == 2


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_broken_weights_name_the_field_and_the_tensor(make: Make, student: Path, side: str) -> None:
    tensors = load_file(student / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, student / "model.safetensors")
    run = make({f"{side}.model.path": str(student)})
    refused(run, rf"{side}\.model: .*lacks 1 tensors \(model\.layers\.1\.mlp\.up_proj\.weight\)")


def test_a_head_with_fewer_rows_than_the_tokenizer_has_ids(make: Make, student: Path) -> None:
    make_llama(student, hidden=32, layers=1, rows=VOCABULARY - 8, seed=0)
    refused(make(), rf"student\.model: .*has {VOCABULARY - 8} rows, the tokenizer {VOCABULARY} ids")


def test_an_architecture_that_is_not_known(make: Make, student: Path) -> None:
    edit_json(student / "config.json", architectures=["SomeNewForCausalLM"])
    refused(make(), r"student\.model: the output head of SomeNewForCausalLM is not known")


def test_another_vocabulary(make: Make, student: Path) -> None:
    make_tokenizer(student, texts=["quite another text " * 20])
    refused(make({"alignment": "exact"}), "student and teacher have different vocabularies")


@pytest.mark.parametrize("lacking", ["student", "teacher"])
def test_a_chat_template_on_one_side_alone(make: Make, student: Path, lacking: str) -> None:
    (student / "chat_template.jinja").unlink()
    run = make({f"{lacking}.model.path": str(student)})
    if lacking == "teacher":
        other = Path(load_run_student(make))
        run = make({"teacher.model.path": str(student), "student.model.path": str(other)})
    refused(run, f"the {lacking}'s tokenizer has no chat template, and the")
    given = {f"{lacking}.chat_template.template": CHATML}
    checked_plan(
        load_with(run, given),
        download=False,
    )


def load_run_student(make: Make) -> str:
    """Another folder with the same tokenizer and a template: the teacher's."""
    teacher = make().teacher.model
    assert teacher.type == "pretrained"
    return teacher.path


def load_with(run: RunConfig, fields: dict[str, Any]) -> RunConfig:
    tree = run.model_dump(mode="json")
    for dotted, value in fields.items():
        *path, last = dotted.split(".")
        node = tree
        for part in path:
            node = node[part]
        node[last] = value
    return RunConfig.model_validate_json(json.dumps(tree))


def test_a_generation_config_that_cannot_be_saved(make: Make, student: Path) -> None:
    path = student / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    refused(make(), r"generation_config\.json cannot be saved with the trained student")
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    checked_plan(make(), download=False)


def test_mending_the_generation_config_starts_no_training_anew(make: Make, student: Path) -> None:
    before = checked_plan(make(), download=False)
    (student / "generation_config.json").write_text('{"eos_token_id": 2, "do_sample": true}')
    after = checked_plan(make(), download=False)
    assert [i.digest for i in after.values()] == [i.digest for i in before.values()]
    (student / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')  # other ends
    assert tokens_slice(make())["student_ends"] == [0, 2]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["embed_tokens"], r"not to model\.embed_tokens \(Embedding\)"),
        (["lm_head"], r"not to lm_head \(Linear\)"),
        (["q_proj", "lm_head"], r"not to lm_head \(Linear\)"),
        (["input_layernorm"], r"not to model\.layers\.0\.input_layernorm \(LlamaRMSNorm\)"),
        (["no_proj"], r"targets=\['no_proj'\] are no layers of .*; it has .*q_proj"),
    ],
)
def test_adapters_that_would_be_dead_or_lost(make: Make, targets: list[str], message: str) -> None:
    refused(
        make({"student.lora": {"targets": targets}}), rf"student\.model: student\.lora.*{message}"
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"names": "embed_tokens", "lr": 1e-5}], r"no parameter is named 'embed_tokens'"),
        (
            [{"names": "model.*", "frozen": True}, {"names": "*norm*", "lr": 1e-5}],
            r"'\*norm\*', or an earlier group has it; there are lm_head\.weight$",
        ),
        ([{"names": "*", "frozen": True}], "every parameter is frozen"),
    ],
)
def test_groups_of_parameters_that_are_none(
    make: Make, groups: list[dict[str, object]], message: str
) -> None:
    refused(make({"student.parameter_groups": groups}), rf"student\.parameter_groups: .*{message}")


def gpt2(folder: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=416)
    GPT2LMHeadModel(config).save_pretrained(folder)


def test_adapters_on_layers_that_are_not_linear(make: Make, student: Path) -> None:
    (student / "model.safetensors").unlink()
    gpt2(student)
    refused(
        make({"student.lora": {"rank": 4}}),
        r"h\.0\.attn\.c_attn \(Conv1D\).*GPT2LMHeadModel; leave",
    )


@pytest.mark.parametrize(
    "name", ["max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"]
)
def test_names_of_the_context_length(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: 77}))
    assert context_length(tmp_path) == 77


def test_gpt2s_positions_limit_its_samples(make: Make, student: Path, tmp_path: Path) -> None:
    (student / "model.safetensors").unlink()
    gpt2(student)
    rows = [{"prompt": f"{i} " * (1 + i), "completion": "yes"} for i in range(60)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make({"data.sources.0.path": str(data), "data.heldout_fraction": 0.3})
    ref: ArtifactRef = run_inline(run, until="tokenize")["tokens"]
    manifest = json.loads((Path(ref.uri) / "manifest.json").read_text())
    assert manifest["info"]["dropped"]["long.jsonl"].keys() == {"too_long"}
    assert "the limit is 32" in manifest["info"]["first_dropped"]["too_long"]


def test_attention_that_is_not_exact_or_not_there(make: Make) -> None:
    refused(
        make({"student.attention": "flash_attention_2"}), "needs the package flash-attn and a GPU"
    )


def test_layers_that_nothing_can_compile(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(
        make({"student.compile": True}),
        r"student\.compile=true needs a compiler, and there is none of the name no-such-compiler",
    )


def test_packing_that_is_not_exact(make: Make) -> None:
    refused(
        make({"student.packing": True, "student.attention": "eager"}),
        r"student\.model: packing=true: attention=eager has no packed form .* set student\.packing",
    )


def test_experts_where_there_are_none(make: Make) -> None:
    refused(
        make({"student.router_aux_loss_coef": 0.01}),
        r"student\.model: student\.router_aux_loss_coef=0\.01: LlamaForCausalLM has no routers",
    )


def test_activations_that_are_not_computed_again(make: Make, student: Path) -> None:
    tiny_model("JetMoeForCausalLM", student, vocab_size=416)
    refused(
        make({"student.activation_checkpointing": True}),
        r"student\.activation_checkpointing: JetMoeForCausalLM does not have it",
    )


def test_a_head_that_cannot_be_spread(make: Make, student: Path) -> None:
    make_llama(student, hidden=32, layers=1, rows=416, seed=0, tied=True)
    refused(
        make({"student.vocabulary_parallel": True}),
        r"student\.vocabulary_parallel: the output head of LlamaForCausalLM is its embedding",
    )


def test_layers_that_cannot_be_dropped_from_a_folder(make_recipe: Callable[..., Path]) -> None:
    run = load_run(
        str(make_recipe()), {"student.model": {"type": "layer_drop", "drop_layers": [9]}}
    )
    refused(run, "the teacher has layers 0 to 2")


def test_code_in_a_model_folder_is_not_run_and_not_asked_about(make: Make, student: Path) -> None:
    """transformers would ask on standard input; with the field, the code is part of the model."""
    (student / "own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    edit_json(student / "config.json", auto_map={"AutoConfig": "own.OwnConfig"}, model_type="own")
    refused(make(), r"brings Python code of its own.*set trust_remote_code=true")


def test_trusted_code_is_part_of_the_identity(make: Make, student: Path) -> None:
    (student / "own.py").write_text("")
    trusted = {"student.model.trust_remote_code": True}
    before = [checked_plan(make(o), download=False)["train"].digest for o in ({}, trusted)]
    (student / "own.py").write_text("changed = True\n")
    after = [checked_plan(make(o), download=False)["train"].digest for o in ({}, trusted)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def sparse_8b(folder: Path) -> None:
    """A checkpoint of Llama-3-8B's size, whose data are holes: 16 GB that take no room."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    shards: list[dict[str, Any]] = [{} for _ in range(4)]
    for number, (name, tensor) in enumerate(meta_model(config).state_dict().items()):
        shards[number % 4][name] = list(tensor.shape)
    for number, shapes in enumerate(shards):
        file, begin, header = f"model-{number}.safetensors", 0, {}
        for name, shape in shapes.items():
            end = begin + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            begin, weight_map[name] = end, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + begin)
    moved = "model.layers.31.self_attn.q_proj.weight"
    wrong = (list(weight_map).index(moved) + 1) % 4
    right, weight_map[moved] = weight_map[moved], f"model-{wrong}.safetensors"
    (folder / "right").write_text(right)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_of_8b_is_looked_at_by_its_headers(make: Make, student: Path) -> None:
    """`kdflow plan` finds what is wrong without reading 16 GB: under a limit of memory, and the
    files have no data at all.
    """
    (student / "model.safetensors").unlink()
    sparse_8b(student)
    config = json.loads((student / "config.json").read_text())
    assert sum(f.stat().st_size for f in student.glob("*.safetensors")) > 16e9
    run = make()
    refused(run, "has it in model-3.safetensors: they belong to different checkpoints")
    index = student / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.layers.31.self_attn.q_proj.weight"] = (student / "right").read_text()
    index.write_text(json.dumps({"weight_map": weight_map}))
    edit_json(student / "config.json", num_hidden_layers=33)
    refused(make(), r"lacks 9 tensors \(model\.layers\.32\.")
    edit_json(student / "config.json", num_hidden_layers=31)
    refused(make(), r"none of that name, 9 tensors \(model\.layers\.31\.")
    edit_json(student / "config.json", num_hidden_layers=32, intermediate_size=14000)
    refused(make(), "in another shape 96 tensors")
    assert config["num_hidden_layers"] == 32


def test_the_command_says_it_in_one_line(make_recipe: Callable[..., Path], student: Path) -> None:
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    for command in ("plan", "run"):
        said = kdflow(command, str(make_recipe()), f"student.model.path={student}", code=1)
        assert "pytorch_model.bin, which is not safetensors and may run code" in said
        assert said.startswith("error: ")
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("fields", "bytes_each"),
    [
        ({}, 16),
        ({"student.num_ranks": 2}, 8),
        (NARROWED, 8),
        ({"student.lora": {"rank": 2}}, 4),
        ({"student.num_ranks": 2, "student.reduce_gradients": "every_step"}, 10),
    ],
    ids=["alone", "ranks", "narrow", "adapters", "whole gradients"],
)
def test_what_no_batch_size_makes_fit(
    make: Make, student: Path, monkeypatch: pytest.MonkeyPatch, fields: Fields, bytes_each: int
) -> None:
    """Weights, gradients and moments, on a device that lacks a little of them, or has it."""
    logits = 1_000_000
    count = sum(t.numel() for t in load_file(student / "model.safetensors").values())
    run = make(fields | {"teacher.model.path": str(student)})
    rooms = iter((count * bytes_each, count * bytes_each + logits))
    monkeypatch.setattr("tasks.checks.room_check._device", lambda: ("GPU 0", next(rooms)))
    refused(
        run,
        r"training \(student\.num_ranks=\d\) takes 0\.00 GB \(weights 0\.00, .* on each rank",
    )
    checked_plan(run, download=False)


def test_an_offloaded_student_is_held_by_the_host(
    make: Make, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the device it takes embedding and head, and two layers, as they are computed with."""
    tensors = load_file(student / "model.safetensors")
    count = sum(t.numel() for t in tensors.values())
    inner = [t.numel() for name, t in tensors.items() if ".layers." in name]
    gathered = 4 * (count - sum(inner) + 2 * sum(inner) // 2)  # it has two layers, alike
    run = make({"student.offload": True, "student.num_ranks": 2})
    room, host = gathered + 1_000_000, 16 * count

    def has(on_device: int, in_host: int) -> None:
        monkeypatch.setattr("tasks.checks.room_check._device", lambda: ("GPU 0", on_device))
        monkeypatch.setattr("tasks.checks.room_check._host_memory", lambda: in_host)

    has(room - 1, host)
    refused(run, r"training .* takes 0\.00 GB \(gathered 0\.00, logits 0\.00\) on each rank")
    has(room, host - 2)
    refused(
        run, r"the student that student\.offload keeps there takes .* and the host of GPU 0 has 0"
    )
    has(room, host)
    checked_plan(run, download=False)


def test_a_checkpoint_that_the_host_cannot_hold(
    make: Make, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments, of GPUs that have room for them."""
    count = sum(t.numel() for t in load_file(student / "model.safetensors").values())
    monkeypatch.setattr("tasks.checks.room_check._device", lambda: ("GPU 0", 10**12))
    monkeypatch.setattr("tasks.checks.room_check._host_memory", lambda: 12 * count - 1)
    refused(
        make({"student.num_ranks": 2}),
        r"a checkpoint takes 0\.00 GB \(weights 0\.00, moments 0\.00\) on each rank at the least, "
        "and the host of GPU 0 has 0",
    )
    for fields in (NARROWED, {"student.lora": {"rank": 2}}):
        checked_plan(make(fields), download=False)


def test_a_teacher_that_the_device_cannot_hold(
    make: Make, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the student, where it runs with it and does not leave."""
    teacher = make().teacher.model
    assert teacher.type == "pretrained"
    sizes = [
        sum(t.numel() for t in load_file(folder / "model.safetensors").values())
        for folder in (student, Path(teacher.path))
    ]
    room = 16 * sizes[0] + 1_000_000 + 2 * sizes[1]
    monkeypatch.setattr("tasks.checks.room_check._device", lambda: ("GPU 0", room))
    checked_plan(make(), download=False)
    refused(
        make({"delivery": "live"}),
        r"moments 0\.00, .*teacher 0\.00\) on .*, and GPU 0 has 0\.00 GB",
    )
    checked_plan(make({"delivery": "live", "teacher.sleep": True}), download=False)
    monkeypatch.setattr("tasks.checks.room_check._device", lambda: ("GPU 0", 4 * sizes[1] - 1))
    refused(
        make({"student.lora": {"rank": 2}}),
        r"the teacher takes 0\.00 GB \(weights 0\.00\) on each rank",
    )


SGLANG = {"type": "sglang", "dtype": "float32"}


def answering(by: str) -> tuple[Fields, str]:
    """A student that answers in SGLang, in rounds or before them; and the field that says so."""
    if by == "rounds":
        rounds = {"rounds": 1, "prompts_per_round": 8, "rollout": SGLANG}
        fields = {"mode": "onpolicy", "student.max_steps": None, "on_policy": rounds}
        return fields, "on_policy.rollout"
    return {"data.answers": {"by": "student", "engine": SGLANG}}, "data.answers.engine"


@pytest.mark.parametrize("by", ["rounds", "answers"])
def test_answers_of_a_model_with_soft_caps_in_sglang_on_a_cpu(
    make: Make, student: Path, by: str
) -> None:
    """They would be another model's, and nothing would say so."""
    tiny_model("Gemma2ForCausalLM", student, vocab_size=416)
    fields, field = answering(by)
    fields |= {"student.attention": "eager", "student.packing": False}
    refused(make(fields), r"student\.model: SGLang on a CPU writes answers without the soft-caps")
    eager = {"type": "transformers", "attention": "eager"}
    checked_plan(make(fields | {field: eager}), download=False)


@pytest.mark.parametrize("by", ["rounds", "answers", "teacher"])
def test_a_model_that_sglang_has_no_code_for(make: Make, student: Path, by: str) -> None:
    """Seen by SGLang's sources, before anything of it is loaded."""
    tiny_model("BioGptForCausalLM", student, vocab_size=416)
    if by == "teacher":
        model = {"type": "pretrained", "path": str(student)}
        fields, field = {"teacher": SGLANG | {"model": model}}, "teacher.type"
    else:
        fields, field = answering(by)
    message = r"SGLang [\d.]+ does not run BioGptForCausalLM; set the type of what runs it to tr"
    refused(make(fields), message)
    other = "transformers" if by == "teacher" else {"type": "transformers", "dtype": "float32"}
    checked_plan(make(fields | {field: other}), download=False)
