"""Reads pickles in which others publish networks, and executes nothing in them.

A pickle is a program for a small machine with a stack, whose instructions may import anything and call it. Python's own
machine is hard to restrict: even if `find_class` allows little, it sets attributes of whatever the program has found,
looks names up in copyreg's registry, and allocates what the program asks for. So this is another machine. It knows the
instructions that plain data need, and of all names those in `BUILDERS` and `TYPES`, which stand for functions of this
file or for nothing at all: it never imports, never sets an attribute of a foreign object, never compiles text. Every
other instruction and name is refused.

Numbers become numpy arrays that are views of the file's bytes; an object becomes a `Record` of its class's name and its
attributes. What torch nests in it (a pickle with a tensor's bytes behind it, or a zip file of the two) goes through the
same machine, which then knows no builder at all. The formats are those of `torch.save` (serialization.py), numpy
(`ndarray.__reduce__`) and Python's pickletools.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 4 << 30  # of a file; the largest network published is a tenth of it
MOST_STEPS = 2_000_000  # instructions of a program; published networks have some ten thousand
MOST_AXES = 8
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch's format from before its zip files

PLAIN = (str, int, float, bool, type(None), bytes)  # keys: hashing deeper ones could exhaust the interpreter's stack

STORAGES = {
    f"torch.{name}Storage": np.dtype(code)
    for name, code in {
        "Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1",
        "Byte": "u1", "Bool": "?",
    }.items()
}  # fmt: skip
DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
TYPES = {*STORAGES, "numpy.ndarray"}  # names that are arguments only


@dataclass(frozen=True)
class Name:
    """Something outside the file, by its dotted name."""

    dotted: str


@dataclass(eq=False, repr=False)
class Record:
    """An object that is not rebuilt: its class's name and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class Array:
    """A tensor or an array; read-only. (None until its state has come.)"""

    values: np.ndarray | None = None


@dataclass(eq=False)
class _Dtype:
    """Of numpy's numbers, without the byte order that comes behind it."""

    dtype: np.dtype


@dataclass(eq=False)
class _Storage:
    """The numbers behind a tensor, [n]."""

    values: np.ndarray


