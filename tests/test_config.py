"""Settings of a pre-training: every key has a source and a reader, a mistake is one line, a text is as
written."""

import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from dense_fixture import DENSE, TIED, write_start
from photos import TINY, last, write_photos
from recipe_fixture import CONFIGS
from tool_fixture import TOOLS, ended

from pretrain.config import from_saved, load_config, run_protocol
from pretrain.errors import UserError
from pretrain.methods import SHIPPED, find_method
from pretrain.settings import Settings, as_dict, build, fields, read_words, typed_value
from pretrain.train import train

START = "backbone.weights=start.pth"
SOURCE = re.compile(r"Table 6|appendix B|sec\. [34]|footnote|DINOv2|DINOv3$|DINO$|eq\. |PaKA|NeCo|MAE|ours")


# --- every key --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_says_what_it_means_and_where_its_value_comes_from(name):
    for key, info, holder in fields(find_method(name).Settings):
        source = info.json_schema_extra["source"]
        assert SOURCE.match(source), f"{key}: {source}"
        assert info.description.endswith(f" [{source}]") and len(info.description) > len(source) + 5, key
        assert holder.__doc__, holder


MAE_TINY = ["method=mae", "mae.decoder_width=16", "mae.decoder_heads=4", "mae.decoder_depth=1"]
NO_HEADS = [word for word in TINY if not word.startswith(("heads", "positions"))]
# Runs that, between them, read every key of a method: {method: key=value words of each}.
RUNS = {
    "intertwined": [
        ["color.solarize_p=[1,1,1]", "crops.local_rule=inside", *TINY],
        [*TINY, "losses.centering=sinkhorn_knopp"],
        [*TINY, "positions.encoding=rotary", "positions.tied=false", "positions.augment=false"],
    ],
    "paka": [DENSE, [*DENSE, *TIED, "color.solarize_p=[1,1,1]"]],
    "mae": [[*NO_HEADS, *MAE_TINY, "crops.n_local=0"]],
}
# Read where a probe's folder is given, which these runs do not: tests/test_probes.py,
# tests/test_dense_probes.py.
OF_PROBES = {
    f"probes.{key}"
    for key in "seg_classes dense_set dense_tasks void map mask_name knn_k image_px max_images".split()
}
# Keys of groups that all methods share, of which one has no use for some.
UNREAD = {
    "intertwined": set(),
    # the file says which LayerScale it has, and its field is no new one
    "paka": {"backbone.layer_scale_init"}
    | {f"positions.{key}" for key in ("init_grid", "init_scale", "rescale", "tied")},
    "mae": {"crops.local_inside"},  # no local crops
}


class Readers:
    """Records which keys are read by name, and which groups are handed over whole as keyword arguments."""

    def __init__(self, monkeypatch):
        self.prefixes, self.read, dump = {}, set(), Settings.model_dump

        def get(group, name):
            self.note(group, [name])
            return object.__getattribute__(group, name)

        def model_dump(group, **options):
            if not options:  # as_dict has options: it walks over all keys, to save them
                self.note(group, type(group).model_fields)
            return dump(group, **options)

        monkeypatch.setattr(Settings, "__getattribute__", get, raising=False)
        monkeypatch.setattr(Settings, "model_dump", model_dump)

    def note(self, group, names):
        if id(group) in self.prefixes:
            self.read |= {
                self.prefixes[id(group)] + name for name in names if name in type(group).model_fields
            }

    def watch(self, group, prefix=""):
        for name in type(group).model_fields:
            value = object.__getattribute__(group, name)
            if isinstance(value, Settings):
                self.watch(value, f"{prefix}{name}.")
        self.prefixes[id(group)] = prefix


