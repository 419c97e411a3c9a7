"""Triton adapter of the postprocess stage."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from candidate_ranking import CandidateRanking, best_first, similarities
from waveform_output import cut, no_scores


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
        parameters = json.loads(args["model_config"])["parameters"]
        self._clap_audio_model = parameters["clap_audio_model"]["string_value"]
        self._board = _open_board(args, parameters["jobs_model"]["string_value"])
        self._ranking = CandidateRanking(Path(args["model_repository"]) / args["model_version"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with an error of its own where ranking fails."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        with self._board.take_up(self._board.id_of(request), int(inputs.get("job_ticket", [0])[0])) as entry:
            if entry.is_cancelled():
                entry.end("cancelled")
                return _cancelled()
            response = self._finish(request, inputs)
            entry.end("failed" if response.has_error() else "done")
            return response

    def _finish(self, request: Any, inputs: dict[str, np.ndarray]) -> Any:
        audio = cut(inputs["waveform"], int(inputs["num_samples"][0]))
        scores = no_scores(len(audio))
        num_waveforms_per_prompt = int(inputs["num_waveforms_per_prompt"][0])
        if not np.isfinite(audio).all():
            return _not_finite("the audio is")
        if num_waveforms_per_prompt > 1:
            response = self._clap_audio(request, audio, inputs)
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            audio_embeds = pb_utils.get_output_tensor_by_name(response, "audio_embeds").as_numpy()
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

    def _clap_audio(self, request: Any, audio: np.ndarray, inputs: dict[str, np.ndarray]) -> Any:
        features = self._ranking.input_features(audio, int(inputs["sampling_rate"][0]), int(inputs["seed"][0]))
        call = pb_utils.InferenceRequest(
            request_id=self._board.id_of(request),
            model_name=self._clap_audio_model,
            requested_output_names=["audio_embeds"],
            inputs=[pb_utils.Tensor("input_features", features)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        return call.exec()


def _open_board(args: dict[str, str], jobs_model: str) -> Any:
    """Return the job board, whose module lies with the model `jobs_model`, beside this one."""
    sys.path.append(str(Path(args["model_repository"]).parent / jobs_model / args["model_version"]))
    return importlib.import_module("job_board").open_board(jobs_model, pb_utils.Logger.log_warn)


def _cancelled() -> Any:
    message = "[CANCELLED] the request was cancelled after its last step."
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.CANCELLED))


def _not_finite(what_is: str) -> Any:
    message = f"[INTERNAL] {what_is} not finite: try a smaller guidance_scale, or another scheduler."
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
