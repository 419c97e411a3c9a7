"""The sections about the UNet and its loop."""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from device_defaults import can_compile
from fixed_shape_forward import use_compile_cache
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Memory, clock_of, kernel_use, relative_rms
from benchmarks.gpu.loops import (
    DiffusersLoop,
    Ours,
    compile_diffusers_unet,
    exact_float32,
    load_diffusers_unet,
    make_request,
    make_requests,
)
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import ForkedTooLateError
from benchmarks.gpu.smi import smi
from benchmarks.gpu.ways import (
    COMPILED_HALF,
    EAGER_FP32,
    EAGER_HALF,
    GUIDED,
    OURS_COMPILED,
    OURS_EAGER,
    OURS_GRAPHS,
    OURS_SECOND_GPU,
    guidance,
)
from benchmarks.report import Samples, measure
from export.demo_unet import TEXT_WIDTHS, UNET_WIDTHS, make_scheduler, make_unet

NUM_REFERENCES = 4
"""Requests with guidance, seeds 0 to 3, and as many without."""

BOUNDS = {"torch.float32": 1e-3, "torch.float16": 5e-2, "torch.bfloat16": 2e-1}
"""Of the latents after the whole loop: relative RMS against diffusers in float32."""

STAGGERED_ROUNDS = 3
"""Requests of each of those that run at once."""


def machine(case: Case, results: Results) -> None:
    """What the machine is, and how fast at its fastest."""
    device = torch.device(case.device)
    if not case.is_rehearsal:
        _begin_with_gpu()
    results.add_fact("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    results.add_fact("Inductor can compile for a GPU", can_compile())
    if case.is_rehearsal:
        results.set_machine("A rehearsal on a CPU: its figures mean nothing")
    else:
        name, facts = torch.cuda.get_device_name(device), smi()
        results.set_machine(f"A GPU: {name}", f"{name}, driver {facts.get('driver_version', 'unknown')}")
        results.add_fact("GPUs", torch.cuda.device_count())
        results.add_fact("before", facts)
    for dtype in (torch.float32, getattr(torch, case.half)):
        results.add_one(
            f"rate/matrix product, {str(dtype).removeprefix('torch.')}", matrix_rate(device, dtype), "FLOP/s"
        )
    results.add_one("rate/copy on the device", copy_rate(device), "B/s")
    if not case.is_rehearsal:
        results.add_fact("after matrix products", smi())


def _begin_with_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} can't use a GPU here; --rehearse does the same on a CPU")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "forked" in str(error):
            raise ForkedTooLateError from error
        raise


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    samples = measure(lambda: left @ right, clock_of(device), repeats=10, warm_up=3)
    return 2 * size**3 / samples.median


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second of a large copy, read and written ones."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = measure(lambda: target.copy_(source), clock_of(device), repeats=10, warm_up=3)
    return 2 * source.numel() / samples.median


def weights(case: Case, results: Results) -> None:
    """The UNet with random weights of one seed, made on the device, and the scheduler's configuration."""
    started = time.perf_counter()
    torch.manual_seed(0)
    with torch.device(case.device):
        unet = make_unet(*TEXT_WIDTHS[case.size], **UNET_WIDTHS[case.size])
    unet.save_pretrained(case.unet_folder)
    make_scheduler().save_pretrained(case.scheduler_folder)
    results.add_fact("parameters of the UNet", unet.num_parameters())
    results.add_one("seconds/make and write the UNet", time.perf_counter() - started, "s")


def references(case: Case, results: Results) -> None:
    """The latents that diffusers computes in float32."""
    unet, latents = load_diffusers_unet(case, torch.float32), {}
    with exact_float32():
        for guided in (True, False):
            loop = DiffusersLoop(case, unet, torch.float32, guided=guided, requests=NUM_REFERENCES)
            latents[guidance(guided=guided)] = loop().cpu()
    torch.save(latents, case.work / "references.pt")
    results.add_fact("references, their root mean square", float(latents[GUIDED].square().mean().sqrt()))


def correctness(case: Case, results: Results) -> None:
    """Each way of ours that needs no compiler, against the references."""
    with Ours(case, cuda_graphs="off") as ours:
        results.add_fact("dtype", str(ours.prepared.unet.dtype).removeprefix("torch."))
        for guided in (True, False):
            _check(case, ours, OURS_EAGER, results, 1, guided=guided)
    devices = {OURS_GRAPHS: torch.device(case.device)}
    if not case.is_rehearsal and torch.cuda.device_count() > 1:
        devices[OURS_SECOND_GPU] = torch.device("cuda", 1)
    for way, device in devices.items():
        with Ours(case, device, dtype=auto_dtype(case, results)) as ours:
            for sentence in ours.sentences:
                results.note(way, sentence)
            if not (case.is_rehearsal or ours.has_graphs):
                raise RuntimeError(f"no graph was captured: {'; '.join(ours.sentences)}")
            for guided in (True, False):
                _check(case, ours, way, results, 1, guided=guided)
            _check_mixed(case, ours, way, results)
        results.check_time()


