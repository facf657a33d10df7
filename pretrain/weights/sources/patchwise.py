"""Methods on DINO's code whose networks attend over patches alone: SelfPatch and FLSL.

SelfPatch (``selfpatch_vision_transformer.py``) has no [CLS] and no norm after the last block; its heads have
their own. FLSL (``make_vit_noclass``): the [CLS] token stays in the file but never enters the sequence. By
default positions are MAE's table without a row for [CLS]. There is a norm after the last block, unless the
run switched ``post_layernorm`` off; then the file has none.
"""

from dataclasses import replace

from pretrain.weights.container import Container
from pretrain.weights.sources.dino import Method, backbone_of, match, networks_of, source_of
from pretrain.weights.sources.mae import is_fixed
from pretrain.weights.sources.source import Match

SELFPATCH = Method(
    "selfpatch",
    "SelfPatch",
    "selfpatch",
    heads=("ca_head.", "c_head.", "p_head."),
    needed=("pos_embed",),
    lacking=("cls_token", "norm.", "fc_norm."),
)
# ``norm.*`` beside the backbone is that of ``layernorm_on_mode``: it sees means of clusters, never the
# backbone's tokens.
FLSL = Method("flsl", "FLSL", "flsl", heads=("head.", "norm."), unused=("cls_token",), needed=("pos_embed",))


def match_flsl(file: Container) -> Match:
    """By its loss; a backbone alone, by a [CLS] token without a fixed position, else by the file's name."""
    evidence, networks = match(FLSL, file), networks_of(file)
    if "" not in networks or evidence == Match.NONE:
        return evidence
    backbone, _ = backbone_of(networks[""])
    if "cls_token" in backbone and is_fixed(backbone, has_cls=False):
        return Match.MARKED
    return evidence if evidence > Match.POSSIBLE else Match.NONE


SOURCES = (source_of(SELFPATCH), replace(source_of(FLSL), match=match_flsl))
