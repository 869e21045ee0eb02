"""The process that holds the rollout engine of an on-policy run."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema.on_policy import OnPolicyConfig
from kdflow_core.contracts import Example
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.rollout import build_rollout_engine
from kdflow_core.rollout.base import Completion, Prompt, RolloutEngine, Sampling
from kdflow_core.rollout.rewards import RewardFunction, load_reward, reward_of
from kdflow_core.rollout.sglang import SglangRolloutEngine
from kdflow_core.weight_buckets import Bucket
from kdflow_core.workers.base import RankContext, offered
from storage.rollouts import write_rollouts
from tasks.jobs import chats, parts
from tasks.jobs.round_examples import prompts_of_round
from tasks.jobs.stage_host import open_stage
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import TokenExamples
from tasks.stages.catalogue import ROLLOUTS
from tasks.stages.planning import round_identity


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One answer that is wanted: of the training example `index`."""

    index: int
    example: Example
    prompt: Prompt


class RolloutHost:
    """Answers a round's prompts and takes new weights, as the methods are called."""

    def __init__(self, context: RankContext, spec: str) -> None:
        stage = open_stage(context, spec)
        assert stage.run.on_policy is not None
        self._stage = stage
        self._config: OnPolicyConfig = stage.run.on_policy
        self._table = stage.tables()["train"]
        folder = stage.model_folder("student")
        chat = chats.chat(stage, "student")
        self._tokenizer, self._stop_ids = chat.tokenizer, chat.end_ids
        reward = self._config.reward
        self._reward: RewardFunction | None = None
        if reward is not None:
            self._reward = load_reward(Path(reward.path), reward.name)
        self._engine: RolloutEngine = build_rollout_engine(
            self._config.rollout,
            folder=folder,
            vocabulary_size=true_vocabulary_size(self._tokenizer),
            max_length=stage.length_limit,
            device=parts.device(stage),
            trust_remote_code=stage.trusts("student"),
        )

    @offered
    def ready(self) -> None:
        """Reply once the host is built."""

    @offered
    def begin_weights(self) -> None:
        """New weights will come."""
        self._engine.wake()
        self._engine.begin_weights()

    @offered
    def load_bucket(self, bucket: dict[str, Any]) -> None:
        """Take a bucket of them."""
        self._engine.load_weights(Bucket.from_plain(bucket))

    @offered
    def join_broadcast(self, address: str, port: int) -> None:
        """Meet the trainer's rank 0, which sends."""
        assert isinstance(self._engine, SglangRolloutEngine)
        self._engine.join_broadcast(address, port)

    @offered
    def receive_bucket(self, tensors: list[dict[str, Any]]) -> None:
        """Take a bucket that the trainer's rank 0 sends."""
        assert isinstance(self._engine, SglangRolloutEngine)
        self._engine.receive_weights(
            [t["name"] for t in tensors],
            [t["dtype"] for t in tensors],
            [t["shape"] for t in tensors],
        )

    @offered
    def end_weights(self, version: int) -> int:
        """Serve them; the version that the engine reports."""
        self._engine.end_weights(version)
        return self._engine.version

    @offered
    def roll_out(self, number: int, fraction: float) -> dict[str, Any]:
        """Answer the prompts of a round; the reference of the artifact."""
        started = time.perf_counter()
        identity = round_identity(self._stage.spec.identity, ROLLOUTS, number)
        spec = self._stage.spec.model_copy(update={"identity": identity})
        stage = StageRun(spec, self._stage.reporter, self._stage.context)
        self._engine.wake()
        asked = self._asked(number, fraction)
        rows = self._rows(number, asked)
        self._engine.sleep()
        write_rollouts(stage.workdir, rows)
        counts = {
            "answers": len(rows),
            "tokens": sum(len(row["answer_ids"]) for row in rows),
            "cut_before_their_first_token": len(asked) - len(rows),
        }
        # Where nothing is sampled, no weights are served, and none are stale.
        version = self._engine.version if rows else number - 1
        info = self._info(rows) | {"version": version, "fraction": fraction}
        info["seconds"] = time.perf_counter() - started
        return stage.publish(counts=counts, info=info).model_dump(mode="json")

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _asked(self, number: int, fraction: float) -> list[_Asked]:
        config, data = self._config, TokenExamples(self._table)
        chosen, _ = prompts_of_round(config, self._table, self._stage.run.seed, number, fraction)
        asked = []
        for index in chosen:
            example = data[index]
            prompt = parts.prompt(self._stage, example, "student", config.max_new_tokens)
            asked += [_Asked(index=index, example=example, prompt=prompt)]
        return [one for one in asked for _ in range(config.samples_per_prompt)]

    def _rows(self, number: int, asked: list[_Asked]) -> list[dict[str, Any]]:
        """The rows of a round, in the order of its prompts."""
        rows: list[dict[str, Any] | None] = [None] * len(asked)
        done, tokens = 0, 0
        for place, completion in self._completions(number, asked):
            rows[place] = self._row(number, asked[place], completion)
            done, tokens = done + 1, tokens + len(completion.ids_N)
            self._stage.reporter.progress(
                done=done, total=len(asked), unit="answers", detail=f"{tokens:,} tokens"
            )
        return [row for row in rows if row is not None]

    def _completions(self, number: int, asked: list[_Asked]) -> Iterator[tuple[int, Completion]]:
        config = self._config
        sampling = Sampling(
            stop_ids=self._stop_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        prompts = [one.prompt for one in asked]
        seed = (self._stage.run.seed << 32) + number
        return self._engine.generate(prompts, sampling, seed=seed, enough=config.collect_fraction)

    def _row(self, number: int, asked: _Asked, completion: Completion) -> dict[str, Any]:
        prompt = str(self._tokenizer.decode(asked.prompt.ids_T))
        answer = str(self._tokenizer.decode(completion.ids_N, skip_special_tokens=True))
        label = asked.example.label
        reward = None if self._reward is None else reward_of(self._reward, prompt, answer, label)
        return {
            "round": number,
            "prompt": asked.index,
            "source": asked.example.source,
            "prompt_ids": asked.prompt.ids_T,
            "answer_ids": completion.ids_N,
            "log_probs": completion.log_prob_N,
            "finish_reason": completion.finish_reason,
            "version": completion.version,
            "reward": reward,
            "prompt_text": prompt,
            "answer_text": answer,
            "label": label,
        }

    def _info(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["answer_ids"]) for row in rows]
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        return {
            "finish_reasons": dict(Counter(row["finish_reason"] for row in rows)),
            "mean_length": float(np.mean(lengths)) if lengths else 0.0,
            "longest": max(lengths, default=0),
            "reward_mean": float(np.mean(rewards)) if rewards else None,
        }
