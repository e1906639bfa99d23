"""The asyncio twin of the blocking client: the same names, arguments and errors."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import stamina
from numpy.typing import NDArray

from diffense import names
from diffense.errors import BadInputError, ClientError, OptionError, OverloadedError, ServerDownError, ServerError
from diffense_client._core import (
    Answer,
    GuardedPrediction,
    Pixels,
    Request,
    Settings,
    check_answers_once,
    decode_answer,
    join_parts,
    plan_pixels,
    plan_tensor,
)
from diffense_client._events import StreamEvent, check_streams, decode_event
from diffense_client._failures import RETRIED, Deadline, Protocol, plan_retries
from diffense_client._grpc import AsyncGrpcTransport
from diffense_client._http import AsyncHttpTransport
from diffense_client._model import ServedModel, read_config
from diffense_client._shared_memory import LET_GO_S, LET_GO_WAITS_S, Region, RegionPool, explain_refusal, is_forgotten
from diffense_client._transport import AsyncTransport, Parts


class AsyncGuardClient:
    """:class:`GuardClient` for asyncio: the same arguments and errors, to be used within one event loop.

    Many calls may run at once (``asyncio.gather``); each sends the batches of its own list one after the other.
    """

    def __init__(
        self,
        url: str,
        model: str,
        protocol: Protocol = "grpc",
        *,
        timeout_s: float = 10.0,
        retries: int = 3,
        batch_size: int | None = None,
        shared_memory: bool = False,
    ) -> None:
        self._settings = Settings.check(url, model, protocol, timeout_s, retries, batch_size)
        self._retry = stamina.AsyncRetryingCaller(**plan_retries(retries, timeout_s))
        self._regions = RegionPool() if shared_memory else None
        self._served: ServedModel | None = None
        self._transport: AsyncTransport | None = None
        self._closed = False

    async def describe(self) -> ServedModel:
        """Read the model's config from the server; see :meth:`GuardClient.describe`."""
        if self._served is None:
            deadline, model = Deadline(self._settings.timeout_s), self._settings.model
            config = await self._retry(RETRIED, lambda: self._open.fetch_config(model, deadline.remaining()))
            self._served = read_config(model, config)
        return self._served

    async def infer(
        self, images: Pixels, outputs: Sequence[str] | None = None, *, request_id: str | None = None
    ) -> GuardedPrediction:
        """Classify and judge images, preprocessed as stored with the guard; see :meth:`GuardClient.infer`."""
        served = await self.describe()
        return await self._run(served, plan_pixels(served, images, outputs, request_id, self._settings.batch_size))

    async def infer_tensor(
        self, tensor: NDArray[Any], outputs: Sequence[str] | None = None, *, request_id: str | None = None
    ) -> GuardedPrediction:
        """Classify and judge what is already preprocessed; see :meth:`GuardClient.infer_tensor`."""
        served = await self.describe()
        return await self._run(served, plan_tensor(served, tensor, outputs, request_id, self._settings.batch_size))

    async def stream(
        self, images: Pixels, outputs: Sequence[str] | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Classify and judge images with a streaming model, and give each part of the answer as soon as it is there.

        ``async for event in client.stream(images)`` gets a :class:`StreamedPrediction` and then the :class:`StreamedVerdict`
        of the first batch, then those of the next. Batches follow each other; run several streams for more at once. Whoever
        stops early need not wait: the rest of the answer is read and dropped.

        Args:
            images: as for :meth:`infer`.
            outputs: as for :meth:`infer`; with an empty list only verdicts come.
            request_id: as for :meth:`infer`.

        Raises:
            OptionError: the model does not stream, or the client was made for HTTP or with shared memory.
            ClientError: any leaf, as for :meth:`infer`; also in the place of a verdict. Only a request that was refused
                before its prediction is sent again.
        """
        if self._regions is not None:
            raise OptionError("streams hand their images over in messages; make a client without shared_memory")
        served = await self.describe()
        check_streams(served)
        for request in plan_pixels(served, images, outputs, request_id, self._settings.batch_size):
            deadline = Deadline(self._settings.timeout_s)
            parts, answer = await self._retry(RETRIED, self._begin, request, deadline)
            yield decode_event(served, request, answer)
            if names.FLAGGED not in answer.arrays:
                yield decode_event(served, request, await parts.read(deadline))

    async def close(self) -> None:
        """Close the connections and give shared memory back; a second call does nothing."""
        self._closed = True
        if self._transport is None:
            return
        try:
            if self._regions is not None:
                self._regions.retire_all()
                for wait_s in LET_GO_WAITS_S:
                    await asyncio.sleep(wait_s)
                    if not await self._let_go(self._transport, self._regions):
                        break
        finally:
            await self._transport.close()
            self._transport = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _open(self) -> AsyncTransport:
        if self._closed:
            raise OptionError("this client is closed; make a new one")
        if self._transport is None:  # made at the first call, for it binds to the running event loop
            self._transport = open_transport(self._settings)
        return self._transport

    async def _run(self, served: ServedModel, requests: Iterator[Request]) -> GuardedPrediction:
        check_answers_once(served)
        return join_parts(served, [await self._send(request) for request in requests])

    async def _send(self, request: Request) -> dict[str, NDArray[Any]]:
        return decode_answer(request, await self._retry(RETRIED, self._try, request, Deadline(self._settings.timeout_s)))

    async def _begin(self, request: Request, deadline: Deadline) -> tuple[Parts, Answer]:
        parts = self._open.stream(request, deadline.remaining())
        return parts, await parts.read(deadline)

    async def _try(self, request: Request, deadline: Deadline) -> Answer:
        if self._regions is None:
            return await self._open.infer(request, deadline.remaining())
        try:
            return await self._try_region(self._regions, request, deadline)
        except ClientError as error:
            if not is_forgotten(error):
                raise
            self._regions.retire_all()  # a server that was started again knows none of them, and the request never ran
            return await self._try_region(self._regions, request, deadline)

    async def _try_region(self, regions: RegionPool, request: Request, deadline: Deadline) -> Answer:
        region = regions.acquire(request.tensor.nbytes)
        try:
            if not region.registered:
                await self._register(regions, region, deadline)
            region.write(request.tensor)
            answer = await self._open.infer(replace(request, region=region.name), deadline.remaining())
        except OverloadedError:  # refused, so nobody reads the region
            regions.release(region)
            raise
        except BaseException:
            regions.retire(region)
            raise
        regions.release(region)
        return answer

    async def _register(self, regions: RegionPool, region: Region, deadline: Deadline) -> None:
        await self._let_go(self._open, regions)
        region.registered = True  # from here on the server may know it, whatever the answer
        try:
            await self._open.register(region.name, region.byte_size, deadline.remaining())
        except OverloadedError:  # refused, so the server does not know it, and the next attempt has to tell it
            region.registered = False
            raise
        except (BadInputError, ServerError) as error:
            raise explain_refusal(error) from error

    @staticmethod
    async def _let_go(transport: AsyncTransport, regions: RegionPool) -> bool:
        """Have the server unmap retired regions; True when it still uses some."""
        used = False
        for name in regions.take_retired():
            try:
                await transport.unregister(name, LET_GO_S)
            except ServerDownError:  # it takes its mappings with it
                continue
            except ClientError:
                regions.postpone(name)
                used = True
        return used


def open_transport(settings: Settings) -> AsyncTransport:
    """Connect at the first call, within the event loop that runs then."""
    if settings.protocol == "grpc":
        return AsyncGrpcTransport(settings.address)
    return AsyncHttpTransport(settings.host, settings.port)
