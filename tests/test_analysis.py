"""Attention maps, figures and k-NN."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from photos import TINY, write_photos
from PIL import Image

from pretrain.analysis.attention import last_layer_attention
from pretrain.backbones.vit import ViT
from pretrain.config import load_config
from pretrain.evaluation.knn import knn_accuracy, knn_predict
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[1]


def test_last_layer_attention_by_hand():
    torch.manual_seed(0)
    model = ViT(embed_dim=12, depth=2, num_heads=3, n_registers=2, pos_encoding="field").eval()
    x = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        tokens, _ = model.embed(x)
        q, k, _ = model.blocks[1].attn.heads(model.blocks[1].norm1(model.blocks[0](tokens)))
        scores = (q[0] @ k[0].transpose(-2, -1) / 2)[:, 3:, 3:]  # [heads, 6, 6]; sqrt(12 / 3) = 2
    expected = scores.softmax(-1).mean(0)  # cutting rows and renormalising is a softmax over what is left
    got = last_layer_attention(model, x)
    assert got.shape == (2, 6, 6)
    torch.testing.assert_close(got[0], expected, atol=1e-6, rtol=1e-5)


def test_knn_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 6, generator=g), torch.randn(15, 6, generator=g)
    labels = torch.randint(0, 4, (40,), generator=g)
    expected = []
    for query in queries:
        cosine = [float(torch.nn.functional.cosine_similarity(query, b, dim=0)) for b in bank]
        near = sorted(range(40), key=lambda i: -cosine[i])[:7]
        votes = [sum(torch.tensor(cosine[i] / 0.07).exp().item() for i in near if labels[i] == c) for c in range(4)]
        expected.append(votes.index(max(votes)))
    got = knn_predict(bank, labels, queries, 7, 4, chunk=4)
    assert got.tolist() == expected
    assert knn_accuracy(bank, labels, bank, labels, 1) == 100.0
    with pytest.raises(ValueError, match="k=41"):
        knn_predict(bank, labels, queries, 41, 4)


def test_a_runs_figures(tmp_path, capsys):
    write_photos(tmp_path / "photos")
    overrides = [
        *TINY,
        f"data.root={tmp_path / 'photos'}",
        f"run.output={tmp_path / 'run'}",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
    ]
    train(load_config(None, overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", ["visualize_pretrain.py", str(tmp_path / "run"), "--images", "2"])
        runpy.run_path(str(ROOT / "tools" / "visualize_pretrain.py"), run_name="__main__")
    captions = json.loads((tmp_path / "run" / "figures" / "captions.json").read_text())
    assert set(captions) == {"views.png", "masks.png", "scales.png", "attention.png"}
    for name, entry in captions.items():
        picture = Image.open(tmp_path / "run" / "figures" / name).convert("L")
        assert picture.size[0] > 200 and len(picture.getcolors(256)) > 20 and entry["title"] and entry["caption"]
