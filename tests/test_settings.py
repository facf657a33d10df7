"""Typed settings: values take a field's type, mistakes are one line, old names load; and every protocol is
made of such fields."""

import json

import pytest
from pydantic import PositiveFloat, model_validator
from runs_fixture import ROOT

from det_plugin.protocol import DetectionProtocol
from det_plugin.run import first_names
from posfield.cli import settings_page
from pretrain.cli import fields_and_kwargs
from pretrain.config import RECIPES
from pretrain.errors import UserError
from pretrain.evaluation.clustering import ClusteringSettings
from pretrain.evaluation.dense import DenseSettings, settings_of
from pretrain.evaluation.in_context import InContextSettings
from pretrain.evaluation.knn import KnnSettings
from pretrain.evaluation.linear_segmentation import LinearSettings
from pretrain.methods import SHIPPED, find_method
from pretrain.results import renamed
from pretrain.results.schema import Protocol
from pretrain.settings import (
    Settings,
    as_dict,
    build,
    compared,
    differences,
    fields,
    json_schema,
    plain,
    read_words,
    replaced,
    setting,
    split_words,
    upgraded,
)


class Recipe(Settings):
    renamed = {"steps_it": "steps"}

    name: str = setting("recipe", "its name", source="ours", settable=False)
    steps: int = setting(100, "iterations", source="ours", ge=1)
    lr: float = setting(1e-3, "of AdamW", source="ours", ge=0)
    amp: bool = setting(True, "mixed precision", source="ours")
    norm: str = setting("LN", "of the heads", source="ours")
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW", source="ours")
    milestones: tuple[int, ...] = setting((50, 80), "iterations", source="ours")
    sizes: tuple[PositiveFloat, ...] = setting((1.0,), "of anchors", source="ours")

    @model_validator(mode="after")
    def _steps_hold_milestones(self) -> "Recipe":
        if any(step > self.steps for step in self.milestones):
            raise ValueError(f"milestones={self.milestones} must be within steps={self.steps}")
        return self


