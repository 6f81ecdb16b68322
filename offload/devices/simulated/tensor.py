"""Tensors of the pretend GPU: real numbers in host memory, with a device of their own.

Every operation runs on the CPU with the CPU's kernels, so the numbers are those of the ``cpu`` device, bit for bit.
What is not allowed on a GPU raises: an operation on tensors of two devices, memory beyond the budget.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offload.devices.clock import VirtualClock
from offload.errors import RunLocalError, UsageError

DEVICE_TYPE = "simgpu"
_aten = torch.ops.aten
_TRANSFERS = {_aten._to_copy.default, _aten.copy_.default}
_MAY_INDEX_FROM_HOST = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._unsafe_index.Tensor,
}
_PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default, _aten.matmul.default,
}  # fmt: skip


class SimulatedError(Exception):
    """Something that a real GPU would not allow, or would silently do wrong: a bug of this program, not a user's."""


class VramExhausted(RunLocalError):
    """The simulated device has no memory for this."""


class Vram:
    """The memory of one simulated device: what is allocated, against a hard budget. Thread-safe.

    Tensors in a cycle are dropped by the garbage collector, which may run in the middle of anything that allocates, so
    :meth:`drop` never waits: it leaves a note, and whoever has the lock, or gets it next, counts that.
    """

    def __init__(self, total: int) -> None:
        self.total = self.budget = total
        self.peak = 0
        self._used = 0
        self._lock = threading.Lock()
        self._holders: dict[int, int] = {}  # address of a storage -> tensors that look into it
        self._dropped: deque[tuple[int, int]] = deque()  # addresses and sizes that are not counted yet

    @property
    def used(self) -> int:
        self._settle()
        return self._used

    def hold(self, address: int, size: int) -> None:
        """Raises VramExhausted if there is no room."""
        with self._lock:
            self._count_dropped()  # first: a note about the same address is older
            count = self._holders.get(address, 0)
            if not count:
                if self._used + size > self.budget:
                    raise VramExhausted(
                        f"the simulated device has no room for {size} bytes more: "
                        f"{self._used} of {self.budget} are used"
                    )
                self._used += size
                self.peak = max(self.peak, self._used)
            self._holders[address] = count + 1

    def drop(self, address: int, size: int) -> None:
        self._dropped.append((address, size))
        self._settle()

    def _settle(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._count_dropped()
            finally:
                self._lock.release()

    def _count_dropped(self) -> None:
        while self._dropped:
            address, size = self._dropped.popleft()
            self._holders[address] -= 1
            if not self._holders[address]:
                del self._holders[address]
                self._used -= size


class _Hold:
    """Lives as long as a tensor of the device, and keeps its memory counted."""

    __slots__ = ("_address", "_size", "_storage", "_vram")

    def __init__(self, vram: Vram, storage: torch.UntypedStorage) -> None:
        self._size = 0
        vram.hold(storage.data_ptr(), storage.nbytes())
        self._vram, self._address, self._size = vram, storage.data_ptr(), storage.nbytes()
        self._storage = storage  # the address must not be given to others before the count is dropped

    def __del__(self) -> None:
        if self._size:
            self._vram.drop(self._address, self._size)


class World:
    """What the tensors of one simulated device share."""

    def __init__(self, vram: Vram, clock: VirtualClock) -> None:
        self.vram = vram
        self.clock = clock
        self.quiet = threading.local()  # kernels on a worker were paid for when they were launched
        self.uploaded = self.downloaded = 0


class SimTensor(torch.Tensor):
    """``elem`` holds the numbers."""

    elem: torch.Tensor
    world: World
    _hold: _Hold | None

    @staticmethod
    def __new__(cls, elem: torch.Tensor, world: World) -> SimTensor:
        made: SimTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device(DEVICE_TYPE, 0),
            requires_grad=False,
        )
        made.elem = elem
        made.world = world
        storage = elem.untyped_storage()
        made._hold = _Hold(world.vram, storage) if storage.nbytes() else None
        return made

    def tolist(self) -> Any:
        """By way of the host, as other devices do it; torch's own knows no subclasses."""
        return self.to("cpu").tolist()

    def __repr__(self, **options: Any) -> str:
        return f"SimTensor({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(_world_of(args, kwargs), func, args, kwargs or {})


