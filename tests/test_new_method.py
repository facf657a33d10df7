"""A method that the project does not know: one file and one YAML beside this test.

It trains, resumes bit for bit, logs its own losses, is probed, stands in the table and in the report, is
exported, and computes the same on two ranks and with micro-batches. Nothing else knows of it.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from photos import last, write_photos
from runs_fixture import ROOT, differences, lines_of, tensors_of, train_on_ranks
from tool_fixture import load_tool

from pretrain.build import build_backbone
from pretrain.cli.crops import main as crops
from pretrain.config import from_saved, load_config, load_saved, resolved, run_protocol
from pretrain.data.loader import build_dataset, build_loader
from pretrain.errors import UserError
from pretrain.methods import find_method
from pretrain.results.schema import read_result
from pretrain.settings import fields, flat, printed
from pretrain.train import train
from pretrain.trainer import Length, Trainer
from pretrain.weights import read_checkpoint

CONFIG = ROOT / "tests" / "simclr_method.yaml"
METHOD = ROOT / "tests" / "simclr_method.py"
EXACT = ["run.precision=float64", "backbone.drop_path=0.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight photographs, and some of two classes for the probe."""
    folder = tmp_path_factory.mktemp("simclr")
    write_photos(folder / "photos", n=8)
    for part, first in (("train", 0), ("val", 1)):
        for i, name in enumerate(("bird", "cat")):
            write_photos(folder / "classes" / part / name, n=3, seed=first + 2 * i)
    return folder


def words_of(folder, output, *extra):
    where = [
        f"data.root={folder / 'photos'}",
        f"run.output={output}",
        f"probes.knn_root={folder / 'classes'}",
    ]
    return last([*where, "probes.every=2", "probes.image_px=64", "probes.knn_k=3", *extra])


def run(folder, output, *extra, **named):
    return train(load_config(CONFIG, words_of(folder, output, *extra)), **named)


def pretrain(*words):
    """``tools/train_ssl.py`` in a process of its own; returns stderr."""
    command = [sys.executable, "tools/train_ssl.py", "--config", str(CONFIG), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process: sums are added in one order
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of a run by the tool, and what it said."""
    return folder / "tool", pretrain(*words_of(folder, folder / "tool"))


# --- the method itself ------------------------------------------------------------------------------------


def test_it_is_one_short_file_that_nothing_else_names():
    assert METHOD.read_text().count("\n") <= 150
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    product = [
        ROOT / name
        for name in tracked
        if name.endswith((".py", ".yaml", ".cfg")) and not name.startswith("tests/")
    ]
    assert len(product) > 100
    naming = [
        path.name
        for path in product
        if path.is_file() and "simclr_method" in path.read_text(encoding="utf-8")
    ]
    assert naming == []


def test_every_setting_has_a_source_and_a_wrong_one_is_a_line(folder):
    Settings = find_method(str(METHOD)).Settings
    assert all(info.description.endswith("]") for _, info, _ in fields(Settings))
    config = load_config(CONFIG, ["contrast.temperature=0.5"])
    assert (config.contrast.temperature, config.crops.n_local, config.crops.global_scale) == (
        0.5,
        0,
        (0.08, 1.0),
    )
    for word, said in {
        "contrast.temprature=1": r"unknown key 'contrast\.temprature' .*did you mean contrast\.temperature",
        "contrast.temperature=nan": r"contrast\.temperature=nan should be",
        "crops.n_local=4": r"crops\.n_local=4 should be less than or equal to 0",
        "optim.teacher_momentum=0.9": r"unknown key 'optim\.teacher_momentum'",
        "crops.global_px=60": r"crops\.global_px=60 is no multiple of backbone\.patch_size=16",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            load_config(CONFIG, [word])
        assert "\n" not in str(error.value)


def test_its_config_is_printed_and_loads_again(tmp_path):
    words = ["data.root=photos", "run.seed=7"]
    config = load_config(CONFIG, words)
    text = printed(config, resolved(CONFIG, words)[1])
    assert "[SimCLR, Table 5]" in text and "1e-5 takes hundreds of iterations" in text
    (tmp_path / "printed.yaml").write_text(text)
    assert flat(load_config(tmp_path / "printed.yaml")) == flat(config)


def test_a_method_on_a_command_line_lies_in_the_working_folder(tmp_path, monkeypatch):
    """And is found again wherever the run's own config is read."""
    (tmp_path / "mine.py").write_text(METHOD.read_text())
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["method=mine.py"])
    assert config.method == str(tmp_path / "mine.py") and run_protocol(config, 8).label == "mine"