@pytest.mark.filterwarnings("ignore:(config. positions.grid|weights. )")
def test_every_key_is_read(tmp_path, monkeypatch):
    """A run touches each key of its settings at least once: a key that nothing reads would lie to the
    user."""
    photos, start = write_photos(tmp_path / "photos"), write_start(tmp_path / "start.safetensors")
    for method, runs in RUNS.items():
        with monkeypatch.context() as patch:
            configs = []
            for i, words in enumerate(runs):
                words = [*words, f"data.root={photos}", f"run.output={tmp_path / method / str(i)}"]
                words += [
                    "optim.epochs=1",
                    "optim.warmup_epochs=0",
                    *([f"backbone.weights={start}"] if method == "paka" else []),
                ]
                configs.append(load_config(None, last(words)))
            readers = Readers(patch)
            for config in configs:
                readers.watch(config)
                train(config)
            unread = {key for key, _, _ in fields(find_method(method).Settings)} - readers.read
            assert unread - OF_PROBES == UNREAD[method], method
    assert set(RUNS) == set(SHIPPED)


# --- values that are wrong --------------------------------------------------------------------------------


def refused(words, path=None):
    """The one line by which words, or a file, are refused."""
    with pytest.raises(UserError) as error:
        load_config(path, words)
    line = str(error.value)
    assert "\n" not in line and line.isprintable() and len(line) < 600
    return line


def bad_texts(info):
    """Texts that a field cannot mean: of another type, not finite, outside its choices or its range."""
    kind, parts = info.annotation, typing.get_args(info.annotation)
    if typing.get_origin(kind) is typing.Literal:
        return ["nonesuch", "", parts[0].upper()]
    if typing.get_origin(kind) is tuple:
        limits = (
            typing.get_args(parts[0])[1].metadata if typing.get_origin(parts[0]) is typing.Annotated else []
        )
        rest = "".join(f",{item}" for item in info.default[1:])
        short = ["0.5,", "0.5," * (len(parts) + 1), "", "{a: 1}"]
        return short + [f"{text}{rest}" for text in ("x", "nan", "inf", "-inf", *outside(limits))]
    of_type = {
        bool: ["1", "0", "yes", "", "null"],
        int: ["1.5", "x", "", "nan", "1e3", "0x10", "true", "null", "[1]"],
        float: ["x", "", "nan", "inf", "-inf", "1e999", "true", "null", "[1.0]"],
        str: [b"\xff".decode(errors="surrogateescape")],
    }
    return of_type[kind] + [str(kind(number)) for number in outside(info.metadata) if kind in (int, float)]


def outside(limits):
    """A number below, and one above, what a field takes."""
    below = [getattr(item, name) - 1 for item in limits for name in ("ge", "gt") if hasattr(item, name)]
    return below + [
        getattr(item, name) + 1 for item in limits for name in ("le", "lt") if hasattr(item, name)
    ]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.filterwarnings("ignore:config. ")
def test_no_key_takes_what_it_cannot_mean(name):
    model, start = find_method(name).Settings, [START] if name == "paka" else []
    for key, info, _ in fields(model):
        if key in ("method", "recipe", "backbone.weights"):
            continue
        for text in bad_texts(info):
            line = ""
            try:
                build(model, [read_words([*start, f"{key}={text}"])])
            except UserError as error:
                line = str(error)
            assert line.startswith(f"config: {key}") and "\n" not in line and len(line) < 400, (
                key,
                text,
                line,
            )
        nested = refused([f"method={name}", *start, f"{key}.more=1"])
        assert nested.startswith(f"config: {key}={{'more': '1'}} (command line) should be "), nested


