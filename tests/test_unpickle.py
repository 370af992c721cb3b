"""training/unpickle.py: what such files hold is read as it was written; nothing else is, and nothing is executed."""

import builtins
import copyreg
import functools
import gzip
import importlib.util
import io
import operator
import os
import pathlib
import pickle
import random
import subprocess
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from styleloom.training import unpickle
from styleloom.training.unpickle import Array, Record, load, loads

_spec = importlib.util.spec_from_file_location("foreign_pickles", Path(__file__).with_name("foreign_pickles.py"))
assert _spec is not None
assert _spec.loader is not None
foreign = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(foreign)


def same(a: Any, b: Any) -> bool:
    """Whether what was read is what was written, to the type."""
    if isinstance(b, torch.Tensor):
        b = b.detach().numpy()
    if isinstance(b, np.ndarray):
        assert isinstance(a, Array)
        assert a.values is not None
        assert a.values.dtype == b.dtype
        return a.values.shape == b.shape and np.array_equal(a.values, b)
    return type(a) is type(b) and a == b


# What is read.

PLAIN = {
    "a": 1, "b": [1.5, None, True, False, -3, 2**40, -(2**70)], "c": ("x" * 300, b"y" * 300, "ü", b"\x00\xff"), "d": {},
    "e": set(), "f": {"x", "y"}, "g": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 5: "int", None: 0, (): 0,
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data(protocol):
    data = {key: x for key, x in PLAIN.items() if key != ()}
    assert loads(pickle.dumps(data, protocol)) == data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype="f4").reshape(2, 3, 4), np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3, 2)),
        np.arange(4, dtype=">i2"), np.array(2.5, "f2"), np.zeros((0, 3), "u1"), np.array([True, False]),
    ],
    ids=str,
)  # fmt: skip
def test_numpy_arrays(array, protocol):
    (read,) = loads(pickle.dumps([array], protocol))
    assert same(read, array)
    assert not read.values.flags.writeable or protocol == 5


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("scalar", [np.float64(0.1), np.float32(0.1), np.int64(-7), np.bool_(True), np.float16(2)])
def test_numpy_scalars_become_numbers(scalar, protocol):
    (read,) = loads(pickle.dumps([scalar], protocol))
    assert same(read, scalar.item())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)  # fmt: skip
def test_tensors(dtype, protocol):
    x = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    views = [x, x.permute(2, 0, 1), x[1, 1:, ::2], x[0, 0, 0], x[:0]]
    read = loads(pickle.dumps(views, protocol))
    assert all(same(a, b) for a, b in zip(read, views, strict=True))


def test_channels_last_parameters():
    x = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), requires_grad=False)
    assert same(loads(pickle.dumps(x)), x)


