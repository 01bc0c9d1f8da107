"""The values that the pickle machine builds where a pickle is more than plain data.

Each is an inert note: it says what the file asked for (a global, a call, a dict, a set, a storage) and never is the
thing itself. None of the classes defines `__hash__` or `__eq__`, so notes compare by identity: nothing that the file
chose is hashed or compared.
"""

from __future__ import annotations


class Global:
    """A global, such as `torch._utils._rebuild_tensor_v2`, by the two strings that the file gives; never imported.

    Attributes:
        module: the module's name.
        name: the name in that module, dots included.
    """

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def is_ordered_dict(value: object) -> bool:
    """Tell whether `value` is the note of the class `collections.OrderedDict`.

    Calls of it alone become a `DictNote`; calls of every other class or function become a `Call`.
    """
    return type(value) is Global and value.name == "OrderedDict" and value.module == "collections"


_COPIES = frozenset(
    (*((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")), ("torch", "Size"))
)


def copies_its_list(func: object) -> bool:
    """Tell whether the class `func` takes the items of a list once, when it is called: a set, a `torch.Size`."""
    return type(func) is Global and (func.module, func.name) in _COPIES


class Call:
    """A call that the file asks for and that is never made, and what the file then puts into its result.

    Attributes:
        func: what is called: a `Global`, or a `PersistentId` where torch's old format names a module's class.
        args: the arguments; a tuple in any honest file.
        state: the argument of BUILD, by which pickles set attributes: an object's `__dict__`, as a rule.
        items: the items given to it, as to a dict; None where there are none.
        appends: the values appended to it, as to a list; None where there are none.
    """

    __slots__ = ("appends", "args", "func", "items", "state")

    def __init__(self, func: object, args: object) -> None:
        self.func = func
        self.args = args
        self.state: object = None
        self.items: DictNote | None = None
        self.appends: list[object] | None = None


class DictNote:
    """A dict or OrderedDict of the file.

    Attributes:
        data: the items whose keys are strings.
        pairs: all other items, as (key, value). Their keys are not hashed: a pickle can choose keys that all have one
            hash, or a tuple so deep or so often shared that its hash never ends.
        repeated: keys of `data` that the file gives more than once; None where there are none.
        state: attributes of an OrderedDict, such as the `_metadata` of a state dict.
        ordered: whether it is an OrderedDict.
    """

    __slots__ = ("data", "ordered", "pairs", "repeated", "state")

    def __init__(self, ordered: bool = False) -> None:
        self.data: dict[str, object] = {}
        self.pairs: list[tuple[object, object]] | None = None
        self.repeated: list[str] | None = None
        self.state: object = None
        self.ordered = ordered

    def put(self, key: object, value: object) -> None:
        """Add the item `key: value`; as in a real dict, the last of two items with one string key counts."""
        if type(key) is str:
            if key in self.data:
                # Five at most: an error names one of them, and a file can repeat a key millions of times.
                self.repeated = [*(self.repeated or ())[:4], key]
            self.data[key] = value
        elif self.pairs is None:
            self.pairs = [(key, value)]
        else:
            self.pairs.append((key, value))


class SetNote:
    """A set or frozenset of the file; `items` lists its elements, unhashed, so one may occur twice."""

    __slots__ = ("items",)

    def __init__(self, items: list[object]) -> None:
        self.items = items


class PersistentId:
    """A persistent id: what torch writes in place of a storage, whose bytes lie outside the pickle.

    `value` is what the file gives, normally `("storage", type, key, location, numel)`.
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class RawBytes:
    """A bytes or bytearray object of the pickle, not copied out of it: it may be a whole array's data.

    Attributes:
        offset: where the bytes begin in the data that is parsed.
        raw: a view of the bytes.
        mutable: whether they are a bytearray.
    """

    __slots__ = ("mutable", "offset", "raw")

    def __init__(self, offset: int, raw: memoryview, mutable: bool) -> None:
        self.offset, self.raw, self.mutable = offset, raw, mutable
