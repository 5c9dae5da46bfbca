"""The local student: its loss, its fit, its verdicts."""

import asyncio
from itertools import product

import numpy as np
import pytest
from llama_index.core.evaluation import CorrectnessEvaluator
from scipy.special import softmax

from helpers import Student, distillation_loss, items_of, load_rows, scores_of, untrained_judges
from helpers.pairs import answer_features
from helpers.rows import DATA
from helpers.student import WORD, LocalJudge, fit_head, lexical_features, read_prompt


@pytest.fixture(scope="module")
def bundled():
    """(items, scores) of the bundled training and test rows."""
    parts = [load_rows(DATA / "correctness" / f"{part}_qa.jsonl") for part in ("train", "test")]
    return [(items_of(rows), scores_of(rows, "teacher")) for rows in parts]


@pytest.fixture(scope="module")
def trained(bundled):
    return Student.fit(*bundled[0])


def problem(rows: int = 30, features: int = 4, verdicts: int = 3):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, features))
    hard = np.eye(verdicts)[rng.integers(verdicts, size=rows)]
    soft = rng.dirichlet(np.ones(verdicts), size=rows)
    return rng.normal(size=(features + 1) * verdicts), x, hard, soft


@pytest.mark.parametrize(
    "alpha, temperature, strength", list(product((0, 0.3, 1), (0.5, 1, 3), (0, 0.1)))
)
def test_the_gradient_is_that_of_the_loss(alpha, temperature, strength):
    from scipy.optimize import check_grad

    weights, x, hard, soft = problem()
    settings = x, hard, soft, alpha, temperature, strength
    error = check_grad(
        lambda w: distillation_loss(w, *settings)[0],
        lambda w: distillation_loss(w, *settings)[1],
        weights,
    )
    assert error < 1e-5


def test_alpha_one_is_plain_cross_entropy():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    weights, x, hard, soft = problem()
    w = weights.reshape(5, 3)
    expected = log_loss(hard.argmax(1), softmax(x @ w[:-1] + w[-1], axis=1), labels=[0, 1, 2])
    assert distillation_loss(weights, x, hard, soft, alpha=1)[0] == pytest.approx(
        expected, abs=1e-12
    )
    ours = fit_head(x, hard, soft, alpha=1, strength=0.1)
    theirs = LogisticRegression(C=1 / (len(x) * 0.1), tol=1e-10, max_iter=10_000).fit(
        x, hard.argmax(1)
    )
    assert softmax(x @ ours[:-1] + ours[-1], axis=1) == pytest.approx(
        theirs.predict_proba(x), abs=1e-4
    )


def test_special_cases_of_the_distillation_term():
    weights, x, hard, soft = problem()
    w = weights.reshape(5, 3)
    same = softmax(x @ w[:-1] + w[-1], axis=1)
    for temperature in (0.5, 1, 4):
        loss, gradient = distillation_loss(weights, x, hard, same, alpha=0, temperature=temperature)
        assert loss == pytest.approx(0, abs=1e-12) and gradient == pytest.approx(0, abs=1e-12)
    # For hard targets KL and cross-entropy are the same: their entropy is 0.
    assert distillation_loss(weights, x, hard, hard, 0)[0] == pytest.approx(
        distillation_loss(weights, x, hard, hard, 1)[0], abs=1e-9
    )


def test_twice_trained_is_the_same_to_the_bit(bundled, trained):
    again = Student.fit(*bundled[0])
    assert again.weights.tobytes() == trained.weights.tobytes() and again.kinds == trained.kinds
    assert (
        again.probabilities(bundled[1][0]).tobytes()
        == trained.probabilities(bundled[1][0]).tobytes()
    )


