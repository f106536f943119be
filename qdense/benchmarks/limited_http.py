"""HTTP to a server that may send anything: replies are bounded in bytes and in time. Needs httpx2, which openai brings."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import httpx2 as httpx

MOST_BYTES = 16 * 2**20  # of one reply; a completion of 100,000 tokens is half a megabyte


class LimitedTransport(httpx.AsyncBaseTransport):
    """Ends replies that are too long, or that take longer than `seconds` however steadily they drip.

    httpx's own timeout is for each read, so one byte a second never exceeds it. Compressed replies are refused, since a few
    kilobytes can unpack to gigabytes; requests ask for none.
    """

    def __init__(self, seconds: float) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._seconds = seconds

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + self._seconds
        request.headers["Accept-Encoding"] = "identity"
        response = await self._inner.handle_async_request(request)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding not in ("", "identity"):
            await response.aclose()
            raise httpx.DecodingError(f"the reply is compressed ({encoding[:20]}), but qdense asked for no compression")
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _LimitedStream(response.stream, deadline, request)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _LimitedStream(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, deadline: float, request: httpx.Request) -> None:
        self._inner, self._deadline, self._request = inner, deadline, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for chunk in self._inner:
            num_bytes += len(chunk)
            if num_bytes > MOST_BYTES:
                raise httpx.DecodingError(f"the reply is longer than {MOST_BYTES // 2**20} MiB", request=self._request)
            if time.monotonic() > self._deadline:
                raise httpx.ReadTimeout("the reply took too long", request=self._request)
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