def zipped(x: torch.Tensor, compression: int = zipfile.ZIP_STORED, order: bytes = b"little") -> bytes:
    """A pickle of a tensor whose storage is a zip file, as `torch.save` writes them."""
    stream, again = io.BytesIO(), io.BytesIO()
    torch.save(x.storage(), stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(again, "w", compression) as new:
        for each in old.namelist():
            new.writestr(each, order if each.endswith("byteorder") else old.read(each))
    return calling(
        "torch._utils", "_rebuild_tensor_v2", (Storage(again.getvalue()), 0, tuple(x.shape), x.stride(), 0, {})
    )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_that_are_zip_files():
    x = torch.randn(3, 5)
    assert same(loads(zipped(x)), x)
    with pytest.raises(ValueError, match="a storage of another format"):
        loads(zipped(x, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="a storage of another format"):
        loads(zipped(x, order=b"big"))


def test_classes_of_the_published_code():
    data = {
        "G": foreign.Persistent("Generator", {"_parameters": {"weight": torch.nn.Parameter(torch.ones(2))}, "n": 1}),
        "kwargs": foreign.EasyDict(a=foreign.EasyDict(b=1)),
        "TF": foreign.Network(version=5, variables=[("x", np.ones(2, "f4"))]),
        "ordered": OrderedDict(x=1),
    }
    read = loads(foreign.dump(data))
    assert read["kwargs"] == {"a": {"b": 1}}
    assert read["ordered"] == {"x": 1}
    assert isinstance(read["G"], Record)
    assert (read["G"].kind, read["G"].state["n"]) == ("Generator", 1)
    assert same(read["G"].state["_parameters"]["weight"], np.ones(2, "f4"))
    assert read["TF"].kind == "dnnlib.tflib.network.Network"
    assert same(read["TF"].state["variables"][0][1], np.ones(2, "f4"))


def test_source_code_in_a_file_stays_text():
    """The writer puts `raise SystemExit` where the published files have their modules' sources."""
    data = foreign.dump([foreign.Persistent("X", {}), foreign.Network(version=5, build_module_src=foreign.SOURCE)])
    assert foreign.SOURCE.encode() in data
    _, network = loads(data)
    assert network.state["build_module_src"] == foreign.SOURCE


# What is refused. Payloads create the file `mark`; most are also run as Python would, to see that they are alive.


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> Any:
        parts = (self.function, self.arguments)
        return parts if self.state is None else (*parts, self.state)


class Storage:
    """Pickled as a tensor's storage of these bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.data,)


def calling(module: str, name: str, arguments: Any) -> bytes:
    """A pickle that calls something by its name."""
    head = f"\x80\x02c{module}\n{name}\n".encode("latin1")
    return head + pickle.dumps(arguments, 2)[2:-1] + b"R."


def text(s: str) -> bytes:
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def touch(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()"


def legacy_storage(mark: Path, function: Any = eval) -> bytes:
    """The bytes of a storage in torch's old format, whose object does something else."""
    parts = [unpickle.MAGIC, unpickle.VERSION, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(x, 2) for x in [*parts, Call(function, touch(mark)), ["0"]]) + bytes(8)


def zip_storage(mark: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Call(eval, touch(mark)), 2))
    return stream.getvalue()


def object_array(mark: Path) -> bytes:
    return pickle.dumps(np.array([Call(eval, touch(mark))], dtype=object), 4)


def storage(n: int) -> Any:
    """Of n floats."""
    return torch.storage.TypedStorage(
        wrap_storage=torch.zeros(n).untyped_storage(), dtype=torch.float32, _internal=True
    )


def hooked_tensor(mark: Path) -> bytes:
    """A tensor whose hooks, an argument of its builder, are made by a call."""
    hooks = Call(eval, touch(mark))
    return pickle.dumps(Call(_rebuild_tensor_v2, storage(1), 0, (1,), (1,), False, hooks))


def extension(mark: Path) -> bytes:
    return b"\x80\x02\x82\xf0" + pickle.dumps((f"touch '{mark}'",), 2)[2:-1] + b"R."


MALICIOUS: dict[str, tuple[Any, str]] = {
    "os.system": (lambda m: pickle.dumps(Call(os.system, f"touch '{m}'"), 4), f"{os.name}.system"),
    "os.system, old protocol": (lambda m: pickle.dumps(Call(os.system, f"touch '{m}'"), 2), f"{os.name}.system"),
    "os.system, text protocol": (lambda m: pickle.dumps(Call(os.system, f"touch '{m}'"), 0), f"{os.name}.system"),
    "subprocess": (lambda m: pickle.dumps(Call(subprocess.call, ["touch", str(m)])), "subprocess.call"),
    "eval": (lambda m: pickle.dumps(Call(eval, touch(m))), "builtins.eval"),
    "exec": (lambda m: pickle.dumps(Call(exec, touch(m))), "builtins.exec"),
    "compile": (lambda m: pickle.dumps(Call(exec, Call(compile, touch(m), "x", "exec"))), "builtins.exec"),
    "import": (lambda m: pickle.dumps([Call(__import__, "os"), Call(eval, touch(m))]), "builtins.__import__"),
    "open": (lambda m: pickle.dumps(Call(open, str(m), "w")), "io.open"),
    "getattr": (lambda m: pickle.dumps(Call(pathlib.Path.touch, m), 2), "__builtin__.getattr"),
    "a dotted name": (
        lambda m: b"\x80\x04" + text("pathlib") + text("Path.touch") + b"\x93" + pickle.dumps((m,), 4)[11:-1] + b"R.",
        "pathlib.Path.touch",
    ),
    "attrgetter": (
        lambda m: pickle.dumps(Call(operator.methodcaller("touch"), m)), "operator.methodcaller",
    ),
    "partial": (lambda m: pickle.dumps(Call(functools.partial(eval, touch(m)))), "functools.partial"),
    "map": (lambda m: pickle.dumps(Call(list, Call(map, eval, [touch(m)]))), "builtins.list"),
    "numpy.load": (lambda m: pickle.dumps([Call(np.load, str(m)), Call(eval, touch(m))]), "numpy.load"),
    "torch.load": (
        lambda m: pickle.dumps([Call(torch.load, str(m)), Call(eval, touch(m))]),
        "torch.serialization.load",
    ),
    "a storage's object": (lambda m: pickle.dumps(Storage(legacy_storage(m))), "__builtin__.eval"),
    "a storage's object in a zip file": (lambda m: pickle.dumps(Storage(zip_storage(m))), "__builtin__.eval"),
    "a storage in a storage": (
        lambda m: pickle.dumps(Storage(legacy_storage(m, torch.storage._load_from_bytes))),
        "torch.storage._load_from_bytes",
    ),
    "an array of objects": (object_array, r"numpy.dtype\('O8'\)"),
    "a tensor's hooks": (hooked_tensor, "builtins.eval"),
    "copyreg's registry": (extension, "EXT1 240"),
    "INST": (lambda m: b"(" + text(touch(m)) + b"ibuiltins\neval\n.", "INST builtins eval"),
    "OBJ": (lambda m: b"(cbuiltins\neval\n" + text(touch(m)) + b"o.", "builtins.eval"),
    "NEWOBJ": (
        lambda m: b"\x80\x02csubprocess\nPopen\n" + pickle.dumps((["touch", str(m)],), 2)[2:-1] + b"\x81.",
        "subprocess.Popen",
    ),
    "NEWOBJ_EX": (
        lambda m: b"\x80\x04ccollections\nOrderedDict\n)}\x92" + pickle.dumps(Call(eval, touch(m)), 4)[11:-1] + b".",
        "NEWOBJ_EX",
    ),
    "a persistent number": (lambda m: b"\x80\x02K\x01Q" + pickle.dumps(Call(eval, touch(m)), 2)[2:], "BINPERSID"),
    "a persistent name": (lambda m: b"Peval\n.", "PERSID eval"),
    "attributes of a class": (
        lambda m: b"\x80\x02cdnnlib.util\nEasyDict\nN}" + text("__init__") + b"cbuiltins\nset\ns\x86b.",
        "BUILD of a Name",
    ),
    "slots of an object": (
        lambda m: b"\x80\x02cdnnlib.tflib.network\nNetwork\n)\x81N}" + text("kind") + text("x") + b"s\x86b.",
        "the attributes of dnnlib.tflib.network.Network",
    ),
    "attributes of a dictionary": (
        lambda m: b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + b"K\x01sb.", "BUILD of a dict",
    ),
    "a call of a type": (lambda m: b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
    "a call of text": (lambda m: b"\x80\x02" + text("os.system") + b")R.", "a call of str"),
    "an encoding": (lambda m: calling("_codecs", "encode", ("x", "rot13")), "_codecs.encode"),
    "run_path": (lambda m: calling("runpy", "run_path", (str(m),)), "runpy.run_path"),
    "our own module": (lambda m: calling("styleloom.scripts.cli", "main", ()), "styleloom.scripts.cli.main"),
    "main": (lambda m: calling("__main__", "anything", ()), "__main__.anything"),
    "control characters": (lambda m: calling("os\x1b[2J", "system", ("x",)), r"os\\x1b\[2J.system"),
}  # fmt: skip

# Those that Python's own machine carries out, creating the file.
ALIVE = [
    "os.system", "os.system, old protocol", "os.system, text protocol", "subprocess", "eval", "exec", "compile",
    "open", "getattr", "a dotted name", "attrgetter", "partial", "map", "an array of objects", "copyreg's registry",
    "INST", "OBJ",
]  # fmt: skip


@pytest.fixture
def registry():
    """EXT1 240 is os.system."""
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("name", ALIVE)
@pytest.mark.usefixtures("registry")
@pytest.mark.filterwarnings("ignore")
def test_malicious_pickles_are_alive(name, tmp_path):
    result = pickle.loads(MALICIOUS[name][0](tmp_path / "mark"))
    give_up = time.monotonic() + 20
    while not (tmp_path / "mark").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert (tmp_path / "mark").exists()
    if isinstance(result, subprocess.Popen):
        result.wait()


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.usefixtures("registry")
def test_malicious_pickles_are_refused_by_name_and_not_executed(name, tmp_path, monkeypatch):
    payload, culprit = MALICIOUS[name]
    data = payload(tmp_path / "mark")
    called = []
    for function in ("eval", "exec", "compile", "open", "__import__"):
        its = getattr(builtins, function)
        spy = functools.partial(lambda its, name, *a, **k: (called.append((name, *a)), its(*a, **k))[1], its, function)
        monkeypatch.setattr(builtins, function, spy)
    with pytest.raises(ValueError, match=culprit) as refusal:
        loads(data)
    monkeypatch.undo()
    assert not [call for call in called if call[0] != "__import__" or str(call[1]).startswith(("os", "subp", "runpy"))]
    assert not (tmp_path / "mark").exists()
    assert str(refusal.value).isprintable()


def test_there_are_many_malicious_pickles():
    assert len(MALICIOUS) >= 30
    assert len({payload(Path("/mark")) for payload, _ in MALICIOUS.values()}) == len(MALICIOUS)


@pytest.mark.parametrize("name", ["os.system, old protocol", "a storage's object", "NEWOBJ"])
def test_they_are_refused_anywhere_in_a_file_of_networks(name, tmp_path):
    """Behind whole networks, as the value of a key."""
    payload, culprit = MALICIOUS[name]
    network = foreign.Persistent("Generator", {"_parameters": {"weight": torch.nn.Parameter(torch.ones(2))}})
    head = foreign.dump({"G_ema": network}, 2)
    path = tmp_path / "network.pkl"
    path.write_bytes(head[:-1] + text("D") + payload(tmp_path / "mark")[:-1] + b"s.")
    with pytest.raises(ValueError, match=f"cannot convert {path}: .*{culprit}"):
        load(path)
    assert not (tmp_path / "mark").exists()


def test_the_file_itself_is_refused_in_words_that_tell(tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(MALICIOUS["os.system"][0](tmp_path / "mark"))
    with pytest.raises(
        ValueError, match=f"^cannot convert {path}: posix.system is not among what such a file may hold$"
    ):
        load(path)


# Damage and bombs.


def tensor(its: Any, offset: Any, size: Any, stride: Any) -> bytes:
    return pickle.dumps(Call(_rebuild_tensor_v2, its, offset, size, stride, False, OrderedDict()))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (8,), (1,)), (0, (9,), (1,)), (0, (2, 2), (7, 1)), (0, (2,), (8,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
        (0, (10**6, 10**6), (0, 0)), (0, (9,), (0,)), (2**70, (1,), (1,)), (0, (2**70,), (0,)), (0, (1,), (1, 1)),
        (0, (1,) * 9, (1,) * 9), (0.0, (1,), (1,)), (0, (True,), (1,)), (0, ("1",), (1,)), (0, [1], (1,)),
        (0, (0, 2**62), (1, 1)), (0, (2, 2**70), (0, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_reach_beyond_their_storage(offset, size, stride):
    assert same(loads(tensor(storage(8), 1, (7,), (1,))), torch.zeros(7))
    with pytest.raises(ValueError, match="a tensor"):
        loads(tensor(storage(8), offset, size, stride))


def test_a_storage_of_fewer_bytes_than_it_says():
    data = pickle.dumps(torch.zeros(100), 2)
    assert same(loads(data), torch.zeros(100))
    for says in (99, 101, 2**40):
        wrong = data.replace((100).to_bytes(8, "little"), says.to_bytes(8, "little"))
        assert wrong != data
        with pytest.raises(ValueError, match="a storage of another format"):
            loads(wrong)


def reconstructed(state: Any, shape: Any = (0,), code: Any = "f4") -> bytes:
    multiarray = np.zeros(1).__reduce__()[0]
    dtype = Call(np.dtype, code, False, True, state=(3, "<", None, None, None, -1, -1, 0))
    return pickle.dumps(
        Call(multiarray, np.ndarray, shape, b"b", state=tuple(dtype if x is Ellipsis else x for x in state))
    )


@pytest.mark.parametrize(
    "state",
    [
        (1, (3,), ..., False, bytes(8)), (1, (2**40, 2**40), ..., False, bytes(8)), (1, (-1, -2), ..., False, bytes(8)),
        (1, (2,), ..., False, "x" * 8), (1, (2,), ..., False, [None, None]), (1, (2,), "f4", False, bytes(8)),
        (2, (2,), ..., False, bytes(8)), (1, (2,), ..., False), (1, (0, 2**62), ..., False, b""),
        (1, [2], ..., False, bytes(8)), (1, (2.0,), ..., False, bytes(8)),
    ],
    ids=str,
)  # fmt: skip
def test_arrays_of_another_size_than_their_bytes(state):
    assert same(loads(reconstructed((1, (2,), ..., False, bytes(8)))), np.zeros(2, "f4"))
    with pytest.raises(ValueError, match="numpy array"):
        loads(reconstructed(state))


@pytest.mark.parametrize("code", ["O", "O8", "V8", "S4", "U4", "M8", "f4,f4", "c8", "f16", ""])
def test_dtypes_that_are_no_plain_numbers(code):
    with pytest.raises(ValueError, match=r"numpy\.dtype\('.*'\) is not among"):
        loads(reconstructed((1, (2,), ..., False, bytes(8)), code=code))


def test_a_dtype_with_fields():
    dtype = Call(np.dtype, "f4", False, True, state=(3, "<", None, ("a",), {"a": 1}, 4, 4, 0))
    with pytest.raises(ValueError, match="a numpy dtype with fields"):
        loads(pickle.dumps(dtype))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no pickle"),
        (b"PK\x03\x04 not a pickle", "no pickle"),
        (gzip.compress(pickle.dumps({"G_ema": 1})), "no pickle"),
        (b"<!DOCTYPE html><html>", "no pickle"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "no pickle"),  # BINBYTES8
        (b"\x80\x04B" + (2**31).to_bytes(4, "little") + b"x.", "no pickle"),
        (b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".", "many digits"),
        (b"\x80\x04\x8b" + (2**16).to_bytes(4, "little") + b"\x7f" * 2**16 + b".", "LONG4 is not among"),
        (b"I" + b"9" * 100000 + b"\n.", "no pickle"),
        (b"\x80\x04.", "its stack is empty"),
        (b"\x80\x04R.", "its stack is empty"),
        (b"\x80\x04(R.", "its stack is empty"),
        (b"\x80\x04t.", "a mark is missing"),
        (b"\x80\x04h\x05.", "it refers to what has not been"),
        (b"\x80\x04K\x01K\x02a.", "what is no list"),
        (b"\x80\x04K\x01K\x02K\x03s.", "what is no dictionary"),
        (b"\x80\x04}(K\x01u.", "what is no dictionary"),
        (b"\x80\x04}]K\x01s.", "a key of type list"),
        (b"\x80\x04}" + b")" + b"\x85" * 100000 + b"K\x01s.", "a key of type tuple"),  # hashed, it ends the process
        (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL of what is no name"),
    ],
)
def test_what_is_no_pickle_of_networks(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        loads(data)


def test_containers_in_containers_a_million_deep():
    read = loads(b"\x80\x04" + b"](" * 200000 + b"e" * 200000 + b".")
    assert type(read) is list
    with pytest.raises(ValueError, match="a call of int is not among"):
        loads(b"\x80\x04K\x01)" + b"\x85" * 200000 + b"R.")


def test_a_program_that_makes_much_of_little(monkeypatch):
    """A list of a thousand, put into a thousand sets."""
    items = pickle.dumps(list(range(1000)), 2)[2:-1]
    one = b"cbuiltins\nset\nh\x01\x85R"
    few = loads(b"\x80\x02](" + items + b"q\x01" + one * 2 + b"e.")
    assert [len(x) for x in few] == [1000] * 3
    with pytest.raises(ValueError, match="more memory than it has bytes"):
        loads(b"\x80\x02](" + items + b"q\x01" + one * 1000 + b"e.")
    monkeypatch.setattr(unpickle, "MOST_STEPS", 100)
    with pytest.raises(ValueError, match="more than 100 instructions"):
        loads(b"\x80\x02" + b"N" * 200 + b".")


def test_a_file_of_a_size_that_none_has(tmp_path, monkeypatch):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([1] * 100))
    assert load(path) == [1] * 100
    monkeypatch.setattr(unpickle, "MOST_BYTES", 20)
    with pytest.raises(ValueError, match=r"x\.pkl has \d+ bytes, more than any"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pkl")


def whole_file() -> bytes:
    network = foreign.Persistent("Generator", {"_parameters": {"weight": torch.nn.Parameter(torch.ones(20))}})
    return foreign.dump(
        {"G_ema": network, "D": foreign.Network(variables=[("x", np.ones(3, "f4")), ("y", np.float32(1))])}
    )


def test_cut_files_are_refused():
    data = whole_file()
    loads(data)
    for end in range(0, len(data), 7):
        with pytest.raises(ValueError, match="the file is damaged, or no pickle"):
            loads(data[:end])


def test_damaged_files_are_refused_or_read():
    """Never anything but ValueError."""
    data, rng = whole_file(), random.Random(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 2, 5])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            loads(bytes(damaged))
        except ValueError:
            refused += 1
    assert 300 < refused < 1500