@pytest.mark.parametrize(
    "key, given, held",
    [
        ("steps", "200", 200),
        ("steps", "0100", 100),
        ("lr", "1e-4", 1e-4),
        ("lr", 1, 1.0),
        ("amp", "false", False),
        ("amp", True, True),
        ("norm", "1", "1"),
        ("norm", "none", "none"),
        ("betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("betas", "0.9,0.95", (0.9, 0.95)),
        ("betas", [1, 1e-1], (1.0, 0.1)),
        ("milestones", "10", (10,)),
        ("milestones", 10, (10,)),
        ("milestones", "(1, 2, 3)", (1, 2, 3)),
        ("milestones", "", ()),
        ("sizes", "0.5, 2", (0.5, 2.0)),
        ("steps_it", "200", 200),
    ],
)
def test_values_take_the_type_of_the_field(key, given, held):
    value = getattr(replaced(Recipe(), {key: given}), Recipe.renamed.get(key, key))
    assert value == held and type(value) is type(held)
    if isinstance(held, tuple):
        assert [type(v) for v in value] == [type(v) for v in held]


@pytest.mark.parametrize(
    "key, given, said",
    [
        ("steps", "1.5", "steps='1.5' should be a whole number"),
        ("steps", 1.0, "steps=1.0 should be a valid integer"),
        ("steps", True, "steps=True should be a whole number"),
        ("steps", None, "steps=None should be a valid integer"),
        ("steps", 0, "steps=0 should be greater than or equal to 1"),
        ("lr", "fast", "lr='fast' should be a number"),
        ("lr", "nan", "lr=nan should be a finite number"),
        ("lr", "-inf", "lr=-inf should be a finite number"),
        ("lr", False, "lr=False should be a number"),
        ("amp", 1, "amp=1 should be a valid boolean"),
        ("amp", "yes", "amp='yes' should be true or false"),
        ("norm", 3, "norm=3 should be UTF-8 text"),
        ("norm", b"\xff".decode(errors="surrogateescape"), "norm='\\udcff' should be UTF-8 text"),
        ("betas", "0.9", "betas='0.9' should be a list of 2 values, each a number"),
        ("betas", "0.9, x", "betas='0.9, x' should be a list of 2 values, each a number"),
        ("milestones", "1.5", "milestones='1.5' should be a list of values, each a whole number"),
        ("milestones", [True], "milestones=[True] should be a list of values, each a whole number"),
        ("milestones", "101", "milestones=(101,) must be within steps=100"),
        ("sizes", "1, 0", "sizes[1]=0.0 should be greater than 0"),
        ("step", "1", "unknown key 'step'; did you mean steps?"),
        ("name", "mine", "unknown key 'name'; there are amp, betas, lr, milestones, norm, sizes, steps"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line_with_its_key(key, given, said):
    with pytest.raises(UserError) as error:
        replaced(Recipe(), {key: given}, what="recipe")
    assert str(error.value) == f"recipe: {said}"


def test_an_old_name_beside_the_new_one_is_an_error():
    with pytest.raises(
        UserError, match="steps_it is the old name of steps, and both are given; give steps alone"
    ):
        build(Recipe, [read_words(["steps=1", "steps_it=2"])])
    assert (
        build(Recipe, [read_words(["steps=500"]), read_words(["steps_it=200"])]).steps == 200
    )  # the later layer counts


def test_a_groups_default_may_differ_from_its_models_defaults():
    class Run(Settings):
        recipe: Recipe = Recipe(steps=90, amp=False)
        seed: int = setting(0, "seed", source="ours")

    assert build(Run).recipe == Recipe(steps=90, amp=False)
    assert build(Run, [read_words(["recipe.lr=1"])]).recipe == Recipe(steps=90, amp=False, lr=1.0)


def test_differences_list_both_values_and_nothing_else():
    assert differences(Recipe(), Recipe()) == {}
    changed = replaced(Recipe(), {"lr": "2e-3", "betas": "0.9, 0.95", "steps": 100})
    assert differences(Recipe(), changed) == {"lr": [1e-3, 2e-3], "betas": [[0.9, 0.999], [0.9, 0.95]]}


def test_nested_plain_values_are_compared_key_by_key():
    before = {
        "a": {"b": 1, "same": [1, 2]},
        "hooks": [{"type": "x"}],
        "none": None,
        "empty": {},
        "gone": {"k": {"v": 0}},
    }
    now = {
        "a": {"b": 2, "same": [1, 2]},
        "hooks": [{"type": "x"}, {"type": "y", "n": 1}],
        "none": 0,
        "empty": {"k": 1},
    }
    assert compared(before, now) == {
        "a.b": [1, 2],
        "hooks.1.type": [None, "y"],
        "hooks.1.n": [None, 1],
        "none": [None, 0],
        "empty.k": [None, 1],
        "gone.k.v": [0, None],
    }
    assert compared({"a": {"b": 1}}, {"a": "text"}) == {"a": [{"b": 1}, "text"]}
    assert compared(before, json.loads(json.dumps(before))) == {}


def test_words_of_a_command_line():
    assert split_words(["lr=1e-4", "note=a=b"]) == {"lr": "1e-4", "note": "a=b"}
    for word in ("lr", "=1"):
        with pytest.raises(UserError, match=f"{word!r} is not of the form key=value"):
            split_words([word])
    with pytest.raises(UserError, match="lr is given twice: '1' and '2'"):
        split_words(["lr=1", "lr=2"])


@pytest.mark.parametrize(
    "text, held",
    [
        ("4", 4),
        ("-4", -4),
        ("1e-5", 1e-5),  # in YAML a text
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("[7, 9]", [7, 9]),
        ("010", "010"),
        ("2024-10-01", "2024-10-01"),
        ("/photos #1", "/photos #1"),
        ("${HOME}", "${HOME}"),
        ("*name", "*name"),
        ("yes", "yes"),
    ],
)
def test_words_that_no_type_reads_are_plain(text, held):
    assert plain(text) == held and type(plain(text)) is type(held)
    assert fields_and_kwargs(["lr=1", f"backbone.key={text}"]) == ({"lr": "1"}, {"key": held})


def test_words_of_the_backbone():
    assert fields_and_kwargs(["backbone.layer_scale_init=1e-5"])[1] == {
        "layerscale": 1e-5
    }  # as in a pre-training
    assert fields_and_kwargs(["backbone.layerscale=0.1", "backbone.source=dino"])[1] == {
        "layerscale": 0.1,
        "source": "dino",
    }
    for name in ("name", "weights"):
        with pytest.raises(UserError, match=rf"backbone\.{name}: give it as --"):
            fields_and_kwargs([f"backbone.{name}=x"])


# --- the protocols ----------------------------------------------------------------------------------------


def segmentation():
    pytest.importorskip("mmseg")
    from seg_plugin.protocol import SegmentationProtocol

    return SegmentationProtocol


MODELS = {
    "detection": lambda: DetectionProtocol,
    "segmentation": segmentation,
    **{
        m.__name__: (lambda m=m: m)
        for m in (LinearSettings, InContextSettings, ClusteringSettings, KnnSettings)
    },
}
OLD = {"detection": renamed.DETECTION, "segmentation": renamed.SEGMENTATION}
BAD = {bool: "1", int: "1.5", float: "nan", str: b"\xff".decode(errors="surrogateescape")}


@pytest.mark.parametrize("name", MODELS)
def test_every_key_says_what_it_is_and_where_its_value_is_from(name):
    found = list(fields(MODELS[name]()))
    assert found
    for key, info, _ in found:
        source = info.json_schema_extra["source"]
        assert (
            source and info.description.endswith(f" [{source}]") and len(info.description) > len(source) + 4
        ), key


@pytest.mark.parametrize("name", MODELS)
def test_no_field_takes_what_is_no_value_of_its_type(name):
    model = MODELS[name]()
    for key, info, _ in fields(model):
        if not info.json_schema_extra["settable"]:
            continue
        value = info.default[0] if isinstance(info.default, tuple) else info.default
        bad = BAD[type(value)]
        bad = ",".join([bad] * len(info.default)) if isinstance(info.default, tuple) else bad
        for given in (bad, *(["inf", "-inf"] if type(info.default) is float else []), {"a": 1}, object()):
            with pytest.raises(UserError, match=rf"^protocol: {key}(\[\d\])?=.* should ") as error:
                replaced(model(), {key: given}, "protocol")
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="^protocol: unknown key 'no_such_key'; "):
        replaced(model(), {"no_such_key": 1}, "protocol")


@pytest.mark.parametrize(
    "name, old, new", [(name, old, new) for name, names in OLD.items() for old, new in names.items()]
)
def test_old_names_of_fields_still_load(name, old, new):
    """As words, as values of a saved run, as a deviation in a result, in the command of a job."""
    model = MODELS[name]()
    assert model.renamed == OLD[name]
    value = {"milestones": [1, 2], "max_iters": 30_000}.get(new, 7)
    text = "1,2" if new == "milestones" else str(value)
    expected = as_dict(replaced(model(), {new: value}))
    assert as_dict(build(model, [read_words([f"{old}={text}"])])) == expected
    assert as_dict(replaced(model(), {old: value})) == expected
    saved = as_dict(model()) | {new: value}
    saved = {old if key == new else key: item for key, item in saved.items()}
    assert upgraded(model, saved) == as_dict(model()) | {new: value} == expected
    pair = {"name": "x", "version": 1, "full": False}
    assert Protocol(**pair, deviations={old: [1, 2]}) == Protocol(**pair, deviations={new: [1, 2]})
    assert renamed.in_command(f"tool {old}={text} '{old}=[1]'") == f"tool {new}={text} '{new}=[1]'"
    assert list(first_names({"protocol": {new: value}})["protocol"]) == [old]


def test_the_arguments_of_the_vit_as_a_deviation_by_their_old_name():
    pair = {"name": "x", "version": 1, "full": False}
    (key,) = Protocol(**pair, deviations={"backbone_flags": [{}, {"depth": 1}]}).deviations
    assert key == "model_kwargs"


def test_a_task_of_dense_evaluation_is_a_group():
    assert set(DenseSettings.model_fields) == {"linear", "in_context", "clustering", "knn"}
    assert settings_of(["linear"], ["linear.epochs=2"], seed=3)["linear"] == LinearSettings(epochs=2, seed=3)


@pytest.mark.parametrize("method", SHIPPED)
def test_the_shipped_json_schemas_are_those_of_the_models(method):
    """Rewritten by ``python tools/config.py RECIPE --schema > pretrain/recipes/schema/METHOD.json``."""
    shipped = json.loads((RECIPES / "schema" / f"{method}.json").read_text())
    assert shipped == json_schema(find_method(method).Settings)
    assert {"base", "optim"} < shipped["properties"].keys() and not shipped["additionalProperties"]
    assert shipped["properties"]["data"]["default"]["source"] == "auto"
    (optim,) = (group for name, group in shipped["$defs"].items() if name.endswith("OptimSettings"))
    assert optim["properties"]["base_lr"]["minimum"] == 0 and optim["properties"]["betas"]["maxItems"] == 2


def test_the_page_of_settings_is_the_models():
    page = ROOT / "docs" / "settings.md"
    assert page.read_text() == settings_page.page(), "posfield config --markdown > docs/settings.md"
