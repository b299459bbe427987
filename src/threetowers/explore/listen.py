"""uvicorn's server with the limits of the page, which says on which port it listens."""

from collections.abc import Callable
from typing import Any

import uvicorn

from threetowers.errors import UsageError, of_system
from threetowers.explore.guard import Guard

CONNECTIONS = 512
"""Open at a time."""
HEADER_BYTES = 32 * 2**10


class Listener(uvicorn.Server):
    """A server of an application; `run` returns when it is interrupted or `should_exit` is set.

    said: is called with the port once it listens. It binds by itself, since answers through a socket that uvicorn makes
    beforehand wait for the client's acknowledgement, about 40 ms each.
    """

    def __init__(self, app: Guard, host: str, port: int, said: Callable[[int], object]) -> None:
        self.address, self.said = (host, port), said
        super().__init__(uvicorn.Config(
            app, host, port, lifespan="off", log_level="critical", access_log=False, server_header=False, ws="none",
            timeout_keep_alive=10, timeout_graceful_shutdown=3, limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        ))  # fmt: skip

    async def startup(self, sockets: Any = None) -> None:
        """Binds the address; raises UsageError where that cannot be done."""
        try:
            await super().startup(sockets)
        except SystemExit as stop:
            cause = stop.__context__
            host, port = self.address
            said = of_system(cause) if isinstance(cause, OSError) else "it cannot be bound"
            raise UsageError(
                f"--host {host} --port {port}: {said}. Give another --port; 0 takes a free one"
            ) from None
        self.said(self.servers[0].sockets[0].getsockname()[1])
