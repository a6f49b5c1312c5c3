"""Who asks: the keys that a server knows, whose each request is, and how much each key may have.

    [[keys]]
    name = "team-a"
    sha256 = "…"                   # of the key: printf %s "$KEY" | sha256sum
    requests_per_minute = 60       # these three have no limit where they are left out
    tokens_per_minute = 100000     # of prompts and outputs
    concurrent_requests = 8
    priorities = [0, 10]           # that requests may ask for; any where it is left out

Requests are counted that make work: those sent with POST. What is allowed a minute may be had at once, and comes
back evenly. How many tokens a request takes is known when it has ended: it is taken in as long as any are left, and
what it had too much is waited for by the next.
"""

from __future__ import annotations

import hashlib
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError, error_response, retry_later
from engine.errors import ConfigError
from engine.logs import note_request

Positive = Annotated[int, msgspec.Meta(ge=1, le=10**12)]


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key of the file, and what whoever has it may ask for.

    Attributes:
        name: Whose requests they are, to the scheduler, in logs and in errors.
        sha256: Digest of the key, in hexadecimal.
        priorities: The smallest and the largest that requests may have.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,64}$")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}$")]
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None
    priorities: tuple[int, int] | None = None


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[ApiKey]


def read_keys(path: str) -> list[ApiKey]:
    """The keys of a TOML file.

    Raises:
        ConfigError: It cannot be read, or says what no key may have.
    """
    try:
        keys = msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), _KeyFile).keys
    except OSError as error:
        raise ConfigError(f"api_keys: {path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"api_keys: {path}: {error}") from None
    for what in ("name", "sha256"):
        values = [getattr(key, what).lower() for key in keys]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"api_keys: {path}: two keys have the {what} {twice}")
    for key in keys:
        if key.priorities is not None and key.priorities[0] > key.priorities[1]:
            raise ConfigError(
                f"api_keys: {path}: {key.name}: priorities must be the smaller, then the larger"
            )
    return keys


class TokenBucket:
    """So many units a minute: a minute's worth may be taken at once, and comes back evenly.

    Args:
        clock: Seconds, from anywhere.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._size, self._clock = per_minute, clock
        self._left, self._at = float(per_minute), clock()

    def seconds_to_one(self) -> float:
        """How long until one is left; 0 if one is."""
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._at) * self._size / 60)
        self._at = now
        return max(0.0, (1 - self._left) * 60 / self._size)

    def take(self, count: int) -> None:
        """Takes as many, be there so many or not."""
        self._left -= count


class Client:
    """Who sends a request.

    Args:
        owner: The key's name, or what else stands for the key: clients with the same see the same stored responses.
        key: What they may ask for; None: everything.
        share: Whose share of the engine their requests take; None: the owner's.
    """

    def __init__(
        self,
        owner: str,
        key: ApiKey | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        share: str | None = None,
    ) -> None:
        self.owner = owner
        self.share = owner if share is None else share
        self._key = key
        self._num_open = 0
        self._requests = self._tokens = None
        if key is not None and key.requests_per_minute is not None:
            self._requests = TokenBucket(key.requests_per_minute, clock)
        if key is not None and key.tokens_per_minute is not None:
            self._tokens = TokenBucket(key.tokens_per_minute, clock)

    @property
    def has_name(self) -> bool:
        """Whether the owner is a name that whoever runs the server has given."""
        return self._key is not None

    def enter(self) -> None:
        """Begins a request, which `leave` ends.

        Raises:
            ApiError: 429, the key has what it may have; names the limit. The request has not begun.
        """
        self._check()
        if self._requests is not None:
            self._requests.take(1)
        self._num_open += 1

    def leave(self) -> None:
        """Ends a request."""
        self._num_open -= 1

    def charge(self, num_tokens: int) -> None:
        """Counts tokens of a prompt or an output."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def priority(self, asked: int | None) -> int:
        """The priority of a request: the one that it asks for, or the nearest to 0 that it may have.

        Raises:
            ApiError: 400, the key may not have what it asks for.
        """
        if self._key is None or self._key.priorities is None:
            return asked or 0
        low, high = self._key.priorities
        if asked is None:
            return min(max(0, low), high)
        if not low <= asked <= high:
            raise ApiError(
                400,
                f"priority must be between {low} and {high} with this API key, got {asked}",
                param="priority",
            )
        return asked

    def _check(self) -> None:
        key = self._key
        if key is None:
            return
        if key.concurrent_requests is not None and self._num_open >= key.concurrent_requests:
            raise self._refusal("concurrent_requests", f"{key.concurrent_requests} requests at a time", 1.0)
        for bucket, name, limit, what in (
            (self._requests, "requests_per_minute", key.requests_per_minute, "requests"),
            (self._tokens, "tokens_per_minute", key.tokens_per_minute, "tokens"),
        ):
            seconds = 0.0 if bucket is None else bucket.seconds_to_one()
            if seconds > 0.0:
                raise self._refusal(name, f"{limit} {what} a minute", seconds)

    def _refusal(self, name: str, limit: str, seconds: float) -> ApiError:
        why = f"the API key {self.owner} may have {limit} ({name})"
        return retry_later(429, why, "rate_limit_exceeded", seconds)


class KeyRing:
    """The keys that open a server; without one, it is open to all.

    Args:
        plain: A key without limits.
    """

    def __init__(self, plain: str | None, keys: Sequence[ApiKey] = ()) -> None:
        self.is_open = plain is None and not keys
        self._clients = {key.sha256.lower(): Client(key.name, key) for key in keys}
        if plain is not None:
            digest = hashlib.sha256(plain.encode()).hexdigest()
            self._clients.setdefault(digest, Client(digest))

    @property
    def has_several(self) -> bool:
        """Whether there are keys whose requests are not each other's to see."""
        return self.is_open or len(self._clients) > 1

    def client(self, headers: Headers) -> Client | None:
        """Who sends these headers; None without a key that is known, where one is needed.

        A key is the bearer token, "bearer" in any case (RFC 9110, 11.1), as OpenAI's clients send it, or stands in
        X-Api-Key, as Anthropic's do. Digests are compared, whose likeness tells nothing of a key.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip(" ")] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        digests = [hashlib.sha256(key.encode("latin-1")).hexdigest() for key in given if key]
        if self.is_open:
            # Anybody could make up keys, and with each of them a share of the engine.
            return Client(digests[0] if digests else "", share="")
        return next((self._clients[digest] for digest in digests if digest in self._clients), None)


class KeyMiddleware:
    """Lets requests pass that carry a key, within its limits, or go to an open path; notes whose they are."""

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Sequence[str]) -> None:
        self._app = app
        self._keys, self._open_paths = keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        client = self._keys.client(Headers(scope=scope))
        if client is None:
            error = ApiError(
                401,
                "a valid API key is needed in the header Authorization: Bearer <key>, or in X-Api-Key",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if client.has_name:
            note_request(key=client.owner)
        scope = {**scope, "state": {**scope.get("state", {}), "client": client}}
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            client.enter()
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            client.leave()


def client_of(request: Request) -> Client:
    """Who sends a request to a path that is not open."""
    client: Client = request.scope["state"]["client"]
    return client
