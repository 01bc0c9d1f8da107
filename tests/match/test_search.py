"""Names in, plan or refusal out: one line for each rule, and one for each way in which it could go wrong."""

from __future__ import annotations

import time

import pytest
from naming import GivenAnswers, matched, model_keys, renamed

from smartload import AmbiguousKeysError, KeyMismatchError, ShapeMismatchError
from smartload.match.plan import module_paths
from smartload.records.entries import TensorSpec
from smartload.records.requests import ModelKeys, Options

MLP = "fc.weight fc.bias"

ADAPTED = {
    # name: (model, file, what pairs off, the rule in words)
    "identity": (MLP, MLP, "fc.weight fc.bias", ""),
    "another order": (MLP, "fc.bias fc.weight", "fc.weight fc.bias", ""),
    "DataParallel": (MLP, "module.fc.weight module.fc.bias", "", "removed 'module.'"),
    "twice": (MLP, "module.module.fc.weight module.module.fc.bias", "", "removed 'module.'"),
    "compiled": (MLP, "_orig_mod.fc.weight _orig_mod.fc.bias", "", "removed '_orig_mod.'"),
    "DataParallel of compiled": (
        MLP, "module._orig_mod.fc.weight module._orig_mod.fc.bias", "", "removed 'module.', removed '_orig_mod.'",
    ),
    "in the middle": (MLP, "fc.module.weight fc.module.bias", "", "removed 'module.'"),
    "some layers only": ("a.w b.w", "a._checkpoint_wrapped_module.w b.w", "", "removed '_checkpoint_wrapped_module.'"),
    "unknown prefix": (MLP, "net.fc.weight net.fc.bias", "", "removed 'net.'"),
    "long prefix": (MLP, "a.b.c.fc.weight a.b.c.fc.bias", "", "removed 'a.b.c.'"),
    "wrapper before a prefix": (MLP, "module.net.fc.weight module.net.fc.bias", "", "removed 'module.net.'"),
    "wrapper behind a prefix": (MLP, "net.module.fc.weight net.module.fc.bias", "", None),
    "prefix added": ("model.fc.weight model.fc.bias", MLP, "", "added 'model.'"),
    "prefix added behind a wrapper": ("model.fc.weight", "module.fc.weight", "", None),
    "thop": (MLP, MLP + " total_ops:() fc.total_params:1", "fc.weight fc.bias", ""),
    "averaged": (MLP, "n_averaged:() module.fc.weight module.fc.bias", "", "removed 'module.'"),
    "not a tensor": (MLP, MLP + " epoch:?", "fc.weight fc.bias", ""),
    "scalar of torch 0.3": ("scale:()", "scale:1", "scale", ""),
    "beside a loss": (MLP, "model.fc.weight model.fc.bias loss.weight", "", "removed 'model.'"),
    "real module": ("module.weight fc.weight", "module.weight fc.weight", "module.weight fc.weight", ""),
    "wrapped real module": ("module.weight fc.weight", "module.module.weight module.fc.weight", "", "removed 'module.'"),
    "wrapped real module inside": (
        "a.module.weight a.fc.weight", "a.module.module.weight a.module.fc.weight",
        "a.module.weight<a.module.module.weight a.fc.weight<a.module.fc.weight", "removed 'module.'",
    ),
    "real module and its own weight": ("module.weight weight", "module.module.weight module.weight", "", "removed 'module.'"),
    "real module inside and its own weight": (
        "a.module.weight a.weight", "a.module.module.weight a.module.weight",
        "a.module.weight<a.module.module.weight a.weight<a.module.weight", "removed 'module.'",
    ),
    "real model": ("model.weight fc.weight", "model.weight fc.weight", "model.weight fc.weight", ""),
    "real model with a prefix": ("model.weight fc.weight", "model.model.weight model.fc.weight", "", "removed 'model.'"),
    "names that only end alike": ("submodule.w attn_module.w", "submodule.w attn_module.w", "submodule.w attn_module.w", ""),
    "a weight called module": ("module fc.module", "module.module module.fc.module", "", "removed 'module.'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTED)
def test_one_dict(case: str) -> None:
    model, file, pairs, rule = ADAPTED[case]
    plan = matched(model, file)
    assert list(plan.pairs) == model.split() or list(plan.pairs) == [key.partition(":")[0] for key in model.split()]
    if pairs:
        assert renamed(plan) == pairs
    assert len(set(plan.pairs.values())) == len(plan.pairs)
    if rule is not None:
        assert plan.rule == rule


PARTS = {
    "one dict": ({"state_dict": MLP}, "state_dict", ""),
    "two levels down": ({"ckpt.model": MLP}, "ckpt.model", ""),
    "DeepSpeed": ({"module": MLP}, "module", ""),
    "a prefix in a dict": ({"state_dict": "net.fc.weight net.fc.bias"}, "state_dict", "removed 'net.'"),
    "wrapper in a dict": ({"model": "module.fc.weight module.fc.bias"}, "model", "removed 'module.'"),
    "tensors at the top": ({"": "best:() epoch:?", "model": MLP}, "model", ""),
    "beside a smaller net": ({"model": MLP, "disc": "fc.weight"}, "model", ""),
    "beside other shapes": ({"student": MLP, "teacher": "fc.weight:3 fc.bias:3"}, "student", ""),
    "several that make one": ({"fc": "weight bias"}, "", ""),
}


@pytest.mark.parametrize("case", PARTS)
def test_dicts_in_dicts(case: str) -> None:
    parts, part, rule = PARTS[case]
    plan = matched(MLP, parts)
    assert list(plan.pairs) == MLP.split()
    assert (plan.part, plan.rule) == (part, rule)


def test_several_dicts_make_one_model() -> None:
    parts = {"encoder": "w b", "decoder": "module.w", "sizes": "x y z"}
    plan = matched("encoder.w encoder.b decoder.w", parts)
    assert renamed(plan) == "encoder.w encoder.b decoder.w<decoder.module.w"
    assert plan.part == ""
    assert {item.key for item in plan.ignored} == {"sizes.x", "sizes.y", "sizes.z"}
    without_prefix = matched("encoder.w encoder.b decoder.w", {f"ckpt.{path}": names for path, names in parts.items()})
    assert without_prefix.part == "ckpt"
    assert list(without_prefix.pairs.values()) == ["ckpt.encoder.w", "ckpt.encoder.b", "ckpt.decoder.module.w"]


WRAPPED = {
    "plain into DataParallel": ("module.fc.weight", "module", "fc.weight"),
    "DataParallel into DataParallel": ("module.fc.weight", "module", "module.fc.weight"),
    "compiled into DataParallel": ("module.fc.weight", "module", "_orig_mod.fc.weight"),
    "DataParallel(compiled) into compiled(DataParallel)": (
        "_orig_mod.module.fc.weight", "_orig_mod _orig_mod.module", "module._orig_mod.fc.weight",
    ),
    "Lightning into DataParallel": ("module.fc.weight", "module", "model.fc.weight"),
    "wrapped inside": ("a.module.w b.w", "a.module", "a.w b.w"),
    "wrapped inside, elsewhere in the file": ("a.module.w b.w", "a.module", "a.w b.module.w"),
    "a real module in a wrapper": ("module.module.w module.w", "module", "module.w w"),
    "a real module in a wrapper, as it is": ("module.module.w module.w", "module", "module.module.w module.w"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_the_models_own_wrappers(case: str) -> None:
    keys, wrappers, file = WRAPPED[case]
    plan = matched(model_keys(keys, wrappers), file)
    assert list(plan.pairs) == keys.split()
    assert list(plan.pairs.values()) == file.split()


def test_averaged_model_and_plain_file() -> None:
    model = model_keys("n_averaged:() module.fc.weight", "module")
    plan = matched(model, "fc.weight")
    assert [(item.key, item.reason) for item in plan.kept] == [
        ("n_averaged", "bookkeeping of AveragedModel, not in the file")
    ]
    assert renamed(matched(model, "n_averaged:() module.fc.weight")) == "n_averaged module.fc.weight"
    assert renamed(matched(model, "net.fc.weight")) == "module.fc.weight<net.fc.weight"
    twice = model_keys("n_averaged:() module.n_averaged:() module.module.w", "module module.module")
    assert renamed(matched(twice, "n_averaged:() module.n_averaged:() module.module.w")) == (
        "n_averaged module.n_averaged module.module.w"
    )


def test_counters_of_thop_in_the_model_keep_their_value() -> None:
    plan = matched(model_keys("fc.weight total_ops:()"), "module.fc.weight")
    assert plan.kept[0].reason == "a counter of the profiler thop, not in the file"


TIED = model_keys("embed.w head.w", tied=[("embed.w", "head.w")])


def test_tied_names() -> None:
    assert renamed(matched(TIED, "head.w")) == "embed.w<head.w head.w"
    assert renamed(matched(TIED, "module.embed.w")) == "embed.w<module.embed.w head.w<module.embed.w"
    assert renamed(matched(TIED, "embed.w head.w", GivenAnswers(equal=[{"embed.w", "head.w"}]))) == "embed.w head.w"
    with pytest.raises(AmbiguousKeysError) as caught:
        matched(TIED, "embed.w head.w")
    assert str(caught.value) == (
        "f.pt is ambiguous: 2 tensors fit embed.w and head.w of Net:\n"
        "  embed.w: write allow_unexpected=['head.w']\n"
        "  head.w: write allow_unexpected=['embed.w']"
    )
    plan = matched(TIED, "embed.w head.w", allow_unexpected=("embed.w",))
    assert renamed(plan) == "embed.w<head.w head.w"
    assert plan.unexpected_keys == ("embed.w",)


def test_a_non_persistent_buffer() -> None:
    model = model_keys("fc.weight", non_persistent="position_ids:4")
    plan = matched(
        model, "module.fc.weight module.position_ids:4", GivenAnswers(buffers=[("module.position_ids", "position_ids")])
    )
    assert plan.ignored[0].reason == "equal to the model's non-persistent buffer 'position_ids'"
    for file in ("fc.weight position_ids:4", "fc.weight position_ids:5"):
        with pytest.raises(KeyMismatchError, match="unexpected: position_ids"):
            matched(model, file)


AMBIGUOUS = {
    "raw and EMA dicts": ({"model": MLP, "ema": MLP}, ["select='model'", "select='ema'"]),
    "top and EMA dict": ({"": MLP, "ema": MLP}, ["2 keys at the top: write select=''", "select='ema'"]),
    "top and a dict called module": ({"": MLP, "module": MLP}, ["fc.weight", "module.fc.weight"]),
    "student and teacher": ("student.fc.weight student.fc.bias teacher.fc.weight teacher.fc.bias", ["select='student'", "select='teacher'"]),
    "ema_pytorch": ("step:() online_model.fc.weight online_model.fc.bias ema_model.fc.weight ema_model.fc.bias", ["select='online_model'", "select='ema_model'"]),
    "k and module.k": ("fc.weight fc.bias module.fc.bias", ["fc.bias: write allow_unexpected=['module.fc.bias']", "module.fc.bias"]),
    "all twice": ("fc.weight fc.bias module.fc.weight module.fc.bias", ["allow_unexpected=['module.*']", "select='module'"]),
    "inside": ("fc.weight fc.bias fc.module.bias", ["allow_unexpected=['fc.module.bias']", "allow_unexpected=['fc.bias']"]),
    "beside the prefix": ("model.fc.weight model.fc.bias fc.bias", ["model.fc.bias", "  fc.bias"]),
    "beside the prefix, wrapped": ("model.fc.weight model.fc.bias module.model.fc.bias", ["module.model.fc.bias", "  model.fc.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_two_answers_are_refused_with_the_argument_that_decides(case: str) -> None:
    parts, words = AMBIGUOUS[case]
    with pytest.raises(AmbiguousKeysError) as caught:
        matched(MLP, parts)  # type: ignore[arg-type]
    for each in words:
        assert each in str(caught.value)


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_every_argument_that_is_printed_works(case: str) -> None:
    parts, _ = AMBIGUOUS[case]
    with pytest.raises(AmbiguousKeysError) as caught:
        matched(MLP, parts)  # type: ignore[arg-type]
    taken = []
    for _, argument in caught.value.problem.answers:  # type: ignore[union-attr]
        if argument:
            plan = matched(MLP, parts, **eval(f"dict({argument})"))  # type: ignore[arg-type]
            taken.append(tuple(plan.pairs.values()))
    assert taken
    assert len(set(taken)) == len(taken)


def test_equal_parts_are_one_answer() -> None:
    given = GivenAnswers(equal=[{f"{part}.{key}" for part in ("model", "ema")} for key in MLP.split()])
    assert matched(MLP, {"model": MLP, "ema": MLP}, given).part == "model"
    given = GivenAnswers(equal=[{"model.fc.weight", "ema.fc.weight"}])
    with pytest.raises(AmbiguousKeysError):
        matched(MLP, {"model": MLP, "ema": MLP}, given)


def test_more_parts_than_anyone_compares_are_ambiguous() -> None:
    with pytest.raises(AmbiguousKeysError, match="is ambiguous: 8 or more parts fit Net") as caught:
        matched("w", " ".join(f"x{i}.w" for i in range(500)))
    assert str(caught.value).count("\n") == 8


REFUSED = {
    "one missing": (MLP, "fc.weight", KeyMismatchError, "1 of 2 keys of Net are in f.pt\n  missing:    fc.bias [2]\nwrite allow_missing=['fc.bias'] (what is missing stays as initialised)"),
    "one unexpected": (MLP, MLP + " x", KeyMismatchError, "2 of 2 keys of Net are in f.pt\n  unexpected: x [2]\nwrite allow_unexpected=['x']"),
    "after a rule": (MLP, "module.fc.weight", KeyMismatchError, "1 of 2 keys of Net are in f.pt (after: removed 'module.')\n  missing:    fc.bias [2]\nwrite allow_missing=['fc.bias'] (what is missing stays as initialised)"),
    "a head of another name": ("b.w fc.w fc.b", "b.w head.w head.b", KeyMismatchError, "write rename={'head': 'fc'}"),
    "a head of another size": ("b.w fc.w", "b.w fc.w:9", ShapeMismatchError, "shapes:     fc.w [9] in the file, [2] in the model\nwrite allow_missing=['fc.w'], allow_unexpected=['fc.w']"),
    "prefix exchanged": ("model.fc.w model.x.w", "net.fc.w net.x.w", KeyMismatchError, "write rename={'net': 'model'}"),
    "nothing alike": (MLP, "x y z", KeyMismatchError, "0 of 2 keys of Net are in f.pt\n  missing:    fc.weight [2], fc.bias [2]\n  unexpected: x [2], y [2], z [2]"),
    "empty": (MLP, "", KeyMismatchError, "0 of 2 keys of Net are in f.pt\n  missing:    fc.weight [2], fc.bias [2]"),
    "adapter": (MLP, "base_model.model.fc.lora_A.weight base_model.model.fc.lora_B.weight", KeyMismatchError, "This is a LoRA adapter"),
    "flat": (MLP, "_flat_param:100", KeyMismatchError, "These are FSDP flat parameters (_flat_param)"),
    "zero3": (MLP, "fc.weight:0 fc.bias:0", ShapeMismatchError, "saved under DeepSpeed ZeRO-3"),
    "not that scalar": ("scale:()", "scale:2", ShapeMismatchError, "scale [2] in the file, [] in the model"),
    "no longest suffix": ("a.b.w", "x.b.w", KeyMismatchError, "0 of 1 key of Net"),
    "extra state": (MLP, MLP + " fc._extra_state:?", KeyMismatchError, "unexpected: fc._extra_state"),
    "a wrapper's name as a leaf": (MLP, "fc.weight fc.bias fc.module", KeyMismatchError, "unexpected: fc.module"),
    "a prefix that is no whole segment": (MLP, "netfc.weight netfc.bias", KeyMismatchError, "write rename={'netfc': 'fc'}"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    model, file, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        matched(model, file)
    assert type(caught.value) is kind
    assert words in str(caught.value)


def test_an_argument_that_would_not_work_is_not_printed() -> None:
    with pytest.raises(KeyMismatchError) as caught:
        matched("b.w fc.w", "b.w head.w:9")
    assert "rename" not in str(caught.value)
    with pytest.raises(ShapeMismatchError) as caught:
        matched("b.w fc.w", "b.w:7 fc.w:9")
    assert "write" not in str(caught.value)


def test_dicts_that_hold_what_is_missing_are_named() -> None:
    with pytest.raises(KeyMismatchError) as caught:
        matched("body.w head.w head.b", {"body": "w", "fc": "w b"})
    assert str(caught.value) == (
        "One layer differs: head in the model is fc in the file.\n1 of 3 keys of Net are in f.pt\n  missing:    head.w [2], head.b [2]\n  unexpected: fc.w [2], fc.b [2]\n"
        "write rename={'fc': 'head'} or allow_missing=['head.*'], allow_unexpected=['fc.*'] (what is missing stays as initialised)"
    )


RENAMED = {
    "a prefix": ("fc.w", "head.w", {"head": "fc"}, "fc.w<head.w"),
    "below a wrapper": ("fc.w", "module.head.w", {"head": "fc"}, "fc.w<module.head.w"),
    "with its wrapper": ("fc.w", "module.head.w", {"module.head": "fc"}, "fc.w<module.head.w"),
    "below a prefix": ("fc.w b.w", "net.head.w net.b.w", {"head": "fc"}, "fc.w<net.head.w b.w<net.b.w"),
    "with a dot at the end": ("fc.w", "head.w", {"head.": "fc."}, "fc.w<head.w"),
    "the longest wins": ("a.w b.w", "x.w x.y.w", {"x": "a", "x.y": "b"}, "a.w<x.w b.w<x.y.w"),
    "a whole name": ("fc.w", "head", {"head": "fc.w"}, "fc.w<head"),
    "away": ("w", "a.b.w", {"a.b": ""}, "w<a.b.w"),
    "in front": ("a.w", "w", {"": "a"}, "a.w<w"),
    "exchanged": ("a.w b.w", "a.w b.w", {"a": "b", "b": "a"}, "a.w<b.w b.w<a.w"),
    "a function": ("fc.w fc.b", "FC.W FC.B", str.lower, "fc.w<FC.W fc.b<FC.B"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_rename(case: str) -> None:
    model, file, rename, pairs = RENAMED[case]
    plan = matched(model, file, rename=rename)
    assert renamed(plan) == pairs
    assert "renamed" in plan.rule


def test_rename_into_a_wrapped_model() -> None:
    model = model_keys("module.fc.w", "module")
    for target in ("fc", "module.fc"):
        assert renamed(matched(model, "head.w", rename={"head": target})) == "module.fc.w<head.w"


def test_a_rename_that_merges_names_is_refused() -> None:
    with pytest.raises(AmbiguousKeysError, match=r"a.w and b.w would get the same name"):
        matched("a.w", "a.w b.w", rename=lambda name: "a.w")
    with pytest.raises(AmbiguousKeysError, match=r"a.w and b.w would get the same name"):
        matched("a.w", "a.w b.w", rename={"b": "a"})


def test_a_rename_that_merges_names_elsewhere_does_not_matter() -> None:
    assert matched("a.w", {"model": "x.w", "other": "x.w a.w q"}, rename={"x": "a"}).part == "model"


SELECTED = {
    "a dict": ({"model": MLP, "ema": MLP}, "ema", "ema.fc.weight"),
    "a dict of dicts": ({"ckpt.model": MLP, "ckpt.ema": MLP}, "ckpt.ema", "ckpt.ema.fc.weight"),
    "a prefix": ("a.fc.weight a.fc.bias b.fc.weight b.fc.bias", "b", "b.fc.weight"),
    "a dict and a prefix": ({"sd": "a.fc.weight a.fc.bias b.fc.weight b.fc.bias"}, "sd.b", "sd.b.fc.weight"),
    "the top": ({"": MLP, "ema": MLP}, "", "fc.weight"),
    "through a wrapper": ({"sd": "module.fc.weight module.fc.bias", "ema": MLP}, "sd", "sd.module.fc.weight"),
}


@pytest.mark.parametrize("case", SELECTED)
def test_select(case: str) -> None:
    parts, path, first = SELECTED[case]
    assert matched(MLP, parts, select=path).pairs["fc.weight"] == first


def test_select_of_nothing_says_what_there_is() -> None:
    with pytest.raises(KeyMismatchError, match=r"there is no 'x' in the file. It holds: model, ema"):
        matched(MLP, {"model": MLP, "ema": MLP}, select="x")


def test_two_dicts_of_one_dotted_path_are_told_apart() -> None:
    for path in (None, "a", "a.b"):
        with pytest.raises(AmbiguousKeysError, match="would get the same name"):
            matched("c", {"a": "b.c", "a.b": "c"}, select=path)


def test_patterns() -> None:
    plan = matched("b.w fc.w", "b.w aux.w", allow_missing=("fc.*",), allow_unexpected=("aux.*",))
    assert (plan.missing_keys, plan.unexpected_keys) == (("fc.w",), ("aux.w",))
    plan = matched("b.w fc.w", "module.b.w module.fc.w:9", allow_missing=("fc.*",), allow_unexpected=("fc.*",))
    assert (plan.missing_keys, plan.unexpected_keys) == (("fc.w",), ("module.fc.w",))
    wrapped = model_keys("module.b.w module.fc.w", "module")
    for pattern in ("fc.*", "module.fc.*"):
        assert matched(wrapped, "b.w", allow_missing=(pattern,)).missing_keys == ("module.fc.w",)
    assert matched("b.w fc.w", "b.w fc.w", allow_missing=("fc.*",)).missing_keys == ()


@pytest.mark.parametrize("side", ["allow_missing", "allow_unexpected"])
def test_a_shape_may_differ_only_if_both_sides_allow_it(side: str) -> None:
    with pytest.raises(ShapeMismatchError):
        matched("b.w fc.w", "b.w fc.w:9", **{side: ("fc.*",)})


def test_a_pattern_that_matched_nothing() -> None:
    with pytest.raises(
        KeyMismatchError, match="allow_missing pattern 'x' matched no key of Net; the keys look like fc"
    ):
        matched(MLP, MLP, allow_missing=("x",))
    with pytest.raises(KeyMismatchError, match="allow_unexpected pattern 'x' matched no key of the file"):
        matched(MLP, MLP, allow_unexpected=("x",))
    with pytest.raises(KeyMismatchError, match="rename rule 'x' matched no key of the file"):
        matched(MLP, MLP, rename={"x": "y"})


def test_three_names_for_one_key_and_a_pattern_for_some() -> None:
    file = "w module.w _orig_mod.w"
    assert renamed(matched("w", file, allow_unexpected=("module.w", "_orig_mod.w"))) == "w"
    for allowed in ("w", "module.w"):
        with pytest.raises(AmbiguousKeysError):
            matched("w", file, allow_unexpected=(allowed,))


def test_missing_keys_are_no_reason_to_take_a_corner_of_the_file() -> None:
    tree = "w l.w r.w"
    with pytest.raises(KeyMismatchError, match="unexpected: extra"):
        matched(tree, "n.w n.l.w n.r.w n.extra", allow_missing=("*",))
    assert renamed(matched(tree, "n.w n.l.w n.r.w", allow_missing=("*",))) == "w<n.w l.w<n.l.w r.w<n.r.w"


def test_tied_names_are_no_reason_to_take_a_corner_of_the_file() -> None:
    model = model_keys("w b.w", tied=[("w", "b.w")])
    with pytest.raises(KeyMismatchError, match="unexpected: x"):
        matched(model, "a.w a.b.w a.x", GivenAnswers(equal=[{"a.w", "a.b.w"}]))
    with pytest.raises(KeyMismatchError, match="unexpected: x"):
        matched(model, "b.w x")
    assert renamed(matched(model, "a.b.w")) == "w<a.b.w b.w<a.b.w"


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(KeyMismatchError, match="0 of 2 keys"):
        matched(MLP, "x y", allow_missing=("*",), allow_unexpected=("*",))
    with pytest.raises(KeyMismatchError, match="0 of 2 keys"):
        matched(MLP, "", allow_missing=("*",))
    assert matched("", "").pairs == {}


def test_the_models_own_code_is_asked_last_and_as_the_file_spells_it_first() -> None:
    given = GivenAnswers(accepted=[{"fc.weight"}])
    plan = matched(MLP, "module.fc.weight", given)
    assert plan.rehearsed
    assert renamed(plan) == "fc.weight<module.fc.weight"
    assert plan.rule == "removed 'module.', the model's own loading code handles fc.bias"
    given = GivenAnswers(accepted=[{"fc.w_g", "fc.w_v", "fc.bias"}])
    plan = matched(model_keys("fc.p.0 fc.p.1 fc.bias"), "net.fc.w_g net.fc.w_v net.fc.bias", given)
    assert set(plan.pairs) == {"fc.w_g", "fc.w_v", "fc.bias"}
    both = GivenAnswers(accepted=[{"fc.weight"}])
    with pytest.raises(AmbiguousKeysError):
        matched(MLP, {"model": "fc.weight", "ema": "fc.weight"}, both)


def test_code_that_takes_anything_gets_the_file_as_it_is() -> None:
    class Anything(GivenAnswers):
        def accepts(self, names: object, own_shapes: bool = False) -> bool:
            return True

    assert renamed(matched(MLP, "net.fc.weight net.x", Anything())) == "net.fc.weight net.x"


def test_shapes_alone_are_named_where_the_model_handles_the_names() -> None:
    given = GivenAnswers(named=[{"fc.w", "bn.w"}])
    with pytest.raises(ShapeMismatchError) as caught:
        matched("fc.w bn.w bn.count:()", "fc.w:9 bn.w", given)
    assert str(caught.value).startswith(
        "One layer differs: fc.\n2 of 3 keys of Net are in f.pt\n  shapes:     fc.w [9] in the file, [2] in the model"
    )


def test_module_paths_for_versions() -> None:
    assert module_paths({"fc.w": "module.fc.w"}) == {"module.fc": "fc", "module": ""}
    assert module_paths({"model.fc.w": "fc.w"}) == {"fc": "model.fc", "": "model"}
    assert module_paths({"a.b.w": "a.module.b.w"}) == {"a.module.b": "a.b", "a.module": "a", "a": "a", "": ""}
    assert module_paths({"a.module.b.w": "sd.a.b.w"}) == {"sd.a.b": "a.module.b", "sd.a": "a.module", "sd": ""}
    assert module_paths({"w": "w", "a.w": "w"}) == {"": ""}


def flat(names: list[str], shape: tuple[int, ...] = (2,)) -> dict[str, TensorSpec | None]:
    return dict.fromkeys(names, TensorSpec(shape, "float32"))


MANY = 20_000
HOSTILE = {
    "one key many times": (["weight"], flat([f"x{i}.weight" for i in range(MANY)])),
    "in another shape": (["weight"], flat([f"x{i}.weight" for i in range(MANY)], (3,))),
    "long paths": (["weight"], flat([".".join([f"s{i}"] * 10_000) + ".weight" for i in range(30)])),
    "wrappers in wrappers": (["weight"], flat(["module." * 10_000 + f"w{i}.weight" for i in range(30)])),
    "long names": (["weight"], flat(["x" * 1_000_000 + f"{i}.weight" for i in range(10)])),
    "nested names": (["weight"], flat(["a." * i + "weight" for i in range(1, 1000)])),
    "nested names in another shape": (["weight"], flat(["a." * i + "weight" for i in range(1, 1000)], (3,))),
    "numbers": (["weight"], flat([".".join("1" * i + "2" + "1" * (900 - i)) + ".weight" for i in range(900)], (3,))),
    "one prefix": ([f"l{i}.weight" for i in range(MANY)], flat([f"{'p.' * 10}l{i}.w" for i in range(MANY)])),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_work_grows_with_the_names_only(case: str) -> None:
    keys, file = HOSTILE[case]
    started = time.process_time()
    with pytest.raises(KeyMismatchError) as caught:
        matched(ModelKeys("Net", flat(keys)), {"": file})
    text = str(caught.value)
    assert time.process_time() - started < 20  # each takes a second at most; what grows faster takes minutes
    assert text.count("\n") < 25
    assert len(text) < 5000


def test_as_many_dicts_as_tensors() -> None:
    with pytest.raises(AmbiguousKeysError):
        matched(ModelKeys("Net", flat(["weight"])), {f"d{i}": flat(["weight"]) for i in range(MANY)})  # type: ignore[arg-type]


def test_options_are_values() -> None:
    assert Options() == Options(None, None, (), ())
