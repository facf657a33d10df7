"""k-NN classification of folders: against a plain loop; DINO's crops; what is refused; nothing is read
twice or kept."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import write_photos
from PIL import Image
from torchvision import transforms

from pretrain.backbones.vit import ViT
from pretrain.data.class_folders import open_class_folders
from pretrain.data.images import center_crop, read_picture
from pretrain.errors import Interrupted, UserError
from pretrain.evaluation import knn as module
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.knn import KnnSettings, class_votes, knn_predict, nearest
from pretrain.signals import StopSignals

SMALL = KnnSettings(resize_px=40, crop_px=32, k=(2, 5, 20))


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    vit = ViT(embed_dim=24, depth=1, num_heads=2, pos_encoding="none")
    with frozen(vit):
        yield Features(vit, torch.device("cpu"), nullcontext())


def write_classes(root, n_train=9, n_val=4, classes=("n01440764", "n01443537", "n02085620")):
    """Images of each class in its own tint, more or less."""
    for part, n in (("train", n_train), ("val", n_val)):
        for c, name in enumerate(classes):
            folder = write_photos(root / part / name, n, seed=2 * c + (part == "val"))
            for file in folder.iterdir():
                pixels = np.array(Image.open(file)).astype(float)
                pixels[..., c] += 35
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    file.with_suffix(".JPEG"), quality=95
                )
                file.unlink()
    return root


def knn_classification(features, root, settings, max_images=10**6, **others):
    """Of the first images of a folder's parts."""
    return module.knn_classification(
        features, *(part.first(max_images) for part in open_class_folders(root)), settings, **others
    )


@pytest.fixture
def root(tmp_path):
    return write_classes(tmp_path / "set")


def by_loop(features, root, k, resize_px=40, crop_px=32):
    """DINO's rule, image by image, from torchvision's transforms."""
    crop = transforms.Compose(
        [
            transforms.Resize(resize_px, interpolation=3),
            transforms.CenterCrop(crop_px),
            transforms.PILToTensor(),
        ]
    )
    found = {}
    for part in ("train", "val"):
        files = sorted((root / part).glob("*/*"))
        images = torch.stack([crop(Image.open(file).convert("RGB")) for file in files])
        x = torch.cat([tokens.cls for tokens in features(images)]).double()
        found[part] = x / x.norm(dim=1, keepdim=True), [file.parent.name for file in files]
    right = 0
    for query, name in zip(*found["val"]):
        cosines = found["train"][0] @ query
        votes = {}
        for row in sorted(range(len(cosines)), key=lambda r: -cosines[r])[:k]:
            votes[found["train"][1][row]] = votes.get(found["train"][1][row], 0) + np.exp(
                cosines[row].item() / 0.07
            )
        right += max(votes, key=votes.get) == name
    return 100 * right / len(found["val"][1])


def test_equals_a_plain_loop(features, tmp_path):
    root = write_classes(tmp_path, n_val=12)
    metrics = knn_classification(features, root, SMALL).metrics
    expected = {k: by_loop(features, root, k) for k in (2, 5, 20)}
    assert metrics == pytest.approx(
        {
            "knn_top1": expected[20],
            "largest_class": 100 / 3,
            **{f"knn_top1_k{k}": expected[k] for k in (2, 5, 20)},
        }
    )
    assert len({*expected.values()}) > 1 and min(expected.values()) > 34 and max(expected.values()) < 100


@pytest.mark.parametrize("size", [(90, 70), (70, 91), (33, 200), (224, 224), (257, 256), (500, 375)])
def test_crops_are_dinos(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size)
    expected = transforms.Compose(
        [transforms.Resize(256, interpolation=3), transforms.CenterCrop(224), transforms.PILToTensor()]
    )(image)
    assert torch.equal(center_crop(np.array(image), 256, 224), expected)


def test_chunks_of_the_search_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    bank, queries, labels = (
        torch.randn(300, 8, generator=g),
        torch.randn(37, 8, generator=g),
        torch.randint(0, 5, (300,), generator=g),
    )
    unit = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    whole, chunked = nearest(unit[0], [unit[1]], 30), nearest(unit[0], unit[1].split(16), 30)
    plain = F.cosine_similarity(queries[:, None], bank[None], dim=2).sort(dim=1, descending=True)
    assert torch.equal(whole[1], plain.indices[:, :30]) and torch.equal(chunked[1], whole[1])
    torch.testing.assert_close(whole[0], plain.values[:, :30])
    torch.testing.assert_close(chunked[0], whole[0])
    monkeypatch.setattr(module, "QUERIES", 10)
    monkeypatch.setattr(module, "BANK_CHUNK", 16)
    each = knn_predict(bank, labels, queries, (1, 7, 30), 5, 0.07)
    for k, found in zip((1, 7, 30), each):
        assert torch.equal(found, knn_predict(bank, labels, queries, (k,), 5, 0.07)[0])
    assert torch.equal(each[0], labels[whole[1][:, 0]])
    votes = class_votes(whole[0], labels[whole[1]], (7, 30), 5, 0.07)
    by_hand = torch.zeros(5).index_add(0, labels[whole[1][3, :7]], (whole[0][3, :7] / 0.07).exp())
    torch.testing.assert_close(votes[0, 3], by_hand)
    assert votes.shape == (2, 37, 5) and (votes[1] >= votes[0]).all()


