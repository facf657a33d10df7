"""The public face: ``import posfield``, its functions, the console script."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from backbone_fixture import randomize
from photos import TINY as PHOTO_WORDS
from photos import write_photos
from PIL import Image
from tool_fixture import ended

import posfield
from posfield.cli import COMMANDS
from pretrain.data.images import center_crop
from pretrain.errors import UserError
from pretrain.views.pixels import normalize
from pretrain.weights import save_backbone

TINY = "vit_tiny_patch16"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    vit = randomize(posfield.build_backbone(TINY, depth=1))
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    return save_backbone(path, vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs)


WITHOUT_TORCH = "pretrain detect segment embed table report submit benchmark config toy-data demo".split()
HELP = """
import contextlib, io, sys, posfield.cli
for name in sys.argv[1:]:
    sys.argv = ["posfield", *name.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        posfield.cli.main()
    assert told.getvalue().startswith("usage: posfield")
"""


def loaded(code, *words):
    """The packages that a fresh Python has loaded behind ``code``."""
    line = [
        sys.executable,
        "-c",
        f"{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})",
        *words,
    ]
    return set(subprocess.check_output(line, text=True).split())


def test_only_what_is_needed_is_loaded():
    """What costs a start: torch 2 s, its compiler (by torchvision or scipy's friends) another 2, mmseg 4."""
    assert not loaded("import sys, posfield, posfield.cli") & {"torch", "pydantic", "rich", "numpy"}
    heavy = {
        "torch",
        "torchvision",
        "matplotlib",
        "scipy",
        "tensorboard",
        "mmengine",
        "mmseg",
        "transformers",
    }
    assert not loaded(HELP, *WITHOUT_TORCH) & heavy
    started = loaded("import sys, pretrain.train, det_plugin.train")
    assert started & (heavy | {"sympy", "triton", "detectron2"}) == {"torch"}


def test_the_functions_of_the_face():
    assert set(posfield.__all__) <= set(dir(posfield))
    for name in posfield.__all__:
        assert callable(getattr(posfield, name)) and getattr(posfield, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = posfield.nothing


@torch.no_grad()
def test_weights_alone_say_what_they_are(weights):
    named, unnamed = posfield.build_backbone(TINY, weights), posfield.build_backbone(weights)
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(named(image).cls, unnamed(image).cls)
    with pytest.raises(UserError, match="'vit_nothing' is not registered, and no file of weights"):
        posfield.build_backbone("vit_nothing")
    with pytest.raises(UserError, match="a name is needed"):
        posfield.build_backbone()


def test_every_kind_of_image_is_preprocessed_alike(weights, tmp_path):
    backbone = posfield.build_backbone(weights)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = normalize(center_crop(pixels, 37, 32))[None]
    for image in (pixels, Image.fromarray(pixels), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert torch.equal(backbone.preprocess(image, 32), expected)
    assert backbone.preprocess(pixels).shape == (1, 3, 32, 64)  # whole patches, 40 and 70 px rounded
    gray = pixels[..., 0]
    assert torch.equal(backbone.preprocess(gray), backbone.preprocess(np.stack([gray] * 3, -1)))
    for bad in (3, pixels[None], pixels.astype(np.float32)):
        with pytest.raises(UserError, match="a path, a PIL image or a uint8 array"):
            backbone.preprocess(bad)
    with pytest.raises(UserError, match="nothing.png cannot be read"):
        backbone.preprocess(tmp_path / "nothing.png")


@torch.no_grad()
def test_embeddings_are_the_class_tokens(weights, tmp_path):
    folder = write_photos(tmp_path / "photos", 5)
    backbone, files = posfield.build_backbone(weights), sorted(folder.iterdir())
    expected = torch.cat([backbone(backbone.preprocess(file, 48)).cls for file in files])
    for images in (folder, files, [Image.open(file) for file in files]):
        found = posfield.embed(images, weights, size_px=48, batch_size=2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    output = tmp_path / "out" / "e.npz"
    assert ended("embed", "--weights", weights, "--images", folder, "--output", output, "--size", 48) == 0
    written = np.load(output)
    assert [*written["names"]] == [str(file.relative_to(folder)) for file in files]
    torch.testing.assert_close(torch.from_numpy(written["vectors"]), expected, rtol=1e-4, atol=1e-5)
    (folder / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="broken.jpg cannot be read"):
        posfield.embed(folder, backbone, size_px=48)
    with pytest.raises(UserError, match="no images are given"):
        posfield.embed([], backbone)


def test_pretrain_takes_its_settings_by_group(tmp_path):
    folder = write_photos(tmp_path / "photos", 4)
    changes = dict(
        data={"root": folder, "workers": 0},
        backbone={"name": TINY, "depth": 1},
        optim={"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
        heads={"n_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
        log={"tensorboard": False, "images_every": 0},
    )
    run = posfield.pretrain("toy", run={"output": tmp_path / "run", "device": "cpu"}, **changes)
    assert (run / "result.json").is_file()
    assert posfield.build_backbone(run / "backbone.safetensors").model_kwargs["depth"] == 1
    with pytest.raises(UserError, match=r"optim.epochs='many' \(arguments\) should be a whole number"):
        posfield.pretrain("toy", optim={"epochs": "many"})
    with pytest.raises(UserError, match="optim.epochs is given twice"):
        posfield.pretrain("toy", **{"optim": {"epochs": 1}, "optim.epochs": 2})


def test_help_fits_a_screen_and_every_command_has_its_own(capsys):
    assert ended("--help") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 30 and max(map(len, said)) <= 100
    for name in COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in said)
        assert ended(f"{name} --help") == 0
        assert capsys.readouterr().out.startswith(f"usage: posfield {name} ")
    assert ended("evaluate") == 2
    assert ended("evaluate --help") == 0
    assert "evaluate dense" in capsys.readouterr().out
    assert ended("evaluat dense") == 2
    assert "error: posfield evaluat: no such command" in capsys.readouterr().err


WITHOUT_EXTRAS = """
import sys, posfield.cli
sys.modules |= dict.fromkeys(["submitit", "matplotlib", "tensorboard", "mmseg", "pycocotools", "skimage", "sklearn"])
for words in sys.argv[1:]:
    sys.argv = ["posfield", *words.split()]
    try:
        posfield.cli.main()
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
"""


def test_what_no_extra_brought_is_named_when_it_is_needed(tmp_path):
    """A pre-training and its table do without; each other command names the extra."""
    photos, run = write_photos(tmp_path / "photos"), tmp_path / "run"
    words = [word for word in PHOTO_WORDS if not word.startswith("log.tensorboard")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, f"pretrain --data {photos} --output {run} {' '.join(words)}"]
        + [
            f"table {run}",
            "compare --help",
            f"submit --dry-run -- pretrain --data {photos}",
            f"analyze crops {run}",
        ]
        + [f"toy-data --output {tmp_path / 'toy'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (run / "backbone.safetensors").is_file() and "COCO and ADE20K" in done.stdout, done.stderr
    told = [line for line in done.stderr.splitlines() if "pip install" in line]
    assert told == [
        "no TensorBoard: tensorboard is not installed: pip install 'posfield[tensorboard]'",
        "error: submitit is not installed: pip install 'posfield[cluster]'",
        "error: matplotlib is not installed: pip install 'posfield[figures]'",
        "error: the toy data is made of photographs in scikit-image, not installed: pip install 'posfield[demo]'",
    ]
    assert [line for line in done.stderr.splitlines() if line.startswith("code")] == [
        "code 0",
        *["code 2"] * 3,
    ]


def test_the_version(capsys):
    assert ended("--version") == 0
    assert capsys.readouterr().out == (
        f"posfield {posfield.__version__}, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}\n"
    )