def load(path: Path) -> Any:
    """What a pickle holds: dict, list, tuple, set, str, int, float, bool, bytes, None, and `Array`, `Record`, `Name`.

    Containers of other classes come as plain ones. There may be cycles in it, and the same object many times.

    Raises:
        ValueError: it is no whole pickle, holds anything else, or asks for more than there can be in such a file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than any file of networks")
    try:
        return loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"cannot convert {path}: {error}") from None


def loads(data: bytes) -> Any:
    """As `load`, of the bytes of a file."""
    return _Machine(io.BytesIO(data), 4 * len(data), builds=True).run()


def refusal(name: str) -> ValueError:
    """For a name or instruction that a file holds, without control characters and the rest of long names."""
    shown = ascii(name[:200])[1:-1] + "..." * (len(name) > 200)
    return ValueError(f"{shown} is not among what such a file may hold")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the file is damaged, or no pickle of networks ({what})")


class _Machine:
    """Runs one program.

    Args:
        stream: the program, from where it begins; what is behind it is left unread.
        size: bytes that builders may copy altogether. (A builder called a million times could copy as often.)
        builds: whether there are any builders.
        persistent: what stands for an object that lies elsewhere, by its description; None: there is none.
    """

    def __init__(
        self, stream: io.BytesIO, size: int, builds: bool, persistent: Callable[[Any], Any] | None = None
    ) -> None:
        self.stream, self.left, self.builds, self.persistent = stream, size, builds, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the program leaves. Raises ValueError."""
        instructions = pickletools.genops(self.stream)
        for _ in range(MOST_STEPS):
            try:
                opcode, argument, _ = next(instructions)
            except ValueError as error:
                raise ValueError(f"the file is damaged, or no pickle ({error})") from None
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise ValueError(f"the file has more than {MOST_STEPS:,} instructions")

    def _step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            if type(argument) is int:
                _require(argument.bit_length() < 128, "a number of many digits")
            self.stack.append(argument)
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        else:
            said = isinstance(argument, str) or (type(argument) is int and argument.bit_length() < 64)
            raise refusal(f"{name} {argument}" if said else name)

    # The stack.

    def _pop(self) -> Any:
        _require(len(self.stack) > (self.marks[-1] if self.marks else 0), "its stack is empty")
        return self.stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self.stack.append(value)
        return value

    def _above_mark(self) -> list[Any]:
        _require(bool(self.marks), "a mark is missing")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _tuple(self, n: int | None) -> None:
        values = self._above_mark() if n is None else [self._pop() for _ in range(n)][::-1]
        self.stack.append(tuple(values))

    def _put(self, key: int) -> None:
        self.memo[key] = self._top()

    def _get(self, key: int) -> None:
        _require(key in self.memo, "it refers to what has not been")
        self.stack.append(self.memo[key])

    # Containers.

    def _extend(self, values: list[Any]) -> None:
        into = self._top()
        _require(type(into) is list, "it appends to what is no list")
        into.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        into = self._top()
        _require(type(into) is dict and len(values) % 2 == 0, "it sets items of what is no dictionary")
        into.update(zip(_plain(values[::2]), values[1::2], strict=True))

    def _add_items(self, values: list[Any]) -> None:
        into = self._top()
        _require(type(into) is set, "it adds to what is no set")
        into.update(_plain(values))

    # Names and what is made of them.

    def _name(self, dotted: str) -> None:
        if dotted not in TYPES and not (self.builds and dotted in BUILDERS):
            raise refusal(dotted)
        self.stack.append(Name(dotted))

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise refusal("STACK_GLOBAL of what is no name")
        self._name(f"{module}.{name}")

    def _call(self) -> None:
        arguments, callee = self._pop(), self._pop()
        if not (self.builds and isinstance(callee, Name) and callee.dotted in BUILDERS):
            raise refusal(f"a call of {callee.dotted if isinstance(callee, Name) else type(callee).__name__}")
        _require(type(arguments) is tuple, f"the arguments of {callee.dotted}")
        least, most, builder = BUILDERS[callee.dotted]
        _require(least <= len(arguments) <= most, f"{len(arguments)} arguments of {callee.dotted}")
        self.stack.append(builder(self, *arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            _require(type(state) is dict and all(type(key) is str for key in state), f"the attributes of {target.kind}")
            self.spend(len(state))
            target.state.update(state)
        elif isinstance(target, Array) and target.values is None:
            target.values = _numpy_array(state)
        elif isinstance(target, _Dtype):
            _set_byte_order(target, state)
        else:
            raise refusal(f"BUILD of a {type(target).__name__}")

    def _persist(self) -> None:
        description = self._pop()
        if self.persistent is None:
            raise refusal("BINPERSID")
        self.stack.append(self.persistent(description))

    def spend(self, n: int) -> None:
        """Notes n bytes or elements copied. Raises ValueError if that is more than the file can be in need of."""
        self.left -= n
        _require(self.left >= 0, "it asks for more memory than it has bytes")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "MARK": lambda machine, argument: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, argument: machine._tuple(None),
    "TUPLE1": lambda machine, argument: machine._tuple(1),
    "TUPLE2": lambda machine, argument: machine._tuple(2),
    "TUPLE3": lambda machine, argument: machine._tuple(3),
    "APPEND": lambda machine, argument: machine._extend([machine._pop()]),
    "APPENDS": lambda machine, argument: machine._extend(machine._above_mark()),
    "SETITEM": lambda machine, argument: machine._set_items([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, argument: machine._set_items(machine._above_mark()),
    "ADDITEMS": lambda machine, argument: machine._add_items(machine._above_mark()),
    "FROZENSET": lambda machine, argument: machine.stack.append(set(_plain(machine._above_mark()))),
    "BINPUT": lambda machine, argument: machine._put(argument),
    "LONG_BINPUT": lambda machine, argument: machine._put(argument),
    "MEMOIZE": lambda machine, argument: machine._put(len(machine.memo)),
    "BINGET": lambda machine, argument: machine._get(argument),
    "LONG_BINGET": lambda machine, argument: machine._get(argument),
    "GLOBAL": lambda machine, argument: machine._name(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, argument: machine._stack_name(),
    "REDUCE": lambda machine, argument: machine._call(),
    "NEWOBJ": lambda machine, argument: machine._call(),
    "BUILD": lambda machine, argument: machine._build(),
    "BINPERSID": lambda machine, argument: machine._persist(),
}


def _plain(keys: list[Any]) -> list[Any]:
    """`keys`. Raises ValueError unless all are of `PLAIN` types."""
    for key in keys:
        if type(key) not in PLAIN:
            raise refusal(f"a key of type {type(key).__name__}")
    return keys


def _counts(values: Any, what: str) -> tuple[int, ...]:
    """A shape, or the strides of one."""
    _require(type(values) is tuple and len(values) <= MOST_AXES, what)
    _require(all(type(n) is int and n >= 0 for n in values), what)
    return values


# Builders: (machine, arguments of the call) -> what stands for the object.


def _container(machine: _Machine) -> dict[Any, Any]:
    return {}


def _set(machine: _Machine, values: Any = ()) -> set[Any]:
    _require(type(values) in (list, tuple), "the elements of a set")
    machine.spend(len(values))
    return set(_plain(values))


def _no_bytes(machine: _Machine) -> bytes:
    """As protocol 2 writes them."""
    return b""


def _encoded(machine: _Machine, text: Any, encoding: Any) -> bytes:
    """The bytes that protocol 2 writes as text."""
    _require(type(text) is str and encoding == "latin1", "the arguments of _codecs.encode")
    machine.spend(len(text))
    return text.encode("latin1")


def _network(machine: _Machine) -> Record:
    return Record("dnnlib.tflib.network.Network")


def _persistent_object(machine: _Machine, meta: Any) -> Record:
    """An object of the persistence module: {"class_name", "state", "module_src", ...}. Its source code stays text."""
    what = "the description of a persistent object"
    _require(type(meta) is dict, what)
    name, state = meta.get("class_name"), meta.get("state")
    _require(type(name) is str and type(state) is dict and all(type(key) is str for key in state), what)
    machine.spend(len(state))
    return Record(name, state)


def _first(machine: _Machine, value: Any, *_rest: Any) -> Array:
    """A parameter is its tensor."""
    _require(isinstance(value, Array), "a parameter that is no tensor")
    return value


def _tensor(machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Array:
    """A view of a storage, which must reach nowhere beyond it and have no more elements than it."""
    _require(isinstance(storage, _Storage), "a tensor without a storage")
    size, stride = _counts(size, "a tensor's size"), _counts(stride, "a tensor's strides")
    _require(len(size) == len(stride) and type(offset) is int and offset >= 0, "a tensor's strides")
    values = storage.values
    if math.prod(size) == 0:
        _require(max(size) <= len(values) + 1, "a tensor's size")
        return Array(np.zeros(size, values.dtype))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    _require(last < len(values) and math.prod(size) <= len(values), "a tensor reaches beyond its storage")
    width = values.itemsize
    return Array(np.ndarray(size, values.dtype, values, offset * width, [step * width for step in stride]))


def _storage(machine: _Machine, data: Any) -> _Storage:
    """The storage in what `torch.save` made of it."""
    _require(type(data) is bytes, "a storage that is no bytes")
    machine.spend(len(data))
    return _from_zip(machine, data) if data.startswith(b"PK\x03\x04") else _from_legacy(data)


@dataclass(frozen=True)
class _Stored:
    """The description of a storage whose bytes lie elsewhere."""

    dtype: np.dtype
    key: str
    n: int


def _stored(description: Any) -> _Stored:
    """Of ("storage", type, key, device, number of elements[, view])."""
    what = "the description of a storage"
    _require(type(description) is tuple and len(description) in (5, 6) and description[0] == "storage", what)
    fields: list[Any] = list(description)
    kind, key, n = fields[1], fields[2], fields[4]
    if not (isinstance(kind, Name) and kind.dotted in STORAGES):
        raise refusal(f"a storage of {kind.dotted if isinstance(kind, Name) else type(kind).__name__}")
    _require(type(key) is str and type(n) is int and n >= 0 and fields[5:] in ([], [None]), what)
    return _Stored(STORAGES[kind.dotted], key, n)


def _nested(stream: io.BytesIO) -> Any:
    """What a program within a storage leaves: plain data, or a `_Stored`."""
    return _Machine(stream, 0, builds=False, persistent=_stored).run()


def _from_legacy(data: bytes) -> _Storage:
    """Magic number, version, about the machine, the storage, the keys; then the number of elements and their bytes."""
    stream, what = io.BytesIO(data), "a storage of another format"
    _require(_nested(stream) == MAGIC and _nested(stream) == VERSION, what)
    about, stored, keys = _nested(stream), _nested(stream), _nested(stream)
    _require(type(about) is dict and about.get("little_endian") is True, what)
    _require(isinstance(stored, _Stored) and keys == [stored.key], what)
    begin = stream.tell() + 8
    size = stored.n * stored.dtype.itemsize
    _require(int.from_bytes(data[begin - 8 : begin], "little") == stored.n and begin + size <= len(data), what)
    return _Storage(np.frombuffer(data, stored.dtype, stored.n, begin))


def _from_zip(machine: _Machine, data: bytes) -> _Storage:
    """FOLDER/data.pkl, which describes the storage, and FOLDER/data/KEY, its bytes; nothing is compressed."""
    what = "a storage of another format"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {each.filename.partition("/")[2]: each for each in archive.infolist()}
            for each in entries.values():
                _require(each.compress_type == zipfile.ZIP_STORED and each.file_size <= len(data), what)
            _require("data.pkl" in entries, what)
            machine.spend(entries["data.pkl"].file_size)
            stored = _nested(io.BytesIO(archive.read(entries["data.pkl"])))
            _require(isinstance(stored, _Stored) and f"data/{stored.key}" in entries, what)
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            entry = entries[f"data/{stored.key}"]
            machine.spend(entry.file_size)
            content = archive.read(entry)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError, OverflowError, OSError) as error:
        raise ValueError(f"the file is damaged ({what}: {error})") from None
    _require(order == b"little" and len(content) == stored.n * stored.dtype.itemsize, what)
    return _Storage(np.frombuffer(content, stored.dtype))


def _empty_array(machine: _Machine, kind: Any, shape: Any, code: Any) -> Array:
    """What numpy's state comes to."""
    if kind != Name("numpy.ndarray"):
        raise refusal("numpy's _reconstruct of another type than numpy.ndarray")
    return Array()


def _numpy_array(state: Any) -> np.ndarray:
    """Of (version, shape, dtype, whether in Fortran's order, bytes)."""
    what = "the state of a numpy array"
    _require(type(state) is tuple and len(state) == 5 and state[0] == 1, what)
    return _from_buffer(state[4], state[2], state[1], "F" if state[3] else "C", what)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, what: str) -> np.ndarray:
    _require(type(data) in (bytes, bytearray) and isinstance(dtype, _Dtype) and order in ("C", "F"), what)
    shape, dtype = _counts(shape, what), dtype.dtype
    _require(math.prod(shape) * dtype.itemsize == len(data), what)
    _require(max(shape, default=0) < 2**31, what)
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _protocol_5_array(machine: _Machine, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array(_from_buffer(data, dtype, shape, order, "a numpy array"))


def _scalar(machine: _Machine, dtype: Any, data: Any) -> bool | int | float:
    """A numpy scalar as a number of Python's."""
    what = "a numpy scalar"
    _require(isinstance(dtype, _Dtype) and type(data) is bytes and len(data) == dtype.dtype.itemsize, what)
    return np.frombuffer(data, dtype.dtype)[0].item()


def _dtype(machine: _Machine, code: Any, align: Any, copy: Any) -> _Dtype:
    if type(code) is not str or code not in DTYPES:
        raise refusal(f"numpy.dtype({code!r})" if type(code) is str else "numpy.dtype of what is no name")
    return _Dtype(np.dtype(code))


def _set_byte_order(target: _Dtype, state: Any) -> None:
    """Of (version, byte order, subarray, names, fields, size, alignment, flags); numbers have none of the rest."""
    _require(type(state) is tuple and len(state) >= 2 and state[1] in ("<", ">", "|", "="), "a numpy dtype")
    _require(all(x is None for x in state[2:5]), "a numpy dtype with fields")
    target.dtype = np.dtype(f"{state[1]}{target.dtype.str[1:]}")


# Least and greatest number of arguments, and the builder. (torch's last one, where there is one, is empty.)
BUILDERS: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "collections.OrderedDict": (0, 0, _container),
    "dnnlib.util.EasyDict": (0, 0, _container),
    "dnnlib.tflib.network.Network": (0, 0, _network),
    "torch_utils.persistence._reconstruct_persistent_obj": (1, 1, _persistent_object),
    "torch._utils._rebuild_tensor_v2": (6, 7, _tensor),
    "torch._utils._rebuild_parameter": (3, 3, _first),
    "torch._utils._rebuild_parameter_with_state": (4, 4, _first),
    "torch.storage._load_from_bytes": (1, 1, _storage),
    "numpy.dtype": (3, 3, _dtype),
    "_codecs.encode": (2, 2, _encoded),
    "__builtin__.bytes": (0, 0, _no_bytes),
    **{f"{module}.{name}": (0, 1, _set) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    **{f"{core}.multiarray._reconstruct": (3, 3, _empty_array) for core in ("numpy.core", "numpy._core")},
    **{f"{core}.multiarray.scalar": (2, 2, _scalar) for core in ("numpy.core", "numpy._core")},
    **{f"{core}.numeric._frombuffer": (4, 4, _protocol_5_array) for core in ("numpy.core", "numpy._core")},
}
