"""The order of requests about documents: one question of a document alone, which leaves its prompt in the engine's
cache, then its other questions together; the longest documents first, so that no straggler is left at the end.

    document A  |first|other|                    time ->
                      |other|
    document B  |first      |other|
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from longalign_ray.evaluate.task import EvalCase

T = TypeVar("T")


def by_document(cases: Iterable[EvalCase]) -> list[list[EvalCase]]:
    """The cases of each document, the longest document first.

    Within one the case comes first that shares most of its prompt with others, then the longest.
    """
    groups: dict[str, list[EvalCase]] = {}
    for case in cases:
        groups.setdefault(case.document, []).append(case)
    ordered = []
    for group in groups.values():
        longest_first = sorted(group, key=lambda case: -case.num_tokens)
        first = max(longest_first, key=lambda case: case.shared_tokens)
        ordered.append([first, *(case for case in longest_first if case is not first)])
    return sorted(ordered, key=lambda group: -max(case.num_tokens for case in group))


async def do_by_document(
    groups: Sequence[Sequence[T]], do: Callable[[T], Awaitable[None]], *, concurrency: int
) -> None:
    """Does all items of all groups, at most `concurrency` at a time; the first of a group before its others begin.

    Groups begin in their order, and others of a group that has begun go before groups that have not: what is cached is
    used before it is thrown out. An exception of `do` ends the whole, and is raised in an ExceptionGroup.
    """
    # What may be done now: (0, group, item) for others, (1, group, 0) for first items.
    ready: asyncio.PriorityQueue[tuple[int, int, int]] = asyncio.PriorityQueue()
    for number, group in enumerate(groups):
        if group:
            ready.put_nowait((1, number, 0))

    async def worker() -> None:
        while True:
            _, number, place = await ready.get()
            group = groups[number]
            await do(group[place])
            for other in range(1, len(group) if place == 0 else 0):
                ready.put_nowait((0, number, other))
            ready.task_done()

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(worker()) for _ in range(min(concurrency, sum(map(len, groups))))]
        await ready.join()
        for one in workers:
            one.cancel()
