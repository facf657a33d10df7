"""Object discovery: LOST and TokenCut against loops, on planted objects, and CorLoc on sets of the public
layouts."""

import csv
import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from backbone_fixture import randomize
from coco_fixture import write_coco
from PIL import Image
from tool_fixture import load_tool
from torchvision.ops import box_iou

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.data.box_sets import read_boxes, read_voc_xml
from pretrain.errors import Interrupted, UserError
from pretrain.evaluation.discovery import METHODS, box_of, component, discover, lost, tokencut
from pretrain.evaluation.features import Features, frozen
from pretrain.results.folder import unnamed
from pretrain.results.schema import read_result
from pretrain.weights import save_backbone

CPU = torch.device("cpu")


def random_features(seed, n, dim=8):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, dim)) + 0.7 * rng.normal(size=dim))


def plain_lost(x, grid, k):
    n = len(x)
    similarity = [[float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    degree = [sum(similarity[i][j] > 0 for j in range(n) if j != i) for i in range(n)]
    order = sorted(range(n), key=lambda i: (degree[i], i))
    seed = order[0]
    joined = [i for i in order[:k] if similarity[seed][i] > 0]
    mask = np.array([sum(similarity[i][j] for i in joined) > 0 for j in range(n)]).reshape(grid)
    labels, _ = scipy.ndimage.label(mask)
    return labels == labels[divmod(seed, grid[1])], divmod(seed, grid[1])


def plain_tokencut(x, grid, tau, eps):
    n = len(x)
    cosine = [[float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for j in range(n)] for i in range(n)]
    weights = np.array([[1.0 if cosine[i][j] > tau else eps for j in range(n)] for i in range(n)])
    degrees = np.diag(weights.sum(1))
    vector = scipy.linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 1])[1][:, 0]
    seed = next(i for i in range(n) if abs(vector[i]) >= (1 - 1e-6) * max(map(abs, vector)))
    side = vector > vector.mean()
    side = side if side[seed] else ~side
    labels, _ = scipy.ndimage.label(side.reshape(grid))
    return labels == labels[divmod(seed, grid[1])], divmod(seed, grid[1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("grid", [(5, 7), (6, 4)])
def test_both_methods_equal_plain_loops(seed, grid):
    x = random_features(seed, grid[0] * grid[1])
    mask, at = plain_lost(x, grid, k=9)
    found = lost(x, grid, k=9)
    assert found.seed == at and np.array_equal(found.mask, mask)
    mask, at = plain_tokencut(x, grid, 0.2, 1e-5)
    found = tokencut(x, grid)
    assert found.seed == at and np.array_equal(found.mask, mask)


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_object_is_found_whole(method):
    truth = np.zeros((9, 11), bool)
    truth[2:6, 4:7] = True
    elsewhere = np.zeros_like(truth)
    elsewhere[7, 9] = True  # like the object, but apart from it, and out of its component
    object_, background = torch.tensor([1.0, 0.1, 0.0]), torch.tensor([-0.3, 1.0, 0.5])
    features = torch.where(torch.from_numpy(truth | elsewhere).flatten()[:, None], object_, background)
    found = METHODS[method](features, truth.shape)
    assert np.array_equal(found.mask, truth)
    assert box_of(found.mask, (16, 16), (150, 170)).tolist() == [64, 32, 112, 96]
    assert np.array_equal(METHODS[method](7 * features, truth.shape).mask, truth)


def test_degenerate_graphs():
    for method in METHODS.values():
        assert method(torch.zeros(6, 3), (2, 3)).mask.any()  # features that say nothing
        assert method(torch.ones(1, 3), (1, 1)).mask.tolist() == [[True]]
        assert method(torch.ones(6, 3), (2, 3)).mask.any()


def test_components_equal_scipys():
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random((9, 13)) < 0.55
        labels, _ = scipy.ndimage.label(mask)
        for seed in map(tuple, np.argwhere(mask)[::5]):
            assert np.array_equal(component(mask, seed), labels == labels[seed])


def test_boxes_and_their_ious_by_hand():
    mask = np.zeros((3, 4), bool)
    mask[1:3, 2:4] = True
    assert box_of(mask, (16, 16), (40, 60)).tolist() == [
        32,
        16,
        60,
        40,
    ]  # cut off where the patches were padded
    assert box_of(mask, (10.0, 12.5), (30, 50)).tolist() == [25, 10, 50, 30]


@pytest.mark.parametrize(
    "model_kwargs",
    [{}, dict(has_cls=False), dict(n_registers=3, patch_size=8), dict(relative_positions=True)],
)
def test_keys_are_those_of_the_last_attention(model_kwargs):
    backbone = randomize(ViT(embed_dim=24, depth=2, num_heads=3, pos_encoding="none", **model_kwargs))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 70), dtype=np.uint8))
    features = Features(backbone, CPU, nullcontext())
    with frozen(backbone):
        inputs = []
        with backbone.blocks[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
            keys = features.attended(images)
        k = backbone.blocks[-1].attn.heads(backbone.blocks[-1].norm1(inputs[0]))[
            1
        ]  # [B, heads, S + N, D / heads]
        torch.testing.assert_close(keys, k.transpose(1, 2).flatten(2)[:, backbone.n_prefix :])
        patch = backbone.patch_size
        assert keys.shape[1] == -(-40 // patch) * -(-70 // patch)
    assert not backbone.blocks[-1].attn.qkv._forward_hooks


def two_tone(height=150, width=170, box=(48, 32, 112, 96)):
    """A bright rectangle on dark: a network without biases sees opposite features."""
    pixels = np.full((height, width, 3), 25, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 222
    return pixels


def contrast_vit(**model_kwargs):
    """No positions and no biases: what is embedded is the color alone."""
    torch.manual_seed(0)
    backbone = ViT(embed_dim=24, depth=1, num_heads=2, pos_encoding="none", **model_kwargs)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return backbone


@pytest.mark.parametrize("of", ["keys", "tokens"])
@pytest.mark.parametrize("model_kwargs", [dict(has_cls=False), dict(patch_size=8, n_registers=2), {}])
def test_an_object_in_a_picture_is_found_exactly(of, model_kwargs):
    features = Features(contrast_vit(**model_kwargs), CPU, nullcontext())
    truth = np.array([[0, 100, 30, 140.0], [48, 32, 112, 96]])
    with frozen(features.backbone):
        found = discover(features, two_tone(), truth, list(METHODS), of)
        scaled = discover(
            features,
            two_tone(160, 192),
            truth,
            list(METHODS),
            of,
            short_px=80 if model_kwargs.get("patch_size") == 8 else 320,
        )
    for judged in [*found.values(), *scaled.values()]:
        assert judged.box.tolist() == [48, 32, 112, 96] and judged.iou == 1 and judged.hit


@pytest.mark.parametrize(("right", "hit"), [(79, False), (80, False), (81, True)])
def test_a_hit_is_more_than_half(right, hit):
    features = Features(contrast_vit(has_cls=False), CPU, nullcontext())
    with frozen(features.backbone):
        (judged,) = discover(features, two_tone(), np.array([[48, 32, right, 96.0]]), ["lost"]).values()
    assert judged.iou == (right - 48) / 64 and judged.hit == hit


# --- sets -------------------------------------------------------------------------------------------------

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>{truncated}</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part></object>"""
PLANTED = [(48, 32, 112, 96), (16, 48, 64, 112), (64, 16, 144, 80), (32, 32, 96, 80)]


def voc_object(box, name="dog", truncated=0, difficult=0):
    return OBJECT.format(box=box, name=name, truncated=truncated, difficult=difficult)


def write_voc(root: Path) -> Path:
    """Four images, each with its planted box as VOC counts; one more that is hard, and one that is not in
    the split."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for i, box in enumerate([*PLANTED, PLANTED[0], PLANTED[1]]):
        Image.fromarray(two_tone(box=box)).save(root / "JPEGImages" / f"{i:06d}.jpg", quality=95)
        # the third image's truth is elsewhere; the fifth has only difficult and truncated ones
        true = (1, 1, 40, 40) if i == 2 else (box[0] + 1, box[1] + 1, *box[2:])
        hard = [voc_object(true, difficult=1), voc_object((1, 1, 9, 9), truncated=1)]
        objects = hard if i == 4 else [voc_object((1, 130, 20, 150), "cat"), voc_object(true)]
        text = (
            f"<annotation><folder>VOC</folder><size><width>170</width></size>{''.join(objects)}</annotation>"
        )
        (root / "Annotations" / f"{i:06d}.xml").write_text(text)
    (root / "ImageSets/Main/trainval.txt").write_text("".join(f"{i:06d}\n" for i in (3, 0, 1, 2, 4)))
    (root / "ImageSets/Main/dog_trainval.txt").write_text("000000  1\n000005 -1\n")
    return root


def test_pascal_voc(tmp_path):
    images = read_boxes(write_voc(tmp_path / "VOCdevkit" / "VOC2007"))
    assert [image.path.stem for image in images] == ["000003", "000000", "000001", "000002", "000004"]
    assert images[1].boxes.tolist() == [[0, 129, 20, 150], [48, 32, 112, 96]] and images[1].path.is_file()
    assert images[4].boxes.tolist() == [[48, 32, 112, 96], [0, 0, 9, 9]]
    assert [image.path.stem for image in read_boxes(tmp_path, no_hard=True)] == [
        "000003",
        "000000",
        "000001",
        "000002",
    ]
    assert [image.path.stem for image in read_boxes(tmp_path, "dog_trainval")] == ["000000", "000005"]
    (tmp_path / "list.txt").write_text("# some\nJPEGImages/000002.jpg\n000003\n")
    assert [image.path.stem for image in read_boxes(tmp_path, names=tmp_path / "list.txt")] == [
        "000002",
        "000003",
    ]


def edit(root, name, old, new):
    file = root / name
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: edit(r, "Annotations/000001.xml", "<xmin>17</xmin>", ""), r"000001\.xml: object 2 has no bndbox"),
        (lambda r: edit(r, "Annotations/000001.xml", "<xmin>17<", "<xmin>one<"), r"000001\.xml: object 2 has no bndbox"),
        (lambda r: edit(r, "Annotations/000001.xml", "<xmin>17<", "<xmin>nan<"), r"000001\.xml: object 2 .* no box"),
        (lambda r: edit(r, "Annotations/000001.xml", "<xmin>17<", "<xmin>700<"), r"000001\.xml: object 2 .* no box"),
        (lambda r: edit(r, "Annotations/000001.xml", "</annotation>", ""), r"000001\.xml: no readable annotation"),
        (lambda r: (r / "Annotations/000001.xml").unlink(), r"000001\.xml: no readable annotation"),
        (lambda r: edit(r, "Annotations/000001.xml", "<annotation>", '<!DOCTYPE a><annotation>'), "no document type"),
        (lambda r: (r / "ImageSets/Main/trainval.txt").write_text("\n"), r"trainval\.txt names no image"),
        (lambda r: (r / "ImageSets/Main/trainval.txt").unlink(), r"trainval\.txt is no readable list"),
        (lambda r: (r / "JPEGImages").rename(r / "J"), "holds neither"),
    ],
)  # fmt: skip
def test_malformed_voc(tmp_path, spoil, said):
    root = write_voc(tmp_path / "VOC2007")
    spoil(root)
    with pytest.raises(UserError, match=said) as error:
        read_boxes(root)
    assert "\n" not in str(error.value)


