"""Nothing that is recorded has changed; safety_net.py says what, and when the record may change."""

import importlib.util
import warnings

import pytest
import safety_net

# Groups that run an optional package, and these packages.
NEEDED = {
    group: [name for name in safety_net.NEEDS.get(group, ()) if not importlib.util.find_spec(name)]
    for group in safety_net.GROUPS
}
GROUPS = [
    pytest.param(
        group, marks=[pytest.mark.detectron2] if "detectron2" in safety_net.NEEDS.get(group, ()) else []
    )
    for group in safety_net.GROUPS
]


@pytest.mark.parametrize("group", GROUPS)
def test_as_recorded(group):
    if NEEDED[group]:
        pytest.skip(f"not installed: {', '.join(NEEDED[group])}")
    lines = safety_net.differences(group, safety_net.measure(group))
    if not safety_net.is_exact(group):
        warnings.warn(
            f"{group}: another machine than the record's: compared to {safety_net.TOLERANCE:g}, no hashes",
            stacklevel=1,
        )
    assert not lines, "\n".join([f"{len(lines)} differences", *lines[:40]])


def test_every_group_is_recorded():
    assert list(safety_net.read_record()["groups"]) == list(safety_net.GROUPS)


def test_a_change_is_seen():
    """The last bit of a loss, a hash, a missing and a new entry."""
    group = "pretraining"
    found = safety_net.read_record()["groups"][group]
    name = "toy cpu accumulate=1 checkpointing=none"
    loss = found[name]["logged"]["loss"]
    loss[1] *= 1 + 1e-3
    found[name]["tensors"]["more"] = {"count": 1}
    del found[name]["logged"]["koleo"]
    keys = [line.split(": ")[1] for line in safety_net.differences(group, found)]
    assert {f"{name}.logged.loss.1", f"{name}.logged.koleo.0", f"{name}.tensors.more.count"} <= set(keys)
