"""Triton adapter of the denoising loop."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from answer_sender import AnswerSender
from denoising_engine import DenoisingEngine
from denoising_errors import DenoisingError, RequestCancelledError, StageError
from denoising_job import Progress
from denoising_request import DenoisingRequest
from device_choice import device_of
from loop_metrics import LoopMetrics, PublishedMetrics
from loop_options import LoopOptions
from noise_schedulers import NoiseSchedulers
from prepared_unet import PreparedUNet
from scheduler_steps import SchedulerSteps

if TYPE_CHECKING:
    from job_entry import JobEntry
    from stage_setup import StageSetup

DEVICE_LOST_STATUS = 70
"""Of the process whose GPU has failed."""


class TritonPythonModel:
    """Denoises latents, of several requests together; one response for each request, when it is ready.

    `execute` hands requests to the engine and returns at once. The queue is the engine's (docs/denoising.md says why).

    Inputs (`rows`: the prompts, with guidance after as many negative prompts):
        generated_prompt_embeds: FP32 [rows, 8, GPT-2 width].
        prompt_embeds: FP32 [rows, tokens, T5 width].
        attention_mask: INT64 [rows, tokens].
        denoising_options: BYTES [1], the JSON object that DenoisingRequest.from_options reads.
        deadline_unix_us: INT64 [1], optional, when the client's time is up; 0 for never. The request parameter
            `timeout` (microseconds, from now on) holds as well.
        job_ticket: INT64 [1], optional, of the entry on the job board that an earlier stage made; 0 for none. Without
            this input, a request that carries an id gets an entry here, and is done when it is denoised.

    Outputs:
        latents: FP32 [waveforms, channels, frames, bins].
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the UNet and the scheduler's configuration, and start the loop."""
        stage = _set_up(args)
        self._board = stage.board
        options = LoopOptions.from_parameters(stage.parameters)
        device = device_of(args["model_instance_kind"], int(args["model_instance_device_id"]))
        schedulers = NoiseSchedulers.load(stage.folder / "scheduler" / "scheduler_config.json")
        labels = {"model": args["model_name"], "version": args["model_version"]}
        metrics = LoopMetrics()
        self._published = PublishedMetrics(metrics, pb_utils.MetricFamily, labels)
        self._is_closing = False
        prepared = PreparedUNet(stage.folder / "unet", device, options, _report)
        self._engine = DenoisingEngine(
            prepared.load,
            SchedulerSteps(schedulers),
            options,
            metrics,
            on_poll=self._on_poll,
            on_device_lost=self._end_process,
            make_graphs=prepared.make_graphs,
        )
        self._published.publish_choice({"device": str(device), **prepared.choice.describe(prepared.unet.dtype)})
        prepared.compile_in_background()
        self._prepared = prepared
        self._responder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responder")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse | None]:
        """Start each request, or refuse it; None stands for a response that comes later."""
        return [self._start_or_refuse(request) for request in requests]

    def finalize(self) -> None:
        """Finish what runs, and answer it."""
        self._prepared.close()
        self._engine.close()
        self._responder.shutdown()

    def _on_poll(self, in_flight: int, waiting: int) -> None:
        self._published.publish(in_flight, waiting)
        if not self._is_closing and self._board.is_stopping():
            self._is_closing = True
            threading.Thread(target=self._engine.close, args=[0.0]).start()  # it waits for the thread that this is

    def _end_process(self) -> None:
        """Answer those who wait, and end: only a new process can use the GPU again; whoever runs Triton starts it."""
        pb_utils.Logger.log_error("unet: the GPU has failed, and this process ends.")
        self._responder.shutdown()
        os._exit(DEVICE_LOST_STATUS)

    def _start_or_refuse(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse | None:
        entry, state_after = self._entry(request)
        try:
            self._engine.check_queue()
        except DenoisingError as error:
            _end(entry, error)
            return _error_response(error)  # the quickest way, for there may be many of these
        sender = _Sender(request)
        try:
            future = self._start(request, entry, sender)
        except Exception as fault:
            _fail(sender, entry, fault)
        else:
            future.add_done_callback(self._answer_later(sender, entry, state_after))
        return None

    def _entry(self, request: pb_utils.InferenceRequest) -> tuple[JobEntry, str]:
        """Return the request's entry on the job board, and its state once it is denoised."""
        ticket = pb_utils.get_input_tensor_by_name(request, "job_ticket")
        request_id = self._board.id_of(request)
        if ticket is None:
            entry, state_after = self._board.create_entry(request_id), "done"
        else:
            entry, state_after = self._board.open_entry(request_id, int(ticket.as_numpy()[0])), "decoding"
        entry.enter_queue()
        return entry, state_after

    def _start(self, request: pb_utils.InferenceRequest, entry: JobEntry, sender: _Sender) -> Future[torch.Tensor]:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        return self._engine.submit(
            _denoising_request(inputs),
            deadline=_deadline(inputs, request.timeout()),
            is_cancelled=lambda: entry.is_cancelled() or sender.is_cancelled(),
            on_progress=_report_to(entry),
            on_start=entry.start_denoising,
        )

    def _answer_later(
        self, sender: _Sender, entry: JobEntry, state_after: str
    ) -> Callable[[Future[torch.Tensor]], object]:
        """Return a callback that answers in a thread of its own: sending takes a while, and the loop must not wait."""
        return lambda future: self._responder.submit(_answer, sender, future, entry, state_after)


class _Sender:
    """Answers one request, and asks Triton whether its client still waits."""

    def __init__(self, request: pb_utils.InferenceRequest) -> None:
        self._sender = request.get_response_sender()
        self._order = AnswerSender(self._sender.is_cancelled)
        self.is_cancelled = self._order.is_cancelled

    def send(self, response: pb_utils.InferenceResponse) -> None:
        """Send the one answer."""
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._order.send(lambda: self._sender.send(response, flags=flags))


def _set_up(args: dict[str, str]) -> StageSetup:
    """Import what the Python models share: it lies with the model that the parameter `jobs_model` names."""
    jobs_model = json.loads(args["model_config"])["parameters"]["jobs_model"]["string_value"]
    sys.path.append(str(Path(args["model_repository"]).parent / jobs_model / args["model_version"]))
    from parent_death import end_with_parent
    from stage_setup import set_up_stage

    end_with_parent()
    return set_up_stage(args, pb_utils.Logger.log_warn)


def _report(sentence: str) -> None:
    pb_utils.Logger.log_info(f"unet: {sentence}")


def _denoising_request(inputs: dict[str, np.ndarray]) -> DenoisingRequest:
    """Copy what is needed out of a request."""
    return DenoisingRequest.from_options(
        torch.tensor(inputs["generated_prompt_embeds"]),
        torch.tensor(inputs["prompt_embeds"]),
        torch.tensor(inputs["attention_mask"]),
        inputs["denoising_options"][0],
    )


def _deadline(inputs: dict[str, np.ndarray], timeout_us: int) -> float | None:
    """Return the earlier one of both deadlines, on the monotonic clock."""
    deadlines = []
    if timeout_us:
        deadlines.append(time.monotonic() + timeout_us / 1e6)
    if unix_us := int(inputs.get("deadline_unix_us", [0])[0]):
        deadlines.append(time.monotonic() + unix_us / 1e6 - time.time())
    return min(deadlines, default=None)


def _report_to(entry: JobEntry) -> Callable[[Progress], None]:
    return lambda progress: entry.report(
        "queued" if progress.is_waiting else "denoising", progress.step, progress.total_steps, progress.requests_ahead
    )


def _fail(sender: _Sender, entry: JobEntry, fault: BaseException) -> None:
    error = _error_of(fault)
    _end(entry, error)
    sender.send(_error_response(error))


def _error_of(fault: BaseException) -> DenoisingError:
    """Return why a request failed; what nobody has foreseen is logged, and must not become the fault of others."""
    if isinstance(fault, DenoisingError):
        return fault
    traceback.print_exception(fault)
    return StageError(f"the request could not be denoised ({type(fault).__name__}: {fault}).")


def _end(entry: JobEntry, error: DenoisingError) -> None:
    entry.end("cancelled" if isinstance(error, RequestCancelledError) else "failed", error.tag)


def _answer(sender: _Sender, future: Future[torch.Tensor], entry: JobEntry, state_after: str) -> None:
    if fault := future.exception():
        _fail(sender, entry, fault)
    else:
        entry.end(state_after)
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("latents", future.result().numpy())]))


def _error_response(error: DenoisingError) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(error.message, getattr(pb_utils.TritonError, error.code))
    )