def test_entities_are_never_expanded(tmp_path):
    file = tmp_path / "a.xml"
    file.write_text(
        '<!DOCTYPE x [<!ENTITY a "' + "z" * 50 + '">]><annotation>&a;</annotation>', encoding="utf-16"
    )
    try:
        assert len(read_voc_xml(file)) == 0  # a few letters at most: expat bounds how much they grow
    except UserError as error:
        assert "a.xml" in str(error)


def test_coco(tmp_path):
    root = write_coco(tmp_path / "coco")
    images = read_boxes(root)
    assert [image.path.name for image in images] == [
        f"{id:012d}.png" for id in (1001, 1002, 1003)
    ]  # the last one has no object
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    for image in images:
        boxes = [
            a["bbox"]
            for a in content["annotations"]
            if a["image_id"] == int(image.path.stem) and not a["iscrowd"]
        ]
        assert image.boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in boxes] and image.path.is_file()
    (tmp_path / "list.txt").write_text("train2017/000000000003.png\n000000000001\n")
    assert [i.path.stem for i in read_boxes(root, "train2017", names=tmp_path / "list.txt")] == [
        "000000000003",
        "000000000001",
    ]
    content["annotations"][0]["bbox"] = [1.4, 2.5, 10.2, 3.9]
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    assert read_boxes(root)[0].boxes[0].tolist() == [1, 2, 12, 6]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1 has the bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "annotation 1 has the bbox"),
        (lambda c: c["annotations"][0].update(bbox="box"), "annotation 1 has the bbox"),
        (
            lambda c: c["annotations"][0].update(bbox=[10**400, 0, 1, 1]),
            r"annotation 1 has the bbox \[1000.*\.\.\.",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1e308, 0, 1e308, 1]), "annotation 1 has the bbox"),
        (lambda c: c["annotations"][0].update(iscrowd="no"), "annotation 1 has the iscrowd 'no': not 0 or 1"),
        (lambda c: c["annotations"][0].update(iscrowd=-1), "annotation 1 has the iscrowd -1"),
        (lambda c: c["annotations"][0].update(image_id=10**400), r"of image 1000.*\.\.\., which"),
        (
            lambda c: c["images"][0].update(file_name="a\nb.png"),
            r"the file_name 'a\\nb.png', which is no file",
        ),
        (lambda c: c["annotations"][0].update(image_id=7), "an annotation is of image 7"),
        (lambda c: c["images"][0].update(file_name="../../secret.png"), "which is no file of the set"),
        (lambda c: c["images"][0].pop("id"), "whose id is None"),
        (lambda c: c.update(images=3), "'images' is no list"),
        (lambda c: c.update(annotations=[]), "no image of .* has a box"),
    ],
)
def test_malformed_coco(tmp_path, spoil, said):
    root = write_coco(tmp_path / "coco")
    file = root / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_boxes(root)


