"""Triton adapter of the tokenizer stage."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import triton_python_backend_utils as pb_utils
from admission import Load, load_of
from audio_geometry import AudioGeometry
from generation_request import GenerationRequest, Limits, parse_request
from live_requests import EndedRequest, LiveRequests
from request_errors import DeadlineError, RequestCancelledError, RequestError, ServerBusyError
from request_log import FORMAT_VARIABLE, line_of, read_format
from request_metrics import RequestMetrics, build_labels
from request_reporter import RequestReporter
from scheduler_names import SchedulerNames
from text_tokenizers import TextTokenizers

if TYPE_CHECKING:
    from job_entry import JobEntry
    from stage_setup import StageSetup

LAST_UNIX_US = 2**63 - 1
"""The latest deadline: job boards and the tensor have 63 bits for it."""


class TritonPythonModel:
    """Checks a public request, lets it in or refuses it, and tokenizes its prompts; one response for each request.

    It is the first stage, and sees every request: so it also reports how each has ended, whichever stage ended it.

    Inputs, all but `prompt` optional: the public ones, whose meaning and bounds are those of GenerationRequest.

    Outputs (rows: the prompts, with guidance after as many negative prompts):
        clap_input_ids, clap_attention_mask: INT64 [rows, clap_tokens].
        t5_input_ids, t5_attention_mask: INT64 [rows, tokens].
        num_samples: INT64 [1], of each waveform after it is cut.
        sampling_rate: INT32 [1], Hz.
        used_seed: INT64 [1].
        num_waveforms_per_prompt: INT32 [1], as asked for, or the default.
        denoising_options: BYTES [1], JSON, what the model `unet` needs to know.
        truncated_tokens: INT32 [prompts], how many T5 tokens of each prompt were cut off.
        deadline_unix_us: INT64 [1], when the request's `timeout` is over; 0 for never.
        job_ticket: INT64 [1], of the request's entry on the job board; 0 for none.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizers, the checkpoint's sizes and the limits."""
        stage = _set_up(args)
        self._board = stage.board
        self._model = stage.parameters.text("ensemble_model")
        self._limits = Limits.from_parameters(stage.parameters)
        self._geometry = AudioGeometry.load(stage.folder / "audio_geometry.json")
        self._schedulers = SchedulerNames.load(stage.folder / "scheduler_classes.json")
        self._tokenizers = TextTokenizers(stage.folder)
        self._log_format = read_format(os.environ.get(FORMAT_VARIABLE, ""))
        self._live = LiveRequests(self._limits.budgets, self._board)
        metrics = RequestMetrics(
            pb_utils.MetricFamily, self._model, self._limits.budgets, build_labels(stage.folder / "checkpoint.json")
        )
        self._reporter = RequestReporter(self._live, metrics, self._log, self._show_load)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request, with an error of its own where it is wrong or one too many."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Report what has ended and wasn't reported."""
        self._reporter.close()

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        request_id, deadline_unix_us = self._board.id_of(request), _deadline_unix_us(request.timeout())
        entry, parsed = self._board.create_entry(request_id, deadline_unix_us), None
        try:
            if entry.is_cancelled():
                raise RequestCancelledError("the request was cancelled before it came.")
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            parsed = parse_request(inputs, self._geometry, self._schedulers, self._limits)
            tokens_per_row = self._tokenizers.most_tokens([*parsed.prompts, *(parsed.negative_prompts or ())])
            self._live.admit(load_of(parsed, tokens_per_row), parsed, entry, request_id)
        except RequestError as error:
            return self._refuse(error, entry, request_id, parsed)
        try:
            outputs = self._outputs(parsed)
            if deadline_unix_us and _unix_us() >= deadline_unix_us:
                raise DeadlineError("the time was up before the text was encoded.")
        except RequestError as error:
            entry.end("failed", error.reason)
            return _error_response(error)
        except Exception as error:  # one request's fault must not become that of those beside it
            entry.end("failed")
            traceback.print_exc()
            message = f"[INTERNAL] the text could not be tokenized ({type(error).__name__}: {error})."
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
        outputs["deadline_unix_us"] = np.array([deadline_unix_us], np.int64)
        outputs["job_ticket"] = np.array([entry.ticket], np.int64)
        entry.close()
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def _refuse(
        self, error: RequestError, entry: JobEntry, request_id: str, request: GenerationRequest | None
    ) -> pb_utils.InferenceResponse:
        entry.end("cancelled" if isinstance(error, RequestCancelledError) else "failed", error.reason)
        self._live.add_refused(request_id, entry.record, request)
        if isinstance(error, ServerBusyError):
            self._show_load(self._live.load())
        return _error_response(error)

    def _show_load(self, load: Load) -> None:
        self._board.show_full(self._model, self._limits.budgets.why_full(load))

    def _log(self, ended: EndedRequest) -> None:
        line = line_of(ended, self._model, self._log_format)
        if self._log_format == "json":
            print(line, flush=True)  # Triton's log would put it into quotes
        else:
            pb_utils.Logger.log_info(line)

    def _outputs(self, request: GenerationRequest) -> dict[str, np.ndarray]:
        negative_prompts = request.negative_prompts or ("",) * len(request.prompts)
        tokens = self._tokenizers.tokenize(
            request.prompts, negative_prompts if request.do_classifier_free_guidance else None
        )
        return {
            **vars(tokens),
            "num_samples": np.array([self._geometry.num_samples(request.audio_length_in_s)], np.int64),
            "sampling_rate": np.array([self._geometry.sampling_rate], np.int32),
            "used_seed": np.array([request.seed], np.int64),
            "num_waveforms_per_prompt": np.array([request.num_waveforms_per_prompt], np.int32),
            "denoising_options": np.array([request.denoising_options(self._geometry).encode()], np.object_),
        }


def _set_up(args: dict[str, str]) -> StageSetup:
    """Import what the Python models share: it lies with the model that the parameter `jobs_model` names."""
    jobs_model = json.loads(args["model_config"])["parameters"]["jobs_model"]["string_value"]
    sys.path.append(str(Path(args["model_repository"]).parent / jobs_model / args["model_version"]))
    from parent_death import end_with_parent
    from stage_setup import set_up_stage

    end_with_parent()
    return set_up_stage(args, pb_utils.Logger.log_warn)


def _deadline_unix_us(timeout_us: int) -> int:
    """Return when `timeout_us` from now is; the clock is the one that all models of a server share."""
    return min(_unix_us() + timeout_us, LAST_UNIX_US) if timeout_us else 0


def _unix_us() -> int:
    return time.time_ns() // 1000


def _error_response(error: RequestError) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code)))
