"""Triton adapter of the postprocess stage."""

from typing import Any

import triton_python_backend_utils as pb_utils
from waveform_output import cut, no_scores


class TritonPythonModel:
    """Cuts waveforms to the length that was asked for; one response for each request.

    Inputs:
        waveform: FP32 [waveforms, samples], whole latent frames.
        num_samples: INT64 [1].

    Outputs:
        audio: FP32 [waveforms, num_samples], in the order of the waveforms.
        clap_score: FP32 [waveforms], NaN.
    """

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        waveform = pb_utils.get_input_tensor_by_name(request, "waveform").as_numpy()
        num_samples = int(pb_utils.get_input_tensor_by_name(request, "num_samples").as_numpy()[0])
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("audio", cut(waveform, num_samples)),
                pb_utils.Tensor("clap_score", no_scores(len(waveform))),
            ]
        )
