"""Triton adapter of the tokenizer stage."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import triton_python_backend_utils as pb_utils
from audio_geometry import AudioGeometry
from generation_request import GenerationRequest, InvalidInputError, Limits, parse_request
from scheduler_names import SchedulerNames
from text_tokenizers import TextTokenizers

if TYPE_CHECKING:
    from stage_setup import StageSetup


class TritonPythonModel:
    """Checks a public request and tokenizes its prompts; one response for each request.

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
        self._limits = Limits.from_parameters(stage.parameters)
        self._geometry = AudioGeometry.load(stage.folder / "audio_geometry.json")
        self._schedulers = SchedulerNames.load(stage.folder / "scheduler_classes.json")
        self._tokenizers = TextTokenizers(stage.folder)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request, with an error of its own where it is wrong."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            with self._board.create_entry(self._board.id_of(request)) as entry:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                outputs = self._outputs(parse_request(inputs, self._geometry, self._schedulers, self._limits))
                outputs["deadline_unix_us"] = np.array([_deadline_unix_us(request.timeout())], np.int64)
                outputs["job_ticket"] = np.array([entry.ticket], np.int64)
        except InvalidInputError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

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
    from stage_setup import set_up_stage

    return set_up_stage(args, pb_utils.Logger.log_warn)


def _deadline_unix_us(timeout_us: int) -> int:
    """Return when `timeout_us` from now is; the clock is the one that all models of a server share."""
    return time.time_ns() // 1000 + timeout_us if timeout_us else 0
