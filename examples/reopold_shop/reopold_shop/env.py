"""A shop: the tools change the state of the episode, and the state decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from reopold_agent.envs.base import ToolChoice, ToolEnv
from reopold_agent.errors import ToolError
from reopold_agent.tools import EpisodeState, ToolResult
from reopold_agent.types import IMAGE_MARK, Task
from reopold_shop.tasks import ShopTasks, draw

LOOK_COST = 0.01
Number = Annotated[int, "The item's number."]


def search(
    state: EpisodeState, kind: Annotated[Literal["ball", "box", "tent"], "What to list."]
) -> ToolResult:
    """List all items of one kind, with their numbers and prices."""
    stock = enumerate(state.task.metadata["stock"], 1)
    found = [f"item {n}, {item['price']} coins" for n, item in stock if item["kind"] == kind]
    return ToolResult("\n".join(found) or f"This shop has no {kind}.")


def look(state: EpisodeState, item: Number) -> ToolResult:
    """Look at an item. Each look costs a little."""
    picture = draw(_item(state.task, item))
    return ToolResult(f"Item {item}:\n{IMAGE_MARK}", (picture,), reward=-LOOK_COST)


def put(state: EpisodeState, item: Number) -> ToolResult:
    """Put an item into the cart."""
    _item(state.task, item)
    if item in state.extra["cart"]:
        raise ToolError(f"Item {item} is in the cart already.")
    state.extra["cart"].append(item)
    return ToolResult(f"In the cart: {state.extra['cart']}.")


def take(state: EpisodeState, item: Number) -> ToolResult:
    """Take an item out of the cart again."""
    if item not in state.extra["cart"]:
        raise ToolError(f"Item {item} is not in the cart.")
    state.extra["cart"].remove(item)
    return ToolResult(f"In the cart: {state.extra['cart']}.")


def buy(state: EpisodeState) -> ToolResult:
    """Buy what is in the cart and leave the shop."""
    if not state.extra["cart"]:
        raise ToolError("The cart is empty.")
    state.extra["bought"] = state.extra["cart"]
    return ToolResult(f"You have bought: {state.extra['bought']}.", done=True)


class ShopEnv(ToolEnv):
    """``reopold_shop/Shop-v0``: buy the one item that a task describes, within its budget."""

    default_tools: ClassVar[Sequence[ToolChoice]] = (search, look, put, take, buy)
    default_guideline: ClassVar[str] = "Colour and pattern are only in the pictures: look first."

    def load_tasks(self, split: str) -> ShopTasks:
        """Returns the tasks of a split: "train" or "eval"."""
        return ShopTasks(split)

    def begin(self, task: Task, state: EpisodeState) -> None:
        """Starts with an empty cart. What tools change is in ``extra``, as JSON values."""
        state.extra.update(cart=[], bought=[])

    def reward(self, task: Task, answer: str, state: EpisodeState) -> tuple[float, bool]:
        """Returns 1 and success if the right item was bought, however the episode ended."""
        right = _fits(task, state.extra["bought"])
        return float(right), right

    def truncation_reward(self, task: Task, state: EpisodeState) -> tuple[float, bool]:
        """Returns a part of the reward if only the purchase was missing; that is no success."""
        return 0.2 * _fits(task, state.extra["cart"]), False


def _item(task: Task, number: int) -> dict[str, Any]:
    stock: list[dict[str, Any]] = task.metadata["stock"]
    if not 1 <= number <= len(stock):
        raise ToolError(f"There is no item {number}; the items are numbered 1 to {len(stock)}.")
    return stock[number - 1]


def _fits(task: Task, numbers: Sequence[int]) -> bool:
    """Whether these items are what the task asks for: one, as described, within the budget."""
    items = [_item(task, number) for number in numbers]
    asked, budget = task.metadata["asked"].items(), task.metadata["budget"]
    return len(items) == 1 and asked <= items[0].items() and items[0]["price"] <= budget
