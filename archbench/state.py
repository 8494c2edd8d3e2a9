"""States: what a model carries between calls, as plain data.

A state is any nesting of tuples, NamedTuples, lists and dicts whose leaves are tensors with the batch first, or plain
ints (a length shared by all rows). The functions here copy, repeat, select and weigh states without knowing whose they
are. Passing a state to a model gives it up: the model may write into its tensors. Branch with `copy_state` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Any


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The same nesting with `function` applied to every tensor.

    Raises:
        TypeError: a leaf is neither a tensor nor an int nor None.
    """
    if isinstance(state, Tensor):
        return function(state)
    if state is None or isinstance(state, int):
        return state
    if isinstance(state, dict):
        return {key: map_state(function, value) for key, value in state.items()}
    if isinstance(state, tuple) and type(state) is not tuple:  # a NamedTuple: rebuilt by position
        return type(state)(*(map_state(function, value) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(map_state(function, value) for value in state)
    raise TypeError(f"a state holds tensors, ints and containers of them; found {type(state).__name__}")


def tensors(state: State) -> list[Tensor]:
    """All tensors of the state, in order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_state(collect, state)
    return found


def copy_state(state: State) -> State:
    """A state that shares no memory with the original."""
    return map_state(torch.clone, state)


def tile_state(state: State, n: int) -> State:
    """Every row repeated `n` times in place: rows a, b become a, a, b, b for n = 2. Shares no memory."""
    return map_state(lambda tensor: tensor.repeat_interleave(n, dim=0), state)


def select_rows(state: State, rows: Tensor) -> State:
    """The rows with these indices, in that order. Shares no memory."""
    return map_state(lambda tensor: tensor.index_select(0, rows), state)


def state_bytes(state: State) -> int:
    """Bytes of memory the state holds alive, counting each storage once, unused capacity included. On the meta device
    too, where no storage has an address."""
    storages = [tensor.untyped_storage() for tensor in tensors(state)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