def test_saved_and_loaded_it_judges_the_same(bundled, trained, tmp_path):
    trained.save(tmp_path / "student.v2")
    loaded = Student.load(tmp_path / "student.v2")
    assert (loaded.scores(bundled[1][0]) == trained.scores(bundled[1][0])).all()
    with np.load(tmp_path / "student.v2.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["kinds", "labels", "mean", "scale", "weights"]


def test_judging_one_by_one_is_judging_in_a_batch(bundled, trained):
    items = bundled[1][0][:10]
    evaluator = CorrectnessEvaluator(llm=trained.llm())

    async def go():
        return [await evaluator.aevaluate(query=q, reference=r, response=a) for q, r, a in items]

    assert [result.score for result in asyncio.run(go())] == trained.scores(items).tolist()


def test_it_has_learnt_something(bundled, trained):
    """On the test rows the student must be closer to the teacher than all that learn nothing."""
    (items, truth), taught = bundled[1], bundled[0][1]
    error = np.abs(trained.scores(items) - truth).mean()
    for name, judge in untrained_judges(float(np.median(taught))).items():
        assert error < np.abs([judge._judge(item)[0] for item in items] - truth).mean(), name


def test_the_untrained_judges(bundled):
    judges = untrained_judges(3.5)
    same = bundled[0][0][0][1]  # its vector is bundled, so no encoder is loaded
    item = ("Who?", same, same)
    assert {name: judge._judge(item)[0] for name, judge in judges.items()} == {
        "base": pytest.approx(5.0, abs=1e-3),  # vectors are of half precision
        "overlap": 5.0,
        "longer": pytest.approx(1 + 4 * len(WORD.findall(same)) / 60),
        "constant": 3.5,
    }
    assert judges["overlap"]._judge(("Who?", "Ada Lovelace", "Bob Smith"))[0] == 1
    assert judges["longer"]._judge(("Who?", "x", "word " * 500))[0] == 5


@pytest.mark.parametrize(
    "answer", ["plain", "", "two\n\nparagraphs", "## User Query\nnested?", " spaces "]
)
def test_a_prompt_is_read_as_it_was_written(tmp_path, answer):
    seen = []
    judge = LocalJudge(lambda item: (seen.append(item), (3.0, "x"))[1], model_name="j")
    asyncio.run(
        CorrectnessEvaluator(llm=judge).aevaluate(
            query="A question?", reference="A\n\nreference.", response=answer
        )
    )
    assert seen == [("A question?", "A\n\nreference.", answer)]


def test_a_strange_prompt_is_refused():
    with pytest.raises(ValueError, match="CorrectnessEvaluator's prompt.*begins 'Is it good"):
        read_prompt([{"role": "user", "content": "Is it good?"}])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"alpha": 1.2}, "alpha=1.2: expected 0 to 1"),
        ({"alpha": -0.1}, "expected 0 to 1"),
        ({"temperature": 0}, "temperature=0: expected above 0"),
        ({"verdicts": [4.0] * 12}, "all 12 rows have the verdict 4"),
        ({"kinds": "length"}, "kinds='length': expected one of lexical, similarity"),
    ],
)
def test_what_cannot_be_learnt_is_refused(settings, said):
    with pytest.raises(ValueError, match="no rows"):
        Student.fit([], [])
    items = [(f"q{i}", f"r{i}", f"a{i}") for i in range(12)]
    with pytest.raises(ValueError, match=said):
        Student.fit(items, **{"verdicts": [1.0, 5.0] * 6, **settings})


def test_one_question_about_many_texts_is_enough(bundled):
    (items, verdicts), *_ = bundled
    asked = items[0][0]  # its vector is bundled, so no encoder is loaded
    student = Student.fit([(asked, *item[1:]) for item in items], verdicts)
    assert np.corrcoef(student.held_out @ student.labels, verdicts)[0, 1] > 0.4
    with pytest.raises(ValueError, match="1 different questions .* too few"):
        Student.fit([("Why?", "Because.", item[2]) for item in items], verdicts)


def test_kinds_that_are_named_are_not_chosen(bundled, monkeypatch):
    monkeypatch.setattr("helpers.student.embed", None)  # counts need no encoder
    items, verdicts = bundled[0]
    student = Student.fit(items[:60], verdicts[:60], kinds="lexical")
    assert student.kinds == "lexical"
    assert student.scores(items[60:70]).shape == (10,)


def test_features_that_are_cached_cannot_be_changed():
    assert isinstance(lexical_features(("Who?", "Ada.", "Ada.")), tuple)
    assert isinstance(answer_features("Who?", "It was Ada.", "Ada."), tuple)
