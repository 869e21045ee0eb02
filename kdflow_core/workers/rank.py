"""`python -m kdflow_core.workers.rank JOB NAME`: a rank of a group on its launcher's machine.

What it is comes with the first request; its arguments are for people who look at processes.
"""

import logging
import os
import sys
import traceback
from pkgutil import resolve_name
from typing import NoReturn

from kdflow_core.workers.rank_side import begin, emit, receive_requests, reply

DISK_IS_FULL = (
    "the disk is full; what is finished stays: make room, or point storage.root and "
    "storage.scratch to a larger disk, and run again"
)


def serve() -> int:
    """Be the host that the first request asks for, until it is told to leave. The exit code."""
    requests = receive_requests()
    first = next(requests)
    try:
        # Imported here: from its first moment a rank listens to its launcher.
        from kdflow_core.workers.base import Host, Request, Start, offered_method  # noqa: PLC0415

        start = Start.model_validate_json(first)
        logging.basicConfig(level=logging.WARNING)
        host: Host = resolve_name(start.job)(start.context, start.spec)
        for text in requests:
            request = Request.model_validate_json(text)
            if request.role == "leave":
                host.close()
                _leave_group()
                return 0
            reply(request.number, offered_method(host, request.method)(**request.arguments))
    except Exception as error:  # noqa: BLE001 - the process boundary: all must reach the launcher
        report_error(error)
    return 1


def _leave_group() -> None:
    """Out of torch's process group, if the host has joined one."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist  # noqa: PLC0415 - loaded by now

    if dist.is_initialized():
        dist.destroy_process_group()


def report_error(error: Exception) -> None:
    """Tell the launcher what went wrong, and whether the message alone is for the user."""
    from configs.errors import KdflowError  # noqa: PLC0415 - see above
    from configs.secrets import public  # noqa: PLC0415 - see above

    text = public("".join(traceback.format_exception(error)))
    message, expected = public(str(error)), isinstance(error, KdflowError) and error.expected
    if not expected and "No space left on device" in text:
        message, expected = DISK_IS_FULL, True
    elif _is_out_of_memory(error):
        message, expected = (
            f"out of memory: {error}. Lower student.micro_batch_tokens, teacher.tokens_per_batch "
            "or loss.logits_memory_mb, or set student.activation_checkpointing=true",
            True,
        )
    elif not expected:
        message = f"{type(error).__name__}: {message}"
    emit({"event": "error", "message": message, "expected": expected, "traceback": text})


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def leave(code: int) -> NoReturn:
    """End this process at once: at a usual exit, threads of native libraries abort some."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run() -> NoReturn:
    """Be a rank, and end."""
    begin()  # before all imports that take their time
    try:
        code = serve()
    except SystemExit as asked:  # by a library
        code = asked.code if isinstance(asked.code, int) else 1
    leave(code)


if __name__ == "__main__":
    run()
