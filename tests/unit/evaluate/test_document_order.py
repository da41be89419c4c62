from __future__ import annotations

import asyncio
import random

import pytest

from longalign_ray.evaluate.document_order import by_document, do_by_document
from longalign_ray.evaluate.task import EvalCase


def case(name: str, document: str, num_tokens: int, shared_tokens: int = 0) -> EvalCase:
    return EvalCase(name, "t", "/x", {}, None, document, num_tokens, shared_tokens=shared_tokens)


def test_documents_stay_together_the_longest_first():
    cases = [case("1", "a", 10), case("2", "b", 50), case("3", "a", 90), case("4", "c", 70), case("5", "b", 60)]
    assert [[item.case_id for item in group] for group in by_document(cases)] == [["3", "1"], ["4"], ["5", "2"]]
    shared = [case("1", "a", 90, 10), case("2", "a", 89, 80), case("3", "a", 91, 40)]
    assert [item.case_id for item in by_document(shared)[0]] == ["2", "3", "1"]


def test_two_at_a_time_worked_by_hand():
    """Items with their tenths of a second."""
    groups = [[("a0", 5), ("a1", 1), ("a2", 1)], [("b0", 1), ("b1", 1)], [("c0", 1)]]
    began: list[str] = []

    async def do(job: tuple[str, int]) -> None:
        began.append(job[0])
        await asyncio.sleep(job[1] / 10)

    asyncio.run(do_by_document(groups, do, concurrency=2))
    # b's other question before c begins; a's when its first is answered.
    assert began == ["a0", "b0", "b1", "c0", "a1", "a2"]


@pytest.mark.parametrize("concurrency", [1, 3, 7, 100])
def test_all_are_done_once_and_the_first_of_a_document_before_its_others(concurrency: int):
    rng = random.Random(concurrency)
    groups = [[(number, place) for place in range(rng.randrange(5))] for number in range(30)]
    ended: list[tuple[int, int]] = []
    in_flight, most = 0, 0

    async def do(job: tuple[int, int]) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        assert job[1] == 0 or (job[0], 0) in ended
        await asyncio.sleep(rng.random() / 1000)
        in_flight -= 1
        ended.append(job)

    asyncio.run(do_by_document(groups, do, concurrency=concurrency))
    assert sorted(ended) == sorted(job for group in groups for job in group)
    assert most <= concurrency
    if concurrency <= 7:
        assert most == concurrency


def test_an_error_ends_the_whole():
    async def do(job: int) -> None:
        await asyncio.sleep(0)
        if job == 3:
            raise RuntimeError("disk full")

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        asyncio.run(do_by_document([[1, 2, 3], [4, 5]], do, concurrency=2))
    asyncio.run(do_by_document([], do, concurrency=2))
