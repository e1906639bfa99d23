import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffense.errors import OptionError
from diffense.options import parse_counts, parse_floats, parse_names, parse_size

SIDE = st.integers(1, 8000)  # two of them are as many pixels as an image may have


@given(SIDE, SIDE, st.sampled_from("xX"))
def test_sizes_are_read_as_height_and_width(height: int, width: int, times: str) -> None:
    assert parse_size(f"{height}{times}{width}") == (height, width)
    assert parse_size(str(height)) == (height, height)


@pytest.mark.parametrize("text", ["", "x", "224x", "x224", "0", "0x5", "-3", "2.5", "12x12x3", "224*224", "big", "²x2"])
def test_a_size_that_is_none_names_its_option(text: str) -> None:
    with pytest.raises(OptionError, match="--size") as refused:
        parse_size(text)
    assert repr(text) in str(refused.value)


@given(st.text())
def test_any_text_is_a_size_or_an_error_of_ours(text: str) -> None:
    try:
        height, width = parse_size(text)
    except OptionError:
        return
    assert height > 0 and width > 0


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_numbers_come_back(values: list[float]) -> None:
    assert parse_floats("--mean", ",".join(map(repr, values))) == tuple(values)


def test_numbers_may_have_blanks_and_may_be_missing() -> None:
    assert parse_floats("--std", " 0.5, 1e-1 ,2") == (0.5, 0.1, 2.0)
    assert parse_floats("--std", None) is None


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1;2", "0.5,", "1 2"])
def test_numbers_that_are_none_name_their_option(text: str) -> None:
    with pytest.raises(OptionError, match="--mean") as refused:
        parse_floats("--mean", text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(value: float) -> None:
    with pytest.raises(OptionError, match="--std"):
        parse_floats("--std", f"1,{value}")


def test_names_lose_blanks_and_empty_ones() -> None:
    assert parse_names("a, /b/Relu ,,c") == ["a", "/b/Relu", "c"]
    assert parse_names(None) is None


def test_counts_are_positive_whole_numbers() -> None:
    assert parse_counts("--batch", "1, 8,32") == [1, 8, 32]
    for text in ("", "0", "1,,2", "-1", "1.5", "²"):
        with pytest.raises(OptionError, match="--batch"):
            parse_counts("--batch", text)
