"""The head of verl's worker: the model's output embedding gives log-probs in place of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reopold_agent.errors import ModelError
from reopold_agent.objectives.chunks import BANNED
from reopold_agent.train.verl.head import TokenHead, Wanted, before_tokens

BANNED_IDS = [2, 3, 405]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def plain(model: Any, ids_BT: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by the definition, from all logits."""
    logits = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
    logits[:, BANNED_IDS] = BANNED
    logp_NV = logits[wanted.states_N].log_softmax(dim=-1)
    chosen = logp_NV.gather(1, wanted.targets_N[:, None])[:, 0]
    return chosen, -(logp_NV.exp() * logp_NV).sum(dim=-1)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_plain_path_and_holds_no_logits(
    make_model: Callable[..., Any], tied: bool
) -> None:
    model = make_model(seed=4)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    rows, length = 3, 200
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(4, 400, (rows, length), generator=generator)
    # Most tokens are the prompt's or a tool's.
    masks = [torch.rand(120, generator=generator) < 0.7 for _ in range(rows)]
    states = before_tokens([length, 2 * length, 3 * length], masks)
    assert len(states) < ids_BT.numel() / 2
    wanted = Wanted(states, ids_BT.flatten()[states + 1], entropy=True)
    weights_N = torch.randn(len(states), generator=generator)

    def gradients(logp_N: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logp_N * weights_N).sum().backward()
        named = model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    with Largest() as whole:
        logp_N, entropy_N = plain(model, ids_BT, wanted)
        expected = gradients(logp_N)
    vocabulary = model.lm_head.weight.shape[0]
    assert whole.elements >= ids_BT.numel() * vocabulary, "the measure sees logits"

    head = TokenHead(model.lm_head, BANNED_IDS, slice_elements=4096)
    head.wanted = wanted
    with Largest() as chunked:
        found_N, found_entropy_N = model(input_ids=ids_BT, use_cache=False).logits
        found = gradients(found_N)
    # What remains is the model's own: weights and states.
    assert chunked.elements < ids_BT.numel() * vocabulary / 4
    torch.testing.assert_close(found_N, logp_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_entropy_N, entropy_N, atol=1e-5, rtol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * largest, rtol=0, msg=name)


def test_a_pass_without_tokens_reaches_all_weights(make_model: Callable[..., Any]) -> None:
    """A micro-batch of verl's filler rows must take part in FSDP's collectives."""
    model = make_model(seed=4)
    head = TokenHead(model.lm_head, BANNED_IDS)
    none = torch.zeros(0, dtype=torch.int64)
    head.wanted = Wanted(none, none, entropy=True)
    logp_N, _ = model(input_ids=torch.arange(9)[None], use_cache=False).logits
    logp_N.sum().backward()
    assert all(
        p.grad is not None and not p.grad.any() for p in model.model.language_model.parameters()
    )


def test_a_state_stands_before_its_token() -> None:
    # Two sequences of 5 and 4 tokens whose responses are 3 and 2 long.
    masks = [torch.tensor([1, 0, 1]), torch.tensor([0, 1])]
    assert before_tokens([5, 9], masks).tolist() == [1, 3, 7]
    # The same, padded to rows of 6.
    assert before_tokens([5, 10], masks).tolist() == [1, 3, 8]


def test_what_it_cannot_do_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model(seed=4)
    TokenHead(model.lm_head, BANNED_IDS)
    with pytest.raises(RuntimeError, match="whose log-probs"):
        model(input_ids=torch.arange(9)[None])
    with pytest.raises(ModelError, match="has a bias"):
        TokenHead(torch.nn.Linear(4, 5), BANNED_IDS)
