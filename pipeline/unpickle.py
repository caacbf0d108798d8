"""What a pickle says, without running it.

Python's unpickler imports and calls what a file names. This is a stack machine of our own over the instructions that
`pickletools` parses: it makes plain containers and places of tensors, imports nothing and calls nothing. Whatever else
a file names, a class or a function, becomes an inert `Record`; so a whole pickled module can be read for its weights.

It does not know where the numbers of the tensors lie, nor which model they are of.
"""

import math
import pickletools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_NAME_LIMIT = 256  # letters
_TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_KEYS = (str, int, float, type(None))
_LARGE = 2**48


class WeightsError(ValueError):
    """A file of weights that cannot be used, or that asks for more than tensors; says why and what to do."""


@dataclass(frozen=True)
class Global:
    """A class or function that a file names; nothing is imported."""

    name: str


@dataclass(eq=False)
class Record:
    """What a file would have made of a class or function: what it is of, and all it was to be made from."""

    of: Any
    arguments: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """Numbers that lie in the file under a key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, numbers: Tensor) -> Tensor:
        """The tensor, with memory of its own. numbers: those of the whole storage."""
        return numbers.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def run(file: Any, limit: int) -> Any:
    """What the pickle at a file's position says: dicts, lists, tuples, numbers, words, `StoredTensor`s and `Record`s.

    Sets and frozen sets become lists and tuples. limit: in bytes. Raises WeightsError where it is longer and for what
    is forged, or whatever a damaged pickle makes of parsing.
    """
    end = file.tell() + limit
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for opcode, argument, place in pickletools.genops(file):  # type: ignore[arg-type]
        if place is not None and place > end:
            raise WeightsError(f"its pickle has more than {limit} bytes; save the state dict alone")
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case name if name in _LITERALS:
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = _TUPLES.index(opcode.name)
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            case "TUPLE" | "LIST" | "FROZENSET":
                taken = pop_mark()
                stack.append(taken if opcode.name == "LIST" else tuple(taken))
            case "DICT":
                stack.append(_set({}, pop_mark()))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS" | "ADDITEMS":
                taken = [stack.pop()] if opcode.name == "APPEND" else pop_mark()
                (stack[-1].items if isinstance(stack[-1], Record) else stack[-1]).extend(taken)
            case "SETITEM" | "SETITEMS":
                taken = [stack.pop(), stack.pop()][::-1] if opcode.name == "SETITEM" else pop_mark()
                _set(stack[-1], taken)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Global(str(argument).replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if len(name) + len(module) > _NAME_LIMIT:  # a memo could repeat it without end
                    raise WeightsError(f"it names a class in {len(name) + len(module)} letters; download it again")
                stack.append(Global(f"{module:s}.{name:s}"))
            case "REDUCE" | "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                stack.append(_make(made, arguments))
            case "NEWOBJ_EX":
                stack.pop()
                arguments, made = stack.pop(), stack.pop()
                stack.append(Record(made, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Record):
                    stack[-1].state = state  # of a dict or a tensor: attributes, which nothing here reads
            case "BINPERSID":
                stack.append(_persistent(stack.pop()))
            case other:
                raise WeightsError(f"it uses the instruction {other}, which torch never writes; download it again")
    raise WeightsError("its pickle has no end; copy or download it again")


def _set(target: Any, taken: list[Any]) -> Any:
    pairs = list(zip(taken[::2], taken[1::2], strict=True))
    if isinstance(target, Record):
        target.items.extend(pairs)
        return target
    if not isinstance(target, dict):
        raise WeightsError("it sets items of what is no dict; download it again")
    for key, value in pairs:
        # The hash of nested tuples may take forever, so a key that is neither word nor number is left out.
        if isinstance(key, (*_KEYS, Global)):
            target[key] = value
    return target


def _make(made: Any, arguments: Any) -> Any:
    """What a call would give: an empty dict, a tensor, a parameter's tensor, or a record."""
    match made:
        case Global("collections.OrderedDict" | "collections.defaultdict"):
            return {}
        case Global("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2"):
            return _view(*arguments[:4])
        case Global("torch._utils._rebuild_parameter") if isinstance(arguments[0], StoredTensor):
            return arguments[0]
    return Record(made, arguments)


def _persistent(persistent: Any) -> Any:
    """What lies outside the pickle: a storage, or the class of a module beside its source, which is not read."""
    if persistent[0] == "module":
        return persistent[1]
    word, kind, key, _, numel = persistent[:5]
    if word != "storage" or not isinstance(kind, Global) or kind.name not in _STORAGES:
        raise WeightsError("it refers to what is no storage of numbers; save the state dict alone")
    if not isinstance(key, str) or not key.isalnum() or type(numel) is not int or not 0 <= numel < _LARGE:
        raise WeightsError("a storage has no sound key or size; copy or download it again")
    if len(persistent) > 5 and persistent[5] is not None:
        raise WeightsError("its storages are views of others, as before torch 0.4; save it again with a later torch")
    return Storage(key, _STORAGES[kind.name], numel)


def _view(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    numbers = [offset, *shape, *stride]
    if (
        not isinstance(storage, Storage)
        or any(type(n) is not int or not 0 <= n < _LARGE for n in numbers)
        or len(shape) > 8
    ):
        raise WeightsError("a tensor has no storage or no sizes; download it again")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    if math.prod(shape) > storage.numel or (math.prod(shape) and last >= storage.numel):
        raise WeightsError(f"a tensor of shape {shape!r:.60} does not lie within its {storage.numel} numbers")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))
