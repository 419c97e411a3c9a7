"""What is measured, in its order: the first four minutes have what matters most, ten have everything."""

from benchmarks.gpu.runner import Section

UNET, WHOLE = "benchmarks.gpu.unet_sections", "benchmarks.gpu.whole_requests"
REPOSITORY, STARTS = "benchmarks.gpu.repository", "benchmarks.gpu.starts"

SECTIONS = (
    Section("machine", f"{UNET}:machine"),
    Section("weights", f"{UNET}:weights", after=("machine",)),
    Section("references", f"{UNET}:references", after=("weights",)),
    Section("correctness", f"{UNET}:correctness", 15, after=("references",)),
    Section("eager", f"{UNET}:eager", 10, after=("references",)),
    Section("graphs", f"{UNET}:graphs", 15, after=("references",)),
    Section("checkpoint", f"{REPOSITORY}:checkpoint", 60, after=("machine",), is_behind=True),
    Section("export", f"{REPOSITORY}:export", 200, after=("machine",), is_behind=True),
    Section("compile_first", f"{UNET}:compile_first", 40, after=("weights",)),
    Section("compiled_peer", f"{UNET}:compiled_peer", 15, after=("references",)),
    Section("compiled", f"{UNET}:compiled", 15, after=("references",)),
    Section("cold", f"{STARTS}:cold", 20, after=("weights",)),
    Section("compile_more", f"{UNET}:compile_more", 60, after=("weights",)),
    Section("compiled_peer_without", f"{UNET}:compiled_peer_without", 20, after=("references",)),
    Section("more_compiled", f"{UNET}:more_compiled", 30, after=("references",)),
    Section("warm", f"{STARTS}:warm", 20, after=("weights",)),
    Section("stages", "benchmarks.gpu.stages:stages", 20, after=("checkpoint",)),
    Section("request", f"{WHOLE}:request", 40, after=("checkpoint",)),
    Section("onnx", f"{WHOLE}:onnx", 20, after=("checkpoint", "export")),
    Section("served", "benchmarks.gpu.served:served", 40, after=("checkpoint", "export")),
)

NOT_REHEARSED = ("compile_more", "compiled_peer_without", "more_compiled", "export", "onnx", "served")
"""Three do what others do with other numbers. Three take longer than the rest together: `--sections` rehearses them."""

PRELOAD = (UNET,)
"""What the processes of all sections have imported."""
