"""The baseline of `teacher.py`: SGLang's own engine, whose states come as lists of floats."""

import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PLAIN_CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.5,
}


def best_of(folder: Path, ids: list[list[int]], *, dtype: str, tokens: int, rounds: int) -> float:
    """Seconds of the best round, in a process that has ended when this returns: its scheduler
    polls, and would take a core from the other subjects.
    """
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(
        target=_serve, args=(there, str(folder), ids, dtype, tokens, rounds)
    )
    process.start()
    there.close()
    seconds: list[float] = here.recv()
    process.join()
    return min(seconds)


def _serve(
    answer: Connection, folder: str, ids: list[list[int]], dtype: str, tokens: int, rounds: int
) -> None:
    from sglang import Engine

    hardware: dict[str, Any] = {} if torch.cuda.is_available() else PLAIN_CPU
    engine = Engine(
        model_path=folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        chunked_prefill_size=-1,
        max_prefill_tokens=tokens,
        max_total_tokens=4 * tokens,
        enable_return_hidden_states=True,
        log_level="error",
        **hardware,
    )
    sampling = {"temperature": 0, "max_new_tokens": 1}
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        states = engine.generate(input_ids=ids, sampling_params=sampling, return_hidden_states=True)
        seconds.append(time.perf_counter() - begin)
    assert [len(s["meta_info"]["hidden_states"][0]) for s in states] == [len(one) for one in ids]
    engine.shutdown()
    answer.send(seconds[1:])
