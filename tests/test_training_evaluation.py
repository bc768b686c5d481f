"""Loss, perplexity and bits per byte, against a model whose probabilities are known."""
import math

import numpy as np
import pytest

import tensorgrad as tg
from gpt.text import IGNORE_INDEX
from gpt.training import Evaluation, evaluate, validation_batches
from tensorgrad import nn
from tensorgrad.nn import functional as F


class Bigram(nn.Module):
    """Predicts from the current token only: row i of `table` holds the logits after token i."""

    def __init__(self, table):
        super().__init__()
        self.table = tg.tensor(table)
        self.modes = []

    def forward(self, idx, targets):
        self.modes.append(self.training)
        logits = self.table[idx]  # (B, T, V)
        return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


@pytest.fixture
def table():
    return np.random.default_rng(0).normal(size=(5, 5))


def nats(table, tokens):
    """-log p of each token but the first."""
    logs = table - np.log(np.exp(table).sum(1, keepdims=True))
    return -logs[tokens[:-1], tokens[1:]]


def test_the_whole_text_is_every_target_once(table):
    tokens = np.random.default_rng(1).integers(5, size=1000).astype(np.uint16)  # 1000 = 31 * 32 + 8: an uneven end
    sizes = np.array([1, 1, 2, 3, 1])
    model = Bigram(table)
    result = evaluate(model, validation_batches(tokens, block_size=32, batch_size=7), sizes)
    expected = nats(table, tokens)
    assert result.tokens == 999
    assert result.loss == pytest.approx(expected.mean(), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / sizes[tokens[1:]].sum(), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-12)
    assert result.mean_probability == pytest.approx((np.exp(-expected) ** (1 / 999)).prod(), rel=1e-9)


def test_special_tokens_count_for_the_loss_but_not_for_bits_per_byte(table):
    tokens = np.random.default_rng(1).integers(5, size=300).astype(np.uint16)
    sizes = np.array([1, 2, 0, 3, 1])  # 2 is special
    result = evaluate(Bigram(table), validation_batches(tokens, block_size=16, batch_size=3), sizes)
    expected, text = nats(table, tokens), tokens[1:] != 2
    assert result.loss == pytest.approx(expected.mean(), rel=1e-12)
    bits, size = expected[text].sum() / math.log(2), sizes[tokens[1:]].sum()
    assert result.bits_per_byte == pytest.approx(bits / size, rel=1e-12)


def test_ignored_targets_do_not_count(table):
    x = np.array([[0, 1, 2], [3, 4, 0]])
    y = np.array([[1, IGNORE_INDEX, 0], [IGNORE_INDEX, 2, IGNORE_INDEX]])
    result = evaluate(Bigram(table), [(x, y)], np.ones(5, int))
    expected = [nats(table, np.array(pair))[0] for pair in ((0, 1), (2, 0), (4, 2))]
    assert result.tokens == 3 and result.loss == pytest.approx(np.mean(expected), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(np.sum(expected) / math.log(2) / 3, rel=1e-12)


def test_batches_weigh_by_their_targets(table):
    full = (np.array([[0, 1, 2, 3]]), np.array([[1, 2, 3, 4]]))
    nearly_empty = (np.array([[4, 4, 4, 4]]), np.array([[0] + 3 * [IGNORE_INDEX]]))
    result = evaluate(Bigram(table), [full, nearly_empty], np.ones(5, int))
    expected = [*nats(table, np.arange(5)), nats(table, np.array([4, 0]))[0]]
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-12)


def test_sampled_batches_are_the_same_each_time_and_as_many_as_asked():
    tokens = np.arange(500, dtype=np.uint16)
    one, two = (list(validation_batches(tokens, 8, 4, iters=3, seed=5)) for _ in range(2))
    assert len(one) == 3
    for (x, y), (x_again, _) in zip(one, two, strict=True):
        assert (x == x_again).all() and (y == x + 1).all()
    other = next(validation_batches(tokens, 8, 4, iters=3, seed=6))
    assert (other[0] != one[0][0]).any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_evaluation_mode_and_then_as_before(table, training):
    model = Bigram(table).train(training)
    evaluate(model, validation_batches(np.zeros(20, np.uint16), 4, 2), np.ones(5, int))
    assert not any(model.modes) and model.training is training
    with pytest.raises(IndexError):
        evaluate(model, [(np.zeros((1, 1), int), np.full((1, 1), 77))], np.ones(5, int))
    assert model.training is training


def test_an_enormous_loss_is_no_overflow():
    assert Evaluation(loss=1e4, bits_per_byte=1.0, tokens=1).perplexity == math.inf
