"""The policy's loss: against a loop in double precision, and against the gradient of what it stands for."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_decode.training.credit import credit
from hf_adaptive_decode.training.policy_loss import policy_loss

# --- against a loop ---------------------------------------------------------------------------------------------------


def looped(logits, action, advantage, reference, trajectories, decisions, entropy_coef, kl_coef):
    """The docstring's formula, one decision and one action at a time, and its gradient written out by hand."""
    loss, entropy, kl = 0.0, 0.0, 0.0
    gradient = torch.zeros_like(logits)
    for m, row in enumerate(logits.tolist()):
        weights = [math.exp(value - max(row)) for value in row]
        p = [weight / sum(weights) for weight in weights]
        others = [math.exp(value) for value in reference[m].tolist()]
        q = [other / sum(others) for other in others]
        loss -= math.log(p[action[m]]) * float(advantage[m]) / trajectories
        own_entropy = -sum(x * math.log(x) for x in p)
        own_kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        entropy += own_entropy / decisions
        kl += own_kl / decisions
        for a, x in enumerate(p):
            gradient[m, a] += (x - (a == action[m])) * float(advantage[m]) / trajectories
            gradient[m, a] += entropy_coef * x * (math.log(x) + own_entropy) / decisions
            gradient[m, a] += kl_coef * x * (math.log(x / q[a]) - own_kl) / decisions
    return loss - entropy_coef * entropy + kl_coef * kl, entropy, kl, gradient


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.01, 2.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_value_and_gradient_are_those_of_a_loop(rows, actions, seed, entropy_coef, kl_coef):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, reference, advantage = 2 * normal(rows, actions), normal(rows, actions), normal(rows)
    action = torch.randint(0, actions, (rows,), generator=generator)
    # Trajectories and decisions may be more than those at hand: dropped groups, and other processes.
    counts = {"trajectories": rows + 3.0, "decisions": rows + 0.5}
    logits.requires_grad_()
    how = {**counts, "entropy_coef": entropy_coef, "kl_coef": kl_coef}
    found = policy_loss(logits, action, advantage, reference=reference, **how)
    found.loss.backward()
    loss, entropy, kl, gradient = looped(logits.detach(), action.tolist(), advantage, reference, **how)
    assert (found.loss.item(), found.entropy, found.kl) == pytest.approx((loss, entropy, kl), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-12, atol=1e-12)


def test_without_a_reference_there_is_no_divergence_and_with_oneself_it_is_zero():
    logits = torch.randn(4, 3, dtype=torch.float64)
    given_ = {"action": torch.tensor([0, 1, 2, 0]), "advantage": torch.zeros(4), "trajectories": 4, "decisions": 4}
    assert policy_loss(logits, **given_, kl_coef=5.0).kl == 0.0
    assert policy_loss(logits, **given_, kl_coef=5.0, reference=logits).kl == pytest.approx(0.0, abs=1e-15)
    assert policy_loss(torch.zeros(4, 3), **given_).entropy == pytest.approx(math.log(3))


def test_each_term_pulls_where_its_name_says():
    given_ = {"action": torch.tensor([0]), "trajectories": 1, "decisions": 1}

    def step(logits, advantage, **how):
        logits = torch.tensor([logits], requires_grad=True)
        policy_loss(logits, advantage=torch.tensor([advantage]), **given_, **how).loss.backward()
        return -logits.grad[0]

    assert step([0.0, 0.0], 1.0)[0] > 0
    assert step([0.0, 0.0], -1.0)[0] < 0
    assert step([2.0, 0.0], 0.0, entropy_coef=1.0)[0] < 0
    assert step([2.0, 0.0], 0.0, kl_coef=1.0, reference=torch.tensor([[4.0, 0.0]]))[0] > 0


def test_actions_that_are_nearly_impossible_leave_the_gradient_finite():
    logits = torch.tensor([[0.0, -200.0], [90.0, -90.0]], requires_grad=True)
    how = {"trajectories": 2, "decisions": 2, "entropy_coef": 1.0, "kl_coef": 1.0, "reference": -logits.detach()}
    found = policy_loss(logits, torch.tensor([1, 0]), torch.tensor([1.0, -1.0]), **how)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(logits.grad).all()


# --- the estimate is of the right thing -------------------------------------------------------------------------------

# A language model of four tokens, the first of which ends the text; row v holds what follows v, row 0 the prompt.
TABLE = torch.tensor(
    [[0.1, 0.5, 0.25, 0.15], [0.3, 0.1, 0.2, 0.4], [0.25, 0.2, 0.35, 0.2], [0.6, 0.1, 0.1, 0.2]], dtype=torch.float64
)
TEMPERATURES = (0.0, 1.25)
STEPS = 2


