"""The Redis of a store: found, checked for its modules and the version of our keys, its errors told in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from sotopia_rl.episode import SCHEMA_VERSION
from sotopia_rl.errors import MissingExtraError, StoreError

try:
    import redis
except ImportError as error:
    raise MissingExtraError("redis", "redis") from error

OWN = "sotopia-rl:"
"""What our own keys start with."""


class RedisServer:
    """A Redis that can hold a store.

    Args:
        url: `redis://[:password@]host:port[/0]`; empty, or bare `redis`, for the one in `REDIS_OM_URL`.

    Attributes:
        db: The client, from the `redis` package.
        where: Its address for messages, without the password.

    Raises:
        StoreError: No Redis answers, it lacks a module, or our keys in it are of another schema version.
    """

    def __init__(self, url: str) -> None:
        url = url if urlsplit(url).netloc else os.environ.get("REDIS_OM_URL", "")
        if not url:
            raise StoreError("no Redis given; write redis://HOST:PORT, or set REDIS_OM_URL")
        parts = urlsplit(url)
        self.where = f"redis://{parts.hostname}:{parts.port or 6379}"
        if parts.path.strip("/") not in ("", "0"):
            raise StoreError(f"{self.where}: search works in database 0 only; leave {parts.path!r} out of the address")
        with self.errors_told():
            self.db: Any = redis.Redis.from_url(url, decode_responses=True)
            self._check_server()
            self._check_version()

    def _check_server(self) -> None:
        missing = []
        for module, command in (("JSON", ("JSON.GET", OWN + "nothing")), ("search", ("FT._LIST",))):
            try:
                self.db.execute_command(*command)
            except redis.exceptions.ResponseError as error:
                if "unknown command" not in str(error):
                    raise
                missing.append(module)
        if missing:
            raise StoreError(
                f"{self.where}: this Redis has no {' and no '.join(missing)} module; start Redis 8 or Redis Stack, "
                "or load rejson.so and redisearch.so with --loadmodule"
            )

    def _check_version(self) -> None:
        self.db.set(OWN + "schema_version", SCHEMA_VERSION, nx=True)
        version = self.db.get(OWN + "schema_version")
        if version != str(SCHEMA_VERSION):
            raise StoreError(
                f"{self.where}: the keys {OWN}* are of schema version {version}, this sotopia-rl reads version "
                f"{SCHEMA_VERSION}; export them with the sotopia-rl that wrote them, or use another Redis"
            )

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        try:
            yield
        except redis.exceptions.AuthenticationError as error:
            raise StoreError(
                f"{self.where}: Redis refuses the password; put it in the address or REDIS_OM_URL"
            ) from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise StoreError(f"{self.where}: no Redis answers; start it, or check the address") from error
        except redis.exceptions.RedisError as error:
            told = (
                "Redis is out of memory; raise maxmemory or free some"
                if "maxmemory" in str(error)
                else f"Redis: {error}"
            )
            raise StoreError(f"{self.where}: {told}") from error

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Commands that take effect together, or not at all."""
        with self.errors_told():
            pipeline = self.db.pipeline(transaction=True)
            yield pipeline
            pipeline.execute()
