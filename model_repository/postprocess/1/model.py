"""Triton adapter of the postprocess stage."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import triton_python_backend_utils as pb_utils
from candidate_ranking import CandidateRanking, best_first, similarities
from waveform_output import cut, no_scores

if TYPE_CHECKING:
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
        with self._board.open_entry(self._board.id_of(request), int(inputs.get("job_ticket", [0])[0])) as entry:
            if entry.is_cancelled():
                entry.end("cancelled")
                return _cancelled()
            response = self._finish(request, inputs)
            entry.end("failed" if response.has_error() else "done")
            return response

    def _finish(self, request: pb_utils.InferenceRequest, inputs: dict[str, np.ndarray]) -> pb_utils.InferenceResponse:
        audio = cut(inputs["waveform"], int(inputs["num_samples"][0]))
        scores = no_scores(len(audio))
        num_waveforms_per_prompt = int(inputs["num_waveforms_per_prompt"][0])
        if not np.isfinite(audio).all():
            return _not_finite("the audio is")
        if num_waveforms_per_prompt > 1:
            response = self._clap_audio(request, audio, inputs)
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            audio_embeds = response.output_tensors()[0].as_numpy()
            num_prompts = len(audio) // num_waveforms_per_prompt
            scores = similarities(audio_embeds, inputs["clap_text_embeds"][-num_prompts:])
            if not np.isfinite(scores).all():
                return _not_finite("the scores of the candidates are")
            order = best_first(scores, num_waveforms_per_prompt)
            audio, scores = audio[order], scores[order]
        outputs = {
            "audio": audio,
            "sampling_rate": inputs["sampling_rate"],
            "used_seed": inputs["seed"],
            "clap_score": scores,
            "truncated_tokens": inputs["truncated_tokens"],
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def _clap_audio(
        self, request: pb_utils.InferenceRequest, audio: np.ndarray, inputs: dict[str, np.ndarray]
    ) -> pb_utils.InferenceResponse:
        features = self._ranking.input_features(audio, int(inputs["sampling_rate"][0]), int(inputs["seed"][0]))
        call = pb_utils.InferenceRequest(
            request_id=self._board.id_of(request),
            model_name=self._clap_audio_model,
            requested_output_names=["audio_embeds"],
            inputs=[pb_utils.Tensor("input_features", features)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        return call.exec()


def _set_up(args: dict[str, str]) -> StageSetup:
    """Import what the Python models share: it lies with the model that the parameter `jobs_model` names."""
    jobs_model = json.loads(args["model_config"])["parameters"]["jobs_model"]["string_value"]
    sys.path.append(str(Path(args["model_repository"]).parent / jobs_model / args["model_version"]))
    from stage_setup import set_up_stage

    return set_up_stage(args, pb_utils.Logger.log_warn)


def _cancelled() -> pb_utils.InferenceResponse:
    message = "[CANCELLED] the request was cancelled after its last step."
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.CANCELLED))


def _not_finite(what_is: str) -> pb_utils.InferenceResponse:
    message = f"[INTERNAL] {what_is} not finite: try a smaller guidance_scale, or another scheduler."
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
