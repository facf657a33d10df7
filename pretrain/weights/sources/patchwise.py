"""Methods on DINO's code whose networks attend over patches alone: SelfPatch and FLSL.

SelfPatch (``selfpatch_vision_transformer.py``): no [CLS], no norm after the last block; its heads bring their own of both.
FLSL (``make_vit_noclass``): the [CLS] token stays in the file but never enters the sequence; positions are by default MAE's table
without a row for [CLS]; there is a norm after the last block unless the run switched ``post_layernorm`` off, and then it is not in
the file.
"""

from dataclasses import replace

from pretrain.weights.container import Container
from pretrain.weights.sources.dino import Method, backbone_of, networks_of, recognize, source_of
from pretrain.weights.sources.mae import is_fixed
from pretrain.weights.sources.source import Evidence

SELFPATCH = Method(
    "selfpatch",
    "SelfPatch",
    "selfpatch",
    heads=("ca_head.", "c_head.", "p_head."),
    needed=("pos_embed",),
    lacking=("cls_token", "norm.", "fc_norm."),
)
# ``norm.*`` beside the backbone is that of ``layernorm_on_mode``: it sees means of clusters, never the backbone's tokens.
FLSL = Method("flsl", "FLSL", "flsl", heads=("head.", "norm."), unused=("cls_token",), needed=("pos_embed",))


def recognize_flsl(file: Container) -> Evidence:
    """By its loss; of a backbone alone, by a [CLS] token that the fixed positions know nothing of, else by the file's name."""
    evidence, networks = recognize(FLSL, file), networks_of(file)
    if "" not in networks or evidence == Evidence.NONE:
        return evidence
    backbone, _ = backbone_of(networks[""])
    if "cls_token" in backbone and is_fixed(backbone, has_cls=False):
        return Evidence.MARKED
    return evidence if evidence > Evidence.POSSIBLE else Evidence.NONE


SOURCES = (source_of(SELFPATCH), replace(source_of(FLSL), recognize=recognize_flsl))