class SimMode(TorchDispatchMode):
    """While it is active, tensors can be made on the device (``torch.zeros(3, device=...)``)."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self._world, func, args, kwargs or {})


def register_device() -> None:
    """Tell torch of the device type; once for a process. Raises UsageError if this torch cannot have one."""
    try:
        if torch._C._get_privateuse1_backend_name() == DEVICE_TYPE:
            return
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--device simulated: torch {torch.__version__} cannot have devices written in Python; install a newer one"
        ) from error
    _setup_privateuseone_for_python_backend(DEVICE_TYPE)


@contextmanager
def made_on_device(world: World) -> Iterator[None]:
    """Tensors that the code inside makes with the device's name are made there."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) goes by way of the host, and so through here
    try:
        with SimMode(world):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def to_device(tensor: torch.Tensor, world: World) -> SimTensor:
    """``tensor``, now counted as the device's. Shares its memory."""
    if isinstance(tensor, SimTensor):
        return tensor
    with torch.inference_mode():  # views of others cannot be taken in inference mode
        return SimTensor(tensor, world)


def _is_sim(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE_TYPE


def _inner(value: Any) -> Any:
    return value.elem if isinstance(value, SimTensor) else value


def _world_of(args: Any, kwargs: Any) -> World:
    return next(leaf.world for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, SimTensor))


def _run(world: World, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.overloadpacket is _aten.to:  # in inference mode torch does not take it apart itself
        with SimMode(world):
            return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    theirs = [tensor for tensor in tensors if not isinstance(tensor, SimTensor)]
    wanted = kwargs.get("device")
    if _is_sim(wanted):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func in _TRANSFERS:
        return _transfer(world, func, args, kwargs, wanted, ours, theirs)
    if func is _aten._local_scalar_dense.default and ours:
        world.clock.sync()
    foreign = [tensor for tensor in theirs if tensor.dim() > 0] if ours else []
    if func in _MAY_INDEX_FROM_HOST and isinstance(args[0], SimTensor):
        foreign = []
    if foreign:
        raise SimulatedError(
            f"{func}: expected all tensors on {DEVICE_TYPE}:0, but found one of shape {tuple(foreign[0].shape)} on "
            f"{foreign[0].device}"
        )
    on_device = _is_sim(wanted) if wanted is not None else bool(ours)
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not on_device:
        return result
    by_inner = {id(tensor.elem): tensor for tensor in ours}
    storages = {tensor.elem.untyped_storage().data_ptr() for tensor in ours}
    moved = 0

    def outer(value: Any) -> Any:
        nonlocal moved
        if not isinstance(value, torch.Tensor):
            return value
        found = by_inner.get(id(value))
        if found is not None:  # written in place
            moved += value.nbytes
            return found
        if value.untyped_storage().data_ptr() not in storages:
            moved += value.nbytes
        return SimTensor(value, world)

    result = tree_map(outer, result)
    if moved and not getattr(world.quiet, "on", False):  # a view costs nothing
        world.clock.launch(moved + sum(tensor.elem.nbytes for tensor in ours), _flops(func, args))
    return result


def _transfer(
    world: World, func: Any, args: Any, kwargs: dict[str, Any], wanted: Any, ours: list[Any], theirs: list[Any]
) -> Any:
    """Copies within the device and between it and the host; those wait for the kernels, as CUDA's do."""
    if func is _aten.copy_.default:
        to_sim = isinstance(args[0], SimTensor)
    else:
        to_sim = _is_sim(wanted) if wanted is not None else bool(ours)
    quiet = getattr(world.quiet, "on", False)
    size = sum(tensor.nbytes for tensor in theirs) or sum(tensor.elem.nbytes for tensor in ours[-1:])
    if ours and not to_sim:
        world.downloaded += size
        if not quiet:
            world.clock.sync()
            world.clock.host(size / world.clock.machine.link_bytes_per_s)
    elif theirs and to_sim:
        world.uploaded += size
        if not quiet:
            world.clock.host(size / world.clock.machine.link_bytes_per_s)
    elif ours and not quiet:
        world.clock.launch(2 * size)
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is _aten.copy_.default:
        return args[0]
    if ours and not to_sim:
        return result if result is not _inner(args[0]) else result.clone()
    return SimTensor(result, world) if to_sim else result


def _flops(func: Any, args: Any) -> float:
    """Of a product of matrices; everything else is limited by memory."""
    if func not in _PRODUCTS:
        return 0.0
    shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor) and arg.dim() >= 2]
    if len(shapes) < 2:
        return 0.0
    first, second = shapes[-2:]
    if func is _aten.linear.default:
        first, second = shapes[0], shapes[1]
        return 2.0 * math.prod(first) * second[0]
    return 2.0 * math.prod(first) * second[-1]
