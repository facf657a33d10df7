"""LOCA's Flax files, written by flax.serialization's format: features equal a restatement of
scenic/projects/loca/vit.py."""

import msgpack
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from public_fixture import NAME, features, images

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import read_checkpoint
from pretrain.weights.flax_file import read_flax_file

WIDTH, HEADS, SIDE, DEPTH = 192, 3, 14, 2
ATTENTION = "MultiHeadDotProductAttention_0"


def network(seed=0, width=WIDTH):
    """{module: {parameter: array}}, in Flax's shapes; the two heads of training included."""
    rng, d = np.random.default_rng(seed), width // HEADS

    def array(*shape):
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    def norm():
        return {"scale": 1 + array(width), "bias": array(width)}

    def dense(n, m):
        return {"kernel": array(n, m), "bias": array(m)}

    def block():
        attention = {
            part: {"kernel": array(width, HEADS, d), "bias": array(HEADS, d)}
            for part in ("query", "key", "value")
        }
        attention["out"] = {"kernel": array(HEADS, d, width), "bias": array(width)}
        mlp = {"Dense_0": dense(width, 4 * width), "Dense_1": dense(4 * width, width)}
        return {"LayerNorm_0": norm(), ATTENTION: attention, "LayerNorm_1": norm(), "MlpBlock_0": mlp}

    tokens = {
        "embedding": {"kernel": array(16, 16, 3, width), "bias": array(width)},
        "posembed_input": array(1, SIDE, SIDE, width),
    }
    head = {"Dense_0": dense(width, 8), "prototypes": {"kernel": array(8, 5)}}
    training = {"projection_head_for_clustering_prediction": head, "cross_attention_block": block(), "final_norm": norm(),
                "position_predictor": dense(width, 196)}  # fmt: skip
    blocks = {f"encoderblock_{i}": block() for i in range(DEPTH)}
    return {"ToTokenSequence_0": tokens, **blocks, "encoder_norm": norm(), **training}


def packed(tree, chunk_bytes=2**30):
    """flax.serialization.msgpack_serialize, restated."""

    def ndarray(array):
        return msgpack.packb((array.shape, array.dtype.name, array.tobytes("C")), use_bin_type=True)

    def extension(x):
        if isinstance(x, np.ndarray):
            return msgpack.ExtType(1, ndarray(x))
        if isinstance(x, complex):
            return msgpack.ExtType(2, msgpack.packb((x.real, x.imag)))
        return msgpack.ExtType(3, ndarray(np.asarray(x)))

    def chunked(x):
        if isinstance(x, dict):
            return {key: chunked(value) for key, value in x.items()}
        if not isinstance(x, np.ndarray) or x.nbytes <= chunk_bytes:
            return x
        step, flat = chunk_bytes // x.itemsize, x.reshape(-1)
        chunks = [flat[i : i + step] for i in range(0, flat.size, step)]
        numbered = [{str(i): v for i, v in enumerate(values)} for values in (x.shape, chunks)]
        return {"__msgpack_chunked_array__": True, "shape": numbered[0], "chunks": numbered[1]}

    return msgpack.packb(chunked(tree), default=extension, strict_types=True)


def resize(position, height, width):
    """jax.image.resize(..., 'bilinear'): a triangle kernel, as wide as a step of a smaller grid,
    normalized."""

    def weights(n, m):
        at = (torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5
        distance = (at.unsqueeze(1) - torch.arange(n)).abs() / max(n / m, 1.0)
        triangle = (1 - distance).clamp(min=0)
        return triangle / triangle.sum(1, keepdim=True)

    rows, columns = weights(position.shape[1], height), weights(position.shape[2], width)
    return torch.einsum("ia,jb,xabc->xijc", rows, columns, position.double()).float()


def reference(params, x):
    """patches [B, N, D] after encoder_norm."""
    p = {k: torch.from_numpy(v.copy()) for k, v in flat(params).items()}

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * p[f"{name}/scale"] + p[f"{name}/bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    tokens = "ToTokenSequence_0/"
    patches = F.unfold(x, 16, stride=16).transpose(1, 2)  # [B, N, 3 * 16 * 16]
    kernel = p[tokens + "embedding/kernel"].permute(2, 0, 1, 3).flatten(0, 2)
    y = patches @ kernel + p[tokens + "embedding/bias"]
    y = y + resize(p[tokens + "posembed_input"], x.shape[2] // 16, x.shape[3] // 16).flatten(1, 2)
    for i in range(DEPTH):
        block = f"encoderblock_{i}/"
        z, a = norm(y, block + "LayerNorm_0"), block + ATTENTION + "/"
        q, k, v = (
            torch.einsum("bnc,chd->bnhd", z, p[f"{a}{part}/kernel"]) + p[f"{a}{part}/bias"]
            for part in ("query", "key", "value")
        )
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        y = y + torch.einsum("bqhd,hdc->bqc", z, p[a + "out/kernel"]) + p[a + "out/bias"]
        z, m = norm(y, block + "LayerNorm_1"), block + "MlpBlock_0/"
        z = gelu(z @ p[m + "Dense_0/kernel"] + p[m + "Dense_0/bias"])
        y = y + z @ p[m + "Dense_1/kernel"] + p[m + "Dense_1/bias"]
    return norm(y, "encoder_norm")


def flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value})
    return found


def state_of(teacher, student, names=("teacher_weights", "student_weights")):
    """A state of training, as it is saved."""
    moments = {"mu": network(5), "count": np.int32(7)}
    return {"global_step": 125, names[0]: teacher, names[1]: student, "opt_state": {"0": moments}, "rng": np.zeros(2, np.uint32),
            "metadata": {"chrono": {"train_time": 1.5}, "phase": 1j, "loss": np.float32(0.5), "none": None}}  # fmt: skip


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (20, 17)])
def test_features_equal(tmp_path, grid):
    teacher, student = network(0), network(1)
    path = tmp_path / "loca_vsmall_imnet1k"
    path.write_bytes(packed(state_of(teacher, student)))
    x = images(grid, 16)
    for subnet, params in ((None, teacher), ("teacher", teacher), ("student", student)):
        given = features(path, x, subnet=subnet)[:, 1:]  # the first is the mean of the patches
        torch.testing.assert_close(given, reference(params, x), atol=1e-5, rtol=1e-5)
    checkpoint = read_checkpoint(path)
    assert (
        checkpoint.provenance == {"source": "loca", "method": "LOCA", "subnet": "teacher"}
        and checkpoint.backbone == NAME
    )
    wanted = dict(
        has_cls=False,
        gelu="tanh",
        ln_eps=1e-6,
        pos_interpolation="bilinear_antialias",
        pos_grid=SIDE,
        num_heads=HEADS,
    )
    assert {key: checkpoint.model_kwargs[key] for key in wanted} == wanted


