"""Whatever stage fails: callers are told at once, and the server says that it isn't ready, comes back, and is right."""

import numpy as np
import pytest

from server import EmbeddedServer, embedded
from server.watchdog import RestartPolicy
from tests.helpers.faults import fail_and_recover, reference

# Guards against hangs, on a machine that does other things as well. `python -m benchmarks.faults` measures.
UNREADY_S = 3.0
ANSWERED_S = 6.0
WELL_S = 60.0

STAGES = ["tokenizer", "text_encoder", "gpt2", "unet", "vae", "vocoder", "postprocess", "clap_audio", "jobs"]


@pytest.fixture(scope="module")
def server(exported_repository) -> EmbeddedServer:
    with pytest.MonkeyPatch.context() as patch:
        # More faults than a healthy server has: each is as the first.
        patch.setattr(embedded, "RestartPolicy", lambda _: RestartPolicy(stable_s=0.0))
        with EmbeddedServer(exported_repository) as running:
            yield running


@pytest.fixture(scope="module")
def audio(server):
    return reference(server)


FAULTS = [
    *((stage, None, number % 2 * 2) for number, stage in enumerate(STAGES)),  # killed, idle or with two callers
    *(("unet", 1.5, 2), ("vae", 1.5, 0), ("text_encoder", 10.0, 2)),
]


@pytest.mark.parametrize(("stage", "pause_s", "callers"), FAULTS)
def test_a_failing_stage_harms_nobody_for_long(server, audio, stage, pause_s, callers):
    seen = fail_and_recover(server, stage, pause_s, callers)
    assert seen.unready_s < UNREADY_S
    for answer in seen.answers:
        assert answer.status == 503
        assert f"[UNAVAILABLE] stage {stage} " in answer.error
    assert seen.answered_s < ANSWERED_S
    assert seen.well_s < WELL_S
    np.testing.assert_array_equal(seen.audio, audio)