@pytest.mark.parametrize(
    "word, told",
    [
        (
            "optim.learning_rate=1",
            "unknown key 'optim.learning_rate' (command line); optim.* has base_lr, batch_size, ",
        ),
        ("optim.bach_size=1", "unknown key 'optim.bach_size' (command line); did you mean optim.batch_size?"),
        ("learning_rate=1", "unknown key 'learning_rate' (command line); there are backbone, color, "),
        ("alignment.loss=gram", "unknown key 'alignment' (command line); "),  # another method's
        ("optim=3", "optim (command line) is a group of keys, not '3'; set optim.KEY"),
        ("optim.epochs=many", "optim.epochs='many' (command line) should be a whole number"),
        ("optim.epochs=1.5", "optim.epochs='1.5' (command line) should be a whole number"),
        ("optim.base_lr=fast", "optim.base_lr='fast' (command line) should be a number"),
        ("optim.base_lr=nan", "optim.base_lr=nan should be a finite number (command line)"),
        ("optim.base_lr=1e999", "optim.base_lr=inf should be a finite number (command line)"),
        (
            "crops.ratio=[1.0]",
            "crops.ratio='[1.0]' (command line) should be a list of 2 values, each a number",
        ),
        ("crops.ratio=[0.5,nan]", "crops.ratio[1]=nan should be a finite number (command line)"),
        ("run.deterministic=1", "run.deterministic='1' should be 'cpu', 'always' or 'never' (command line)"),
        ("log.tensorboard=1", "log.tensorboard='1' (command line) should be true or false"),
        (
            "losses.centering=none",
            "losses.centering='none' should be 'softmax_center' or 'sinkhorn_knopp' (command line)",
        ),
        ("optim.batch_size=0", "optim.batch_size=0 should be greater than or equal to 1 (command line)"),
        ("run.seed=-1", "run.seed=-1 should be greater than or equal to 0 (command line)"),
        ("run.output=", "run.output='' should have at least 1 character (command line)"),
        (
            "color.jitter=[0.4,0.4,0.2,0.6]",
            "color.jitter[3]=0.6 should be less than or equal to 0.5 (command line)",
        ),
        (
            "masks.content_share=0.7",
            "masks.content_share + masks.position_share is more than 1; lower one of them",
        ),
        ("masks.ratio=[0.5,0.1]", "masks.ratio=[0.5, 0.1] should rise"),
        ("crops.ratio=[2.0,1.0]", "crops.ratio=[2.0, 1.0] should rise"),
        ("crops.local_px=100", "crops.local_px=100 is no multiple of backbone.patch_size=16; take 96"),
        ("crops.n_global=1", "crops.n_global=1 should be at least 2: the loss compares global crops"),
        ("positions.s_max=0.1", "positions.s_min=0.2 is more than positions.s_max=0.1"),
        ("color.blur_kernel_px=8", "color.blur_kernel_px=8 should be odd, such as 9"),
        ("epochs", "'epochs' is not of the form key=value"),
        ("=1", "'=1' is not of the form key=value"),
        ("recipe=mine", "recipe='mine' is none of dinov2-100ep, "),
        ("recipe=paka-25ep", "recipe=paka-25ep is of method=paka, not of intertwined; take another"),
        (
            "method=mine",
            "'mine' is none of intertwined, mae, paka, nor a dotted module or a .py file of your own",
        ),
        ("method=", "'' is none of intertwined, mae, paka, nor a dotted module or a .py file of your own"),
        ("method=no_such.module", "no_such.module cannot be imported (No module named 'no_such')"),
        (
            "method=nothing.py",
            f"{Path.cwd() / 'nothing.py'} cannot be imported ([Errno 2] No such file or directory: ",
        ),
        (
            "method=paka",
            "backbone.weights is empty, but a post-training starts from a backbone; set backbone.weights=FILE",
        ),
    ],
)
def test_a_bad_word_is_one_line_that_says_the_way_on(word, told):
    start = "method: " if word.startswith("method=") and word != "method=paka" else "config: "
    assert refused([word]).startswith(start + told)


