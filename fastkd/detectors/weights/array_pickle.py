"""Reads numpy arrays from a pickle without executing it.

A pickle is a program that may call any function. This module interprets only the opcodes that build dicts, lists,
text, numbers and plain numpy arrays. Calls of numpy's reconstruction functions are recognised by name and implemented
below; nothing is imported or called for the file.

`pickle.Unpickler` with a whitelisting `find_class` would be shorter but less safe (CPython 3.11): hashing a deeply
nested tuple as a dict key overflows the C stack, nine bytes with a memo index of 2**31 allocate 34 GB, and extension
opcodes bypass `find_class` for classes that the process has already unpickled through them.
"""

from __future__ import annotations

import math
import os
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"} | {f"{k}{n}": f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8)}
_ARRAY_MODULES = (
    "numpy",
    *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")),
)
_OTHER_NAMES = (("_codecs", "encode"), ("collections", "OrderedDict"), ("__builtin__", "bytes"), ("builtins", "bytes"))
_MARK = object()
_ANSWERS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_NUMBERS = ("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STRING", "BINSTRING", "SHORT_BINSTRING")
_VALUES = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))


class _Refused(ValueError):
    """The file contains something other than arrays."""


@dataclass(frozen=True)
class _Name:
    """A global named in the pickle; never imported."""

    module: str
    name: str


@dataclass
class _Type:
    """A numpy dtype under construction."""

    code: str
    order: str = "="

    def set(self, state: Any) -> None:
        """Set the state that numpy writes for a dtype; it may contain only the byte order."""
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
        order = _text(state[1]) if plain else ""
        if order not in ("<", ">", "=", "|"):
            raise _Refused(f"a numpy type with the state {state!r:.80}")
        self.order = order

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + _KINDS[self.code])


@dataclass
class _Array:
    """A numpy array under construction."""

    value: np.ndarray | None = None

    def set(self, state: Any) -> None:
        """Set the state that numpy writes for an array: version, shape, dtype, order, bytes."""
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Type):
            raise _Refused("a numpy array whose state is not of plain numbers")
        _, shape, kind, fortran, content = state
        self.value = _array(content, kind, shape, "F" if fortran else "C")


