"""Documents packed into one row, kept from seeing each other: each becomes a row of its own, and comes back.

A recurrence is cut where a document begins if its decay there is zero and its convolution sees zeros before. Not every
kernel can be told so, and cutting the row itself asks nothing of them: what a document gives is what it gives alone, at
every level and through every gradient. The price is padding to the longest piece.

A piece is a document, or what stands in a row before its first document begins and so continues from a state given.
Padding is zero and stands before a document, whose zero state it leaves zero. Behind a continued piece it does no harm:
only a piece that reaches the end of its row is asked for its state, and a continued one that does is as long as the
row, so that nothing is padded.

Source: Dao & Gu 2024 (arXiv 2405.21060), section 8.3, for what is computed.

Letters: b batch, t time, p pieces, l tokens of the longest piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Pieces(NamedTuple):
    """Where tokens go and where they come from."""

    row: Int[Tensor, " p"]
    """the row that a piece was cut from"""
    column: Int[Tensor, "p l"]
    """the token of that row at each place of a piece"""
    padding: Bool[Tensor, "p l"]
    continued: Bool[Tensor, " p"]
    piece: Int[Tensor, "b t"]
    """the piece that a token went to"""
    place: Int[Tensor, "b t"]
    """its place in there"""

    def apart(self, x: Float[Tensor, "b t *rest"]) -> Float[Tensor, "p l *rest"]:
        """Tokens of the rows as tokens of pieces."""
        padding = self.padding.reshape(*self.padding.shape, *[1] * (x.ndim - 2))
        return x[self.row[:, None], self.column].masked_fill(padding, 0)

    def together(self, y: Float[Tensor, "p l *rest"]) -> Float[Tensor, "b t *rest"]:
        """Tokens of the pieces as tokens of rows."""
        return y[self.piece, self.place]

    def opening(self, state: Float[Tensor, "b ..."]) -> Float[Tensor, "p ..."]:
        """The state each piece begins from: its row's where the row goes on, else zero."""
        fresh = ~self.continued.reshape(-1, *[1] * (state.ndim - 1))
        return state[self.row].masked_fill(fresh, 0)

    def closing(self, states: Float[Tensor, "p ..."]) -> Float[Tensor, "b ..."]:
        """The state each row ends with: that of its last piece."""
        return states[self.piece[:, -1]]


def cut(starts: Bool[Tensor, "b t"], n_rows: int, n_tokens: int) -> Pieces:
    """Cuts rows of one token at least where `starts` says that a document begins.

    Raises:
        ValueError: `starts` does not have a place for each of the n_rows x n_tokens tokens.
    """
    if starts.shape != (n_rows, n_tokens):
        raise ValueError(f"starts is {tuple(starts.shape)}; with x of {n_rows} rows it must be {(n_rows, n_tokens)}")
    begins = starts.clone()
    begins[:, 0] = True
    row, begin = begins.nonzero(as_tuple=True)
    piece = begins.flatten().cumsum(0).view_as(begins) - 1
    length = piece.flatten().bincount(minlength=len(row))
    longest = int(length.max())
    continued = ~starts[row, begin]
    in_front = (longest - length).masked_fill(continued, 0)
    offset = torch.arange(longest, device=starts.device) - in_front[:, None]
    padding = (offset < 0) | (offset >= length[:, None])
    column = (begin[:, None] + offset).masked_fill(padding, 0)
    place = torch.arange(n_tokens, device=starts.device) + (in_front - begin)[piece]
    return Pieces(row, column, padding, continued, piece, place)
