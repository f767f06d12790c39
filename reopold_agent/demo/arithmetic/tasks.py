"""Generated problems of written arithmetic with exact answers; the splits share no problem.

There are three kinds: sums and differences of two three-digit numbers, and two digits times one.
Every problem has at least one carry (or borrow), so that forgetting the carries never gives the
answer. A task is a function of (seed, split, index), so a set needs no storage.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from typing_extensions import override

from reopold_agent.demo.base import GeneratedTasks
from reopold_agent.types import Task

Operation = Literal["+", "-", "x"]

HELD_OUT_SHARE: Final = 8
"""One problem in this many belongs to the held-out split."""

OPERATIONS: Final[tuple[Operation, ...]] = ("+", "-", "x")


@dataclass(frozen=True)
class Problem:
    """``first operation second``, with the larger number first in a difference and one digit second
    in a product."""

    first: int
    operation: Operation
    second: int

    @property
    def answer(self) -> int:
        """The exact result."""
        if self.operation == "+":
            return self.first + self.second
        if self.operation == "-":
            return self.first - self.second
        return self.first * self.second

    @property
    def question(self) -> str:
        """The problem in words."""
        return f"What is {self.first} {self.operation} {self.second}?"

    @property
    def has_carry(self) -> bool:
        """Whether any column carries to, or borrows from, the next."""
        if self.operation == "x":
            return self.first % 10 * self.second > 9
        sign = 1 if self.operation == "+" else -1
        columns = zip(digits(self.first)[:2], digits(self.second)[:2], strict=True)
        return any(not 0 <= one + sign * other <= 9 for one, other in columns)

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the eval split; its mirror image (b + a) does too."""
        operands = (self.first, self.second)
        if self.operation == "+":
            operands = (min(operands), max(operands))
        name = f"{operands[0]}{self.operation}{operands[1]}"
        return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def digits(number: int, count: int = 3) -> list[int]:
    """Returns the digits from the ones upwards."""
    return [number // 10**place % 10 for place in range(count)]


@dataclass(frozen=True)
class ArithmeticTasks(GeneratedTasks):
    """The tasks of a split, each made when it is read.

    Attributes:
        split: ``"train"`` or ``"eval"``.
        size: number of tasks.
        seed: of the tasks.
        operations: kinds of problems, drawn uniformly; repeat one to draw it more often.

    Raises:
        ValueError: an attribute is out of range.
    """

    operations: tuple[Operation, ...] = OPERATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.operations or set(self.operations) - set(OPERATIONS):
            raise ValueError(
                f"operations must be some of {', '.join(OPERATIONS)}, got {list(self.operations)}"
            )

    def problem(self, index: int) -> Problem:
        """Returns the problem at ``index``."""
        rng = self.rng(index)
        operation = self.operations[int(rng.integers(len(self.operations)))]
        while True:
            problem = _draw(rng, operation)
            if problem.has_carry and problem.held_out == (self.split == "eval"):
                return problem

    @override
    def make(self, index: int) -> Task:
        problem = self.problem(index)
        return Task(
            id=f"arithmetic-{self.split}-{self.seed}-{index}",
            question=problem.question,
            answers=(str(problem.answer),),
            metadata={"category": problem.operation},
        )


def _draw(rng: np.random.Generator, operation: Operation) -> Problem:
    if operation == "x":
        return Problem(int(rng.integers(12, 100)), "x", int(rng.integers(2, 10)))
    one, other = (int(v) for v in rng.integers(100, 1000, size=2))
    if operation == "-":
        # The result has three digits, so that every column is written.
        while abs(one - other) < 100:
            one, other = (int(v) for v in rng.integers(100, 1000, size=2))
        one, other = max(one, other), min(one, other)
    return Problem(one, operation, other)
