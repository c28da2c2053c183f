"""The kinds of state that a cache can hold; declaring one is a few lines."""

from jaxcache.components.base import Component, FieldSpec, np_dtype
from jaxcache.components.full_attention import FullAttention
from jaxcache.components.recurrent_state import RecurrentState
from jaxcache.components.sliding_window import SlidingWindow

__all__ = ["Component", "FieldSpec", "FullAttention", "RecurrentState", "SlidingWindow", "np_dtype"]
