"""Arithmetic modulo 2^32 against plain integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycopy import seq

numbers = st.integers(0, seq.MASK) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**31 + 1, seq.MASK])
steps = st.integers(-(2**31) + 1, 2**31 - 1)


@given(numbers, steps)
def test_diff_undoes_add(a, n):
    assert seq.diff(seq.add(a, n), a) == n


@given(numbers, st.integers(-(2**40), 2**40))
def test_add_stays_in_range_and_is_exact_modulo(a, n):
    assert 0 <= seq.add(a, n) <= seq.MASK
    assert (seq.add(a, n) - a - n) % 2**32 == 0


@given(numbers, numbers)
def test_diff_range(a, b):
    assert -(2**31) <= seq.diff(a, b) <= 2**31 - 1


@given(numbers, steps)
def test_order_is_the_order_of_the_unwrapped_numbers(a, n):
    b = seq.add(a, n)
    assert seq.lt(b, a) == (n < 0)
    assert seq.le(b, a) == (n <= 0)
    assert seq.gt(b, a) == (n > 0)
    assert seq.ge(b, a) == (n >= 0)
    assert seq.max_seq(a, b) == (b if n > 0 else a)


@given(numbers, numbers)
def test_the_four_comparisons_agree_everywhere(a, b):
    assert seq.lt(a, b) == (not seq.ge(a, b))
    assert seq.gt(a, b) == (not seq.le(a, b))
    assert seq.le(a, b) == (seq.lt(a, b) or a == b)
    assert seq.ge(a, b) == (seq.diff(a, b) >= 0)


@pytest.mark.parametrize("a", [0, 1, 2**31 - 1, 2**31, seq.MASK])
def test_the_antipode_is_defined_even_if_meaningless(a):
    b = seq.add(a, 2**31)
    assert seq.diff(a, b) == seq.diff(b, a) == -(2**31)
    assert seq.lt(a, b) and seq.lt(b, a)
