"""The blocking client."""

import uuid
from collections.abc import Sequence
from types import TracebackType

from audioldm2_client._request import GenerationOptions, InferenceRequest, build_request, check_timeout
from audioldm2_client._result import GenerationResult, parse_response
from audioldm2_client._transport import make_transport
from audioldm2_client._url import parse_url

DEFAULT_TIMEOUT_S = 600.0


class _ClientCore:
    """Policy without I/O: what holds for every client, blocking or not."""

    def __init__(self, url: str, *, model_name: str, timeout_s: float) -> None:
        self.model_name = model_name
        self.timeout_s = check_timeout(timeout_s)
        self._address = parse_url(url)
        self._closed = False

    def _prepare(
        self, prompt: str | Sequence[str], options: GenerationOptions, timeout_s: float | None
    ) -> InferenceRequest:
        if self._closed:
            raise RuntimeError("the client is closed; make a new one")
        return build_request(
            prompt,
            options,
            model_name=self.model_name,
            request_id=uuid.uuid4().hex,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
        )


class AudioLDM2Client(_ClientCore):
    """Generates audio on a Triton server. One client may be used by several threads at the same time.

    Args:
        url: "host:port" or "grpc://host:port" for gRPC (Triton's port 8001), "http://host:port" for HTTP (8000).
        model_name: the ensemble to call; others of the same contract may be on the same server.
        timeout_s: time allowed for one generation, seconds, from the connection to the last byte. The default, 600, is
            long because a CPU needs minutes for one; making the connection is allowed 5 of them.

    Raises:
        ValueError: a bad url or timeout.

    Nothing is sent before the first `generate`. Close the client after use, or use it as a context manager.
    """

    def __init__(
        self, url: str = "localhost:8001", *, model_name: str = "audioldm2", timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        super().__init__(url, model_name=model_name, timeout_s=timeout_s)
        self._transport = make_transport(self._address)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_length_in_s: float | None = None,
        num_waveforms_per_prompt: int | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        eta: float | None = None,
        timeout_s: float | None = None,
    ) -> GenerationResult:
        """Generate audio for one prompt or several, and wait for it.

        What is None isn't sent: the server's default, named here as it is in an unchanged server, holds. The server
        also checks the ranges.

        Args:
            prompt: what to hear; one text, or P of them for P sounds (they share every other setting).
            negative_prompt: what not to hear; one text, or one per prompt.
            num_inference_steps: denoising steps, 1..1000; 20. More take longer and sound better.
            guidance_scale: how closely to follow the prompt, >= 0; 3.5. At 1.0 and below there is no guidance.
            audio_length_in_s: seconds; 10.24.
            num_waveforms_per_prompt: candidates W per prompt, ranked by CLAP score where there are several; 1.
            seed: >= 0, equal seeds give equal audio; drawn by the server.
            scheduler: diffusers' class name; "DPMSolverMultistepScheduler".
            eta: DDIM's noise, 0..1; 0. Other schedulers ignore it.
            timeout_s: time allowed for this generation, seconds; the client's `timeout_s`. The server is told it too.

        Returns:
            P x W waveforms.

        Raises:
            InvalidRequestError: the server refuses a value, in its own words; or a value can't be sent at all.
            ServerBusyError: overloaded; safe to send again.
            RequestCancelledError: the server dropped the request.
            DeadlineExceededError: not done within `timeout_s`.
            ServerUnreachableError: no server at the address.
            ModelNotFoundError: the server doesn't have the model.
            ServerFaultError: the server failed.
            TypeError: a value of the wrong type.
            RuntimeError: the client is closed.
        """
        options = GenerationOptions(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            audio_length_in_s=audio_length_in_s,
            num_waveforms_per_prompt=num_waveforms_per_prompt,
            seed=seed,
            scheduler=scheduler,
            eta=eta,
        )
        request = self._prepare(prompt, options, timeout_s)
        return parse_response(self._transport.infer(request), request)

    def close(self) -> None:
        """Free the connections. Closing again does nothing; `generate` then raises RuntimeError."""
        if not self._closed:
            self._closed = True
            self._transport.close()

    def __enter__(self) -> "AudioLDM2Client":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
