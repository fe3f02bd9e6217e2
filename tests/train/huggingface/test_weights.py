"""Weights in files of a bounded size."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.train.huggingface.weights import in_groups


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), most=st.integers(1, 120))
def test_groups_hold_every_name_once_in_order(sizes: list[int], most: int) -> None:
    shapes = {str(number): (size,) for number, size in enumerate(sizes)}
    groups = list(in_groups(shapes, 1, most))
    assert [name for group in groups for name in group] == list(shapes)
    assert all(len(group) == 1 or sum(shapes[name][0] for name in group) <= most for group in groups)
    joined = [sum(shapes[name][0] for name in (*one, two[0])) for one, two in pairwise(groups)]
    assert all(size > most for size in joined), "no file without need"
