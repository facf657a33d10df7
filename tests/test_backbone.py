"""The backbone is timm's ViT, with the field in place of pos_embed where asked."""

import shutil

import pytest
import timm
import torch
from backbone_fixture import randomize

from pretrain.backbones.attention import choose_attention
from pretrain.backbones.vit import SIZES, ViewGroup, ViT
from pretrain.build import backbone_names, build_backbone
from pretrain.errors import UserError
from pretrain.weights import save_backbone

SMALL = dict(embed_dim=48, depth=3, num_heads=3)


def as_timm(ours: ViT, image_size):
    """timm's own model with our weights: the test's oracle."""
    registers = ours.n_registers
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=ours.pos_grid * ours.patch_size,
        patch_size=ours.patch_size,
        num_classes=0,
        global_pool="",
        init_values=ours.model_kwargs["layerscale"],
        reg_tokens=registers,
        no_embed_class=registers > 0,
        dynamic_img_size=True,
        dynamic_img_pad=True,
        **SMALL,
    )
    state = dict(ours.state_dict())
    if registers:  # timm holds the position of [CLS] inside cls_token
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("n_registers", [0, 4])
@pytest.mark.parametrize("layerscale", [None, 1e-5])
@pytest.mark.parametrize("size", [(224, 224), (160, 272), (100, 75)])
def test_equals_timm(n_registers, layerscale, size):
    ours = randomize(
        ViT(**SMALL, n_registers=n_registers, layerscale=layerscale, pos_interpolation="bicubic_antialias")
    )
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, expected = ours(x), as_timm(ours, size).forward_features(x)
    got = torch.cat([tokens.cls.unsqueeze(1), tokens.registers, tokens.patches], dim=1)
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_feature_map_is_the_patch_grid():
    model = randomize(ViT(**SMALL, pos_encoding="field", n_registers=2))
    x = torch.randn(1, 3, 40, 70)  # 3 x 5 patches after padding
    with torch.no_grad():
        maps, tokens = model.feature_map(x), model(x)
    assert maps.shape == (1, 48, 3, 5)
    assert torch.equal(maps[0, :, 1, 2], tokens.patches[0, 1 * 5 + 2])
    padded = torch.nn.functional.pad(x, (0, 10, 0, 8))
    with torch.no_grad():
        assert torch.equal(model.feature_map(padded), maps)


def test_registered_names_and_sizes():
    assert backbone_names() == sorted(
        f"vit_{size}_patch16{registers}" for size in SIZES for registers in ("", "_reg4")
    )
    model = build_backbone("vit_small_patch16_reg4", patch_size=14, depth=1)
    assert (model.embed_dim, model.n_registers, model.patch_size) == (384, 4, 14)
    n_parameters = sum(p.numel() for p in build_backbone("vit_small_patch16").parameters())
    assert n_parameters == sum(
        p.numel() for p in timm.create_model("vit_small_patch16_224", num_classes=0).parameters()
    )


def test_drop_path_keeps_the_mean_and_is_off_in_eval():
    model = build_backbone("vit_tiny_patch16", depth=2, drop_path=0.5)
    assert [b.drop_path.rate for b in model.blocks] == [0.0, 0.5]
    branch = model.blocks[1].drop_path.train()
    torch.manual_seed(0)
    out = branch(torch.ones(4000, 1, 1))
    assert set(out.unique().tolist()) == {0.0, 2.0} and abs(out.mean().item() - 1) < 0.06
    assert torch.equal(branch.eval()(torch.ones(5, 1, 1)), torch.ones(5, 1, 1))


def test_attention_map_is_what_sdpa_uses():
    model = randomize(ViT(**SMALL))
    attention, x = model.blocks[0].attn, torch.randn(2, 7, 48)
    with torch.no_grad():
        _, _, v = attention.heads(x)
        expected = attention.proj((attention.attention_map(x) @ v).transpose(1, 2).reshape(2, 7, 48))
        torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)


