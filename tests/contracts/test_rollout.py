"""Every rollout engine passes this suite; the witness is a loop over transformers' logits."""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema.rollout import SglangRollout, TransformersRollout
from kdflow_core.errors import ModelError
from kdflow_core.rollout import build_rollout_engine
from kdflow_core.rollout.base import Completion, Prompt, RolloutEngine, Sampling
from kdflow_core.weight_buckets import BucketFile
from tests.conftest import VOCABULARY, make_llama

# SGLang's engine leaves sockets to the end of its process.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CONFIGS = {
    "transformers": TransformersRollout(dtype="float32", prompts_per_batch=5),
    "sglang": SglangRollout(dtype="float32", max_running=16),
}
GREEDY = Sampling(stop_ids=(), temperature=0.0)
LONGEST = 128
ROWS = 416  # of the students' heads: 16 beyond the vocabulary


@pytest.fixture(scope="module", params=CONFIGS)
def engine(request: pytest.FixtureRequest, student_folder: Path) -> Iterator[RolloutEngine]:
    before = psutil.Process().children()  # what other files' tests have left is not the engine's
    built = build_rollout_engine(
        CONFIGS[request.param],
        folder=student_folder,
        vocabulary_size=VOCABULARY,
        max_length=LONGEST,
        device=torch.device("cpu"),
    )
    yield built
    built.close()
    zombies = [
        child
        for child in psutil.Process().children()
        if child not in before and child.status() == psutil.STATUS_ZOMBIE
    ]
    assert zombies == []
    with pytest.raises(ModelError, match="closed"):
        answers(built, prompts(1), GREEDY, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def model(student_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)


def prompts(count: int, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, int(rng.integers(2, 30)), np.int32) for _ in range(count)]


def answers(
    engine: RolloutEngine,
    asked: list[np.ndarray],
    sampling: Sampling,
    length: int | list[int],
    *,
    seed: int = 0,
) -> list[Completion]:
    lengths = [length] * len(asked) if isinstance(length, int) else length
    given = [Prompt(ids_T=i, max_new_tokens=n) for i, n in zip(asked, lengths, strict=True)]
    found = dict(engine.generate(given, sampling, seed=seed))
    assert sorted(found) == list(range(len(asked)))
    return [found[number] for number in range(len(asked))]


def log_softmax(
    model: PreTrainedModel, prompt: np.ndarray, answer: np.ndarray, temperature: float = 1.0
) -> torch.Tensor:
    """The log-probabilities [N, V] that the answer's tokens were chosen from."""
    ids = torch.from_numpy(np.concatenate([prompt, answer])).long()[None]
    with torch.no_grad():
        logits_TV = model(ids).logits[0, len(prompt) - 1 : -1, :VOCABULARY]
    return torch.log_softmax(logits_TV / temperature, -1)


def is_greedy(model: PreTrainedModel, prompt: np.ndarray, completion: Completion) -> bool:
    log_q_NV = log_softmax(model, prompt, completion.ids_N)
    chosen_N = log_q_NV[torch.arange(len(log_q_NV)), torch.from_numpy(completion.ids_N).long()]
    return bool((chosen_N > log_q_NV.amax(-1) - 1e-4).all())


