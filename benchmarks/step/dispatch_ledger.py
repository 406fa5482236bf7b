"""Machine-independent cost of a computation: operators, bytes, products, allocations, synchronisations.

A dispatch mode sees every operator that reaches a kernel, forward, backward and optimiser. Counts are nominal: each
operand is read once and each result written once, independent of the kernel; a compiled op of fastkd is one operator
with its own formulas. Scratch memory inside an operator is not counted (benchmarks/memory.py counts it).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.step.fastkd_costs import FLOPS, READ_TWICE
from fastkd.training.cost.memory import StorageMeter

# results depend on values, so that the host synchronises with a GPU
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "nms",
}
HOST_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # on CPU tensors they dispatch no operator
ALIASES = {"_unsafe_view", "lift_fresh"}  # views without alias annotation
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
WRITE_ONLY = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_"}
SELECTIONS = {"index", "index_select", "gather", "embedding", "take"}  # they read as many bytes as they return


@dataclass
class Counts:
    """Totals of a computation.

    Args:
        ops: dispatched operators, including views; views: those that only create a view.
        bytes_read, bytes_written: by all operators, each operand and result once.
        flops: of matrix products and convolutions by torch.utils.flop_counter, and of fastkd's ops (including their
            elementwise arithmetic); convolutions: those of torch's convolutions.
        largest: bytes of the largest new tensor.
        peak: maximum bytes of new tensors alive at the same time.
        syncs: number of synchronisations with a GPU to read a value or a size.
        by_op: operators by name.
    """

    ops: int = 0
    views: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    convolutions: int = 0
    largest: int = 0
    peak: int = 0
    syncs: int = 0
    by_op: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def minus(self, other: Counts) -> Counts:
        """The difference of all counts."""
        names = {*self.by_op, *other.by_op}
        by_op = {name: self.by_op.get(name, 0) - other.by_op.get(name, 0) for name in sorted(names)}
        numbers = {
            item.name: getattr(self, item.name) - getattr(other, item.name)
            for item in dataclasses.fields(self)
            if item.name != "by_op"
        }
        return Counts(**numbers, by_op={name: count for name, count in by_op.items() if count})


def size_of(tensor: Tensor) -> int:
    """Bytes that a kernel accesses; expanded dimensions count once."""
    if tensor.layout != torch.strided:
        return 0
    count = tensor.element_size()
    for side, stride in zip(tensor.shape, tensor.stride()):
        count *= side if stride else min(side, 1)
    return count


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bound(function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The given arguments by their names in the schema."""
    names = [argument.name for argument in function._schema.arguments]
    return dict(zip(names, args)) | kwargs


class _HostReads(TorchFunctionMode):
    """Counts reads by the host that dispatch no operator."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counts.syncs += function in HOST_READS
        return function(*args, **(kwargs or {}))


class DispatchLedger(StorageMeter):
    """Counts the operators inside `with DispatchLedger() as ledger`; see `Counts`, in ledger.counts.

    Existing tensors are recognised at their first use; only new storages count as memory.
    Raises: ValueError for an op of fastkd without formulas in benchmarks/step/fastkd_costs.py.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counts()
        self._by_op: collections.Counter[str] = collections.Counter()
        self._host_reads = _HostReads(self.counts)

    def __enter__(self):
        self._host_reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._host_reads.__exit__(*error)
        self.counts.peak = self.peak
        self.counts.by_op = dict(sorted(self._by_op.items()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if tensor.layout == torch.strided:
                self._watch(tensor.untyped_storage(), 0)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self._count(function, args, kwargs, result)
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._alive:
            self.counts.largest = max(self.counts.largest, size)
        super()._watch(storage, size)

    def _count(self, function, args: tuple, kwargs: dict, result: Any) -> None:
        counts, schema = self.counts, function._schema
        namespace, name = schema.name.split("::")
        if namespace == "profiler":
            return
        overload = f"{name}.{schema.overload_name}"
        counts.ops += 1
        self._by_op[schema.name] += 1
        counts.syncs += name in WAITS or overload in WAITS or _selects_by_flags(name, args) or _to_host(args, result)
        returns = [value.alias_info for value in schema.returns]
        if name in ALIASES or any(alias is not None and not alias.is_write for alias in returns):
            counts.views += 1
            return
        bound = _bound(function, args, kwargs)
        read, written = traffic(function, bound, result)
        counts.bytes_read += read
        counts.bytes_written += written
        if namespace == "fastkd":
            if name not in FLOPS:
                raise ValueError(f"DispatchLedger: fastkd::{name} must have a formula; add it to fastkd_costs.py")
            counts.flops += FLOPS[name](bound, result)
        elif function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
            counts.flops += flops
            counts.convolutions += flops * ("convolution" in name)


def _selects_by_flags(name: str, args: tuple) -> bool:
    return name in ("index", "index_put", "index_put_") and any(
        flags.dtype in (torch.bool, torch.uint8) for flags in _tensors(args[1])
    )


def _to_host(args: tuple, result: Any) -> bool:
    """Whether a tensor went from a device to the CPU."""
    return (
        isinstance(result, Tensor)
        and result.device.type == "cpu"
        and any(tensor.device.type != "cpu" for tensor in _tensors(args))
    )


def traffic(function: torch._ops.OpOverload, bound: dict[str, Any], result: Any) -> tuple[int, int]:
    """Bytes that one operator (not a view) reads and writes.

    Args:
        bound: arguments by name.
        result: its result.
    """
    name = function._schema.name.split("::")[1]
    if name in EMPTY:
        return 0, 0
    changed = {argument.name for argument in function._schema.arguments if argument.alias_info is not None}
    read = written = 0
    for argument, value in bound.items():
        size = sum(size_of(tensor) for tensor in _tensors(value))
        if argument in changed:
            written += size
            read += 0 if name in WRITE_ONLY else size
        elif not (name in SELECTIONS and argument in ("self", "weight")):
            read += size
    made = 0 if changed else sum(size_of(tensor) for tensor in _tensors(result))
    if name in ("index_put_", "index_copy_", "index_add_", "scatter_", "scatter_add_", "index_fill_"):
        value = next((bound[key] for key in ("values", "source", "src") if isinstance(bound.get(key), Tensor)), None)
        share = size_of(value) if value is not None else 0  # only these elements of self are accessed
        size = size_of(bound["self"])
        read, written = read - size + share, written - size + share
    if name in SELECTIONS:
        read += made
    read += sum(size_of(tensor) for argument in READ_TWICE.get(name, ()) for tensor in _tensors(bound.get(argument)))
    return read, written + made


def count(work: Callable[[], object]) -> Counts:
    """Counts of one call; its results are discarded."""
    with DispatchLedger() as ledger:
        work()
    return ledger.counts
