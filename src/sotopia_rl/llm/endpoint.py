"""An HTTP endpoint as a run sees it: its address and key, its connections, its pace, and whether it is alive."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass, field
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from sotopia_rl import __version__
from sotopia_rl.errors import ConfigError, FailureKind
from sotopia_rl.llm.limits import ModelLimits

OPENAI_URL = "https://api.openai.com/v1"
DOWN_AFTER_FAILURES = 3
"""Failures in a row before an endpoint can count as down."""

# Part of a key as servers quote it back, such as "sk-ab***yz".
_KEY_LIKE = re.compile(r"\b(?:sk|pk|api|key)-[\w*.-]{4,}")


def key_variable(url: str) -> str:
    """The environment variable that holds the key of a custom endpoint.

    SOTOPIA_RL_KEY_ and the host and port as they stand in the URL: http://localhost:8000/v1 has
    SOTOPIA_RL_KEY_LOCALHOST_8000, https://api.example.com/v1 has SOTOPIA_RL_KEY_API_EXAMPLE_COM.
    """
    parsed = URL(url)
    place = parsed.host or ""
    if parsed.explicit_port is not None:
        place += f"_{parsed.explicit_port}"
    return "SOTOPIA_RL_KEY_" + re.sub(r"[^A-Z0-9]+", "_", place.upper())


def read_key(variable: str) -> str | None:
    """The key in the environment, or None.

    Raises:
        ConfigError: It cannot be sent in a header. The key is not shown.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{variable} holds spaces or other characters that no key has; set it again")
    return key or None


class Endpoint:
    """One address of one run, shared by the models behind it.

    The key is kept here and in the connection's headers, nowhere else; `redact` takes it out of any text that
    came from the server.
    """

    def __init__(self, url: str, limits: ModelLimits, *, variable: str) -> None:
        self.address = URL(f"{url}/chat/completions")
        self.url = url
        self.variable = variable
        self.limits = limits
        self._key = read_key(variable)
        self.slots = asyncio.Semaphore(limits.max_in_flight)
        self.pace = Pace(limits.max_per_minute)
        self.refused_schemas: set[str] = set()
        """Schemas, as JSON, that this endpoint answered with an error; they are not sent again."""
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    @property
    def has_key(self) -> bool:
        return self._key is not None

    def session(self) -> aiohttp.ClientSession:
        """The open connections, opened on first use."""
        if self._session is None:
            headers = {"Content-Type": "application/json", "User-Agent": f"sotopia-rl/{__version__}"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._session = aiohttp.ClientSession(
                headers=headers,
                # `slots` is the limit; the connector's own would queue calls within their deadline.
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self.limits.timeout_seconds),
                proxy=_proxy(self.address),
            )
        return self._session

    async def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def redact(self, text: str) -> str:
        """`text` without the key, and without what looks like a part of one."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return _KEY_LIKE.sub("[key]", text)

    def holds_key(self, text: str) -> bool:
        return self._key is not None and self._key in text


def _proxy(address: URL) -> str | None:
    """The proxy of the environment for this address; found once, not per call."""
    if proxy_bypass(address.host or ""):
        return None
    return getproxies().get(address.scheme)


class Pace:
    """Calls per minute, evenly spaced, and a pause that the server asked for."""

    def __init__(self, max_per_minute: int | None) -> None:
        self._interval = 60 / max_per_minute if max_per_minute else 0.0
        self._next = 0.0

    def hold(self, seconds: float) -> None:
        """Start no call for `seconds`."""
        self._next = max(self._next, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Wait until the next call may start."""
        now = time.monotonic()
        start = max(now, self._next)
        if self._interval:
            self._next = start + self._interval
        if start > now:
            await asyncio.sleep(start - now)


@dataclass
class Health:
    """Whether one model still answers.

    Down after three failures in a row that leave no hope (no connection, a refused key, an unknown model) when
    nothing ever worked; or, once something has, after nothing but failures for `down_after_seconds`.
    """

    down_after_seconds: float
    worked: bool = False
    failures: int = 0
    since: float = field(default=0.0, repr=False)
    cause: str = ""
    kind: FailureKind = "connection"
    down: bool = False

    def success(self) -> None:
        self.worked = True
        self.failures = 0

    def failure(self, kind: FailureKind, cause: str, *, hopeless: bool) -> None:
        now = time.monotonic()
        if self.failures == 0:
            self.since = now
        self.failures += 1
        self.kind, self.cause = kind, cause
        lasted = now - self.since >= self.down_after_seconds
        if self.failures >= DOWN_AFTER_FAILURES and (lasted or (hopeless and not self.worked)):
            self.down = True
