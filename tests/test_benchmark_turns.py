"""Contenders that take turns, each in a process of its own."""

import pytest
import torch

from pretrain.benchmark.turns import Figures, in_turns, report
from pretrain.errors import UserError


def hold(n_mib):
    """Work that holds and lets go: a contender of known memory."""

    def work():
        torch.ones(n_mib, 2**18).sum()

    return work


def refuse(_):
    raise UserError("nothing to measure")


def test_ratios_and_peaks_are_those_of_each_process():
    found = in_turns({"ours": (hold, (64,)), "theirs": (hold, (256,))}, "cpu", 2)
    assert [len(f.seconds) for f in found.values()] == [2, 2]
    assert 64 <= found["ours"].peak_mib < 128 and 256 <= found["theirs"].peak_mib < 320
    figures = {"ours": Figures([1.0, 9.0, 2.0], 10.0), "theirs": Figures([2.0, 1.0, 4.0], 40.0)}
    told = report(figures, {"a_{}_ratio": ("ours", "theirs")})
    assert (told["a_time_ratio"], told["a_memory_ratio"]) == (0.5, 0.25)
    assert told["seconds"] == {"ours": 2.0, "theirs": 2.0} and told["peak_mib"] == {
        "ours": 10.0,
        "theirs": 40.0,
    }
    with pytest.raises(UserError, match="nothing to measure"):
        in_turns({"ours": (refuse, (1,))}, "cpu", 1)
