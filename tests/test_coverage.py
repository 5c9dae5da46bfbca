"""How often the 95 % intervals hold the truth, where the truth is known."""

import numpy as np
import pytest
from scipy.special import ndtri

from helpers.grade_metrics import _auc
from helpers.metrics import cascade_cut, measured, pearson, ppi_mean

pytestmark = pytest.mark.slow

DRAWS = 500
# The rows of each document, as in the notebooks.
THREE, EIGHT, NINE = [23, 23, 23], [8, 8, 8, 8, 8, 7, 7, 7], [9] * 9


def documents(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def normal(rng, document, icc):
    """Standard normal values whose correlation within a document is `icc`."""
    shared = rng.normal(size=document.max() + 1)[document]
    return np.sqrt(icc) * shared + np.sqrt(1 - icc) * rng.normal(size=len(document))


def drawn(rng, document, icc, *shares):
    """0, 1, ... with these probabilities; their intraclass correlation is `icc`."""
    p = np.tile(shares, (document.max() + 1, 1))
    if icc:
        p = np.array([rng.dirichlet(np.multiply(shares, (1 - icc) / icc)) for _ in p])
    return (rng.random(len(document))[:, None] > p.cumsum(axis=1)[document, :-1]).sum(axis=1)


def correlation(rng, document, icc):
    x = normal(rng, document, icc)
    y = 0.85 * x + np.sqrt(1 - 0.85**2) * normal(rng, document, icc)
    return "correlation", 0.85, lambda at: pearson(x[at], y[at])


def agreement(share):
    def draw(rng, document, icc):
        agrees = drawn(rng, document, icc, 1 - share, share)
        return "agreement_overall", share, lambda at: agrees[at].mean()

    return draw


def auc(rng, document, icc):
    truth = drawn(rng, document, icc, 0.47, 0.53) == 1
    p = np.sqrt(2) * ndtri(0.82) * truth + normal(rng, document, icc)
    return "auc", 0.82, lambda at: np.reshape(_auc(truth[at], p[at]), (2, 1))


def difference(rng, document, icc):
    """Of the agreement of two judges: both or neither agree, only one, only the other."""
    judged = drawn(rng, document, icc, 0.6, 0.27, 0.13)
    return "difference", 0.14, lambda at: (judged[at] == 1).mean() - (judged[at] == 2).mean()


SITUATIONS = [
    (correlation, EIGHT),
    (correlation, [2] * 8),  # the rows of one generator
    (agreement(0.64), THREE),
    (agreement(0.8), NINE),
    (agreement(0.96), NINE),  # often all rows agree
    (auc, NINE),
    (difference, THREE),
    (difference, EIGHT),
]


@pytest.mark.parametrize("icc", [0, 0.05, 0.15])
@pytest.mark.parametrize("draw, sizes", SITUATIONS)
def test_an_interval_holds_the_truth_as_often_as_it_says(draw, sizes, icc):
    rng, document, held = np.random.default_rng(0), documents(sizes), 0
    rows = [{"document": int(one)} for one in document]
    for _ in range(DRAWS):
        name, truth, statistic = draw(rng, document, icc)
        cells = measured(rows, (name,), statistic)
        held += cells[f"{name}_low"] <= truth <= cells[f"{name}_high"]
    assert held / DRAWS >= 0.93


@pytest.mark.parametrize("by_document", [False, True])
def test_the_interval_of_ppi_holds_the_mean_and_is_shorter(by_document):
    """60 labels of 2,060 rows; the student's correlation with the labels is 0.8."""
    rng, held, saved = np.random.default_rng(2), 0, []
    document = np.arange(2060)
    if by_document:
        document = np.append(documents([5] * 12), np.arange(2000) % 100)
    for _ in range(DRAWS):
        y = normal(rng, document, 0.1 * by_document)
        p = 0.8 * y + 0.6 * rng.normal(size=2060) + 1  # it is wrong by 1 on average
        found = ppi_mean(y[:60], p[:60], p[60:], document if by_document else None)
        held += found["low"] <= 0 <= found["high"]
        saved.append(found["saved"])
    assert held / DRAWS >= 0.93 and 0.5 < np.mean(saved) < 0.7


def test_the_cut_of_a_cascade_keeps_its_promise():
    """The student is wrong with the probability (1 - confidence) / 2, on 200 rows held out."""
    rng, kept, cuts = np.random.default_rng(3), 0, []
    for _ in range(DRAWS):
        confidence = rng.random(200)
        wrong = rng.random(200) < (1 - confidence) / 2
        cuts.append(cascade_cut(np.zeros(200), wrong, confidence))
        kept += 1 - (1 - min(cuts[-1], 1)) ** 2 / 4 >= 0.95  # the agreement on all other rows
    assert kept / DRAWS >= 0.87 and np.mean(cuts) < 0.75  # the lowest possible is 0.55
