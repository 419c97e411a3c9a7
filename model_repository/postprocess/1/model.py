"""Triton adapter of the postprocess stage."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import triton_python_backend_utils as pb_utils
from candidate_ranking import CandidateRanking, best_first, similarities
from waveform_output import (
    PostprocessError,
    check_embeds,
    check_finite,
    check_sizes,
    check_wanted,
    cut,
    no_scores,
)

if TYPE_CHECKING:
    from job_entry import JobEntry
    from stage_setup import StageSetup


class TritonPythonModel:
    """Cuts waveforms to the length that was asked for and ranks candidates; one response for each request.

    Inputs:
        waveform: FP32 [waveforms, samples], whole latent frames.
        num_samples: INT64 [1].
        sampling_rate: INT32 [1], Hz.
        num_waveforms_per_prompt: INT32 [1]; 1 means that nothing is ranked.
        clap_text_embeds: FP32 [rows, CLAP width]; the last rows are the prompts.
        seed: INT64 [1].
        truncated_tokens: INT32 [prompts].
        deadline_unix_us: INT64 [1], optional, when the client's time is up; 0 for never.
        job_ticket: INT64 [1], optional, of the request's entry on the job board; 0 for none.

    Outputs, none of them with a NaN or an infinity, which JSON doesn't have:
        audio: FP32 [waveforms, num_samples], for each prompt best first.
        sampling_rate, used_seed, truncated_tokens: as they came in.
        clap_score: FP32 [waveforms], cosine similarity of text and audio; -2 where nothing is ranked.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load CLAP's feature extractor."""
        stage = _set_up(args)
        self._board = stage.board
        self._clap_audio_model = stage.parameters.text("clap_audio_model")
        self._ranking = CandidateRanking(stage.folder)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request, with an error of its own where ranking fails."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        entry = self._board.open_entry(self._board.id_of(request), int(inputs.get("job_ticket", [0])[0]))
        try:
            check_wanted(inputs, entry.is_cancelled())
            outputs = self._outputs(request, inputs)
        except Exception as fault:  # one request's fault must not become that of those beside it
            error = _error_of(fault, inputs, entry)
            entry.end("cancelled" if error.reason == "CANCELLED" else "failed", error.reason)
            return _error_response(error)
        entry.end("done")
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def _outputs(self, request: pb_utils.InferenceRequest, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_sizes(inputs)
        audio = cut(inputs["waveform"], int(inputs["num_samples"][0]))
        scores = no_scores(len(audio))
        num_waveforms_per_prompt = int(inputs["num_waveforms_per_prompt"][0])
        check_finite(audio, "the audio is")
        if num_waveforms_per_prompt > 1:
            audio_embeds = self._clap_audio(request, audio, inputs)
            text_embeds = inputs["clap_text_embeds"][-(len(audio) // num_waveforms_per_prompt) :]
            check_embeds(audio_embeds, text_embeds)
            scores = similarities(audio_embeds, text_embeds)
            check_finite(scores, "the scores of the candidates are")
            order = best_first(scores, num_waveforms_per_prompt)
            audio, scores = audio[order], scores[order]
        return {
            "audio": audio,
            "sampling_rate": inputs["sampling_rate"],
            "used_seed": inputs["seed"],
            "clap_score": scores,
            "truncated_tokens": inputs["truncated_tokens"],
        }

    def _clap_audio(
        self, request: pb_utils.InferenceRequest, audio: np.ndarray, inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        features = self._ranking.input_features(audio, int(inputs["sampling_rate"][0]), int(inputs["seed"][0]))
        call = pb_utils.InferenceRequest(
            request_id=self._board.id_of(request),
            model_name=self._clap_audio_model,
            requested_output_names=["audio_embeds"],
            inputs=[pb_utils.Tensor("input_features", features)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = call.exec()
        if response.has_error():
            raise PostprocessError("INTERNAL", f"the candidates could not be ranked ({response.error().message()}).")
        return response.output_tensors()[0].as_numpy()


def _set_up(args: dict[str, str]) -> StageSetup:
    """Import what the Python models share: it lies with the model that the parameter `jobs_model` names."""
    jobs_model = json.loads(args["model_config"])["parameters"]["jobs_model"]["string_value"]
    sys.path.append(str(Path(args["model_repository"]).parent / jobs_model / args["model_version"]))
    from parent_death import end_with_parent
    from stage_setup import set_up_stage

    end_with_parent()
    return set_up_stage(args, pb_utils.Logger.log_warn)


def _error_of(fault: Exception, inputs: dict[str, np.ndarray], entry: JobEntry) -> PostprocessError:
    """Return why a request failed; what nobody has foreseen is logged.

    The model that ranks refuses what nobody waits for any more: then that is the reason.
    """
    try:
        check_wanted(inputs, entry.is_cancelled())
    except PostprocessError as given_up:
        return given_up
    if isinstance(fault, PostprocessError):
        return fault
    traceback.print_exception(fault)
    return PostprocessError("INTERNAL", f"the audio could not be finished ({type(fault).__name__}: {fault}).")


def _error_response(error: PostprocessError) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code)))
