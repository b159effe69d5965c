"""Codes stand for names in one place, and every primitive has its place in a slot."""

from __future__ import annotations

from typing import get_args

from transformers.activations import ACT2FN

from adapters_store.primitives import ACTIVATIONS, PrefixEmbeds, PrefixKV, Primitive, Scale
from server.model.backends import codes
from server.model.slots.layout import KIND_OF_TYPE, STORED


def test_every_name_has_a_code_of_its_own() -> None:
    """Each activation of a bottleneck has its own code below the first flag, and each gate is one of transformers'."""
    assert set(codes.ACTIVATION_CODES) == set(ACTIVATIONS)
    assert len(set(codes.ACTIVATION_CODES.values())) == len(ACTIVATIONS)
    assert max(codes.ACTIVATION_CODES.values()) <= codes.ACTIVATION_MASK < codes.IS_BIASED
    assert set(codes.GATE_CODES) <= set(ACT2FN)


def test_every_primitive_is_stored() -> None:
    """Each kind has one way to be stored, and each type of primitive that acts at a site has a kind."""
    assert set(STORED) == set(codes.KINDS)
    assert {*KIND_OF_TYPE, Scale, PrefixEmbeds, PrefixKV} == set(get_args(Primitive))
