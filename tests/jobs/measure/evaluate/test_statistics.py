"""The statistics against cases known by hand or by simulation."""

import numpy as np
import pytest

from jobs.measure.evaluate.statistics import Tally, accuracies, interval, paired_p, weights


def _rng(seed=0):
    return np.random.default_rng(seed)


def _tally(right, asked):
    return Tally(np.array(right, float), np.array(asked, float))


def _estimate(tallies, resamples=400, seed=0):
    return accuracies(tallies, [weights(_rng(seed), len(tally.asked), resamples) for tally in tallies])


def test_first_line_counts_every_scene_once_and_the_others_as_many_scenes():
    drawn = weights(_rng(), 7, 50)
    assert drawn[0].tolist() == [1] * 7
    assert drawn.sum(axis=1).tolist() == [7] * 51
    assert len(np.unique(drawn[1:], axis=0)) > 40


def test_questions_count_alike_within_a_suite_and_suites_count_alike():
    assert _estimate([_tally([1, 1], [1, 9])])[0] == pytest.approx(0.2)
    assert _estimate([_tally([5, 5], [5, 5]), _tally([0] * 100, [9] * 100)])[0] == pytest.approx(0.5)


def test_a_suite_that_asks_nothing_is_left_out_and_nothing_at_all_is_nan():
    nothing = _tally([0, 0], [0, 0])
    assert _estimate([_tally([1, 1], [1, 1]), nothing])[0] == 1
    assert np.isnan(_estimate([nothing])).all()
    assert np.isnan(interval(_estimate([nothing]))).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = _rng(1), 0
    for trial in range(200):
        asked = rng.integers(1, 6, 60)
        tally = _tally(rng.binomial(asked, 0.8), asked)
        low, high = interval(_estimate([tally], 300, trial))
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 198


def test_questions_about_one_scene_are_not_taken_for_independent():
    rng = _rng(2)
    whole = rng.random(60) < 0.5  # a scene's eight answers are right or wrong together
    low, high = interval(_estimate([_tally(8 * whole, [8] * 60)]))
    single_low, single_high = interval(_estimate([_tally(whole, [1] * 60)]))
    assert (low, high) == pytest.approx((single_low, single_high))
    assert high - low > 0.2  # 480 independent answers would give 0.09


def test_p_is_one_for_equal_answers_and_least_for_clearly_different_ones():
    good, bad = _tally([4] * 40, [4] * 40), _tally([2] * 40, [4] * 40)
    assert paired_p([good], [good], _rng(), 999) == 1
    assert paired_p([good], [bad], _rng(), 999) == pytest.approx(1 / 1000)
    assert paired_p([bad], [good], _rng(), 999) == pytest.approx(1 / 1000)


def test_p_of_a_few_scenes_is_that_of_their_signs():
    """Three scenes that all differ the same way: two of the eight sign patterns are as far apart."""
    one, other = _tally([1, 1, 1, 1], [1] * 4), _tally([0, 0, 0, 1], [1] * 4)
    assert paired_p([one], [other], _rng(), 4000) == pytest.approx(0.25, abs=0.03)
    single = _tally([0, 1, 1, 1], [1] * 4)
    assert paired_p([one], [single], _rng(), 500) == 1


def test_p_is_rarely_small_where_nothing_differs():
    rng, small = _rng(3), 0
    for _ in range(200):
        one, other = (_tally(rng.binomial(3, 0.8, 50), [3] * 50) for _ in range(2))
        small += paired_p([one], [other], rng, 200) <= 0.05
    assert small <= 20


def test_suites_add_up_in_one_test():
    """Neither suite alone is significant, both together are; opposite differences cancel out."""
    better, worse = _tally([1] * 5, [1] * 5), _tally([0] * 5, [1] * 5)
    alone = paired_p([better], [worse], _rng(), 4000)
    assert alone == pytest.approx(2 / 32, abs=0.02)
    assert paired_p([better] * 2, [worse] * 2, _rng(), 4000) < 0.01
    assert paired_p([better, worse], [worse, better], _rng(), 4000) == 1