def as_torch(tree):
    return {
        key: as_torch(value) if isinstance(value, dict) else torch.from_numpy(value)
        for key, value in tree.items()
    }


@pytest.mark.parametrize("edit", ["trainer", "chunks", "bfloat16", "torch"])
def test_other_ways_to_save_it(tmp_path, edit):
    teacher = network(0)
    path, expected = tmp_path / "checkpoint_125000", reference(teacher, images((5, 9), 16))
    if edit == "trainer":
        path.write_bytes(packed(state_of(teacher, network(1), ("ema_params", "params"))))
    elif edit == "chunks":
        path.write_bytes(packed(state_of(teacher, network(1)), chunk_bytes=100_000))
    elif edit == "bfloat16":  # NumPy has none; Flax writes JAX's by its name
        half = torch.from_numpy(teacher["encoder_norm"]["bias"]).bfloat16()
        raw = msgpack.packb(
            ((WIDTH,), "bfloat16", half.view(torch.int16).numpy().tobytes()), use_bin_type=True
        )
        halves = {**teacher, "encoder_norm": {**teacher["encoder_norm"], "bias": msgpack.ExtType(1, raw)}}
        path.write_bytes(packed({"teacher_weights": halves, "student_weights": {}}))
        teacher["encoder_norm"]["bias"] = half.float().numpy()
        expected = reference(teacher, images((5, 9), 16))
    else:
        torch.save({"teacher_weights": as_torch(teacher)}, path)
    torch.testing.assert_close(features(path, images((5, 9), 16))[:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_the_format(tmp_path):
    tree = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": {"c": np.float64(2.5), "d": 3 + 4j, "e": "text", "1": True},
            "optimizer": {"huge": np.zeros(1000)}, "empty": np.zeros((0, 3), np.float32)}  # fmt: skip
    (tmp_path / "x").write_bytes(packed(tree))
    read = read_flax_file(tmp_path / "x")
    assert (
        read.keys() == {"a", "b", "empty"}
        and read["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        and read["empty"].shape == (0, 3)
    )
    assert (
        read["b"]["c"].item() == 2.5
        and read["b"]["d"] == 3 + 4j
        and read["b"]["e"] == "text"
        and read["b"]["1"] is True
    )


def drop(tree, *path):
    for key in path[:-1]:
        tree = tree[key]
    return tree.pop(path[-1])


def replace(tree, value, *path):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


KEY = ("encoderblock_0", ATTENTION, "key", "kernel")


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda n: drop(n, "encoderblock_1", ATTENTION, "key", "bias"), r"no tensor encoderblock_1\..*key\.bias"),
        (lambda n: drop(n, "encoderblock_0"), r"no tensor encoderblock_0"),
        (lambda n: drop(n, "encoder_norm"), r"no tensor encoder_norm\.scale"),
        (lambda n: replace(n, np.zeros(3, np.float32), "surprise"), "left over surprise"),
        (lambda n: replace(n, np.zeros((192, 192), np.float32), *KEY), "not of 3 dimensions"),
        (lambda n: replace(n, np.zeros((192, 6, 32), np.float32), *KEY), "same 3 heads"),
        (lambda n: replace(n, n["encoder_norm"], "encoderblock_1", "LayerNorm_2"), r"left over encoderblock_1\.LayerNorm_2"),
        (lambda n: replace(n, np.zeros((1, 14, 13, 192), np.float32), "ToTokenSequence_0", "posembed_input"), "182 positions"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path, edit, named):
    teacher = network()
    edit(teacher)
    (tmp_path / "loca").write_bytes(packed(state_of(teacher, network(1))))
    with pytest.raises(UserError, match=named):
        build_backbone(NAME, weights=tmp_path / "loca")


def test_a_file_cut_off_and_another_of_scenics(tmp_path):
    whole = packed(state_of(network(), network(1)))
    path = tmp_path / "loca"
    for content in (whole[: len(whole) // 2], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no readable Flax checkpoint"):
            read_checkpoint(path)
    with_cls = network()
    with_cls["ToTokenSequence_0"]["cls"] = np.zeros((1, 1, WIDTH), np.float32)
    path.write_bytes(packed(state_of(with_cls, with_cls)))
    with pytest.raises(
        UserError, match=r"no supported layout; it holds .*'teacher_weights'.*source= takes .*loca"
    ):
        read_checkpoint(path)