def token_probabilities(token, action):
    """What follows `token` under an action."""
    if TEMPERATURES[action] == 0:
        return torch.nn.functional.one_hot(TABLE[token].argmax(), 4).double()
    return (TABLE[token].log() / TEMPERATURES[action]).softmax(-1)


def trajectories(decides_once):
    """Every possible course: its decisions (step, token seen, action), its tokens, and the base's part in its odds."""
    found = []

    def extend(decisions, tokens, odds):
        last = tokens[-1] if tokens else 0
        if len(tokens) == STEPS or (tokens and last == 0):
            found.append((tuple(decisions), tuple(tokens), odds))
            return
        held = decides_once and decisions
        for action in [decisions[0][2]] if held else range(len(TEMPERATURES)):
            chosen = decisions if held else [*decisions, (len(tokens), last, action)]
            for token, probability in enumerate(token_probabilities(last, action).tolist()):
                if probability > 0:
                    extend(chosen, [*tokens, token], odds * probability)

    extend([], [], 1.0)
    return found


def reward_of(tokens):
    """Depends on both tokens, and takes four values."""
    return float((tokens[0] in (1, 3)) + 0.5 * (len(tokens) == STEPS and tokens[1] == 2) - 0.25 * (tokens[0] == 2))


def odds_of(courses, policy):
    """Each course's probability, with the gradient of the policy's logits `[steps, tokens, actions]`."""
    log_p = policy.log_softmax(-1)
    own = [sum(log_p[decision] for decision in decisions) for decisions, _, _ in courses]
    return torch.stack(own).exp() * torch.tensor([odds for _, _, odds in courses], dtype=torch.float64)


def exact_gradient(courses, policy, aggregation, parallel):
    """autograd's, of the expected value of `parallel` independent courses, all of them counted."""
    drawn = 1 if aggregation == "mean" else parallel
    odds = odds_of(courses, policy)
    rewards = torch.tensor([reward_of(tokens) for _, tokens, _ in courses], dtype=torch.float64)
    sets = torch.tensor(list(itertools.product(range(len(courses)), repeat=drawn)))
    expected = (odds[sets].prod(dim=1) * rewards[sets].amax(dim=1)).sum()
    assert odds.sum().item() == pytest.approx(1.0, abs=1e-12)
    return torch.autograd.grad(expected, policy)[0]


def expected_gradient(courses, policy, aggregation, parallel, n):
    """What `policy_loss` brings on average over all groups of n courses, each as often as it occurs."""
    odds = odds_of(courses, policy.detach())
    groups = torch.tensor(list(itertools.product(range(len(courses)), repeat=n)))
    rewards = np.array([reward_of(tokens) for _, tokens, _ in courses])
    advantage = torch.from_numpy(credit(rewards[groups.numpy()], np.full(len(groups), parallel), aggregation))
    # The loss is linear in the advantages, so a group's odds may be multiplied into its own.
    weighted = advantage * odds[groups].prod(dim=1, keepdim=True)
    per_course = torch.zeros(len(courses), dtype=torch.float64).index_add(0, groups.flatten(), weighted.flatten())
    rows = [(decision, course) for course, (decisions, _, _) in enumerate(courses) for decision in decisions]
    steps, tokens, actions = zip(*[decision for decision, _ in rows], strict=True)
    loss = policy_loss(
        policy[list(steps), list(tokens)],
        torch.tensor(actions),
        per_course[[course for _, course in rows]],
        trajectories=n,
        decisions=len(rows),
    ).loss
    return -torch.autograd.grad(loss, policy)[0]


@pytest.mark.parametrize("decides_once", [False, True], ids=["token", "sequence"])
@pytest.mark.parametrize(
    ("aggregation", "parallel", "n"),
    [("mean", 1, 2), ("mean", 1, 3), ("pass@B", 1, 2), ("pass@B", 2, 2), ("pass@B", 2, 3), ("pass@B", 3, 3)],
)
def test_the_expected_gradient_is_the_gradient_of_the_expected_value(aggregation, parallel, n, decides_once):
    courses = trajectories(decides_once)
    generator = torch.Generator().manual_seed(3)
    policy = torch.randn(STEPS, 4, len(TEMPERATURES), generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = exact_gradient(courses, policy, aggregation, parallel)
    found = expected_gradient(courses, policy, aggregation, parallel, n)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_credit_for_one_sample_is_no_credit_for_two():
    # Were the two the same here, the test above would not tell them apart.
    courses = trajectories(decides_once=False)
    policy = torch.zeros(STEPS, 4, len(TEMPERATURES), dtype=torch.float64, requires_grad=True)
    one, two = (exact_gradient(courses, policy, "pass@B", k) for k in (1, 2))
    assert (one - two).abs().max() > 0.01