@pytest.mark.parametrize("chosen", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_greedy(engine: RolloutEngine, model: PreTrainedModel, chosen: dict[str, float]) -> None:
    """However it is asked for, it is the most probable token of transformers, each time."""
    asked = prompts(12)
    sampling = Sampling(stop_ids=(), **chosen)  # type: ignore[arg-type]
    for prompt, completion in zip(asked, answers(engine, asked, sampling, 10), strict=True):
        assert completion.finish_reason == "length"
        assert len(completion.ids_N) == 10
        assert is_greedy(model, prompt, completion)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities(
    engine: RolloutEngine, model: PreTrainedModel, temperature: float
) -> None:
    """They are those of the sampling temperature over the whole vocabulary, padding left out,
    whatever top-p takes away.
    """
    asked = prompts(12, seed=1)
    sampling = Sampling(stop_ids=(), temperature=temperature, top_p=0.9)
    for prompt, completion in zip(asked, answers(engine, asked, sampling, 12), strict=True):
        ids_N = torch.from_numpy(completion.ids_N).long()
        log_q_NV = log_softmax(model, prompt, completion.ids_N, temperature or 1.0)
        expected_N = log_q_NV[torch.arange(len(ids_N)), ids_N]
        np.testing.assert_allclose(completion.log_prob_N, expected_N, atol=1e-4)


def test_log_probabilities_that_nobody_wants(engine: RolloutEngine, model: PreTrainedModel) -> None:
    asked = prompts(3, seed=1)
    sampling = Sampling(stop_ids=(), temperature=0.0, log_probs=False)
    for prompt, completion in zip(asked, answers(engine, asked, sampling, 5), strict=True):
        assert completion.log_prob_N is None
        assert is_greedy(model, prompt, completion)


def test_where_answers_end(engine: RolloutEngine) -> None:
    """With a stop id, which belongs to the answer, or at the length that its prompt allows."""
    asked = prompts(41, seed=2)
    rooms = [5 + number % 16 for number in range(41)]
    ends = tuple(range(100, 130))
    sampling = Sampling(stop_ids=ends, temperature=3.0)
    reasons = set()
    for room, completion in zip(rooms, answers(engine, asked, sampling, rooms), strict=True):
        reasons.add(completion.finish_reason)
        assert 0 < len(completion.ids_N) <= room
        assert len(completion.log_prob_N) == len(completion.ids_N)
        assert not set(completion.ids_N[:-1]) & set(ends)
        stopped = int(completion.ids_N[-1]) in ends
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.ids_N) == room
    assert reasons == {"stop", "length"}


def test_an_answer_may_fill_the_length(engine: RolloutEngine) -> None:
    asked = [ids[:28] for ids in prompts(60, seed=9) if len(ids) >= 28]
    for completion in answers(engine, asked, Sampling(stop_ids=()), LONGEST - 28):
        assert len(completion.ids_N) == LONGEST - 28


def test_samples_follow_the_distribution(engine: RolloutEngine, model: PreTrainedModel) -> None:
    """First tokens of many samples of one prompt; and no token beyond the vocabulary."""
    (prompt,) = prompts(1, seed=4)
    count = 2000
    sampling = Sampling(stop_ids=(), temperature=0.6)
    found = answers(engine, [prompt] * count, sampling, 1)
    observed_V = np.bincount([int(c.ids_N[0]) for c in found], minlength=ROWS) / count
    assert not observed_V[VOCABULARY:].any()
    expected_V = log_softmax(model, prompt, prompt[:1], 0.6)[0].exp().numpy()
    # The expected distance of so many samples is at most sqrt(V_effective / n) / 2.
    effective = np.exp(-(expected_V * np.log(expected_V)).sum())
    distance = 0.5 * np.abs(observed_V[:VOCABULARY] - expected_V).sum()
    assert distance < 1.5 * np.sqrt(effective / count) < 0.5


def test_tokens_of_an_answer_are_drawn_independently(engine: RolloutEngine) -> None:
    """At a temperature at which all tokens are about as probable: one says nothing of the next."""
    asked = prompts(60, seed=10)
    found = answers(engine, asked, Sampling(stop_ids=(), temperature=1000.0), 21)
    ids = np.stack([completion.ids_N for completion in found]).astype(float)
    pairs = np.corrcoef(ids[:, :-1].ravel(), ids[:, 1:].ravel())[0, 1]
    assert abs(pairs) < 4 / np.sqrt(60 * 20)
    assert ids.mean() == pytest.approx((VOCABULARY - 1) / 2, rel=0.05)
    assert len(set(ids.ravel())) > 0.9 * VOCABULARY


def test_the_same_seed_gives_the_same_answers(engine: RolloutEngine) -> None:
    """As long as what is computed together is the same; from prompt to prompt they differ."""
    (prompt,) = prompts(1, seed=4)
    sampling = Sampling(stop_ids=tuple(range(100, 130)), top_p=0.95)

    def sampled(seed: int) -> list[tuple[int, ...]]:
        found = answers(engine, [prompt] * 12, sampling, 20, seed=seed)
        return [tuple(completion.ids_N.tolist()) for completion in found]

    first = sampled(1)
    assert sampled(1) == first
    assert len(set(first)) > 10
    assert not set(first) & set(sampled(2))