def test_words_that_do_not_fit_each_other():
    assert (
        refused(["optim.epochs=1", "optim.epochs=2"])
        == "config: optim.epochs is given twice: '1' and '2'; give it once"
    )
    assert "optim is given as a value and as a group of keys" in refused(["optim=1", "optim.epochs=2"])
    assert "optim is given as a value and as a group of keys" in refused(["optim.epochs=2", "optim=1"])
    both = "color.grey_p is the old name of color.grayscale_p, and both are given"
    assert both in refused(["colour.grey_p=0.1", "color.grayscale_p=0.2"])


# --- values that are right --------------------------------------------------------------------------------


def test_values_keep_their_types():
    config = load_config(
        None, ["optim.base_lr=1e-3", "optim.clip_grad=3", "crops.ratio=[0.5, 2]", "run.seed=010"]
    )
    assert config.optim.base_lr == 1e-3 and config.optim.clip_grad == 3.0 and config.crops.ratio == (0.5, 2.0)
    assert isinstance(config.optim.clip_grad, float) and config.run.seed == 10
    with pytest.raises(ValueError, match="frozen"):
        config.optim.epochs = 3


AS_WRITTEN = [
    *(
        "/photos #1",
        "${HOME}/photos",
        "$HOME",
        "{photos}",
        "{{a: b}",
        "[a, b]",
        "010",
        "007",
        "1e3",
        "2024-10-01",
        "12:30:00",
    ),
    *(
        "a folder of photos",
        " a ",
        "~/photos",
        "null",
        "none",
        "yes",
        "true",
        "*all",
        "&photos x",
        "!photos",
        "- a",
        "a: b",
        "% 1",
    ),
    *("'a'", '"a"', "@a", "`a`", "a\tb", "a=b", "Übung", "写真", "😀", "a\nb", "\x7f\x85\u2028\ufeff", "\\n"),
]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_a_text_is_read_as_written(text, tmp_path):
    """As a word, and where YAML has a form for it, in a file; again from what a run saves."""
    keys = ("data.root", "run.output", "run.name", "backbone.weights", "data.split")
    config = load_config(None, [f"{key}={text}" for key in keys])
    assert [
        typing.cast(dict, as_dict(config))[group][key] for group, key in (key.split(".") for key in keys)
    ] == [text] * 5
    assert from_saved(as_dict(config)) == config


