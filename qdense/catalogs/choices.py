"""What a setting may be, by name: what both recipes and PEFT configurations, or both recipes and rows, must know."""

from __future__ import annotations

from typing import Literal

Activation = Literal["gelu", "silu", "tanh", "relu", "none"]
# Which layers share an encoder and a decoder: all of one module kind, all of one size, or none.
Sharing = Literal["kind", "shape", "none"]
# How M is drawn: as in the paper, or so that the decoder starts to learn as fast as LoRA's B.
Init = Literal["paper", "balanced"]
# The factor that starts at zero, so that the adapter adds nothing at first.
ZeroInit = Literal["decoder", "m", "none"]
RowKind = Literal["pair", "conversation", "text"]  # what all rows of a data set are