def test_engines_that_share_a_seed_give_its_answers(engine: RolloutEngine) -> None:
    """Each some of them, by their places; here whole batches of the reference's five."""
    asked = [Prompt(ids_T=ids, max_new_tokens=12) for ids in prompts(13, seed=11)]
    sampling = Sampling(stop_ids=tuple(range(100, 130)))
    whole = dict(engine.generate(asked, sampling, seed=3))
    shared: dict[int, Completion] = {}
    for places in ([0, 1, 2, 3, 4, 10, 11, 12], [5, 6, 7, 8, 9], []):
        chosen = [asked[place] for place in places]
        found = engine.generate(chosen, sampling, seed=3, places=places)
        shared |= {places[index]: completion for index, completion in found}
    assert sorted(shared) == list(range(13))
    for place, completion in whole.items():
        np.testing.assert_array_equal(shared[place].ids_N, completion.ids_N)


def test_some_answers_may_be_cut(engine: RolloutEngine) -> None:
    """What there is of them is given, if there is a token; the engine serves on."""
    asked = [Prompt(ids_T=ids, max_new_tokens=90) for ids in prompts(40, seed=5)]
    sampling = Sampling(stop_ids=tuple(range(100, 140)), temperature=2.0)
    found = dict(engine.generate(asked, sampling, seed=0, enough=0.5))
    assert all(len(c.ids_N) for c in found.values())
    cut = [c for c in found.values() if c.finish_reason == "cut"]
    assert len(found) - len(cut) >= 20
    assert all(int(c.ids_N[-1]) not in sampling.stop_ids for c in cut)
    assert len(answers(engine, prompts(3, seed=5), sampling, 5)) == 3


@pytest.mark.parametrize("version", [1, 2])
def test_new_weights(
    engine: RolloutEngine, version: int, tmp_path: Path, student_folder: Path
) -> None:
    """From then on answers are greedy under the new weights, and carry their version."""
    make_llama(tmp_path, hidden=32, layers=2, rows=ROWS, seed=20 + version)
    named = sorted(load_file(tmp_path / "model.safetensors").items())
    engine.begin_weights()
    file = BucketFile()
    for begin in range(0, len(named), 4):
        engine.load_weights(file.write(named[begin : begin + 4]))
    engine.end_weights(version)
    assert engine.version == version
    asked = prompts(6, seed=6)
    found = answers(engine, asked, GREEDY, 8)
    new = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    old = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    for prompt, completion in zip(asked, found, strict=True):
        assert completion.version == version
        assert is_greedy(new, prompt, completion)
        assert not is_greedy(old, prompt, completion)


def test_weights_that_did_not_arrive(engine: RolloutEngine, tmp_path: Path) -> None:
    """They are named; with the rest, the engine serves again."""
    make_llama(tmp_path, hidden=32, layers=2, rows=ROWS, seed=30)
    named = dict(load_file(tmp_path / "model.safetensors"))
    late = {name: named.pop(name) for name in ("model.norm.weight",)}
    engine.begin_weights()
    file = BucketFile()
    engine.load_weights(file.write(list(named.items())))
    with pytest.raises(ModelError, match=r"model\.norm\.weight did not arrive"):
        engine.end_weights(9)
    assert engine.version != 9
    engine.load_weights(file.write(list(late.items())))
    engine.end_weights(9)
    asked = prompts(2, seed=7)
    found = answers(engine, asked, GREEDY, 4)
    assert [c.version for c in found] == [9, 9]


def test_sleep_and_wake(engine: RolloutEngine, tmp_path: Path) -> None:
    """Both may be called twice; the engine answers as before, also by weights that came since it
    slept for the first time.
    """
    asked = prompts(3, seed=8)
    for seed in (40, 41):
        make_llama(tmp_path, hidden=32, layers=2, rows=ROWS, seed=seed)
        engine.sleep()
        engine.begin_weights()
        engine.load_weights(
            BucketFile().write(sorted(load_file(tmp_path / "model.safetensors").items()))
        )
        engine.end_weights(seed)
        before = answers(engine, asked, GREEDY, 6)
        for call in (engine.sleep, engine.sleep, engine.wake, engine.wake):
            call()
        after = answers(engine, asked, GREEDY, 6)
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one.ids_N, other.ids_N)
