"""Overriding frozen settings: types held, mistakes named, changes listed."""

from dataclasses import dataclass

import pytest

from pretrain.errors import UserError
from pretrain.overrides import assignments, differences, with_overrides


@dataclass(frozen=True)
class Recipe:
    name: str = "recipe"
    version: int = 1
    steps_it: int = 100
    lr: float = 1e-3
    amp: bool = True
    norm: str = "LN"
    betas: tuple[float, float] = (0.9, 0.999)
    milestones_it: tuple[int, ...] = (50, 80)


@pytest.mark.parametrize(
    "key, given, held",
    [
        ("steps_it", "20", 20),
        ("lr", "1e-4", 1e-4),
        ("lr", 1, 1.0),
        ("amp", "false", False),
        ("amp", True, True),
        ("norm", "1", "1"),
        ("betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("betas", "0.9,0.95", (0.9, 0.95)),
        ("betas", [1, 1e-1], (1.0, 0.1)),
        ("milestones_it", "10", (10,)),
        ("milestones_it", 10, (10,)),
        ("milestones_it", "(1, 2, 3)", (1, 2, 3)),
        ("milestones_it", "", ()),
    ],
)
def test_values_take_the_type_of_the_field(key, given, held):
    value = getattr(with_overrides(Recipe(), {key: given}), key)
    assert value == held and type(value) is type(held)
    if isinstance(held, tuple):
        assert [type(v) for v in value] == [type(v) for v in held]


@pytest.mark.parametrize(
    "key, given",
    [
        ("steps_it", "1.5"),
        ("steps_it", 1.0),
        ("steps_it", True),
        ("steps_it", None),
        ("lr", "fast"),
        ("lr", "nan"),
        ("lr", False),
        ("amp", 1),
        ("amp", "yes"),
        ("norm", 3),
        ("betas", "0.9"),
        ("betas", "0.9, x"),
        ("milestones_it", "1.5"),
        ("milestones_it", [True]),
    ],
)
def test_a_value_of_another_type_is_named(key, given):
    with pytest.raises(UserError, match=rf"^protocol: {key}=.* should be like"):
        with_overrides(Recipe(), {key: given})


@pytest.mark.parametrize("key", ["step_it", "name", "version"])
def test_unknown_and_fixed_fields_are_refused(key):
    with pytest.raises(UserError, match=f"^recipe: no field '{key}'; there are amp, betas, lr, milestones_it, norm, steps_it$"):
        with_overrides(Recipe(), {key: "1"}, what="recipe")


def test_differences_list_both_values_and_nothing_else():
    assert differences(Recipe(), Recipe()) == {}
    changed = with_overrides(Recipe(), {"lr": "2e-3", "betas": "0.9, 0.95", "steps_it": 100})
    assert differences(Recipe(), changed) == {"lr": [1e-3, 2e-3], "betas": [(0.9, 0.999), (0.9, 0.95)]}


def test_assignments_of_a_command_line():
    assert assignments(["lr=1e-4", "note=a=b"]) == {"lr": "1e-4", "note": "a=b"}
    for word in ("lr", "=1"):
        with pytest.raises(UserError, match=word):
            assignments([word])
    with pytest.raises(UserError, match="lr is given twice: '1' and '2'"):
        assignments(["lr=1", "lr=2"])
