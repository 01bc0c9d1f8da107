"""Which of the readings are answers, and which of these are one and the same. Pure; what names cannot tell is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from smartload.match.candidates import ENOUGH, Candidates
from smartload.match.fit import Fit, Fitter
from smartload.match.names import FileNames
from smartload.records.requests import Ignored


class DataChecks(Protocol):
    """Questions that names cannot answer. The caller has the data and the model; `match` does not."""

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors of the file are bit for bit equal."""

    def is_own(self, name: str) -> bool:
        """Whether a tensor in memory is the model's own, live one."""

    def loadable(self, names: Mapping[str, str]) -> bool:
        """Whether all these entries (model key -> name in the file) are tensors that can be loaded."""

    def equals_buffer(self, name: str, buffer: str) -> bool:
        """Whether a tensor of the file equals the model's own non-persistent buffer."""

    def accepts(self, names: Mapping[str, str], own_shapes: bool = False) -> bool:
        """Whether the model's own strict load takes these keys (model's spelling -> name in the file).

        With `own_shapes` a key of the model is taken to have the model's shape, so that names alone decide.
        """


def check_buffers(each: Fit, file: FileNames, checks: DataChecks) -> None:
    """Leftovers that may be a non-persistent buffer of the model are, if they are equal to it."""
    for name, buffer in each.buffers.items():
        if checks.equals_buffer(file.keys[name].dotted, buffer):
            each.ignored.append(Ignored(name, f"equal to the model's own buffer {buffer!r}, which is never saved"))
        else:
            each.unexpected.append(name)
    each.buffers = {}


def largest(answers: list[Fit], found: Candidates) -> list[Fit]:
    """Without those that take a corner of a network for the whole.

    They fit only because the caller allows keys to be missing, or because tied names need one tensor only; that
    the reading around them fails is no reason to prefer them.
    """
    return [
        each
        for each in answers
        if not (each.allowed_missing and len(each.taken) < found.most)
        and not any(each.taken < other.taken for other in answers)
        and not (len(each.taken) < len(each.pairs) and any(_around(other, each) for other in found.near))
    ]


def _around(larger: Fit, corner: Fit) -> bool:
    """Whether a reading has as many tensors in their places as another that lies within it."""
    many = len(larger.taken) - len(larger.shapes) >= len(corner.taken)
    return many and len(larger.removed) < len(corner.removed) and corner.taken <= larger.names.keys()


def unnamed(answers: list[Fit], fitter: Fitter) -> list[Fit]:
    """Without those of which the caller said that all may be left out, where there is another."""
    if len(answers) < 2 or not fitter.options.allow_unexpected:
        return answers
    return [each for each in answers if not all(map(fitter.named, each.taken))] or answers


def rehearsed(near: list[Fit], file: FileNames, checks: DataChecks) -> list[Fit]:
    """Readings that do not pair off by name, but that the model's own loading code accepts."""
    for each in near[:ENOUGH] if len(file.parts) == 1 else ():
        if each.removed == file.parts[0] and not each.rules and not each.twice:
            as_it_is = {file.tail(name): name for name in each.names}
            if _accepts(each, as_it_is, file, checks):
                return [each]
    accepted: list[Fit] = []
    for each in near[:ENOUGH]:
        strays = [*each.unexpected, *each.buffers]
        pairs = each.pairs | {each.model.spell(each.names[name]): name for name in strays}
        whole = len(pairs) == len(each.pairs) + len(strays) and not each.clashes and not each.twice
        if whole and _accepts(each, pairs, file, checks):
            accepted.append(each)
    return accepted


def _accepts(each: Fit, pairs: dict[str, str], file: FileNames, checks: DataChecks) -> bool:
    """Whether the model's own code takes these pairs; the reading is then made to be one of them."""
    if not pairs or not checks.accepts({key: file.keys[name].dotted for key, name in pairs.items()}):
        return False
    own = each.model.model_keys.specs
    each.accepted = [key for key in own if key not in pairs] + [key for key in pairs if key not in own] + each.shapes
    each.pairs, each.missing, each.unexpected, each.shapes, each.buffers = pairs, [], [], [], {}
    each.clashes, each.ignored = {}, [item for item in each.ignored if item.key not in pairs.values()]
    return True


def distinct(answers: list[Fit], file: FileNames, checks: DataChecks) -> list[Fit]:
    """Each different answer once; parts that are bit for bit the same network are one answer."""
    distinct: list[Fit] = []
    for each in answers:
        if not any(_equal(each, other, file, checks) for other in distinct):
            distinct.append(each)
        if len(distinct) == ENOUGH:
            break
    return distinct


def _equal(one: Fit, other: Fit, file: FileNames, checks: DataChecks) -> bool:
    if one.pairs == other.pairs:
        return True
    return one.pairs.keys() == other.pairs.keys() and all(
        name == other.pairs[key] or checks.same(file.keys[name].dotted, file.keys[other.pairs[key]].dotted)
        for key, name in one.pairs.items()
    )