def _error(case: Case, latents: Tensor, *, guided: bool, seed: int = 0) -> float:
    expected = torch.load(case.work / "references.pt", weights_only=True)[guidance(guided=guided)][seed : seed + 1]
    return relative_rms(latents.float().cpu(), expected)


def _check(case: Case, ours: Ours, way: str, results: Results, count: int, *, guided: bool) -> None:
    """Compare requests that run together; those for which there are references."""
    latents = ours.run(make_requests(case, count, guided=guided))[:NUM_REFERENCES]
    errors = [_error(case, each, guided=guided, seed=seed) for seed, each in enumerate(latents)]
    name = f"{way}/{guidance(guided=guided)}" + (f"/{count} at once" if count > 1 else "")
    results.add_error(name, max(errors), BOUNDS[str(ours.prepared.unet.dtype)])


def _check_mixed(case: Case, ours: Ours, way: str, results: Results) -> None:
    """Compare requests with and without guidance that come one after the other, each at another step: as served."""
    kinds = [(guided, seed) for seed in range(NUM_REFERENCES) for guided in (True, False)]
    futures = []
    for guided, seed in kinds:
        futures.append(ours.start(make_request(case, guided=guided, seed=seed)))
        time.sleep(0.003)
    errors = [
        _error(case, future.result(), guided=guided, seed=seed)
        for future, (guided, seed) in zip(futures, kinds, strict=True)
    ]
    bound = BOUNDS[str(ours.prepared.unet.dtype)]
    results.add_error(f"{way}/{len(kinds)} that come one after the other", max(errors), bound)


def eager(case: Case, results: Results) -> None:
    """The peers: diffusers as it is, in float32 and in half precision; and the operations of a row."""
    half = getattr(torch, case.half)
    for way, dtype in ((EAGER_FP32, torch.float32), (EAGER_HALF, half)):
        unet = load_diffusers_unet(case, dtype)
        for guided in (True, False):
            _time_diffusers(case, unet, way, dtype, results, guided=guided)
        if dtype == half:
            _time_diffusers(case, unet, way, dtype, results, guided=True, requests=case.requests[-1])
    once = DiffusersLoop(case, unet, half, guided=False, steps=1)
    with FlopCounterMode(display=False) as counter:
        once()
    results.add_fact("FLOP of a row's forward", counter.get_total_flops())


def compiled_peer(case: Case, results: Results, *, guided: bool = True) -> None:
    """The peer at its fastest: diffusers in half precision, compiled; one request with guidance."""
    half, unet = getattr(torch, case.half), _compiled_diffusers(case)
    started = time.perf_counter()
    DiffusersLoop(case, unet, half, guided=guided, steps=2)()
    seconds = time.perf_counter() - started
    results.add_one(f"seconds/{COMPILED_HALF}, {guidance(guided=guided)}, first forwards from the cache", seconds, "s")
    _time_diffusers(case, unet, COMPILED_HALF, half, results, guided=guided)


def compiled_peer_without(case: Case, results: Results) -> None:
    """The same without guidance."""
    compiled_peer(case, results, guided=False)


def _time_diffusers(
    case: Case,
    unet: Callable[..., tuple[Tensor]],
    way: str,
    dtype: torch.dtype,
    results: Results,
    *,
    guided: bool,
    requests: int = 1,
) -> None:
    device, name = torch.device(case.device), guidance(guided=guided)
    loop = DiffusersLoop(case, unet, dtype, guided=guided, requests=requests)
    results.add_error(f"{way}/{name}", _error(case, loop()[:1], guided=guided), BOUNDS[str(dtype)])
    clock = clock_of(device)
    results.measure(f"loop/{way}/{name}/{requests}", loop, clock, repeats=case.repeats, before=loop.prepare)
    results.add_one(f"memory/{way}/{name}, {requests} at once", Memory(device).peak_of(loop.prepare_and_run), "MiB")
    few = DiffusersLoop(case, unet, dtype, guided=guided, requests=requests, steps=case.profiled_steps)
    _add_kernels(case, f"{way}/{name}/{requests}", few.prepare_and_run, results)


def _add_kernels(case: Case, name: str, call: Callable[[], object], results: Results) -> None:
    """Add what a call of `profiled_steps` steps does; the rest doesn't depend on the profiler."""
    try:
        use = kernel_use(call, torch.device(case.device))
    except RuntimeError as error:
        results.note("kernels", f"{name}: {error}")
        return
    found = {
        "per_step": use.count / case.profiled_steps,
        "busy_ms_per_step": 1000 * use.busy_s / case.profiled_steps,
        "idle_share": use.idle_share,
        "longest": use.longest,
    }
    results.add_fact(f"kernels/{name}", found)


def graphs(case: Case, results: Results) -> None:
    """Ours as it is before anything is compiled: CUDA graphs of the UNet as it is."""
    memory = Memory(torch.device(case.device))
    started = time.perf_counter()
    with Ours(case) as ours:
        results.add_one(f"seconds/{OURS_GRAPHS}, until it can serve", time.perf_counter() - started, "s")
        results.add_one(f"memory/{OURS_GRAPHS}/with all graphs", memory.now(), "MiB")
        results.add_one(f"memory/{OURS_GRAPHS}/kept by PyTorch", memory.reserved(), "MiB")
        results.add_one(f"memory/{OURS_GRAPHS}/of the whole device", memory.of_all(), "MiB")
        for count in case.requests:
            for guided in (True, False):
                _time_ours(case, ours, OURS_GRAPHS, results, count, guided=guided)


