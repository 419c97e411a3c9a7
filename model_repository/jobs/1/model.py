"""Triton adapter of the job board."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import threading

import numpy as np
import triton_python_backend_utils as pb_utils
from job_board import SWEEP_INTERVAL_S, open_board
from job_entry import JobStatus
from job_folder import remove_folders_of_dead_servers
from job_query import InvalidQueryError, parse_query
from parent_death import end_with_parent


class TritonPythonModel:
    """Tells how far a request is, or cancels it; one response for each request.

    Inputs:
        request_id: BYTES [1], the Triton request id that the generation carried, 1 to 128 bytes of UTF-8.
        action: BYTES [1], optional: `status`, or `cancel`, which ends the request if it is live, and the one that comes
            within some seconds if it is unknown.

    Outputs:
        state: BYTES [1], `queued`, `denoising`, `decoding`, `done`, `failed`, `cancelled` or `unknown`.
        step: INT32 [1], scheduler steps that are done.
        total_steps: INT32 [1], the request's num_inference_steps; 0 while that isn't known.
        requests_ahead: INT32 [1], requests before it in the queue; 0 once it is denoised.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Remove what dead servers left, make this server's folder, and from now on remove there what has expired."""
        end_with_parent()
        remove_folders_of_dead_servers()
        self._board = open_board(args["model_name"], pb_utils.Logger.log_warn)
        self._closing = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request, with an error of its own where it is wrong."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Remove the folder; a model that runs on makes it anew when it needs it."""
        self._closing.set()
        self._sweeper.join()
        self._board.remove()

    def _sweep(self) -> None:
        while not self._closing.wait(SWEEP_INTERVAL_S):
            self._board.sweep()

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            query = parse_query(inputs, request.parameters())
        except InvalidQueryError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        if query.action == "cancel":
            return _response(self._board.cancel(query.request_id, is_dropped=query.is_dropped))
        return _response(self._board.status(query.request_id))


def _response(status: JobStatus) -> pb_utils.InferenceResponse:
    numbers = {name: getattr(status, name) for name in ("step", "total_steps", "requests_ahead")}
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("state", np.array([status.state.encode()], np.object_)),
            *(pb_utils.Tensor(name, np.array([number], np.int32)) for name, number in numbers.items()),
        ]
    )
