"""Print a config: every value with what it means and where it comes from, as YAML that loads again.

``posfield config configs/pretrain/toy.yaml optim.epochs=3 > mine.yaml``; with ``--schema`` the JSON
schema of its method's settings, by which editors complete and check YAML files.
"""

import json

from pretrain.cli import command_parser


def main(arguments: list[str]) -> None:
    """Parse, load, print."""
    parser = command_parser("Print every value of a pre-training config with its meaning and its source.")
    add = parser.add_argument
    add("name", help="a YAML file, or a recipe: paka-25ep")
    add("words", nargs="*", metavar="key=value", help="changes, e.g. optim.batch_size=64")
    add("--schema", action="store_true", help="print the JSON schema of its method's settings instead")
    options = parser.parse_intermixed_args(arguments)
    from pretrain.config import load_config, resolved  # loads torch
    from pretrain.settings import json_schema, printed

    config = options.name, options.words
    if options.schema:
        print(json.dumps(json_schema(resolved(*config)[0])))
    else:
        print(printed(load_config(*config), resolved(*config)[1]), end="")