def compiled(case: Case, results: Results) -> None:
    """Ours, compiled: one request with guidance."""
    _time_compiled(case, results, case.first_rows)


def more_compiled(case: Case, results: Results) -> None:
    """Ours, compiled: one request without guidance, and many with and without."""
    _time_compiled(case, results, case.more_rows)


def _time_compiled(case: Case, results: Results, rows: tuple[int, ...]) -> None:
    started = time.perf_counter()
    with Ours(case, dtype=auto_dtype(case, results), compiled_rows=sorted(rows)) as ours:
        results.add_one(
            f"seconds/{OURS_COMPILED}, {', '.join(map(str, rows))} rows from the cache",
            time.perf_counter() - started,
            "s",
        )
        for sentence in ours.sentences:
            if sentence.startswith(("compiled", "no CUDA graph")):
                results.note(OURS_COMPILED, sentence)
        loops = [(count, guided) for count in case.requests for guided in (True, False)]
        for count, guided in loops:
            if count * (1 + guided) in rows:
                _time_ours(case, ours, OURS_COMPILED, results, count, guided=guided)


def auto_dtype(case: Case, results: Results) -> str:
    """Return what `auto` has chosen before, so that it isn't looked for again."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return names[results.facts.get("dtype", "float32" if case.is_rehearsal else case.half)]


def _time_ours(case: Case, ours: Ours, way: str, results: Results, count: int, *, guided: bool) -> None:
    """So many requests at once, and so many that come one after the other."""
    device = torch.device(case.device)
    key = f"{way}/{guidance(guided=guided)}/{count}"
    _check(case, ours, way, results, count, guided=guided)
    run = partial(ours.run, make_requests(case, count, guided=guided))
    together = results.measure(f"loop/{key}", run, clock_of(device), repeats=case.repeats)
    results.add_one(f"memory/{way}/{guidance(guided=guided)}, {count} at once", Memory(device).peak_of(run), "MiB")
    if count == case.requests[-1] or (count == 1 and guided):
        few = partial(ours.run, make_requests(case, count, guided=guided, steps=case.profiled_steps))
        _add_kernels(case, key, few, results)
    if count > 1:
        alone = results.samples.get(f"loop/{way}/{guidance(guided=guided)}/1")
        gap_s = (median(alone["values"]) if alone else together.median) / count
        requests = make_requests(case, count * STAGGERED_ROUNDS, guided=guided)
        seconds = [ours.run_staggered(requests, count, gap_s) for _ in range(max(2, case.repeats // 3))]
        results.add(f"staggered/{key}", Samples(tuple(len(requests) / each for each in seconds), "clips/s"))


def compile_first(case: Case, results: Results) -> None:
    """Have Inductor compile what the next sections need, into its cache, side by side."""
    _compile(case, results, case.first_rows, [True])


def compile_more(case: Case, results: Results) -> None:
    """The same for those after them."""
    _compile(case, results, case.more_rows, [False])


def _compile(case: Case, results: Results, rows: tuple[int, ...], peers: list[bool]) -> None:
    """Compile for each number of rows, and for diffusers with and without guidance, in a process each."""
    case.compile_cache.mkdir(exist_ok=True, mode=0o700)
    jobs = {
        f"{OURS_COMPILED}, {each} rows": partial(_compile_ours, case, auto_dtype(case, results), each) for each in rows
    }
    jobs |= {f"{COMPILED_HALF}, {guidance(guided=each)}": partial(_compile_peer, case, guided=each) for each in peers}
    started = time.perf_counter()
    processes = {name: multiprocessing.Process(target=job, name=name) for name, job in jobs.items()}
    for process in processes.values():
        process.start()
    try:
        while processes:
            for name in [name for name, process in processes.items() if process.exitcode is not None]:
                if status := processes.pop(name).exitcode:
                    results.note("compile", f"{name}: its process ended with status {status}.")
                else:
                    results.add_one(f"compile/{name}, one of {len(jobs)} at a time", time.perf_counter() - started, "s")
            results.check_time()
            time.sleep(0.1)
    finally:
        for process in processes.values():
            process.kill()


def _compile_ours(case: Case, dtype: str, rows: int) -> None:
    with Ours(case, dtype=dtype, compiled_rows=[rows]):
        pass


def _compile_peer(case: Case, *, guided: bool) -> None:
    DiffusersLoop(case, _compiled_diffusers(case), getattr(torch, case.half), guided=guided, steps=2)()


def _compiled_diffusers(case: Case) -> Callable[..., tuple[Tensor]]:
    use_compile_cache(case.compile_cache)
    return compile_diffusers_unet(case, load_diffusers_unet(case, getattr(torch, case.half)))
