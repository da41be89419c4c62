from __future__ import annotations

import pickle

import pytest

from longalign_ray import errors
from longalign_ray.errors import ConfigError, LongAlignError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LongAlignError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[LongAlignError]) -> None:
    """Ray sends errors between processes."""
    error = pickle.loads(pickle.dumps(kind("place = value: rule; remedy")))
    assert type(error) is kind
    assert str(error) == "place = value: rule; remedy"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_says_when_it_is_raised_and_has_an_exit_code(kind: type[LongAlignError]) -> None:
    assert kind.__doc__
    assert kind.exit_code == (2 if kind is ConfigError else 1)


def test_all_errors_were_found() -> None:
    assert len(ALL) >= 9
