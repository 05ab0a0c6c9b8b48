"""A starting server puts off what it does not need yet."""

import sys

import pydantic
import pytest
from pydantic import BaseModel, ValidationError

from modules.start_time import models_built_at_first_use, without_pydantic_v1


def test_models_declared_within_are_built_at_first_use_and_then_check_as_ever() -> None:
    with models_built_at_first_use():

        class Late(BaseModel):
            count: int

    class Early(BaseModel):
        count: int

    assert not Late.__pydantic_complete__
    assert Early.__pydantic_complete__
    assert Late(count=3).count == 3
    with pytest.raises(ValidationError):
        Late.model_validate({"count": "many"})


def test_an_error_within_does_not_leave_later_models_unbuilt() -> None:
    with pytest.raises(ZeroDivisionError), models_built_at_first_use():
        _ = 1 // 0

    class Early(BaseModel):
        count: int

    assert Early.__pydantic_complete__


def test_pydantic_v1_is_out_of_reach_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pydantic.v1")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pydantic, "v1", raising=False)
    with without_pydantic_v1(), pytest.raises(ImportError):
        from pydantic import v1  # noqa: F401
    assert "pydantic.v1" not in sys.modules
