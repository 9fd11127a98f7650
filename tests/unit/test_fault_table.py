# SPDX-License-Identifier: Apache-2.0
"""The table of faults says what was tried and what was not survived."""

from __future__ import annotations

import pytest

from tests.support.survival import Fault, summed, survives, table, taken


def test_a_fault_that_was_not_survived_is_seen() -> None:
    taken()
    with survives(Fault.NBD_LIE):
        pass
    with pytest.raises(AssertionError), survives(Fault.NBD_LIE):
        raise AssertionError
    with survives(Fault.QEMU_KILLED):
        pass
    first = taken()
    assert first == {"NBD_LIE": [2, 1], "QEMU_KILLED": [1, 1]}
    assert taken() == {}
    rows = summed([first, {"NBD_LIE": [3, 3]}])
    assert rows == [(Fault.QEMU_KILLED, 1, 1), (Fault.NBD_LIE, 5, 4)]
    assert [line.split()[-2:] for line in table(rows)] == [["times", "survived"], ["1", "1"], ["5", "4"], ["6", "5"]]
