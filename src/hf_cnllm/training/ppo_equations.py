"""The equations of proximal policy optimization, each beside its source.

Shapes: N responses of up to R tokens; `mask` [N, R] is 1 on a response, its end token included, and 0 behind it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """[N, R] rewards: r_t = −β log(π(y_t) / π_ref(y_t)), plus the response's score [N] at its last token (arXiv 1909.08593,
    equation 2; 2203.02155, equation 2)."""
    last = mask.sum(1, keepdim=True).long() - 1
    return (-kl_coefficient * log_ratio * mask).scatter_add(1, last, scores[:, None])


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, equations 11 and 16); behind a response's last token all is 0."""
    values = values * mask
    advantages, following = torch.zeros_like(values), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # δ_t = r_t + γ V(s_t+1) − V(s_t)
        following = (delta + gamma * gae_lambda * following) * mask[:, t]  # A_t = δ_t + γλ A_t+1
        advantages[:, t] = following
    return advantages, advantages + values  # R_t = A_t + V(s_t)


def policy_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """[N, R] losses −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = π / π_old (arXiv 1707.06347, equation 7), and where the
    second is the smaller."""
    ratio = (log_probs - old_log_probs).exp()
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """[N, R] losses ½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²), as in OpenAI's baselines (ppo2)."""
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π(token) [N, R] under logits [N, R, vocabulary]."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """−Σ π log π = log Z − Σ π x, [N, R], of logits x [N, R, vocabulary]."""
    logits = logits.float()
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def response_mask(tokens: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What of `tokens` [N, R] are responses, the first end token included (float), and which of them have an end [N]."""
    is_end = torch.isin(tokens, torch.tensor(end_ids, device=tokens.device))
    ends_before = is_end.long().cumsum(1) - is_end.long()
    return (ends_before == 0).float(), is_end.any(1)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float) -> float:
    """The weight of the KL penalty after a step, up where the KL is above its target: β (1 + K_β clip(KL / target − 1, ±0.2))
    with K_β = 0.1 (arXiv 1909.08593, section 2.2)."""
    return coefficient * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


class RunningMoments:
    """Mean and deviation of all that it has seen (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        values = values.double()
        count, mean = len(values), values.mean().item()
        total, gap = self.count + count, mean - self.mean
        self.squares += (values - mean).square().sum().item() + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def normalize(self, values: Tensor) -> Tensor:
        return (values - self.mean) / (math.sqrt(self.squares / self.count) + 1e-8)


def rise_of(rewards: Sequence[float]) -> dict[str, float | None]:
    """For a summary: the mean reward of the first and of the last quarter of the steps, and `rise_p_value`."""
    quarter = max(len(rewards) // 4, 1)
    return {
        "reward_of_first_quarter": sum(rewards[:quarter]) / quarter if rewards else None,
        "reward_of_last_quarter": sum(rewards[-quarter:]) / quarter if rewards else None,
        "reward_rise_p_value": rise_p_value(rewards),
    }


def rise_p_value(values: Sequence[float], draws: int = 10_000) -> float:
    """One-sided permutation test of whether the last quarter of a curve is above its first: how often a random division of the
    two shows at least that difference of means."""
    quarter = len(values) // 4
    if quarter == 0:
        return 1.0
    both = torch.tensor([*values[:quarter], *values[-quarter:]], dtype=torch.float64)
    order = torch.rand(draws, 2 * quarter, generator=torch.Generator().manual_seed(0)).argsort(1)
    sums = both[order[:, quarter:]].sum(1)
    return (1 + (sums >= both[quarter:].sum() - 1e-12).sum().item()) / (1 + draws)
