"""GPUs that aren't there: values are computed on the CPU, under the rules that CUDA has for devices and for waiting.

It shows what a machine without a GPU can: that no operation mixes devices, which copies and calls make the host wait,
that nothing reads a copy before it has arrived, and that a graph records what a graph can record. It says nothing of
time, and computes no differently from the CPU.

What is like CUDA:

- An operation on tensors of two devices, or of a GPU and the CPU (numbers apart), raises.
- A copy makes the host wait, unless it is asked not to and the host's side is pinned. Until the host has waited for
  what came before, a copy to it holds NaN (or -1).
- While a graph is captured nothing is computed, copies to or from the host and waiting raise, and operations on another
  GPU than the present one aren't recorded: they run once, and never again.
- A GPU that has failed fails for good.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
    "lift_fresh",
}  # fmt: skip

_READ_BY_HOST = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim",
}  # fmt: skip


@dataclass
class Simulator:
    """What has happened on the GPUs.

    Attributes:
        num_devices: How many there are.
        current: The present one.
        events: `copy` (the host waits for it), `async copy`, `wait` (the host waits for all), `event wait`, `kernel`,
            `replay`, with what each was of.
        is_broken: Whether a GPU has failed.
    """

    num_devices: int = 1
    current: int = 0
    events: list[tuple[str, str]] = field(default_factory=list)
    is_broken: bool = False
    capture: "Graph | None" = None
    _arriving: list[Callable[[], object]] = field(default_factory=list)

    def take(self) -> Counter[str]:
        """Return how often each kind of thing has happened since the last call."""
        taken, self.events = self.events, []
        return Counter(kind for kind, _ in taken)

    def note(self, kind: str, what: str) -> None:
        """Write down what happens; copies and waiting aren't permitted while a graph is captured."""
        if self.capture is not None and kind != "kernel":
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.events.append((kind, what))

    def wait(self, kind: str, what: str) -> None:
        """Let the host wait: what was on its way to it arrives."""
        self.note(kind, what)
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        for arrive in self._arriving:
            arrive()
        self._arriving.clear()

    def copy_to_host(self, target: torch.Tensor, values: torch.Tensor, *, may_be_late: bool) -> None:
        """Copy to the host: at once, or when the host waits the next time."""
        if not may_be_late:
            self.wait("copy", "to the host")
            target.copy_(values)
            return
        self.note("async copy", "to the host")
        arrived = values.clone()
        target.fill_(torch.nan if target.is_floating_point() else -1)
        self._arriving.append(lambda: target.copy_(arrived))


SIMULATOR = Simulator()


class CudaTensor(torch.Tensor):
    """A tensor of a GPU that isn't there.

    Attributes:
        values: What it holds, on the CPU.
        place: The GPU.
    """

    values: torch.Tensor  # type: ignore[assignment]
    place: torch.device

    @staticmethod
    def __new__(cls, values: torch.Tensor, place: torch.device) -> "CudaTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CPU,
        )
        tensor.values, tensor.place = values, place
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The GPU."""
        return self.place

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype}, {self.place})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:  # one kernel, whose parts aren't looked at
            return _run(func, "scaled_dot_product_attention", args, kwargs)
        if func is torch.Tensor.to and isinstance(args[0], cls):
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(
                *args[1:], **{name: value for name, value in kwargs.items() if name != "copy"}
            )
            return _to(args[0], device, dtype, non_blocking, memory_format, must_copy=bool(kwargs.get("copy")))
        if func is torch.Tensor.cpu:
            return _to(args[0], CPU, None, False, None, must_copy=False)
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert a GPU's tensor to numpy: use Tensor.cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what has no tensor yet, such as `torch.zeros`, and copies to a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = "CompositeImplicitAutograd"
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) and "scaled_dot" not in func.name():
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _dispatch(func, args, kwargs or {})


def _to(
    tensor: CudaTensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
    non_blocking: bool,
    memory_format: torch.memory_format | None,
    *,
    must_copy: bool,
) -> torch.Tensor:
    device, dtype = _indexed(device or tensor.place), dtype or tensor.dtype
    fits = memory_format is None or tensor.values.is_contiguous(memory_format=memory_format)
    if (device, dtype) == (tensor.place, tensor.dtype) and fits and not must_copy:
        return tensor
    options: dict[str, Any] = {"device": device, "dtype": dtype, "non_blocking": non_blocking}
    if memory_format is not None:
        options["memory_format"] = memory_format
    return _dispatch(torch.ops.aten._to_copy.default, (tensor,), options)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", SIMULATOR.current) if device.type == "cuda" and device.index is None else device


def _values(argument: Any) -> Any:
    return argument.values if isinstance(argument, CudaTensor) else argument


def _place_of(name: str, arguments: Any) -> torch.device | None:
    """Return the one GPU on which all tensors are; None if they are on the CPU."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    places = {tensor.place for tensor in tensors if isinstance(tensor, CudaTensor)}
    if places and any(not isinstance(tensor, CudaTensor) and tensor.dim() for tensor in tensors):
        places.add(CPU)
    if len(places) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {sorted(map(str, places))}")
    return next(iter(places), None)


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
    if name in ("_to_copy", "copy_"):
        return _copy(func, name, args, kwargs)
    if name in _READ_BY_HOST and _place_of(name, args) is not None:
        SIMULATOR.wait("copy", name)
    if name in ("index", "index_put_", "_index_put_impl_") and _place_of(name, args[0]) is not None:
        args = tuple(args)
        for index in tree_leaves(args[1]):
            if isinstance(index, torch.Tensor) and (index.dtype == torch.bool or not isinstance(index, CudaTensor)):
                SIMULATOR.wait("copy", f"{name} with an index of the host's, or with a mask")
    return _run(func, name, args, kwargs)


