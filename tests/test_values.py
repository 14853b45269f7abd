"""Values of a config that others wrote: of the right type and size, or refused by their key."""

from __future__ import annotations

import math

import pytest

from diffusion_pl.interop import values


def refused(read, *words):
    with pytest.raises(ValueError, match="must be") as error:
        read(*words)
    return str(error.value)


def test_what_is_left_out_is_what_is_usual():
    assert values.whole({}, "heads", 4) == 4
    assert values.real({}, "rate", 0.5) == 0.5
    assert values.flag({}, "biased", True) is True
    assert values.choice({}, "act", "silu", {"silu": "SiLU", "relu": "ReLU"}) == "SiLU"
    values.only({}, "groups", 32, 32)


@pytest.mark.parametrize("value", [0, 9, -1, True, 4.0, "4", None, math.nan])
def test_a_whole_number_is_one_between_the_limits(value):
    message = refused(values.whole, {"heads": value}, "heads", 4, 1, 8)
    assert message == f"heads: must be a whole number from 1 to 8 (got {value!r})"
    assert [values.whole({"heads": n}, "heads", 4, 1, 8) for n in (1, 8)] == [1, 8]


@pytest.mark.parametrize("value", [0, -0.5, 2.5, True, "1", None, math.nan, math.inf])
def test_a_real_number_is_positive_finite_and_not_above_the_limit(value):
    message = refused(values.real, {"rate": value}, "rate", 1.0, 2.0)
    assert message == f"rate: must be a positive number (got {value!r})"
    assert values.real({"rate": 2}, "rate", 1.0, 2.0) == 2.0
    assert "(got inf)" in refused(values.real, {"rate": math.inf}, "rate", 1.0)


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_flag_is_true_or_false(value):
    assert refused(values.flag, {"biased": value}, "biased", False).startswith("biased: must be")


@pytest.mark.parametrize("value", ["gelu", None, ["silu"]])
def test_a_word_that_is_not_known_names_those_that_are(value):
    message = refused(values.choice, {"act": value}, "act", "silu", {"silu": 1, "relu": 2})
    assert message == f"act: must be one of silu, relu (got {value!r})"


def test_what_our_parts_do_not_do_is_refused_though_python_calls_it_equal():
    assert refused(values.only, {"groups": 16}, "groups", 32, 32) == "groups: must be 32 (got 16)"
    assert refused(values.only, {"groups": True}, "groups", 1, 1) == "groups: must be 1 (got True)"
    values.only({"bias": True}, "bias", True, True)


@pytest.mark.parametrize("value", [[], [1] * 17, [0], [2**16 + 1], [1.0], [True], "12", 3, None])
def test_several_are_a_short_list_of_one_type(value):
    assert refused(values.several, {"mult": value}, "mult", int).startswith("mult: must be a list")
    assert values.several({"mult": (1, 2**16)}, "mult", int) == [1, 2**16]


def test_a_long_value_is_quoted_by_its_beginning():
    assert values.got("x" * 200) == f"(got '{'x' * 79} ...)"
    assert values.got("x" * 78) == f"(got '{'x' * 78}')"