def test_a_runs_folder_does_not_import_its_method_untold(tmp_path):
    """Neither by its config, nor by a base of it, nor by the settings in a checkpoint."""
    sys.modules.pop("posfield_own_mine", None)  # another test's
    (tmp_path / "mine.py").write_text(f"print('code ran')\n{METHOD.read_text()}")
    (tmp_path / "base.yaml").write_text("method: mine.py\n")
    method = str(tmp_path / "mine.py")
    for text in (f"method: {method}\n", "base: base.yaml\n", "run: {algorithm: os.path}\n"):
        (tmp_path / "config.yaml").write_text(text)
        for read in (lambda: load_saved(tmp_path / "config.yaml"), lambda: crops([str(tmp_path)])):
            with pytest.raises(UserError, match=r"is code that would be run; .* --trust") as error:
                read()
            assert "\n" not in str(error.value) and "posfield_own_mine" not in sys.modules
    with pytest.raises(UserError, match="is code that would be run"):
        from_saved({"method": method})
    (tmp_path / "config.yaml").write_text("base: base.yaml\n")
    assert load_saved(tmp_path / "config.yaml", trust=True).method == method
    assert from_saved({"method": method}, method).method == method


def test_the_loss_is_the_papers(folder):
    """Equation 1, crop by crop."""
    info_nce = sys.modules[find_method(str(METHOD)).__module__].info_nce
    torch.manual_seed(0)
    embeddings = torch.randn(2, 3, 5, dtype=torch.float64)
    rows, losses = embeddings.flatten(0, 1), []
    for i in range(6):
        similar = [torch.exp(F.cosine_similarity(rows[i], rows[k], dim=0) / 0.5) for k in range(6)]
        losses.append(-torch.log(similar[(i + 3) % 6] / sum(s for k, s in enumerate(similar) if k != i)))
    torch.testing.assert_close(info_nce(embeddings, 0.5), torch.stack(losses).mean())


def test_steps_on_one_batch_lower_its_loss(folder, tmp_path):
    config = load_config(CONFIG, words_of(folder, tmp_path, "backbone.drop_path=0.0", "optim.base_lr=1e-2"))
    trainer = Trainer(config, Length(100, 1000, 0))
    batch, _ = next(iter(build_loader(config, build_dataset(config), 0, 1)))
    assert batch.masks is None and len(batch.local_crops) == 0
    losses = [trainer.step([batch]).losses["loss"].item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0], losses


# --- its run ----------------------------------------------------------------------------------------------


def test_the_tool_trains_it_and_logs_its_own_losses(finished):
    output, said = finished
    lines = lines_of(output)
    names = ["iteration", "loss", "info_nce", "grad_norm", "feature_std", "lr", "weight_decay"]
    assert [list(line) for line in lines] == [names] * 6
    assert all(line["loss"] == line["info_nce"] > 0 for line in lines)
    loss = f"{lines[-1]['loss']:.3f}"
    assert f"pretrain simclr 6/6  loss {loss}  info_nce {loss}" in said.splitlines()[-2]


