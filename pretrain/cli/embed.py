"""Write one vector an image, for search, duplicates, maps of a collection.

posfield embed --weights runs/b16/backbone.safetensors --images photos --output embeddings.npz

The file holds ``names`` [n] and ``vectors`` [n, D] float32: ``numpy.load("embeddings.npz")``.
"""

from pathlib import Path

from pretrain.cli import at_least, command_parser


def main(arguments: list[str]) -> None:
    """Parse, embed, write."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="any supported checkpoint")
    add("--backbone", metavar="NAME", help="where the weights do not say it: vit_small_patch16, ...")
    add("--source", metavar="NAME", help="whose file it is, where that is not clear: dino, mae, timm, ...")
    add("--images", required=True, metavar="FOLDER", help="folder, list file, tar shards, ... (as data.root)")
    add("--output", type=Path, required=True, metavar="FILE.npz")
    add("--size", type=int, default=224, metavar="PX", help="side of the central square (%(default)s)")
    add("--batch", type=int, default=32, metavar="N", help="images at a time (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    at_least(options, size=1, batch=1)
    import numpy as np

    from pretrain.build import build_backbone  # loads torch
    from pretrain.data.sources import DataSettings, open_source
    from pretrain.embed import embed

    backbone = build_backbone(options.backbone, options.weights, source=options.source)
    size, batch = options.size, options.batch
    vectors = embed(options.images, backbone, size_px=size, batch_size=batch, device=options.device)
    source = open_source(DataSettings(root=options.images))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    names = np.array([source.name(index) for index in range(len(source))])
    np.savez(options.output, names=names, vectors=vectors.numpy())
    print(f"{options.output}: {len(vectors)} images, {vectors.shape[1]} numbers each")
