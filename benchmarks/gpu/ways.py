"""The names of what is compared, which the figures have in theirs. `half` is fp16 on a GPU."""

EAGER_FP32 = "diffusers, eager, fp32"
EAGER_HALF = "diffusers, eager, half"
COMPILED_HALF = "diffusers, compiled, half"
OURS_EAGER = "this project, eager"
OURS_GRAPHS = "this project, CUDA graphs"
OURS_COMPILED = "this project, compiled, CUDA graphs"
OURS_SECOND_GPU = "this project, CUDA graphs, second GPU"
LOOPS = (EAGER_FP32, EAGER_HALF, COMPILED_HALF, OURS_EAGER, OURS_GRAPHS, OURS_COMPILED)

GUIDED, UNGUIDED = "guided", "unguided"

DIFFUSERS_FP32 = "diffusers, fp32"
DIFFUSERS_HALF = "diffusers, half"
DIFFUSERS_COMPILED = "diffusers, half, compiled UNet"
OURS_TORCH = "this project in one process, PyTorch's stages in half"
OURS_ONNX = "this project in one process, ONNX stages"
OURS_SERVED = "this project, tritonserver and client"
REQUESTS = (DIFFUSERS_FP32, DIFFUSERS_HALF, DIFFUSERS_COMPILED, OURS_TORCH, OURS_ONNX, OURS_SERVED)


def guidance(*, guided: bool) -> str:
    """Return the name of a request with guidance, or of one without."""
    return GUIDED if guided else UNGUIDED
