"""PPO's equations against numbers worked out by hand and naive twins."""

import math

import pytest
import torch

from hf_cnllm.training.ppo_equations import (
    RunningMoments,
    adapted_kl_coefficient,
    advantages_and_returns,
    policy_losses,
    response_mask,
    rise_p_value,
    token_entropy,
    token_log_probs,
    token_rewards,
    value_losses,
)

MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]])


def test_a_response_ends_with_its_first_end_token():
    tokens = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [9, 5, 5, 5], [5, 5, 5, 2]])
    mask, has_end = response_mask(tokens, [2, 9])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert has_end.tolist() == [True, False, True, True]  # the second was cut


def test_the_kl_penalty_is_a_token_s_and_the_score_the_last_token_s():
    log_ratio = torch.tensor([[0.5, -1.0, 0.0, 9.0], [0.0, 0.0, 0.0, 2.0]])  # 9 is behind the end
    rewards = token_rewards(torch.tensor([3.0, -1.0]), log_ratio, MASK, kl_coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 3.0, 0.0], [0.0, 0.0, 0.0, -1.2]]))


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.2, 0.4, 7.0]])  # 7 is behind the end
    advantages, returns = advantages_and_returns(rewards, values, MASK[:1], gamma=0.9, gae_lambda=0.5)
    # δ: 0.9·0.2 − 0.5, 0.9·0.4 − 0.2, 1 − 0.4; γλ = 0.45
    expected = torch.tensor([[-0.32 + 0.45 * (0.16 + 0.45 * 0.6), 0.16 + 0.45 * 0.6, 0.6, 0.0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + torch.tensor([[0.5, 0.2, 0.4, 0.0]]))


def naive_advantages(rewards, values, length, gamma, gae_lambda):
    """Σ_l (γλ)^l δ_t+l, token by token."""
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_advantages_and_their_naive_twin(gamma, gae_lambda):
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 4, 7]
    rewards, values = (torch.randn(3, 7, generator=generator) for _ in range(2))
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).float()
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, gae_lambda)
    for row, length in enumerate(lengths):
        naive = naive_advantages(rewards[row].tolist(), values[row].tolist(), length, gamma, gae_lambda)
        torch.testing.assert_close(advantages[row, :length], torch.tensor(naive))
        torch.testing.assert_close(returns[row, :length], torch.tensor(naive) + values[row, :length])
        assert not advantages[row, length:].any() and not returns[row, length:].any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),
        (0.5, 2.0, -1.0, False),
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),
    ],
)
def test_policy_losses(ratio, advantage, loss, is_clipped):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    losses, clipped = policy_losses(log_prob, torch.zeros(1, 1), torch.full((1, 1), advantage), clip_range=0.2)
    assert losses.item() == pytest.approx(loss) and clipped.item() == is_clipped
    losses.sum().backward()
    assert log_prob.grad.item() == pytest.approx(0.0 if is_clipped else -ratio * advantage)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(1.1, 1.0, 2.0, 0.405), (1.5, 1.0, 2.0, 0.36125), (0.5, 1.0, 2.0, 1.125), (1.5, 1.0, 1.2, 0.045)],
)
def test_value_losses(value, old, target, loss):
    found = value_losses(*(torch.tensor([[number]]) for number in (value, old, target)), clip_range=0.15)
    assert found.item() == pytest.approx(loss)


def test_log_probabilities_and_entropy():
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0]]])
    torch.testing.assert_close(token_log_probs(logits, torch.tensor([[1, 0]])).exp(), torch.tensor([[0.75, 0.5]]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(token_entropy(logits), torch.tensor([[entropy, math.log(2.0)]]))


def test_running_moments_are_those_of_all_that_was_seen():
    values, moments = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3 + 7, RunningMoments()
    for part in values.split([1, 9, 30]):
        moments.update(part)
    expected = (values - values.mean()) / values.std(correction=0)
    torch.testing.assert_close(moments.normalize(values), expected, rtol=1e-5, atol=1e-6)


def test_the_weight_of_the_kl_penalty_follows_the_kl():
    assert adapted_kl_coefficient(0.1, kl=6.6, target=6.0) == pytest.approx(0.101)
    assert adapted_kl_coefficient(0.1, kl=60.0, target=6.0) == pytest.approx(0.102)
    assert adapted_kl_coefficient(0.1, kl=0.0, target=6.0) == pytest.approx(0.098)


def test_a_rise_is_told_from_noise():
    noise = torch.randn(80, generator=torch.Generator().manual_seed(0)).tolist()
    assert rise_p_value(noise) > 0.05
    assert rise_p_value([value + step / 20 for step, value in enumerate(noise)]) < 1e-3
    assert rise_p_value([-value for value in range(80)]) > 0.99
    assert rise_p_value([1.0, 1.0]) == rise_p_value([1.0] * 80) == 1.0
