"""Works in steps give what each gives alone, in their order, and take each step together."""

from __future__ import annotations

import pytest

from data.text.steps import Steps, all_steps, take_together


def work(name: str, count: int, taken: list[str]) -> Steps[str]:
    for step in range(count):
        taken.append(f"{name}{step}")
        yield
    return name * 2


def test_each_step_is_taken_together() -> None:
    taken: list[str] = []
    assert take_together(work(name, count, taken) for name, count in (("a", 2), ("b", 0), ("c", 3))) == ["aa", "bb", "cc"]
    assert taken == ["a0", "c0", "a1", "c1", "c2"]
    assert take_together([]) == []
    assert all_steps(work("d", 4, taken)) == "dd" and taken[-4:] == ["d0", "d1", "d2", "d3"]


def test_what_a_work_raises_is_raised() -> None:
    def failing() -> Steps[str]:
        yield
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        all_steps(failing())
    with pytest.raises(ValueError, match="no"):
        take_together([work("a", 3, []), failing()])
