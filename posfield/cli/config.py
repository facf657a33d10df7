"""Print a config: every value with what it means and where it comes from, as YAML that loads again.

``posfield config configs/pretrain/toy.yaml optim.epochs=3 > mine.yaml``; with ``--schema`` the JSON
schema of its method's settings, by which editors complete and check YAML files. ``posfield config --markdown``
describes the settings of everything: ``docs/settings.md``.
"""

import json

from pretrain.cli import command_parser
from pretrain.errors import UserError


def main(arguments: list[str]) -> None:
    """Parse, load, print."""
    parser = command_parser("Print every value of a pre-training config with its meaning and its source.")
    add = parser.add_argument
    add("name", nargs="?", help="a YAML file, or a recipe: paka-25ep")
    add("words", nargs="*", metavar="key=value", help="changes, e.g. optim.batch_size=64")
    add("--schema", action="store_true", help="print the JSON schema of its method's settings instead")
    add("--markdown", action="store_true", help="print the page of all settings (docs/settings.md) instead")
    options = parser.parse_intermixed_args(arguments)
    # they load torch
    from posfield.cli import settings_page
    from pretrain.config import load_config, recipe_names, resolved
    from pretrain.settings import json_schema, printed

    config = options.name, options.words
    if options.markdown:
        print(settings_page.page(), end="")
    elif options.name is None:
        raise UserError(f"config: which one? Name a YAML file, or a recipe: {', '.join(recipe_names())}")
    elif options.schema:
        print(json.dumps(json_schema(resolved(*config)[0])))
    else:
        print(printed(load_config(*config), resolved(*config)[1]), end="")