def test_what_is_asked_for_and_not_there(tmp_path):
    coco, voc = write_coco(tmp_path / "coco"), write_voc(tmp_path / "voc")
    for root, there in ((coco, "000000001001"), (voc, "000000")):
        (tmp_path / "list.txt").write_text(f"{there}\n000000000099\n")
        with pytest.raises(UserError, match="'000000000099'"):
            read_boxes(root, names=tmp_path / "list.txt")
    with pytest.raises(UserError, match="no folder test2017/"):
        read_boxes(coco, "test2017")
    with pytest.raises(UserError, match="no object as difficult"):
        read_boxes(coco, no_hard=True)
    (coco / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_boxes(coco)


# --- the tool ---------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    return write_contrast(tmp_path / "b.safetensors")


def write_contrast(file, key_bias=0.0):
    backbone = build_backbone("vit_tiny_patch16", depth=1, pos_encoding="none", has_cls=False)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        backbone.blocks[-1].attn.qkv.bias.chunk(3)[1].fill_(key_bias)
    said = {"method": "mine", "effective_epochs": 12}
    return save_backbone(
        file,
        backbone.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=backbone.model_kwargs,
        provenance=said,
    )


def test_the_tool_counts_what_a_loop_counts(tmp_path, weights, capsys):
    root, out = write_voc(tmp_path / "VOC2007"), tmp_path / "out"
    tool = load_tool("evaluate discovery")
    tool.main(["--weights", str(weights), "--data", str(root), "--output", str(out), "--device", "cpu"])
    result = read_result(out / "checkpoints" / "mine")
    assert result.metrics == {
        "corloc_lost": 80.0,
        "corloc_tokencut": 80.0,
        "void_lost": 0.0,
        "void_tokencut": 0.0,
        "corloc_whole_image": 0.0,
        "images": 5,
    }  # all but the one whose truth is elsewhere
    assert result.kind == "analysis" and result.protocol.full and result.effective_epochs == 12
    with open(out / "checkpoints" / "mine" / "boxes.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    truths = {image.path.name: image.boxes for image in read_boxes(root)}
    for method in METHODS:
        hits = 0
        for name, row in rows.items():
            box = np.array([float(row[f"{method}_{side}"]) for side in ("x0", "y0", "x1", "y1")])
            best = box_iou(torch.from_numpy(box[None]), torch.from_numpy(truths[name])).max().item()
            assert float(row[f"{method}_iou"]) == pytest.approx(best, abs=1e-3)
            hits += best > 0.5
        assert 100 * hits / len(rows) == result.metrics[f"corloc_{method}"]
    table = (out / "corloc.csv").read_text().splitlines()
    assert not unnamed(out, "analysis")
    heads = "checkpoint,images,features,corloc_lost,corloc_tokencut,corloc_whole_image"
    assert table == [heads, "mine,5,keys,80.00,80.00,0.00"]
    said = capsys.readouterr().out
    assert "lost 80.00, corloc_tokencut 80.00; of the whole image 0.00 (5 images, keys)" in said
    picture = np.asarray(Image.open(out / "checkpoints" / "mine" / "figures" / "boxes.png"))
    assert (
        min(picture.shape[:2]) > 300
        and len(np.unique(picture)) > 20
        and (out / "checkpoints/mine/figures/boxes.svg").is_file()
    )

    fewer = [
        "--method",
        "lost",
        "--max-images",
        "2",
        "--features",
        "tokens",
        "--show",
        "0",
        "--no-hard",
        "--size",
        "150",
    ]
    tool.main(
        [
            "--weights",
            str(weights),
            str(weights),
            "--data",
            str(root),
            "--output",
            str(out / "b"),
            "--device",
            "cpu",
            *fewer,
        ]
    )
    results = [read_result(file) for file in sorted((out / "b").glob("checkpoints/*/result.json"))]
    assert len(results) == 2 and set(results[0].metrics) == {
        *("corloc_lost", "void_lost", "corloc_whole_image", "images")
    }
    assert set(results[0].protocol.deviations) == {"size", "features", "max_images", "no_hard"}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, weights, monkeypatch):
    tool, root = load_tool("evaluate discovery"), write_voc(tmp_path / "VOC2007")

    def arguments(out):
        rest = ["--data", str(root), "--device", "cpu", "--show", "1", "--output", str(tmp_path / out)]
        return ["--weights", str(weights), *rest]

    tool.main(arguments("whole"))
    calls, real = [], tool.discover

    def counted(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(tool, "discover", counted)
    with pytest.raises(Interrupted, match="SIGTERM at mine, after 3 of 5 images"):
        tool.main(arguments("parts"))
    folder = tmp_path / "parts" / "checkpoints" / "mine"
    (part,) = folder.glob(".boxes-*.part")
    with open(part, "a") as file:
        file.write('["cut o')  # and the next line goes on there
    assert not (folder / "result.json").exists()
    tool.main(arguments("parts"))
    assert len(calls) == 3 + 2 + 1  # the one that is drawn is seen again
    tool.main(arguments("parts"))
    assert len(calls) == 6  # a checkpoint that is done is not seen again
    for name in ("corloc.csv", "checkpoints/mine/boxes.csv", "checkpoints/mine/figures/boxes.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_result(folder).metrics == read_result(tmp_path / "whole" / "checkpoints" / "mine").metrics
    assert not list(folder.glob(".boxes*"))


def test_the_tool_on_coco(tmp_path, weights):
    root = write_coco(tmp_path / "coco")
    arguments = [
        "--weights",
        weights,
        "--data",
        root,
        "--split",
        "train2017",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    load_tool("evaluate discovery").main(list(map(str, arguments)))
    result = read_result(next((tmp_path / "out").glob("checkpoints/*/result.json")))
    assert result.metrics["images"] == 5 and 0 <= result.metrics["corloc_lost"] <= 100


def test_the_tools_errors(tmp_path, weights):
    root = write_voc(tmp_path / "VOC2007")
    (root / "JPEGImages" / "000001.jpg").write_bytes(b"no")
    arguments = [
        "--weights",
        str(weights),
        "--data",
        str(root),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    for extra, said in (
        ([], r"000001\.jpg cannot be read"),
        (["--size", "-1"], "--size: -1"),
        (["--size", "9999", "--features", "keys"], "patches"),
    ):
        with pytest.raises(UserError, match=said):
            load_tool("evaluate discovery").main([*arguments, *extra])


def discovered(tmp_path, key_bias, *words):
    out = tmp_path / "out"
    where = ["--data", write_voc(tmp_path / "VOC2007"), "--output", out, "--device", "cpu", "--show", "0"]
    weights = write_contrast(tmp_path / "b.safetensors", key_bias)
    load_tool("evaluate discovery").main(list(map(str, ["--weights", weights, *where, *words])))
    return read_result(out / "checkpoints" / "mine"), (out / "corloc.csv").read_text().splitlines()


def test_a_bias_that_makes_all_products_of_keys_positive_is_left_away(tmp_path, capsys):
    """As in DINOv2's files; attention does not depend on it."""
    result, table = discovered(tmp_path, 5.0)
    assert (result.metrics["corloc_lost"], result.metrics["corloc_tokencut"]) == (80.0, 80.0)
    assert result.protocol.deviations == {"features": ["keys", "keys-without-bias"]}
    said = capsys.readouterr().out
    assert "features: keys-without-bias, for 100 % of the products of keys are positive" in said
    assert table[1] == "mine,5,keys-without-bias,80.00,80.00,0.00"


@pytest.mark.parametrize("of", ["keys", "values"])
def test_the_whole_image_in_every_image_is_no_corloc(tmp_path, of, capsys):
    result, table = discovered(tmp_path, 5.0, "--features", of)
    if of == "values":
        assert result.metrics["corloc_lost"] == 80.0 and result.metrics["void_lost"] == 0
        return
    assert set(result.metrics) == {"void_lost", "void_tokencut", "corloc_whole_image", "images"}
    assert result.metrics["void_lost"] == result.metrics["void_tokencut"] == 100
    assert table[1] == "mine,5,keys,,,0.00"
    assert "no CorLoc of lost: in 5 of 5 images it finds the whole image" in capsys.readouterr().out


def test_patches_that_are_resampled_are_a_deviation(tmp_path):
    result, _ = discovered(tmp_path, 0.0, "--patch-size", "8")
    assert result.protocol.deviations == {"patch_size": [16, 8]} and result.network == "vit_tiny_patch8"


def test_the_whole_images_own_corloc_is_named(tmp_path):
    """Objects that fill their images are found by whoever says so of every image."""
    root = write_voc(tmp_path / "VOC2007")
    edit(root, "Annotations/000001.xml", "<xmin>17<", "<xmin>2<")
    for corner, old, new in (("ymin", 49, 2), ("xmax", 64, 165), ("ymax", 112, 148)):
        edit(root, "Annotations/000001.xml", f"<{corner}>{old}<", f"<{corner}>{new}<")
    weights, out = write_contrast(tmp_path / "b.safetensors"), tmp_path / "o"
    words = ["--weights", weights, "--data", root, "--output", out, "--device", "cpu"]
    load_tool("evaluate discovery").main(list(map(str, words)))
    assert read_result(out / "checkpoints" / "mine").metrics["corloc_whole_image"] == 20.0


def test_queries_keys_and_values_are_told_apart():
    backbone = randomize(ViT(embed_dim=24, depth=2, num_heads=3, pos_encoding="none"))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 48), dtype=np.uint8))
    features, bias = Features(backbone, CPU, nullcontext()), backbone.blocks[-1].attn.qkv.bias.detach()
    with frozen(backbone):
        seen = []
        with backbone.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out)):
            found = {name: features.attended(images, name) for name in ("queries", "keys", "values")}
            bare = features.attended(images, "keys", bias=False)
    for third, name in enumerate(found):
        expected = seen[0][:, 1:, 24 * third : 24 * (third + 1)]
        torch.testing.assert_close(found[name], expected)
    torch.testing.assert_close(bare, found["keys"] - bias[24:48])