def _copy(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Copy between devices, or on one."""
    source = args[1] if name == "copy_" else args[0]
    if name == "copy_":
        target = args[0].place if isinstance(args[0], CudaTensor) else CPU
    else:
        target = _indexed(kwargs.get("device") or (source.place if isinstance(source, CudaTensor) else CPU))
    start = source.place if isinstance(source, CudaTensor) else CPU
    if start == target:
        return _run(func, name, args, kwargs)
    non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    if target == CPU:
        host = args[0] if name == "copy_" else torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        SIMULATOR.copy_to_host(host, source.values, may_be_late=bool(non_blocking) and is_pinned(host))
        return host
    if start == CPU and non_blocking and is_pinned(source):
        SIMULATOR.note("async copy", "to a GPU")
    else:
        SIMULATOR.wait("copy", f"to {target}")
    options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
    result = func(*tree_map(_values, args), **options)
    return args[0] if name == "copy_" else CudaTensor(result, target)


def _run(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Compute something on one device, and write it down where that is a GPU."""
    place = _place_of(name, (args, kwargs))
    if (wanted := kwargs.get("device")) is not None:
        place = _indexed(torch.device(wanted)) if torch.device(wanted).type == "cuda" else None
        kwargs = {**kwargs, "device": CPU}
    args, kwargs = tree_map(_values, (args, kwargs))
    kwargs.pop("pin_memory", None) if place is not None else None
    if place is None:
        return func(*args, **kwargs)
    is_in_place = getattr(func, "_schema", None) is not None and func._schema.is_mutable and name.endswith("_")
    if name not in _VIEWS and not name.startswith("empty"):
        SIMULATOR.note("kernel", name)
        if SIMULATOR.capture is not None and place.index == SIMULATOR.capture.device:
            SIMULATOR.capture.before_change(args[0] if is_in_place else None)
            result = func(*args, **kwargs)
            SIMULATOR.capture.operations.append((func, args, kwargs, None if is_in_place else result))
            return _wrapped(result, place)
    return _wrapped(func(*args, **kwargs), place)


def _wrapped(result: Any, place: torch.device) -> Any:
    return tree_map(lambda leaf: CudaTensor(leaf, place) if isinstance(leaf, torch.Tensor) else leaf, result)


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.device = 0
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_change(self, tensor: torch.Tensor | None) -> None:
        """Remember what a tensor held: nothing is computed while a graph is captured."""
        if tensor is not None:
            base = tensor._base if tensor._base is not None else tensor
            self._before.append((base, base.clone()))

    def end(self) -> None:
        """Put back what was changed."""
        for tensor, values in reversed(self._before):
            tensor.copy_(values)
        self._before.clear()

    def replay(self) -> None:
        """Compute what was captured, with what its inputs hold now."""
        SIMULATOR.note("replay", "graph")
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=False):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

    def reset(self) -> None:
        """Forget it."""
        self.operations.clear()

    def pool(self) -> tuple[int, int]:
        """Return a handle of its memory."""
        return (0, id(self))


@contextlib.contextmanager
def _capturing(graph: Graph, **_: Any) -> Iterator[None]:
    SIMULATOR.wait("wait", "before a capture")
    graph.device, SIMULATOR.capture = SIMULATOR.current, graph
    try:
        yield
    finally:
        SIMULATOR.capture = None
        graph.end()


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._enable_timing = enable_timing

    def record(self) -> None:
        SIMULATOR.note("event", "recorded")

    def synchronize(self) -> None:
        SIMULATOR.wait("event wait", "event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, _later: "_Event") -> float:
        return 1.0


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, _other: Any) -> None: ...


def _index_of(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


@contextlib.contextmanager
def _present_device(device: Any) -> Iterator[None]:
    before, SIMULATOR.current = SIMULATOR.current, _index_of(device)
    try:
        yield
    finally:
        SIMULATOR.current = before


def is_pinned(tensor: torch.Tensor) -> bool:
    """Say whether a GPU can copy from or to a tensor of the host by itself."""
    return getattr(tensor, "is_simulated_pinned", False)


def _pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    pinned = tensor.clone()
    pinned.is_simulated_pinned = True  # type: ignore[attr-defined]
    return pinned


def _empty(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    tensor = _REAL_EMPTY(*args, **options)
    if pin_memory:
        tensor.is_simulated_pinned = True  # type: ignore[attr-defined]
    return tensor


_REAL_EMPTY = torch.empty


@contextlib.contextmanager
def simulated_cuda(monkeypatch: Any, num_devices: int = 1) -> Iterator[Simulator]:
    """Have GPUs inside the block."""
    SIMULATOR.__init__(num_devices=num_devices)  # type: ignore[misc]
    for name, replacement in {
        "is_available": lambda: True,
        "device_count": lambda: SIMULATOR.num_devices,
        "current_device": lambda: SIMULATOR.current,
        "set_device": lambda device: setattr(SIMULATOR, "current", _index_of(device)),
        "device": _present_device,
        "synchronize": lambda *_: SIMULATOR.wait("wait", "synchronize"),
        "empty_cache": lambda: SIMULATOR.wait("wait", "empty_cache"),
        "current_stream": lambda *_: _Stream(),
        "set_stream": lambda _: None,
        "Stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": _capturing,
        "graph_pool_handle": lambda: (0, 0),
        "mem_get_info": lambda *_: (8, 10),
        "_lazy_init": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch.Tensor, "pin_memory", _pin)
    monkeypatch.setattr(torch, "empty", _empty)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode():  # type: ignore[no-untyped-call]
            yield SIMULATOR
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
