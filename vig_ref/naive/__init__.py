"""Layer 1, the equation: one token at a time. In float64 it is the oracle of everything else."""

from vig_ref.naive.recurrence import bidirectional_gla, gla

__all__ = ["bidirectional_gla", "gla"]
