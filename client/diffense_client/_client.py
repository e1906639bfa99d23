"""The blocking client."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import stamina
from numpy.typing import NDArray

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
from diffense_client._failures import RETRIED, Deadline, Protocol, plan_retries
from diffense_client._grpc import GrpcTransport
from diffense_client._http import HttpTransport
from diffense_client._model import ServedModel, read_config
from diffense_client._shared_memory import LET_GO_S, LET_GO_WAITS_S, Region, RegionPool, explain_refusal, is_forgotten
from diffense_client._transport import Transport


class GuardClient:
    """A client of one guarded model; a context manager, and threads may share it.

    Args:
        url: ``host:port``, with or without ``grpc://`` or ``http://``.
        model: name of the guarded ensemble or gateway, usually ``<production model>_guarded``.
        protocol: ``"grpc"`` (usually port 8001) or ``"http"`` (8000).
        timeout_s: deadline of each request in seconds, with its retries and the waits between them. A list longer than
            a batch takes several requests.
        retries: how often a request that a busy server refused (UNAVAILABLE, 503) is sent again, with exponential
            backoff and jitter. Nothing else is retried.
        batch_size: most images of one request; None for the server's ``max_batch_size``.
        shared_memory: hand inputs over in system shared memory; server and client must share one host's /dev/shm.

    Raises:
        OptionError: an argument makes no sense.
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
        self._retry = stamina.RetryingCaller(**plan_retries(retries, timeout_s))
        self._regions = RegionPool() if shared_memory else None
        self._served: ServedModel | None = None
        self._transport: Transport | None = _open_transport(self._settings)

    def describe(self) -> ServedModel:
        """Read the model's config from the server; once, so make a new client after a redeployment.

        Raises:
            ModelNotReadyError: the server has no such model, or it is not guarded.
            ClientError: any other leaf, as for :meth:`infer`.
        """
        if self._served is None:
            deadline, model = Deadline(self._settings.timeout_s), self._settings.model
            config = self._retry(RETRIED, lambda: self._open.fetch_config(model, deadline.remaining()))
            self._served = read_config(model, config)
        return self._served

    def infer(
        self, images: Pixels, outputs: Sequence[str] | None = None, *, request_id: str | None = None
    ) -> GuardedPrediction:
        """Classify and judge images, preprocessed as stored with the guard.

        Args:
            images: (N, H, W, C) uint8 pixels in the size that the model takes, or a list of N such images.
            outputs: which outputs of the production model to return, None for all; the verdict always comes along.
            request_id: what the ids of the requests start with, None for a random one; ``-<first image>`` follows.

        Raises:
            BadInputError: an image cannot be used; found here (nothing was sent then) or by the server.
            ServerDownError: nobody answers at the address.
            ModelNotReadyError: the server has no such model, or it is not guarded.
            DeadlineError: a request took longer than ``timeout_s``.
            OverloadedError: the server refused more work, and did so again at each retry.
            ServerError: the server failed, or its answer does not fit the request.
            OptionError: the model streams; this client does not.
        """
        served = self.describe()
        return self._run(served, plan_pixels(served, images, outputs, request_id, self._settings.batch_size))

    def infer_tensor(
        self, tensor: NDArray[Any], outputs: Sequence[str] | None = None, *, request_id: str | None = None
    ) -> GuardedPrediction:
        """Classify and judge what is already preprocessed.

        Args:
            tensor: N images in the dtype, layout and scaling of the graph's input; finite.
            outputs: as for :meth:`infer`.
            request_id: as for :meth:`infer`.

        Raises:
            ClientError: its leaves, as for :meth:`infer`.
        """
        served = self.describe()
        return self._run(served, plan_tensor(served, tensor, outputs, request_id, self._settings.batch_size))

    def close(self) -> None:
        """Close the connections and give shared memory back; a second call does nothing."""
        if self._transport is None:
            return
        try:
            if self._regions is not None:
                self._regions.retire_all()
                for wait_s in LET_GO_WAITS_S:
                    time.sleep(wait_s)
                    if not self._let_go(self._regions):
                        break
        finally:
            self._transport.close()
            self._transport = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _open(self) -> Transport:
        if self._transport is None:
            raise OptionError("this client is closed; make a new one")
        return self._transport

    def _run(self, served: ServedModel, requests: Iterator[Request]) -> GuardedPrediction:
        check_answers_once(served)
        return join_parts(served, [self._send(request) for request in requests])

    def _send(self, request: Request) -> dict[str, NDArray[Any]]:
        return decode_answer(request, self._retry(RETRIED, self._try, request, Deadline(self._settings.timeout_s)))

    def _try(self, request: Request, deadline: Deadline) -> Answer:
        if self._regions is None:
            return self._open.infer(request, deadline.remaining())
        try:
            return self._try_region(self._regions, request, deadline)
        except ClientError as error:
            if not is_forgotten(error):
                raise
            self._regions.retire_all()  # a server that was started again knows none of them, and the request never ran
            return self._try_region(self._regions, request, deadline)

    def _try_region(self, regions: RegionPool, request: Request, deadline: Deadline) -> Answer:
        region = regions.acquire(request.tensor.nbytes)
        try:
            if not region.registered:
                self._register(regions, region, deadline)
            region.write(request.tensor)
            answer = self._open.infer(replace(request, region=region.name), deadline.remaining())
        except OverloadedError:  # refused, so nobody reads the region
            regions.release(region)
            raise
        except BaseException:
            regions.retire(region)
            raise
        regions.release(region)
        return answer

    def _register(self, regions: RegionPool, region: Region, deadline: Deadline) -> None:
        self._let_go(regions)
        region.registered = True  # from here on the server may know it, whatever the answer
        try:
            self._open.register(region.name, region.byte_size, deadline.remaining())
        except OverloadedError:  # refused, so the server does not know it, and the next attempt has to tell it
            region.registered = False
            raise
        except (BadInputError, ServerError) as error:
            raise explain_refusal(error) from error

    def _let_go(self, regions: RegionPool) -> bool:
        """Have the server unmap retired regions; True when it still uses some."""
        used = False
        for name in regions.take_retired():
            try:
                self._open.unregister(name, LET_GO_S)
            except ServerDownError:  # it takes its mappings with it
                continue
            except ClientError:
                regions.postpone(name)
                used = True
        return used


def _open_transport(settings: Settings) -> Transport:
    if settings.protocol == "grpc":
        return GrpcTransport(settings.address)
    return HttpTransport(settings.host, settings.port)
