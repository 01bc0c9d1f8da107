"""The values that the pickle machine builds beside plain data: notes of what a file names, never the thing itself."""

from __future__ import annotations


class Global:
    """A global that the file names; never looked up."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def is_ordered_dict(value: object) -> bool:
    """Whether a note names `collections.OrderedDict`, the one class of which a call is a `Map`."""
    return type(value) is Global and value.name == "OrderedDict" and value.module == "collections"


class Call:
    """What a call would have made: `func` and `args` as the file gives them, and all that was put into it later."""

    __slots__ = ("appends", "args", "func", "items", "state")

    def __init__(self, func: object, args: object) -> None:
        self.func = func
        self.args = args
        self.state: object = None
        self.items: DictNote | None = None
        self.appends: list[object] | None = None


class DictNote:
    """A dict or OrderedDict: string keys in `data`, all others unhashed in `pairs`, names given twice in `repeated`."""

    __slots__ = ("data", "ordered", "pairs", "repeated", "state")

    def __init__(self, ordered: bool = False) -> None:
        self.data: dict[str, object] = {}
        self.pairs: list[tuple[object, object]] | None = None
        self.repeated: list[str] | None = None
        self.state: object = None
        self.ordered = ordered

    def put(self, key: object, value: object) -> None:
        """Add one item, without hashing anything but strings."""
        if type(key) is str:
            if key in self.data:
                self.repeated = [*(self.repeated or ())[:4], key]
            self.data[key] = value
        elif self.pairs is None:
            self.pairs = [(key, value)]
        else:
            self.pairs.append((key, value))


class SetNote:
    """A set or frozenset, as a list of what was put into it."""

    __slots__ = ("items",)

    def __init__(self, items: list[object]) -> None:
        self.items = items


class PersistentId:
    """A persistent id: the file's way of naming a storage."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class RawBytes:
    """Bytes as they lie in the pickle, from `offset` on; `raw` is a view of them; `mutable`: a bytearray."""

    __slots__ = ("mutable", "offset", "raw")

    def __init__(self, offset: int, raw: memoryview, mutable: bool) -> None:
        self.offset, self.raw, self.mutable = offset, raw, mutable
