"""`python -m flows.temporary_server PORT`: Prefect's API on loopback for one run.

Started by `flows.prefect_api`, in a session of its own, so that a Ctrl-C in the terminal does not
reach it; it ends with the process that holds the other end of its standard input, however that
ends.
"""

import os
import sys
import threading

import uvicorn


def main(port: int) -> None:
    """Serve until the starter is gone."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    from prefect.server.api.server import create_app  # noqa: PLC0415 - the thread comes first

    app = create_app(ephemeral=True, final=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", lifespan="on")


def _end_with_the_starter() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
