"""An aiohttp server on a free local port, in a thread of its own."""

import asyncio
import threading
from typing import Self

from aiohttp import web


class LocalServer:
    """with Some(LocalServer)() as server: ... server.url

    Attributes:
        port: 0 takes any free one when it starts.
    """

    port = 0

    def routes(self) -> list[web.RouteDef]:
        """What it answers."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; a second time changes nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**24)
        app.router.add_routes(self.routes())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        ready.set()
        await self._over.wait()
        for _ in range(5):  # a connection accepted in this turn is the runner's, to close, some turns later
            await asyncio.sleep(0)
        await runner.cleanup()