def test_it_is_probed_while_it_trains(finished):
    output, _ = finished
    probes = [json.loads(line) for line in (output / "probes.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in probes] == [1, 3, 5] and all(
        0 <= line["probe/knn_top1"] <= 100 for line in probes
    )
    assert read_result(output).metrics["probe/knn_top1"] == probes[-1]["probe/knn_top1"]


def assert_equal(one, two):
    """The same bits in the last checkpoints and in the logs."""
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for log in ("metrics.jsonl", "probes.jsonl"):
        assert (one / log).read_bytes() == (two / log).read_bytes()


def test_resume_is_bit_for_bit(folder, finished, tmp_path):
    """With dropped paths: by the tool without a stop, by :func:`train` in two parts."""
    run(folder, tmp_path, stop_after=3)
    assert len(lines_of(tmp_path)) == 3
    run(folder, tmp_path, resume="auto")
    assert_equal(tmp_path, finished[0])


def test_resume_with_micro_batches_is_bit_for_bit(folder, tmp_path):
    """By :func:`train` without a stop, by the tool from the middle on."""
    straight = run(folder, tmp_path / "straight", "step.accumulate=2")
    run(folder, tmp_path / "parts", "step.accumulate=2", stop_after=3)
    assert "going on from" in pretrain("--resume", *words_of(folder, tmp_path / "parts", "step.accumulate=2"))
    assert_equal(tmp_path / "parts", straight)


def test_it_goes_on_where_its_file_was_moved(folder, tmp_path):
    """No run depends on where its method lies."""
    straight = run(folder, tmp_path / "straight")
    for place, stop in (("before", 3), ("after", None)):
        (tmp_path / place).mkdir()
        for file in (METHOD, CONFIG):
            (tmp_path / place / file.name).write_text(file.read_text())
        config = load_config(tmp_path / place / CONFIG.name, words_of(folder, tmp_path / "run"))
        train(config, resume="" if stop else "auto", stop_after=stop)
        shutil.rmtree(tmp_path / place)
    assert_equal(tmp_path / "run", straight)
    assert read_result(tmp_path / "run").protocol == read_result(straight).protocol


def test_another_run_starts_from_its_networks(folder, finished, tmp_path):
    output = run(
        folder, tmp_path / "run", f"run.init_from={finished[0]}", "optim.epochs=1", "optim.warmup_epochs=0"
    )
    assert lines_of(output)[0]["loss"] < lines_of(finished[0])[0]["loss"]
    assert read_result(output).protocol.deviations["run.init_from"] == ["from scratch", "tool"]


def test_images_of_what_it_sees(folder, tmp_path):
    """No mask, no local crop, no teacher."""
    output = run(folder, tmp_path / "run", "log.tensorboard=true", "log.images_every=6")
    assert b"images/" in b"".join(path.read_bytes() for path in (output / "tensorboard").iterdir())


def test_it_stands_in_the_table_and_in_the_report(finished, tmp_path, capsys):
    output, _ = finished
    result = read_result(output)
    assert (result.kind, result.stage, result.method, result.loss_terms) == (
        "pretrain",
        "pretrain",
        "simclr",
        ("info_nce",),
    )
    assert result.protocol.name == "simclr_method" and "backbone.depth" in result.protocol.deviations
    assert result.effective_epochs == pytest.approx(3 * 2 * (64 / 224) ** 2, abs=0.01)
    load_tool("table").main([str(output), "--format", "md"])
    table = capsys.readouterr().out.partition("**Pre-training runs**")[2].strip().splitlines()
    cells = dict(
        zip(
            *(
                [cell.strip("| *").replace("\\", "") for cell in line.split(" | ")]
                for line in (table[0], table[2])
            )
        )
    )
    assert cells["method"] == "simclr" and cells["protocol"].startswith("simclr_method, scaled down (")
    assert float(cells["info_nce"]) == pytest.approx(result.metrics["info_nce"], rel=1e-2)
    load_tool("report").main([str(output), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    curves = page[page.index("<h3>Pre-training</h3>") : page.index("<details><summary>Other terms")]
    assert ">info_nce<" in curves and ">feature_std<" not in curves and "simclr" in page


def test_its_backbone_is_one_of_ours_and_is_exported(finished, tmp_path, capsys):
    file = finished[0] / "backbone.safetensors"
    vit = build_backbone("vit_tiny_patch16", weights=file)
    trained = tensors_of(finished[0])
    assert all(
        torch.equal(value, trained[f"method.student.backbone.{key}"])
        for key, value in vit.state_dict().items()
    )
    assert read_checkpoint(file).provenance["method"] == "simclr"
    out = tmp_path / "timm"
    words = ["--weights", str(file), "--format", "timm", "--size", "64", "--output", str(out)]
    load_tool("export").main(words)
    assert (out / "model.safetensors").is_file() and "simclr" in (out / "README.md").read_text()
    assert "largest relative difference" in capsys.readouterr().out


@pytest.fixture(scope="module")
def shared_out(folder):
    """One process alone, with micro-batches, and two ranks, replicated and sharded: float64, no dropped
    path."""
    run(folder, folder / "one", *EXACT)
    run(folder, folder / "micro", *EXACT, "step.accumulate=2")
    by_rule = {rule: [*EXACT, f"step.parallel={rule}", "step.accumulate=2"] for rule in ("ddp", "fsdp2")}
    train_on_ranks(
        2, folder, [(str(CONFIG), words_of(folder, folder / rule, *words)) for rule, words in by_rule.items()]
    )
    return folder


@pytest.mark.parametrize("name", ["micro", "ddp", "fsdp2"])
def test_micro_batches_and_two_gloo_ranks_equal_one(shared_out, name):
    """Each crop's rivals are all others of the whole batch, wherever they are computed."""
    assert differences(shared_out / "one", shared_out / name, 6) == []
    a, b = (read_checkpoint(shared_out / run / "backbone.safetensors").state for run in ("one", name))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-6, atol=1e-8)