def test_masks_replace_content_or_position_alone():
    model = randomize(ViT(**SMALL, pos_encoding="field", mask_tokens=True))
    x = torch.randn(1, 3, 64, 64)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    with torch.no_grad():
        plain, _ = model.embed(x)
        content, _ = model.embed(x, content_mask=mask)
        position, _ = model.embed(x, position_mask=mask)
        p = model.positions((4, 4))[0, 5]
        torch.testing.assert_close(content[0, 1 + 5], model.mask_token[0] + p)
        torch.testing.assert_close(position[0, 1 + 5], plain[0, 1 + 5] - p + model.pos_mask_token[0])
    others = [i for i in range(17) if i != 6]
    assert torch.equal(content[0, others], plain[0, others]) and torch.equal(
        position[0, others], plain[0, others]
    )


@pytest.mark.parametrize("pos_encoding", ["field", "standard"])
def test_file_round_trip_builds_the_same_network(tmp_path, pos_encoding):
    model_kwargs = dict(depth=2, pos_encoding=pos_encoding, n_registers=4, layerscale=1e-5, mask_tokens=True)
    model = randomize(build_backbone("vit_tiny_patch16", **model_kwargs))
    path = save_backbone(
        tmp_path / "b.safetensors",
        model.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=model.model_kwargs,
    )
    again = build_backbone("vit_tiny_patch16", weights=path).eval()
    assert "mask_token" not in again.state_dict()
    assert "mask_token" in build_backbone("vit_tiny_patch16", weights=path, mask_tokens=True).state_dict()
    x = torch.randn(1, 3, 50, 80)
    with torch.no_grad():
        assert torch.equal(again.feature_map(x), model.feature_map(x))


def test_timm_state_dict_is_recognized(tmp_path):
    theirs = randomize(
        timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, dynamic_img_size=True)
    )
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = build_backbone("vit_tiny_patch16", weights=tmp_path / "timm.pth").eval()
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).patches, theirs.forward_features(x)[:, 1:], atol=1e-5, rtol=1e-5)


def save_tiny(tmp_path, edit):
    model = build_backbone("vit_tiny_patch16", depth=1)
    state = dict(model.state_dict())
    edit(state)
    return save_backbone(
        tmp_path / "b.safetensors", state, name="vit_tiny_patch16", model_kwargs=model.model_kwargs
    )