@dataclass
class _Machine:
    """The stack and memo of the pickle machine."""

    stack: list = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def to_mark(self) -> list:
        """Pop all values above the last mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise _Refused("a mark that is missing")

    def pop(self, count: int) -> list:
        """Pop the last `count` values, in order."""
        if len(self.stack) < count or any(item is _MARK for item in self.stack[-count:]):
            raise _Refused("a stack that runs empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def put_items(self, flat: list) -> None:
        """Insert alternating keys and values into the dict on top of the stack."""
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, dict) or len(flat) % 2 or not all(isinstance(k, (str, int)) for k in flat[::2]):
            raise _Refused("a dict whose keys are not text")
        target.update(zip(flat[::2], flat[1::2], strict=True))

    def append(self, items: list) -> None:
        """Append to the list on top of the stack."""
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, list):
            raise _Refused("an item of what is not a list")
        target.extend(items)


def read_array_pickle(path: str | os.PathLike) -> Any:
    """The content of a pickle of dicts, lists, tuples, text, numbers and numpy arrays; nothing of it is executed.

    Args:
        path: a file as `pickle.dump` writes it, any protocol.
    Returns: the content with numpy arrays (read-only where they share the file's bytes).
    Raises: ValueError if the file contains anything else or is damaged; FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_array_pickle: {path} is not a file")
    machine = _Machine()
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return _finished(machine.pop(1)[0], (), {})
                _carry_out(machine, opcode.name, argument)
    except _Refused as error:
        raise ValueError(
            f"read_array_pickle: {path} must hold numpy arrays and nothing else, got {error}; it was not executed"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"read_array_pickle: {path} is no pickle or damaged: {str(error)[:200]}") from None
    raise ValueError(f"read_array_pickle: {path} is no pickle or damaged: it has no end")


def _carry_out(machine: _Machine, name: str, argument: Any) -> None:
    """Execute one opcode."""
    stack, memo = machine.stack, machine.memo
    if name in ("PROTO", "FRAME"):
        return
    if name == "MARK":
        stack.append(_MARK)
    elif name in _VALUES:
        stack.append(argument)
    elif name in _ANSWERS:
        stack.append(_ANSWERS[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(machine.pop(int(name[-1]))))
    elif name == "TUPLE":
        stack.append(tuple(machine.to_mark()))
    elif name == "LIST":
        stack.append(list(machine.to_mark()))
    elif name == "DICT":
        items = machine.to_mark()
        stack.append({})
        machine.put_items(items)
    elif name in ("SETITEM", "SETITEMS"):
        machine.put_items(machine.pop(2) if name == "SETITEM" else machine.to_mark())
    elif name in ("APPEND", "APPENDS"):
        machine.append(machine.pop(1) if name == "APPEND" else machine.to_mark())
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        stack.append(_known(*(argument.split(" ", 1) if name == "GLOBAL" else machine.pop(2))))
    elif name == "REDUCE":
        stack.append(_recognised(*machine.pop(2)))
    elif name == "BUILD":
        (state,) = machine.pop(1)
        if not isinstance(stack[-1], (_Array, _Type)):
            raise _Refused("the state of what is no numpy array")
        stack[-1].set(state)
    else:
        raise _Refused(f"the instruction {name}")


def _known(module: Any, name: Any) -> _Name:
    """The global, if a pickle of arrays may name it. Raises: _Refused."""
    array = module in _ARRAY_MODULES and name in ("ndarray", "dtype", "_reconstruct", "_frombuffer")
    if array or (module, name) in _OTHER_NAMES:
        return _Name(module, name)
    raise _Refused(f"the name {module!s:.60}.{name!s:.60}")


def _recognised(function: Any, arguments: Any) -> Any:
    """The result of a call that a pickle of arrays may contain. Raises: _Refused for others."""
    name = function.name if isinstance(function, _Name) else None
    if not isinstance(arguments, tuple):
        raise _Refused("a call without arguments")
    if name == "dtype" and arguments and isinstance(arguments[0], (str, bytes)):
        code = _text(arguments[0])
        order = code[0] if code[:1] in ("<", ">", "=", "|") else "="
        if code.lstrip("<>=|") not in _KINDS:
            raise _Refused(f"an array of type {code!r:.40}")
        return _Type(code.lstrip("<>=|"), order)
    if name == "_reconstruct" and arguments and arguments[0] in [_Name(m, "ndarray") for m in _ARRAY_MODULES]:
        return _Array()
    if name == "_frombuffer" and len(arguments) == 4 and isinstance(arguments[1], _Type):
        return _Array(_array(arguments[0], arguments[1], arguments[2], arguments[3]))
    if name == "encode" and arguments[1:] in (("latin1",), ("latin-1",)) and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")
    if name in ("OrderedDict", "bytes") and arguments == ():
        return {} if name == "OrderedDict" else b""
    raise _Refused(f"a call of {name or 'an unknown function'} with {len(arguments)} arguments")


def _array(content: Any, kind: _Type, shape: Any, order: Any) -> np.ndarray:
    if isinstance(content, str):  # a pickle of Python 2
        content = content.encode("latin-1")
    sizes = isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not sizes or not isinstance(content, (bytes, bytearray)) or order not in ("C", "F"):
        raise _Refused("a numpy array that is not made of numbers")
    dtype = kind.numpy()
    if math.prod(shape) * dtype.itemsize != len(content):
        raise _Refused(f"an array of shape {list(shape)} and type {dtype} in {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="), copy=False)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _finished(value: Any, around: tuple[int, ...], done: dict[int, Any]) -> Any:
    """The value with `_Array` objects replaced by arrays. Raises: _Refused for a value that contains itself.

    Args:
        around: ids of the enclosing containers.
        done: results by id, so that shared parts are visited once.
    """
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused("an array without content")
        return value.value
    if value is _MARK or isinstance(value, (_Name, _Type)):
        raise _Refused("a bare name")
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) in around or len(around) > 20:
        raise _Refused("containers inside each other without end")
    if id(value) not in done:
        inner = (*around, id(value))
        if isinstance(value, dict):
            done[id(value)] = {key: _finished(item, inner, done) for key, item in value.items()}
        else:
            done[id(value)] = type(value)(_finished(item, inner, done) for item in value)
    return done[id(value)]