def test_too_many_neighbors_are_left_out_with_a_warning(features, root):
    with pytest.warns(UserWarning, match=r"knn: k=\[100, 200\] left out: .*set/train has 27 training images"):
        metrics = knn_classification(features, root, KnnSettings(resize_px=40, crop_px=32)).metrics
    assert list(metrics) == ["knn_top1", "knn_top1_k10", "knn_top1_k20", "largest_class"]
    with pytest.warns(UserWarning, match=r"k=\[20\]"):
        metrics = knn_classification(features, root, SMALL, max_images=6).metrics  # of each part
    assert list(metrics) == ["knn_top1_k2", "knn_top1_k5", "largest_class"]
    with pytest.raises(UserError, match="knn: k=2 is more than the 1 training images"):
        knn_classification(features, root, SMALL, max_images=1)


def test_pictures_are_read_once_and_a_few_at_a_time(features, root, monkeypatch):
    read, waiting, most = [], 0, 0

    def watched(file):
        nonlocal waiting, most
        read.append(file)
        waiting += 1
        most = max(most, waiting)
        return read_picture(file)

    class Watched(Features):
        def __call__(self, images):
            nonlocal waiting
            waiting -= len(images)
            return super().__call__(images)

    monkeypatch.setattr("pretrain.data.class_folders.read_picture", watched)
    monkeypatch.setattr(module, "FORWARD_BATCH", 4)
    monkeypatch.setattr("pretrain.data.images.READ_AHEAD", 6)
    knn_classification(Watched(features.backbone, features.device, features.autocast), root, SMALL)
    assert sorted(read) == sorted(root.glob("*/*/*")) and len(read) == 39
    assert most <= 6 + 4


def test_folders(root):
    (root / "train" / ".cache").mkdir()
    (root / "train" / "n09999999").mkdir()  # without an image
    (root / "train" / "n01440764" / "notes.txt").write_text("no picture")
    train, val = open_class_folders(root)
    assert train.classes == val.classes == ("n01440764", "n01443537", "n02085620") and (
        len(train),
        len(val),
    ) == (27, 12)
    assert train.labels().tolist() == [0] * 9 + [1] * 9 + [2] * 9 and val.first(3).labels().tolist() == [
        0,
        1,
        2,
    ]
    (root / "val" / "n09999999").mkdir()
    Image.new("RGB", (8, 8)).save(root / "val" / "n09999999" / "0.png")
    with pytest.raises(UserError, match="class 'n09999999' of val has no image in train"):
        open_class_folders(root)


def test_a_class_of_train_alone_is_one_that_can_be_wrong(features, root):
    for file in (root / "val" / "n02085620").iterdir():
        file.unlink()
    assert knn_classification(features, root, SMALL).metrics["knn_top1_k5"] == pytest.approx(
        by_loop(features, root, 5)
    )


@pytest.mark.parametrize(
    "spoil, change, message",
    [
        (lambda r: (r / "val").rename(r / "test"), {}, "no folder .*val"),
        (
            lambda r: [f.rename(r / "val" / f.name) for f in (r / "val").glob("*/*")],
            {},
            r"no image CLASS/\*.* in .*val",
        ),
        (
            lambda r: (r / "val" / "n01443537" / "002.JPEG").write_bytes(b"no"),
            {},
            r"n01443537/002\.JPEG cannot be read",
        ),
        (None, {"crop_px": 30}, "crop_px=30 is no multiple of the patch size 16"),
    ],
)
def test_refusals(features, root, spoil, change, message):
    if spoil:
        spoil(root)
    with pytest.raises(UserError, match=message):
        knn_classification(features, root, KnnSettings(**{**vars(SMALL), **change}))


def test_a_signal_stops_it_and_broken_features_are_told(features, root):
    signals = StopSignals()
    signals.received = "SIGTERM"
    with pytest.raises(Interrupted, match="SIGTERM at knn, train"):
        knn_classification(features, write_classes(root, n_train=40), SMALL, signals=signals)
    with torch.no_grad():
        features.backbone.norm.bias[0] = torch.nan
        with pytest.raises(UserError, match="not finite"):
            knn_classification(features, root, SMALL)
        features.backbone.norm.bias[0] = 0
