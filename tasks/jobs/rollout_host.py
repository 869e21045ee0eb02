"""A process that holds a rollout engine of an on-policy run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.schema.on_policy import OnPolicyConfig
from configs.schema.rollout import SglangRollout
from configs.schema.run import REWARD
from kdflow_core.contracts import Example
from kdflow_core.functions import Judge, judged, load_function
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.rollout import build_rollout_engine, placed
from kdflow_core.rollout.base import Completion, Prompt, RolloutEngine, Sampling
from kdflow_core.rollout.prompts import share_answers
from kdflow_core.rollout.sglang import SglangRolloutEngine
from kdflow_core.weight_buckets import Bucket, BucketFile
from kdflow_core.weight_channel import WeightChannel
from kdflow_core.workers.base import RankContext, offered
from storage.rollouts import write_rollouts
from tasks.jobs import chats, parts
from tasks.jobs.round_examples import prompts_of_round
from tasks.jobs.stage_host import open_stage
from tasks.jobs.stored import TokenExamples
from tasks.rounds.rollout_shares import RolloutShare, share_folder
from tasks.stages.catalogue import ROLLOUTS
from tasks.stages.planning import round_identity


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One answer that is wanted: of the training example `index`."""

    index: int
    example: Example
    prompt: Prompt


class RolloutHost:
    """Answers its share of a round's prompts and takes new weights, as the methods are called."""

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
        self._reward: Judge | None = None
        if reward is not None:
            self._reward = load_function(reward.function, REWARD)
            # What fails for the data's own answer would fail after the first ones were paid for.
            first = TokenExamples(self._table)[0]
            prompt = str(self._tokenizer.decode(first.student.prompt_ids_T))
            judged(self._reward, prompt, first.label or "", first.label, field=REWARD)
        self._engine: RolloutEngine = build_rollout_engine(
            placed(self._config.rollout, context.rank_among_devices),
            folder=folder,
            vocabulary_size=true_vocabulary_size(self._tokenizer),
            max_length=stage.length_limit,
            device=parts.device(stage),
            trust_remote_code=stage.trusts("student"),
        )
        self._arrived = BucketFile()
        self._channel: WeightChannel | None = None

    @offered
    def ready(self) -> None:
        """Reply once the host is built."""

    @offered
    def begin_weights(self) -> None:
        """New weights will come."""
        self._engine.begin_weights()

    @offered
    def load_bucket(self, bucket: dict[str, Any]) -> None:
        """Take a bucket of them."""
        self._engine.load_weights(Bucket.from_plain(bucket))

    @offered
    def open_channel(self, address: str, port: int, ranks: int) -> None:
        """Meet the trainer's rank 0, which sends from its host's memory to this one's."""
        rank = 1 + self._stage.context.rank
        self._channel = WeightChannel(address, port, rank=rank, ranks=ranks)

    @offered
    def load_copy(self, bucket: dict[str, Any]) -> None:
        """Take a bucket that the trainer's rank 0 sends through the channel."""
        assert self._channel is not None
        own = self._arrived.room_for(Bucket.from_plain(bucket))
        self._channel.pass_on(own)
        self._engine.load_weights(own)

    @offered
    def join_broadcast(self, address: str, port: int, ranks: int) -> None:
        """Meet the trainer's rank 0, which sends from its device to the engine's."""
        config = self._config.rollout
        assert isinstance(self._engine, SglangRolloutEngine)
        assert isinstance(config, SglangRollout)
        first = 1 + self._stage.context.rank * config.tensor_parallel
        self._engine.join_broadcast(address, port, first=first, ranks=ranks)

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
        """Answer this engine's share of a round's prompts, and write it down; a `RolloutShare`."""
        started, rank = time.perf_counter(), self._stage.context.rank
        identity = round_identity(self._stage.spec.identity, ROLLOUTS, number)
        asked = self._asked(number, fraction)
        costs = [len(one.prompt.ids_T) + one.prompt.max_new_tokens for one in asked]
        shares = share_answers(
            costs,
            together=self._config.answers_together,
            engines=self._stage.context.num_ranks,
        )
        self._engine.wake()
        rows = self._rows(number, {place: asked[place] for place in shares[rank]})
        self._engine.sleep()
        folder = share_folder(self._stage.store.workdir(identity.kind, identity.digest), rank)
        folder.mkdir(parents=True, exist_ok=True)
        write_rollouts(folder, list(rows.values()))
        return RolloutShare(
            places=tuple(rows),
            asked=len(shares[rank]),
            version=self._engine.version,
            fraction=fraction,
            seconds=time.perf_counter() - started,
        ).model_dump(mode="json")

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

    def _rows(self, number: int, mine: dict[int, _Asked]) -> dict[int, dict[str, Any]]:
        """The rows of a share by their places in the round, ascending."""
        rows, tokens, places = dict[int, dict[str, Any]](), 0, list(mine)
        for index, completion in self._completions(number, mine):
            place = places[index]
            rows[place] = self._row(number, mine[place], completion)
            tokens += len(completion.ids_N)
            self._stage.reporter.progress(
                done=len(rows), total=len(mine), unit="answers", detail=f"{tokens:,} tokens"
            )
        return dict(sorted(rows.items()))

    def _completions(
        self, number: int, mine: dict[int, _Asked]
    ) -> Iterator[tuple[int, Completion]]:
        config = self._config
        sampling = Sampling(
            stop_ids=self._stop_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        return self._engine.generate(
            [one.prompt for one in mine.values()],
            sampling,
            seed=(self._stage.run.seed << 32) + number,
            places=list(mine),
            enough=config.collect_fraction,
        )

    def _row(self, number: int, asked: _Asked, completion: Completion) -> dict[str, Any]:
        prompt = str(self._tokenizer.decode(asked.prompt.ids_T))
        answer = str(self._tokenizer.decode(completion.ids_N, skip_special_tokens=True))
        label = asked.example.label
        reward = None
        if self._reward is not None:
            reward = judged(self._reward, prompt, answer, label, field=REWARD)
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
