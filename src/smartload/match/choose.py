"""Choose among complete fits: drop pieces of others, ask the data and the model's code, merge equal ones. Pure.

`search` calls these functions in the order in which they stand here. What names cannot tell is asked through
`DataChecks`, which the caller implements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from smartload.match.candidates import MOST_LISTED, MOST_NEAR, Fits
from smartload.match.fit import Fit, Fitter
from smartload.match.names import FileNames
from smartload.records.requests import Ignored


class DataChecks(Protocol):
    """Questions that names cannot answer. The caller has the data and the model; `match` has neither."""

    def same(self, first: str, second: str) -> bool:
        """Tell whether two tensors of the file are bit for bit equal."""

    def is_own(self, name: str) -> bool:
        """Tell whether a tensor in memory is one of the model's, not a copy."""

    def loadable(self, names: Mapping[str, str]) -> bool:
        """Tell whether all these entries (model key -> name in the file) are tensors that can be loaded."""

    def equals_buffer(self, name: str, buffer: str) -> bool:
        """Tell whether a tensor of the file equals the model's own non-persistent buffer."""

    def accepts(self, names: Mapping[str, str], own_shapes: bool = False) -> bool:
        """Tell whether the model's own strict load takes these keys (model's spelling -> name in the file).

        With `own_shapes` every key of the model is taken to have the model's shape, so that names alone decide.
        """


def check_buffers(fit: Fit, file: FileNames, checks: DataChecks) -> None:
    """Compare names that may be a non-persistent buffer of the model with it: equal ones are ignored."""
    for name, buffer in fit.buffers.items():
        if checks.equals_buffer(file.keys[name].dotted, buffer):
            fit.ignored.append(Ignored(name, f"equal to the model's non-persistent buffer {buffer!r}"))
        else:
            fit.unexpected.append(name)
    fit.buffers = {}


def drop_pieces(complete: list[Fit], fits: Fits) -> list[Fit]:
    """Drop the fits that take a piece of a network for all of it.

    A piece fits only because keys may be missing, or because tied keys need one tensor only: a model of 'w' tied to
    'b.w' fits 'a.b.w' alone. That the network around the piece does not fit is no reason to prefer the piece.
    """
    return [
        fit
        for fit in complete
        if not (fit.allowed_missing and len(fit.taken) < fits.most_loaded)
        and not any(fit.taken < other.taken for other in complete)
        and not (len(fit.taken) < len(fit.pairs) and any(_surrounds(other, fit) for other in fits.near))
    ]


def _surrounds(larger: Fit, piece: Fit) -> bool:
    """Tell whether a fit with a shorter prefix has the tensors of another one among its own, and pairs as many."""
    many = len(larger.taken) - len(larger.shapes) >= len(piece.taken)
    return many and len(larger.removed) < len(piece.removed) and piece.taken <= larger.adapted.keys()


def drop_allowed(complete: list[Fit], fitter: Fitter) -> list[Fit]:
    """Drop the fits all of whose tensors the caller allowed to be unexpected, where another fit is left."""
    # With globs in the file's own spelling only: adapted names are alike in both of two networks.
    if len(complete) < 2 or not fitter.options.allow_unexpected:
        return complete
    return [fit for fit in complete if not all(map(fitter.is_allowed_as_stored, fit.taken))] or complete


def accepted_by_model(near: list[Fit], file: FileNames, checks: DataChecks) -> list[Fit]:
    """Give the incomplete fits that the model's own loading code (hooks, versions, overrides) accepts.

    They are changed to what it accepts. The keys as the file has them are tried first and alone decide: code that
    takes any key would take adapted ones as well.
    """
    for fit in near[:MOST_NEAR] if len(file.parts) == 1 else ():
        if fit.removed == file.parts[0] and not fit.rules and not fit.twice:
            as_stored = {file.tail(name): name for name in fit.adapted}
            if _accepts(fit, as_stored, file, checks):
                return [fit]
    accepted: list[Fit] = []
    for fit in near[:MOST_NEAR]:
        unmatched = [*fit.unexpected, *fit.buffers]
        pairs = fit.pairs | {fit.model.spell(fit.adapted[name]): name for name in unmatched}
        # Two names in one spelling would hide one of the tensors from the model's code.
        all_distinct = len(pairs) == len(fit.pairs) + len(unmatched) and not fit.clashes and not fit.twice
        if all_distinct and _accepts(fit, pairs, file, checks):
            accepted.append(fit)
    return accepted


def _accepts(fit: Fit, pairs: dict[str, str], file: FileNames, checks: DataChecks) -> bool:
    """Tell whether the model's own code takes these pairs; if so, make them the pairs of the fit."""
    if not pairs or not checks.accepts({key: file.keys[name].dotted for key, name in pairs.items()}):
        return False
    specs = fit.model.model_keys.specs
    # Noted for the report: which keys it is that names alone do not explain.
    fit.accepted = [key for key in specs if key not in pairs] + [key for key in pairs if key not in specs] + fit.shapes
    fit.pairs, fit.missing, fit.unexpected, fit.shapes, fit.buffers = pairs, [], [], [], {}
    fit.clashes, fit.ignored = {}, [item for item in fit.ignored if item.key not in pairs.values()]
    return True


def distinct(complete: list[Fit], file: FileNames, checks: DataChecks) -> list[Fit]:
    """Give the fits that load different values, up to `MOST_LISTED`: equal parts of a file are one network."""
    different: list[Fit] = []
    for fit in complete:
        if not any(_equal(fit, other, file, checks) for other in different):
            different.append(fit)
        if len(different) == MOST_LISTED:  # comparing reads tensors, and the error lists no more
            break
    return different


def _equal(one: Fit, other: Fit, file: FileNames, checks: DataChecks) -> bool:
    """Tell whether two fits give every model key the same values."""
    if one.pairs == other.pairs:
        return True
    # Names first: the tensors of two fits with other keys need not be read.
    return one.pairs.keys() == other.pairs.keys() and all(
        name == other.pairs[key] or checks.same(file.keys[name].dotted, file.keys[other.pairs[key]].dotted)
        for key, name in one.pairs.items()
    )
