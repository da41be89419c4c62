"""What all sections of a recipe have in common: the base class, and values that several of them take."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
KEY_PLACE = r"env:\w+|file:.+"
Style = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def key_place(name: str) -> AfterValidator:
    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(KEY_PLACE, value):  # which may be a key, so it is not repeated
            raise ValueError(f"{name} takes a place, env:NAME or file:PATH, and never a key itself")
        return value

    return AfterValidator(check)


def whole_or_range(name: str, value: Any, *, of: str) -> Any:
    """`value` if it is a number of at least 1, or [fewest, most]."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    if len(pair) != 2 or not whole or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"{name} = {value!r}: give a whole number of {of}, 1 or more, or two, [fewest, most]")
    return value
