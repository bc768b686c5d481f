"""Named results of operations that return values and indices."""

from typing import NamedTuple


class MinMax(NamedTuple):
    """Result of max(dim), min(dim): the extreme values and their positions (int64)."""

    values: object
    indices: object


class Sorted(NamedTuple):
    """Result of sort and topk: values in order and their positions (int64)."""

    values: object
    indices: object


def result_pair(kind, values, indices):
    return kind(values, indices)