@pytest.mark.parametrize(
    "text",
    ["010", "2024-10-01", "${HOME}/x", "1e3", "yes", "null", "~", "a b", "0o17", "12:30:00", "1_000", ".nan"],
)
def test_yamls_guesses_are_not_made(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"run:\n  output: {text}\ndata: {{root: '{text}'}}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.run.output == config.data.root == text


def test_typed_values_of_files_and_words_are_the_same(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "optim: {base_lr: 1e-3, epochs: 010}\ncrops:\n  ratio:\n  - 0.5\n  - 2\nlog: {tensorboard: False}\n"
    )
    words = ["optim.base_lr=1e-3", "optim.epochs=010", "crops.ratio=0.5,2", "log.tensorboard=False"]
    assert load_config(tmp_path / "c.yaml") == load_config(None, words)
    assert (
        typed_value(tuple[float, float], "(1, 2,)")
        == typed_value(tuple[float, float], [1, "2"])
        == (1.0, 2.0)
    )


# --- files ------------------------------------------------------------------------------------------------


HOSTILE = "photos #1 ${HOME} {a} 010 2024-10-01"  # a folder's name


@pytest.fixture
def write(tmp_path):
    def write(text, name="child.yaml"):
        path = tmp_path / HOSTILE / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    "text, told",
    [
        ("optim: {epoch: 1}", "unknown key 'optim.epoch' (FILE); did you mean optim.epochs?"),
        ("optim: 3", "optim (FILE) is a group of keys, not '3'; set optim.KEY"),
        ("optim:", "optim (FILE) is a group of keys, not ''; set optim.KEY"),
        ("optim: {epochs: x}", "optim.epochs='x' (FILE) should be a whole number"),
        ("optim: {epochs: 0}", "optim.epochs=0 should be greater than or equal to 1 (FILE)"),
        ("optim: {base_lr: .nan}", "optim.base_lr='.nan' (FILE) should be a number"),
        ("optim: {base_lr: nan}", "optim.base_lr=nan should be a finite number (FILE)"),
        ("run: {output: {a}}", "run.output={'a': ''} (FILE) should be UTF-8 text"),
        ("run: {output: [a]}", "run.output=['a'] (FILE) should be UTF-8 text"),
        ("run: {output: !!python/object/apply:os.getcwd []}", "run.output=[] (FILE) should be UTF-8 text"),
        ("method: [a]", "method=['a'] (FILE) should be the name of one method"),
        ("run: {algorithm: {a: b}}", "method={'a': 'b'} (FILE) should be the name of one method"),
        ("recipe: mine", "recipe='mine' is none of dinov2-100ep, "),
        (
            "recipe: {n_images: 3}",
            "FILE: only files of pretrain/recipes describe a recipe; write 'base: NAME'",
        ),
        ("- 1", "FILE is no mapping of keys, such as 'run: ...'"),
        ("text", "FILE is no mapping of keys, such as 'run: ...'"),
        (
            "run:\n  name: [",
            "FILE is no readable YAML (line 2: expected the node content, but found '<stream end>')",
        ),
        ("a: 1\n---\nb: 2", "FILE is no readable YAML (line 2: but found another document)"),
        ("optim: {epochs: 3}\noptim: {epochs: 4}", "FILE is no readable YAML (line 2: the key stands twice)"),
        ("optim:\n  epochs: 3\n  epochs: 3", "FILE is no readable YAML (line 3: the key stands twice)"),
        ("optim: !x {epochs: 3, epochs: 4}", "FILE is no readable YAML (line 1: the key stands twice)"),
        ("? [a, b]\n: 3", "FILE is no readable YAML (line 1: the key is no text)"),
        ("optim: &a {epochs: 3}\nstep: *a", "FILE is no readable YAML (aliases (*name) are not allowed"),
        (
            "optim: &a {epochs: 3}\nstep: {<<: *a}",
            "FILE is no readable YAML (aliases (*name) are not allowed",
        ),
        ("optim: &a {epochs: *a}", "FILE is no readable YAML (aliases (*name) are not allowed"),
        ("run: {name: [" * 9000, "FILE is no readable YAML (maximum recursion depth exceeded"),
        (
            "run: {name: café}".encode("latin-1"),
            "FILE is no readable YAML (line 1 is no UTF-8",
        ),
        ("run: {name: a}".encode("utf-16")[:-1], "FILE is no readable YAML (it begins as UTF-16 and is none"),
        (b"run: {name: a\0}", "FILE is no readable YAML (unacceptable character #x0000"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(write, text, told, recwarn):
    path = write(text)
    assert refused([], path).startswith(f"config: {told}".replace("FILE", str(path)))


@pytest.mark.parametrize(
    "name", ["", "none.yaml", "nothing", "~no_such_user/x.yaml", "x" * 5000, "a\0b", "."]
)
def test_a_config_that_is_not_there(name):
    with pytest.raises(
        UserError, match="^config: no file .*, and no recipe of that name; there are dinov2-100ep, "
    ):
        load_config(name)


def test_children_change_their_base(write):
    write("optim: {epochs: 7, batch_size: 8}\nrun: {name: a}\n", "base.yaml")
    config = load_config(write("base: base.yaml\noptim: {epochs: 9}\n"), ["run.seed=4"])
    assert (config.optim.epochs, config.optim.batch_size, config.run.name, config.run.seed) == (9, 8, "a", 4)
    assert from_saved(as_dict(config)) == config
    for base in ("base:\n", "base: []\n"):
        assert load_config(write(f"{base}optim: {{epochs: 9}}\n")).optim.batch_size == 512
    assert load_config(write("\ufeffoptim: {epochs: 9}\n")).optim.epochs == 9  # as some editors save it
    assert load_config(write("")) == load_config(write("# nothing\n")) == load_config()


def test_a_base_that_leads_back_is_named(write):
    a, b = write("base: b.yaml\n", "a.yaml"), write("base: [c.yaml, a.yaml]\n", "b.yaml")
    write("optim: {epochs: 3}\n", "c.yaml")
    assert refused([], a) == f"config: base: {a} -> {b} -> {a} is a circle; take one base out"
    assert refused([], b) == f"config: base: {b} -> {a} -> {b} is a circle; take one base out"
    own = write(f"base: '../{HOSTILE}/own.yaml'\n", "own.yaml")
    assert f"base: {own} -> " in refused([], own) and "own.yaml is a circle" in refused([], own)


def test_a_saved_config_keeps_the_recipe_that_it_names(tmp_path):
    """Also where its values have little of that recipe left: it was started from it, and is compared with
    it."""
    config = load_config("dinov2-100ep", ["positions.encoding=field", "positions.interpolation=bilinear"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    again = load_config(tmp_path / "config.yaml")
    assert again == from_saved(as_dict(config)) == config and again.recipe == "dinov2-100ep"
    changed = load_config(tmp_path / "config.yaml", ["recipe=intertwined-100ep"])
    assert run_protocol(changed, 1_281_167).deviations["positions.interpolation"] == ["bicubic", "bilinear"]


@pytest.mark.parametrize("base", ["none.yaml", "[none.yaml]", "{none.yaml: 1}", "[[a]]", "[{a: b}]", "."])
def test_a_base_that_is_none(write, base):
    told = refused([], write(f"base: {base}\n"))
    assert "no file " in told or "should be the name of a file" in told


@pytest.mark.parametrize("way", ["root.yaml", "./root.yaml", "../{folder}/root.yaml"])
def test_what_two_bases_stand_on_counts_once_and_below_both(write, way):
    """A diamond: the second base does not set back what the first one changed, however it spells their
    root."""
    write("optim: {epochs: 1, batch_size: 1}\n", "root.yaml")
    write("base: root.yaml\noptim: {epochs: 2}\n", "one.yaml")
    write(f"base: {way.replace('{folder}', HOSTILE)!r}\noptim: {{batch_size: 3}}\n", "two.yaml")
    config = load_config(write("base: [one.yaml, two.yaml]\n"))
    assert (config.optim.epochs, config.optim.batch_size) == (2, 3)
    of_recipe = load_config(write("base: [dinov2-100ep, one.yaml]\n"))
    assert (of_recipe.recipe, of_recipe.optim.epochs, of_recipe.positions.grid) == ("dinov2-100ep", 2, 14)


# --- the tool ---------------------------------------------------------------------------------------------


def one_line(stderr):
    (line,) = [line for line in stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


# Each of 60 levels has nine times as many items as the one before: who follows the aliases never ends.
LEVELS = [f"n{i}: &n{i} [{', '.join([f'*n{i - 1}'] * 9)}]" for i in range(1, 61)]
BOMB = "\n".join(["n0: &n0 [x]", *LEVELS])


@pytest.mark.parametrize(
    "words", [[b"run.name=\xff"], [b"\xff\xfe=1"], ["--config", "BOMB"]], ids=["value", "key", "bomb"]
)
def test_the_tool_ends_with_one_line_and_code_2(write, words):
    """As a user starts it: a word that is no UTF-8; a file that would fill the memory."""
    words = [write(BOMB) if word == "BOMB" else word for word in words]
    command = [sys.executable, str(TOOLS / "train_ssl.py"), *words]
    done = subprocess.run(
        command,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=TOOLS.parent,
        timeout=120,
    )
    assert done.returncode == 2 and not done.stdout
    line = one_line(done.stderr.decode())
    assert (
        "should be UTF-8 text" in line or "unknown key '\\udcff\\udcfe'" in line or "aliases (*name)" in line
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["optim.bach_size=4"]),
        ("", ["optim.epochs=many"]),
        ("", ["optim.epochs=0"]),
        ("", ["optim.base_lr=nan"]),
        ("", ["optim.base_lr=-inf"]),
        ("", ["optim.epochs=1", "optim.epochs=2"]),
        ("", ["optim.epochs"]),
        ("", ["method=mine"]),
        ("", ["recipe=mine"]),
        ("", [b"data.root=\xff".decode(errors="surrogateescape")]),
        ("optim: {epoch: 3}\n", []),
        ("optim: {epochs: 3\n", []),
        ("optim: {epochs: 3, epochs: 4}\n", []),
        ("base: child.yaml\n", []),
        ("base: nothing.yaml\n", []),
        ("optim: &a {epochs: 3}\nstep: *a\n", []),
        ("run: {name: café}\n".encode("latin-1"), []),
        ("", ["data.root=/photos #1 ${HOME} {a} 2024-10-01"]),  # read as written: it is not there
    ],
)
def test_the_tool_ends_every_mistake_alike(write, capsys, text, words):
    config = ["--config", write(text)] if text else []
    assert ended("pretrain", *config, *words) == 2
    captured = capsys.readouterr()
    assert not captured.out
    line = one_line(captured.err)
    if words and "/photos" in words[0]:
        assert "/photos #1 ${HOME} {a} 2024-10-01" in line


# --- what the configs are ---------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    """Table 6."""
    c = load_config()
    assert (c.optim.epochs, c.optim.batch_size, c.optim.base_lr, c.optim.warmup_epochs) == (
        100,
        512,
        2e-3,
        10,
    )
    assert (c.optim.weight_decay, c.optim.weight_decay_end, c.optim.teacher_momentum) == (0.04, 0.4, 0.992)
    assert (c.backbone.drop_path, c.losses.teacher_temperature, c.heads.n_prototypes) == (0.1, 0.04, 65536)
    assert c.masks.ratio == (0.1, 0.5) and (c.masks.content_share, c.masks.position_share) == (0.5, 0.5)
    assert (c.masks.content_shape, c.masks.position_shape) == ("box", "cross")
    positions = c.positions
    assert (positions.scale, positions.beta, positions.s_min, positions.s_max, positions.grid) == (
        "beta",
        (2, 5),
        0.2,
        1.0,
        50,
    )


def test_a_setting_without_effect_is_a_warning():
    with pytest.warns(UserWarning, match="positions.augment has no effect"):
        load_config(
            None, ["positions.encoding=standard", "positions.interpolation=dinov2", "positions.grid=14"]
        )


def test_masks_without_their_loss_are_a_warning():
    with pytest.warns(UserWarning, match="masks.position_share and losses.position"):
        load_config(None, ["losses.position=0.0"])


@pytest.mark.parametrize("size", ["s", "b"])
@pytest.mark.parametrize("method", ["intertwined", "dinov2"])
def test_the_shipped_recipes_are_the_papers(method, size):
    config = load_config(CONFIGS / f"{method}_vit{size}16.yaml")
    protocol = run_protocol(config, 1_281_167)
    assert protocol.full and protocol.name == f"{method}-100ep" and config.run.name == method
    assert run_protocol(config, 1000).deviations == {"data.n_images": [1_281_167, 1000]}


@pytest.mark.parametrize("name, label", [("toy", "intertwined-100ep"), ("toy_dinov2", "dinov2-100ep")])
def test_toy_recipes_say_that_they_are_scaled_down(name, label):
    protocol = run_protocol(load_config(CONFIGS / f"{name}.yaml"), 300)
    assert not protocol.full and protocol.label.startswith(f"{label}, scaled down")
    assert protocol.deviations["crops.global_px"] == [224, 112]
    assert "positions.encoding" not in protocol.deviations
