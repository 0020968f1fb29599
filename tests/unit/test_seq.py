"""Arithmetic modulo 2^32 against plain integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy.wire import seq

numbers = st.integers(0, seq.MASK) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**31 + 1, seq.MASK])
steps = st.integers(-(2**31) + 1, 2**31 - 1)


@given(numbers, steps)
def test_diff_is_the_step_and_lt_its_sign(a, n):
    b = (a + n) & seq.MASK
    assert seq.diff(b, a) == n
    assert seq.lt(b, a) == (n < 0)


@given(numbers, numbers)
def test_diff_range_and_lt_agree(a, b):
    assert -(2**31) <= seq.diff(a, b) <= 2**31 - 1
    assert seq.lt(a, b) == (seq.diff(a, b) < 0)


@pytest.mark.parametrize("a", [0, 1, 2**31 - 1, 2**31, seq.MASK])
def test_the_antipode_is_defined_even_if_meaningless(a):
    b = (a + 2**31) & seq.MASK
    assert seq.diff(a, b) == seq.diff(b, a) == -(2**31)
    assert seq.lt(a, b) and seq.lt(b, a)
