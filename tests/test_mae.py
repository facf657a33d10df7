"""MAE: its loss against the paper's formulas, what its encoder sees, its run and what that leaves."""

import math

import torch
from torch import nn

from pretrain.backbones.vit import ViewGroup, ViT
from pretrain.losses.pixels import masked_pixel_loss, normalized, patchify
from pretrain.methods.mae import Decoder, initialize

SIDE, PATCH = 4, 8


def networks(dtype=torch.float64):
    """A small encoder and decoder, every weight of ordinary size."""
    torch.manual_seed(0)
    backbone = ViT(
        embed_dim=24, depth=2, num_heads=3, patch_size=PATCH, pos_encoding="standard", pos_grid=SIDE
    )
    decoder = Decoder(24, SIDE, 3 * PATCH**2, 16, 2, 4)
    initialize(backbone, decoder)
    for parameter in (*backbone.parameters(), *decoder.parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return backbone.to(dtype), decoder.to(dtype)


def masked_images(n=3, n_masked=12, dtype=torch.float64):
    """Images [n, 3, 32, 32], the order of their patches [n, N], visible ones first, and how many are visible."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, SIDE * PATCH, SIDE * PATCH, generator=generator, dtype=dtype)
    return images, torch.rand(n, SIDE**2, generator=generator).argsort(1), SIDE**2 - n_masked


# --- the paper's formulas, one image, one patch, one head at a time ---------------------------------------------------


def sines(row, column, width):
    """The column in half of the channels, then the row; in each sines, then cosines, of place / 10000^(k / (width / 4))."""
    values = []
    for place in (column, row):
        angles = [place / 10000 ** (k / (width / 4)) for k in range(width // 4)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(values, dtype=torch.float32).double()  # the networks hold their tables in float32


def layer_norm(x, state, name):
    return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-6).sqrt() * state[f"{name}.weight"] + state[
        f"{name}.bias"
    ]


def linear(x, state, name):
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def transformer(tokens, state, depth, heads):
    """Pre-norm blocks on a list of vectors."""
    for i in range(depth):
        name, size = f"blocks.{i}", len(tokens[0]) // heads
        qkv = [
            linear(layer_norm(t, state, f"{name}.norm1"), state, f"{name}.attn.qkv").view(3, heads, size)
            for t in tokens
        ]
        mixed = []
        for q in qkv:
            of_heads = []
            for h in range(heads):
                weights = torch.stack([q[0, h] @ k[1, h] / size**0.5 for k in qkv]).softmax(0)
                of_heads.append(sum(w * v[2, h] for w, v in zip(weights, qkv)))
            mixed.append(linear(torch.cat(of_heads), state, f"{name}.attn.proj"))
        tokens = [t + m for t, m in zip(tokens, mixed)]
        hidden = [linear(layer_norm(t, state, f"{name}.norm2"), state, f"{name}.mlp.fc1") for t in tokens]
        hidden = [h * (1 + torch.erf(h / 2**0.5)) / 2 for h in hidden]
        tokens = [t + linear(h, state, f"{name}.mlp.fc2") for t, h in zip(tokens, hidden)]
    return tokens


def pixels_of(image, patch):
    """A patch's pixels in reading order, the three colors of each side by side."""
    row, column = divmod(patch, SIDE)
    square = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    return torch.stack(
        [square[color, y, x] for y in range(PATCH) for x in range(PATCH) for color in range(3)]
    )


def restated_loss(encoder, decoder, images, masked):
    """MAE's loss (section 3): the mean over masked patches of the squared error of their normalized pixels.

    Args:
        encoder, decoder: state dicts, float64; 3 and 4 heads, 2 blocks each.
        masked: the masked patches of each image.
    """
    kernel = encoder["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)  # [D, p * p * 3]
    errors = []
    for image, hidden in zip(images, masked):
        visible = [patch for patch in range(SIDE**2) if patch not in hidden]
        tokens = [encoder["cls_token"][0, 0]]
        for patch in visible:
            projected = kernel @ pixels_of(image, patch) + encoder["patch_embed.proj.bias"]
            tokens.append(projected + sines(*divmod(patch, SIDE), 24))
        tokens = [layer_norm(t, encoder, "norm") for t in transformer(tokens, encoder, 2, 3)]
        seen = dict(zip(visible, tokens[1:]))
        full = [linear(tokens[0], decoder, "embed")]
        for patch in range(SIDE**2):  # in reading order, as the paper unshuffles them
            token = linear(seen[patch], decoder, "embed") if patch in seen else decoder["mask_token"][0, 0]
            full.append(token + sines(*divmod(patch, SIDE), 16))
        full = transformer(full, decoder, 2, 4)
        for patch in hidden:
            predicted = linear(layer_norm(full[1 + patch], decoder, "norm"), decoder, "pixels")
            target = pixels_of(image, patch)
            variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
            errors.append(((predicted - (target - target.mean()) / (variance + 1e-6).sqrt()) ** 2).mean())
    return sum(errors) / len(errors)


def test_the_loss_is_the_papers():
    (backbone, decoder), (images, order, n) = networks(), masked_images()
    (tokens,) = backbone.forward_views([ViewGroup(images, visible=order[:, :n])])
    predictions = decoder(torch.cat([tokens.cls.unsqueeze(1), tokens.patches], 1), order)
    loss = masked_pixel_loss(predictions, images, order[:, n:], PATCH)
    expected = restated_loss(backbone.state_dict(), decoder.state_dict(), images, order[:, n:].tolist())
    assert abs(loss - expected) < 1e-12 and expected > 0.5
    theirs = torch.autograd.grad(
        restated_loss_of_parameters(backbone, decoder, images, order[:, n:].tolist()),
        learned(backbone, decoder),
    )
    ours = torch.autograd.grad(loss, learned(backbone, decoder))
    assert all((a - b).abs().max() <= 1e-10 * b.abs().max() for a, b in zip(ours, theirs, strict=True))


def learned(*modules):
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def restated_loss_of_parameters(encoder, decoder, images, masked):
    return restated_loss(dict(encoder.named_parameters()), dict(decoder.named_parameters()), images, masked)


def test_patches_and_their_normal_form():
    images, _, _ = masked_images()
    patches = patchify(images, PATCH)
    assert patches.shape == (3, 16, 192)
    assert all(torch.equal(patches[1, patch], pixels_of(images[1], patch)) for patch in range(16))
    x = normalized(patches)
    expected = torch.tensor(0.0, dtype=torch.float64).expand(3, 16)
    torch.testing.assert_close(x.mean(-1), expected)
    variance = patches.var(-1)
    torch.testing.assert_close(x.var(-1), variance / (variance + 1e-6))
    assert torch.equal(normalized(torch.full((2, 192), 3.0)), torch.zeros(2, 192))  # a flat patch
    assert normalized(patches.bfloat16()).dtype == torch.float32


def test_plain_pixels_as_targets():
    images, order, n = masked_images()
    predictions = torch.randn(3, 12, 192, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = [
        ((predictions[i, j] - pixels_of(images[i], patch)) ** 2).mean()
        for i in range(3)
        for j, patch in enumerate(order[i, n:].tolist())
    ]
    loss = masked_pixel_loss(predictions, images, order[:, n:], PATCH, normalize=False)
    torch.testing.assert_close(loss, sum(errors) / 36)


def test_the_encoder_sees_the_visible_patches_alone():
    """What is masked, and where, reaches no token of the encoder; the decoder learns of it only through positions."""
    (backbone, _), (images, order, n) = networks(), masked_images()
    other = images.clone()
    for image, hidden in zip(other, order[:, n:].tolist()):
        for patch in hidden:
            row, column = divmod(patch, SIDE)
            image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 99.0
    with torch.no_grad():
        one, two = (backbone(x, visible=order[:, :n]) for x in (images, other))
        assert torch.equal(one.cls, two.cls) and torch.equal(one.patches, two.patches)


def test_gradients_flow_into_all_that_learns_and_nothing_else():
    (backbone, decoder), (images, order, n) = networks(), masked_images()
    images.requires_grad_()
    tokens = backbone(images, visible=order[:, :n])
    masked_pixel_loss(
        decoder(torch.cat([tokens.cls.unsqueeze(1), tokens.patches], 1), order),
        images.detach(),
        order[:, n:],
        PATCH,
    ).backward()
    assert backbone.pos_embed.grad is None and not backbone.pos_embed.requires_grad
    for name, parameter in (*backbone.named_parameters(), *decoder.named_parameters()):
        assert name == "pos_embed" or parameter.grad.abs().max() > 0, name
    seen = patchify(images.grad, PATCH).abs().sum(-1)  # [B, N]
    assert all((row[order[i, :n]] > 0).all() and (row[order[i, n:]] == 0).all() for i, row in enumerate(seen))


def test_predictions_do_not_depend_on_the_order_of_the_patches():
    (_, decoder), (_, order, n) = networks(), masked_images()
    tokens = torch.randn(3, 1 + n, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    visible, masked = torch.randperm(n), torch.randperm(16 - n)
    again = torch.cat([order[:, :n][:, visible], order[:, n:][:, masked]], 1)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, visible]], 1)
    torch.testing.assert_close(
        decoder(shuffled, again), decoder(tokens, order)[:, masked], atol=1e-12, rtol=0
    )


def test_positions_are_fixed_sines_with_zero_for_cls():
    backbone, decoder = networks()
    table = torch.stack([sines(*divmod(patch, SIDE), 24) for patch in range(16)])
    assert torch.equal(backbone.pos_embed[0, 0], torch.zeros(24, dtype=torch.float64))
    torch.testing.assert_close(backbone.pos_embed[0, 1:], table, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        decoder.positions, torch.stack([sines(*divmod(p, SIDE), 16) for p in range(16)]), atol=1e-7, rtol=0
    )
    assert "positions" not in decoder.state_dict()


def test_linear_layers_start_as_xaviers():
    """Uniform within sqrt(6 / (fan in + fan out)), the patch projection as the linear layer that it is; biases zero."""
    torch.manual_seed(0)
    backbone, decoder = ViT(embed_dim=96, depth=1, num_heads=3, pos_grid=14), Decoder(96, 14, 768, 64, 1, 4)
    initialize(backbone, decoder)
    layers = [m for m in (*backbone.modules(), *decoder.modules()) if isinstance(m, nn.Linear)]
    assert len(layers) == 10
    for weight in [layer.weight for layer in layers] + [backbone.patch_embed.proj.weight.flatten(1)]:
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound
    assert all((layer.bias == 0).all() for layer in layers)
    for token in (backbone.cls_token, decoder.mask_token):
        assert 0.01 < token.std() < 0.03
