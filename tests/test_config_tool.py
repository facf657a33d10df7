"""tools/config.py: every config, printed with meanings and sources, loads again; the schema for editors."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from recipe_fixture import CONFIGS
from test_config import AS_WRITTEN
from tool_fixture import TOOLS, ended

from posfield import cli
from pretrain.config import RECIPES, load_config, resolved
from pretrain.methods import SHIPPED, find_method
from pretrain.settings import fields, flat, json_schema, printed

EVERY_YAML = sorted([*CONFIGS.rglob("*.yaml"), *RECIPES.rglob("*.yaml")])
START = ["backbone.weights=start.pth"]


def words_for(path):
    return START if path.name.startswith(("paka", "gram", "toy_paka", "toy_gram")) else []


@pytest.mark.parametrize("path", EVERY_YAML, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.filterwarnings("ignore:config. positions.grid")
def test_every_shipped_config_is_printed_and_loads_back(path, tmp_path):
    words = words_for(path)
    config = load_config(path, words)
    text = printed(config, resolved(path, words)[1])
    (tmp_path / "printed.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "printed.yaml") == config
    lines = [line for line in text.splitlines() if line and not line.endswith(":")]
    infos = {key: info for key, info, _ in fields(type(config))}
    assert len(lines) == len(infos)
    for info in infos.values():
        assert any(f"  # {info.description}" in line for line in lines)


def test_the_tool_prints_where_each_value_comes_from(tmp_path, capsys):
    toy = CONFIGS / "toy_dinov2.yaml"
    assert ended("config", toy, "optim.epochs=3", "log.period_it=7") == 0
    text = capsys.readouterr().out
    lines = {line.partition(":")[0].strip(): line for line in text.splitlines()}
    assert "[Table 6]; here: command line" in lines["epochs"] and lines["epochs"].startswith("  epochs: 3 ")
    assert "[Table 6]; here: " in lines["grid"] and lines["grid"].endswith(f"{toy}: 112 / 16")
    assert lines["betas"].endswith("# of AdamW [DINOv2]")
    assert (
        lines["interpolation"].endswith("; here: recipe dinov2-100ep") and "toy.yaml" in lines["n_prototypes"]
    )
    (tmp_path / "printed.yaml").write_text(text)
    assert load_config(tmp_path / "printed.yaml") == load_config(toy, ["optim.epochs=3", "log.every=7"])


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_any_text_is_printed_so_that_it_is_read_again(text, tmp_path):
    config = load_config(None, [f"run.name={text}", f"data.root={text}"])
    file = tmp_path / "child\x7f\u2028# {a}.yaml"  # its name stands in comments
    file.write_text("optim:\n  epochs: 3  # few \u00fc\n")
    for told, layers in ((config, []), (load_config(file, [f"run.name={text}"]), resolved(file)[1])):
        printed_file = tmp_path / "printed.yaml"
        printed_file.write_text(printed(told, layers), encoding="utf-8")
        assert load_config(printed_file) == told


def test_the_tool_ends_mistakes_with_one_line_and_code_2(capsys):
    for words in (
        ["nothing.yaml"],
        ["paka-25ep"],
        [CONFIGS / "toy.yaml", "optim.epoch=3"],
        ["nothing.yaml", "--schema"],
    ):
        assert ended("config", *words) == 2
        captured = capsys.readouterr()
        assert (
            captured.out == ""
            and captured.err.startswith("error: config: ")
            and captured.err.count("\n") == 1
        )


def test_the_tool_as_a_user_starts_it(tmp_path):
    command = [sys.executable, str(TOOLS / "config.py"), "paka-25ep", *START]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["alignment"]["region_grid"] == 7


# --- the schema -------------------------------------------------------------------------------------------


def opened(schema, part, prefix=""):
    """{dotted key: its schema}."""
    found = {}
    for key, value in part["properties"].items():
        if "$ref" in value:
            found |= opened(schema, schema["$defs"][value["$ref"].split("/")[-1]], f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_knows_every_key_with_its_meaning_choices_and_range(name):
    model = find_method(name).Settings
    schema = json_schema(model)
    keys = opened(schema, schema)
    infos = {key: info for key, info, _ in fields(model)}
    assert keys.pop("base")["type"] == ["string", "array"]  # which files have, and settings have not
    assert keys.keys() == infos.keys() and schema["additionalProperties"] is False
    for key, info in infos.items():
        assert keys[key]["description"] == info.description
        default = list(info.default) if isinstance(info.default, tuple) else info.default
        assert keys[key]["default"] == default and keys[key]["type"] in (
            "string",
            "integer",
            "number",
            "boolean",
            "array",
        )
    assert (
        keys["run.device"]["enum"] == ["auto", "cpu", "cuda", "mps"] and keys["optim.epochs"]["minimum"] == 1
    )


@pytest.mark.parametrize("name", ["toy", "toy_paka", "toy_mae"])
def test_the_tool_prints_a_schema_that_the_configs_fit(name, capsys):
    """Of a post-training it does not ask for weights: nothing is run."""
    path = CONFIGS / f"{name}.yaml"
    assert ended("config", path, "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema(resolved(path)[0])
    keys = opened(schema, schema)
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for key, value in flat(yaml.safe_load(path.read_text())).items():
        kind = keys[key]["type"]
        assert any(isinstance(value, kinds[name]) for name in ([kind] if isinstance(kind, str) else kind)), (
            key
        )


def test_an_empty_path_is_refused_by_every_command(monkeypatch, capsys):
    """It would be the working folder. Texts that may be empty pass."""
    reached = []
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: SimpleNamespace(main=lambda words: reached.append(name))
    )
    for name in cli.COMMANDS:
        for words in (["--output", ""], ["--output="], ["--data", " "], ["--weights", "a", ""], [""]):
            monkeypatch.setattr(sys, "argv", ["posfield", *name.split(), *words])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            said = capsys.readouterr().err
            option = words[0].partition("=")[0] or "arguments"
            assert stopped.value.code == 2 and said.startswith(f"error: {option}: ") and "is empty" in said
    assert not reached
    monkeypatch.setattr(sys, "argv", ["posfield", "segment", "--void", "", "--map=", "--output", "run"])
    cli.main()
    assert reached == ["posfield.cli.segment"]