@pytest.mark.parametrize(
    "edit, names",
    [
        (lambda s: s.pop("blocks.0.attn.qkv.bias"), "missing blocks.0.attn.qkv.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "left over extra"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 7)), "cls_token is (1, 1, 7)"),
    ],
)
def test_every_tensor_must_match(tmp_path, edit, names):
    with pytest.raises(UserError) as error:
        build_backbone("vit_tiny_patch16", weights=save_tiny(tmp_path, edit))
    assert names in str(error.value) and "b.safetensors" in str(error.value)


def test_bad_requests_name_the_value(tmp_path):
    path = save_tiny(tmp_path, lambda state: None)
    (tmp_path / "junk.safetensors").write_bytes(b"no")
    (tmp_path / "junk.pth").write_bytes(b"no")
    for arguments, named in [
        ((("vit_huge",), {}), "vit_huge"),
        ((("vit_base_patch16", path), {}), "192 wide"),
        ((("vit_tiny_patch16", path), {"n_registers": 4}), "n_registers=4"),
        ((("vit_tiny_patch16",), {"color": 1}), "color"),
        ((("vit_tiny_patch16",), {"pos_encoding": "rope"}), "rope"),
        ((("vit_tiny_patch16", tmp_path / "none.pth"), {}), "none.pth"),
        ((("vit_tiny_patch16", tmp_path / "junk.safetensors"), {}), "junk.safetensors"),
        ((("vit_tiny_patch16", tmp_path / "junk.pth"), {}), "junk.pth"),
    ]:
        with pytest.raises(UserError, match=named):
            build_backbone(*arguments[0], **arguments[1])


def test_a_pickle_is_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth"):
        build_backbone("vit_tiny_patch16", weights=tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_xformers_is_refused_by_name_where_it_cannot_run():
    assert choose_attention("auto") == "sdpa"
    with pytest.raises(ValueError, match="flash9"):
        choose_attention("flash9")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="xformers"):
            build_backbone("vit_tiny_patch16", attention="xformers")


def packed_inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    large = ViewGroup(
        torch.randn(4, 3, 64, 64, generator=g, dtype=dtype),
        torch.rand(4, 4, generator=g).sort(1).values,
        torch.rand(4, generator=g) < 0.5,
        torch.rand(4, 16, generator=g) < 0.3,
    )
    small = ViewGroup(
        torch.randn(6, 3, 32, 32, generator=g, dtype=dtype),
        torch.rand(6, 4, generator=g).sort(1).values,
        None,
    )
    return [large, small]


def packed_model(dtype=torch.float64, **model_kwargs):
    torch.manual_seed(0)
    model_kwargs = (
        dict(depth=3, pos_encoding="field", pos_grid=7, n_registers=2, mask_tokens=True, layerscale=0.1)
        | model_kwargs
    )
    return build_backbone("vit_tiny_patch16", **model_kwargs).to(dtype)


def ramp(x):
    return torch.arange(x.numel(), dtype=x.dtype).sin().view_as(x)


def packed_gradients(model, forward, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        large, small = forward(packed_inputs(next(model.parameters()).dtype))
        # Sums, and sums of squares, of LayerNorm's output are constants: their gradient would be rounding
        # alone.
        loss = sum((tokens * ramp(tokens)).sum() for tokens in (large.patches, small.cls, large.registers))
    loss.backward()
    return [
        large.cls,
        large.patches,
        small.cls,
        small.patches,
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize(
    "dtype, autocast, tolerance",
    [(torch.float64, False, 1e-9), (torch.float32, False, 1e-5), (torch.float32, True, 0.03)],
)
def test_packed_views_equal_a_pass_for_each_size(dtype, autocast, tolerance):
    """Tokens and every parameter's gradient; under bf16 autocast to 3 % of the largest value."""
    model = packed_model(dtype)
    apart = packed_gradients(model, lambda groups: [model(*group) for group in groups], autocast)
    packed = packed_gradients(model, model.forward_views, autocast)
    assert len(apart) == len(packed) > 40
    for one, two in zip(packed, apart):
        assert (one - two).abs().max() <= tolerance * two.abs().max()


@pytest.mark.parametrize("rule", ["full", "selective"])
def test_checkpointed_blocks_give_the_same_gradients(rule):
    """With paths dropped too: they are drawn outside the blocks, so nothing is drawn again."""
    model = packed_model(drop_path=0.5).train()
    torch.manual_seed(5)
    plain = packed_gradients(model, model.forward_views)
    model.checkpointing = rule
    torch.manual_seed(5)
    again = packed_gradients(model, model.forward_views)
    assert all(torch.equal(one, two) for one, two in zip(plain, again))


def some_patches(batch, n_patches, n, seed=0):
    """Patches of each image, [B, n], in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, n_patches, generator=generator).argsort(1)[:, :n]


def by_hand(model, group, visible):
    """Tokens of the visible patches: each image alone, its sequence put together patch by patch, then
    blocks and norm."""
    content, at = model.patch_embed(group.x), model.positions((4, 4), group.boxes, group.flips)
    at = at.expand(len(group.x), -1, -1)
    rows = []
    for image, patches in enumerate(visible.tolist()):
        chosen = [content[image, :, p // 4, p % 4] + at[image, p] for p in patches]
        sequence = torch.cat([model.cls_input()[0], model.reg_token[0], torch.stack(chosen)]).unsqueeze(0)
        for block in model.blocks:
            sequence = block(sequence)
        rows.append(model.norm(sequence))
    return model.split(torch.cat(rows))


@pytest.mark.parametrize("encoding", ["field", "standard"])
@pytest.mark.parametrize("rule", ["none", "full", "selective"])
def test_visible_patches_are_run_alone(encoding, rule):
    """Tokens and gradients, in a pass of their own and packed with crops of another size, whose patches
    are all there."""
    model = packed_model(pos_encoding=encoding, pos_grid=7)
    visible = some_patches(4, 16, 5)

    def gradients(forward):
        return packed_gradients(
            model, lambda groups: forward(groups[0]._replace(content_mask=None), groups[1])
        )

    expected = gradients(lambda large, small: [by_hand(model, large, visible), model(*small)])
    alone = gradients(lambda large, small: [model(*large._replace(visible=visible)), model(*small)])
    model.checkpointing = rule
    packed = gradients(lambda large, small: model.forward_views([large._replace(visible=visible), small]))
    assert expected[1].shape == (4, 5, 192) and len(expected) > 40
    for wanted, *found in zip(expected, alone, packed, strict=True):
        assert all((x - wanted).abs().max() <= 1e-9 * wanted.abs().max() for x in found)


def test_patches_that_are_not_visible_are_nowhere():
    """Neither their pixels nor their positions reach a token, and nothing flows back into them."""
    model = packed_model(pos_encoding="standard", pos_grid=4)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([[0, 5, 10, 15], [3, 2, 1, 0]])
    tokens = model(x, visible=visible)
    (tokens.patches * ramp(tokens.patches)).sum().backward()
    seen = x.grad.abs().sum(1).unflatten(2, (4, 16)).unflatten(1, (4, 16)).sum((2, 4)).flatten(1)  # [B, N]
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0, 5, 10, 15], [0, 1, 2, 3]]
    learned = model.pos_embed.grad[0, 1:].abs().sum(1).nonzero().flatten().tolist()
    assert learned == [0, 1, 2, 3, 5, 10, 15]


def test_every_patch_visible_in_order_is_the_usual_pass():
    model = packed_model(torch.float32)
    large, small = packed_inputs(torch.float32)
    everything = torch.arange(16).expand(4, -1)
    with torch.no_grad():
        for one, two in zip(
            model.forward_views([large, small]),
            model.forward_views([large._replace(visible=everything), small]),
        ):
            assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_relative_positions_are_those_of_whole_grids():
    model = packed_model(relative_positions=True, pos_encoding="none", pos_grid=None)
    with pytest.raises(AssertionError, match="whole grids"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.float64), visible=torch.tensor([[0, 1]]))


def test_paths_are_dropped_for_whole_crops_and_drawn_group_by_group():
    model = packed_model(drop_path=0.5).train()
    torch.manual_seed(3)
    paths = model.draw_paths([(4, 5), (3, 2)], "cpu")
    torch.manual_seed(3)
    assert torch.equal(
        model.draw_paths([(4, 5)], "cpu"), paths[:, :, :20]
    )  # the first group alone draws the same
    assert paths.shape == (3, 2, 26, 1)
    of_crops = paths[:, :, :20, 0].unflatten(2, (4, 5))
    assert (of_crops == of_crops[..., :1]).all()
    assert set(paths[0].unique().tolist()) == {1.0} and set(paths[2].unique().tolist()) == {0.0, 2.0}
    assert model.eval().draw_paths([(4, 5)], "cpu") is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_gradients():
    """torch.compile block by block, in a packed pass: tokens and gradients to 1e-5."""
    model, visible = packed_model(torch.float32), some_patches(4, 16, 5)
    passes = [
        model.forward_views,
        lambda groups: model.forward_views([groups[0]._replace(visible=visible), groups[1]]),
    ]
    eager = [packed_gradients(model, forward) for forward in passes]
    for block in model.blocks:
        block.compile()
    for forward, expected in zip(passes, eager):
        for one, two in zip(packed_gradients(model, forward), expected):
            assert (one - two).abs().max() <= 1e-5 * two.abs().max()
