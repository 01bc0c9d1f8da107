"""Hold the results of a load, a dry run and a conversion: as data, as words, as html. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from smartload.records.entries import Beside
from smartload.records.requests import Ignored
from smartload.records.text import beside_line, first_few, for_console, html_table, plural, printable, size_text

_INDENT = 13
"""Characters before the text of a line of the report: two spaces and the label."""
_LISTED = 8
"""Things beside the weights that are printed, a line each; `aside` has all."""


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """Which tensor of the file goes to which key of the model, as `check` returns it; nothing was written.

    Every key of the model is in `pairs`, `kept` or `missing_keys`, unless the model's own loading code fills it
    (`rehearsed`). Every tensor of the file's state dicts is in `pairs`, `ignored` or `unexpected_keys`.

    Attributes:
        model: class of the network, without its wrappers.
        path: the file.
        part: dotted path of the state dict taken from the file; "" for the file's top.
        rule: how the file's keys were adapted, in words ("removed 'module.'"); "" where they are equal.
        pairs: model key -> dotted key of the file's tensor. Tied keys share one.
        wanted: number of keys that the model has.
        ignored: what of the file is not loaded, as pairs of key and reason.
        kept: keys of the model that keep their present value, likewise.
        missing_keys: keys of the model that keep their present value because `allow_missing` matches them.
        unexpected_keys: keys of the file that are left out because `allow_unexpected` matches them.
        rehearsed: whether the keys do not pair off by themselves, and the model's own loading code (hooks, versions,
            overrides) accepted them in a rehearsal without data.

    >>> import torch, smartload
    >>> plan = smartload.check(torch.nn.Linear(2, 1), {"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)})
    >>> dict(plan.pairs)
    {'weight': 'module.weight', 'bias': 'module.bias'}
    >>> print(plan)
    the dict in memory fits Linear: 2 of 2 keys (removed 'module.')
    """

    model: str
    path: str
    part: str
    rule: str
    pairs: Mapping[str, str]
    wanted: int
    ignored: tuple[Ignored, ...] = ()
    kept: tuple[Ignored, ...] = ()
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    rehearsed: bool = False

    def __str__(self) -> str:
        # One line where nothing is left to say, as in most calls.
        notes = "; ".join(note for note in (self.rule, self.part and f"from {printable(self.part)!r}") if note)
        head = f"{self.path} fits {self.model}: {len(self.pairs):,} of {plural(self.wanted, 'key')}"
        return for_console("\n".join([head + (f" ({notes})" if notes else ""), *_name_lines(self)]))

    def to_dict(self) -> dict[str, object]:
        """Give everything as plain data (for JSON): nested dicts and lists of str, int and bool."""
        # asdict leaves a NamedTuple a tuple; in JSON its fields shall have their names.
        plain = asdict(self)
        plain["pairs"] = dict(self.pairs)
        plain["ignored"] = [item._asdict() for item in self.ignored]
        plain["kept"] = [item._asdict() for item in self.kept]
        return plain


@dataclass(frozen=True, slots=True)
class Cast:
    """Tensors whose dtype in the file is not the model's.

    Attributes:
        source: the dtype in the file, by torch's name ("float16").
        target: the dtype in the model.
        keys: keys of the model.
    """

    source: str
    target: str
    keys: tuple[str, ...]


def casts_of(tensors: Iterable[tuple[str, str, str]]) -> tuple[Cast, ...]:
    """Group the tensors whose dtype changes by the two dtypes.

    Args:
        tensors: (key, dtype in the file, dtype in the model) of each.

    >>> casts_of([("fc.weight", "float16", "float32"), ("step", "int64", "int64")])
    (Cast(source='float16', target='float32', keys=('fc.weight',)),)
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for key, source, target in tensors:
        if source != target:
            groups.setdefault((source, target), []).append(key)
    return tuple(Cast(source, target, tuple(keys)) for (source, target), keys in groups.items())


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `smart_load` did. It unpacks like the result of `load_state_dict`: `missing, unexpected = report`.

    Print it for people, show it in a notebook, or take `to_dict()` for programs.

    Attributes:
        plan: the keys: part, rule, pairs, what was ignored and kept, and why; see `KeyPlan`.
        format: which format the file has.
        device: where the model's tensors are now ("cuda:0", or "cpu, cuda:1").
        nbytes: bytes of tensors loaded.
        seconds: wall time of the whole call.
        casts: tensors whose dtype was changed, grouped by the two dtypes.
        moves: (keys, from, to) of the tensors that are on another device than before; "all" for all keys.
        aside: what else the file holds (an optimizer's state, arguments, other objects): path, what it is, and how
            many tensors are in it.
        notes: what the caller should know: tensors left on another device, replaced Parameter objects.
        undo: whether the model's old values were copied before the load, so that any failure could be undone.
        verified: whether the bytes that were loaded were compared with their checksums; False also where the file has
            none.

    >>> import torch, smartload
    >>> report = smartload.smart_load(torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    >>> missing, unexpected = report
    >>> missing, unexpected, report.mapping["weight"]
    ([], [], 'weight')
    """

    # `plan` holds what names decide; the fields below are what only a load can know.
    plan: KeyPlan
    format: str
    device: str
    nbytes: int
    seconds: float
    casts: tuple[Cast, ...] = ()
    moves: tuple[tuple[str, str, str], ...] = ()
    aside: tuple[Beside, ...] = ()
    notes: tuple[str, ...] = field(default=())
    undo: bool = True
    verified: bool = False

    @property
    def missing_keys(self) -> list[str]:
        """Keys of the model that were not loaded because `allow_missing` matches them; empty otherwise."""
        return list(self.plan.missing_keys)

    @property
    def unexpected_keys(self) -> list[str]:
        """Keys of the file that were left out because `allow_unexpected` matches them; empty otherwise."""
        return list(self.plan.unexpected_keys)

    @property
    def mapping(self) -> dict[str, str]:
        """Key in the file -> key in the model; the first of the model's keys where they are tied."""
        # Backwards, so that of several keys with one tensor the first is written last.
        return {name: key for key, name in reversed(list(self.plan.pairs.items()))}

    # The three methods of a pair: torch's result is a NamedTuple, and people index it as well as unpack it.
    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))

    def __getitem__(self, index: int) -> list[str]:
        return (self.missing_keys, self.unexpected_keys)[index]

    def __len__(self) -> int:
        return 2

    def __str__(self) -> str:
        return for_console("\n".join([_headline(self), *self._lines()]))

    def _lines(self) -> list[str]:
        """Give the lines below the first, each with its label; nothing that was as usual has a line."""
        plan = self.plan
        # In the order of a load: which part, which names, what was left, what changed on the way.
        lines = [f"  part:      {printable(plan.part)}"] if plan.part else []
        if plan.rule:
            changed = {key: name for key, name in plan.pairs.items() if key != name}
            lines.append(f"  names:     {plan.rule}")
            # One example: it shows the rule at work, and the others are alike.
            lines += [f"             {printable(name)} -> {printable(key)}" for key, name in list(changed.items())[:1]]
        lines += _name_lines(plan)
        lines += [f"  beside:    {beside_line(item)}" for item in self.aside[:_LISTED]]
        lines += [f"  cast:      {cast.source} -> {cast.target}: {first_few(cast.keys)}" for cast in self.casts]
        lines += [f"  moved:     {what} from {source} to {target}" for what, source, target in self.moves]
        return lines + [f"  note:      {note}" for note in self.notes]

    def to_dict(self) -> dict[str, object]:
        """Give everything as plain data (for JSON): nested dicts and lists of str, int, float and bool."""
        plain = asdict(self)
        plain["plan"] = self.plan.to_dict()
        plain["aside"] = [item._asdict() for item in self.aside]
        return plain

    def _repr_html_(self) -> str:
        rows: list[tuple[str, list[str]]] = []
        # The printed lines again, those of one label as one row.
        for line in self._lines():
            label, text = line[:_INDENT].strip(" :"), line[_INDENT:]
            # A line without a label continues the one above, as the example of a renamed key does.
            if rows and label in ("", rows[-1][0]):
                rows[-1][1].append(text)
            else:
                rows.append((label, [text]))
        return html_table(_headline(self), rows)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did, for the log and for the command line.

    Attributes:
        path: the file that was read.
        format: its format.
        to: the file that was written.
        part: dotted path of the state dict that was taken; "" for the file's top.
        rule: how its keys were adapted, in words.
        tensors: number of tensors written.
        nbytes: their bytes.
        casts: tensors whose dtype was changed.
        ignored: keys that were not written, and why.
        aside: what else the file holds.
    """

    path: str
    format: str
    to: str
    part: str
    rule: str
    tensors: int
    nbytes: int
    casts: tuple[Cast, ...]
    ignored: tuple[Ignored, ...]
    aside: tuple[Beside, ...]

    def __str__(self) -> str:
        what = f"{plural(self.tensors, 'tensor')} of {self.path} ({self.format}) to {self.to}"
        lines = [f"wrote {what}: {size_text(self.nbytes)}"]
        lines += [f"  part:      {printable(self.part)}"] if self.part else []
        lines += [f"  names:     {self.rule}"] if self.rule else []
        lines += [f"  cast:      {cast.source} -> {cast.target}: {first_few(cast.keys)}" for cast in self.casts]
        lines += _reasons("left out", self.ignored)
        return for_console("\n".join(lines + [f"  left out:  {beside_line(item)}" for item in self.aside[:_LISTED]]))


def _headline(report: LoadReport) -> str:
    """Say what was loaded from where into what, on which device, and how fast."""
    plan, count = report.plan, len(report.plan.pairs)
    what = f"{plural(count, 'tensor')} of {plan.path} ({report.format}) into {plan.model} on {report.device}"
    return f"loaded {what}: {size_text(report.nbytes)} in {report.seconds:.2f} s"


def _name_lines(plan: KeyPlan) -> list[str]:
    """Give the lines on what was not loaded: one line for each reason."""
    lines = _reasons("ignored", plan.ignored) + _reasons("kept", plan.kept)
    if plan.missing_keys:
        lines.append(f"  missing:   {first_few(plan.missing_keys)}: allowed, the model keeps its own values")
    if plan.unexpected_keys:
        lines.append(f"  left out:  {first_few(plan.unexpected_keys)}: unexpected, allowed")
    return lines


def _reasons(label: str, items: Iterable[Ignored]) -> list[str]:
    """Give one line for each reason, with the keys that have it."""
    # By reason: hundreds of keys are ignored for three reasons.
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(item.key)
    return [f"  {label + ':':11}{first_few(keys)}: {reason}" for reason, keys in reasons.items()]
