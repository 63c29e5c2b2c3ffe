"""The longest wait of the last one to two minutes."""

from worker.observability.metrics import Longest


def test_the_longest_of_the_observed_durations_is_returned() -> None:
    longest = Longest(60.0, now=0.0)
    assert longest.value(now=1.0) == 0
    longest.observe(3.0, now=2.0)
    longest.observe(9.0, now=3.0)
    longest.observe(5.0, now=4.0)
    assert longest.value(now=5.0) == 9


def test_it_is_returned_for_at_least_one_and_at_most_two_windows() -> None:
    longest = Longest(60.0, now=0.0)
    longest.observe(9.0, now=59.0)
    assert longest.value(now=119.0) == 9
    assert longest.value(now=120.0) == 0
    longest.observe(4.0, now=120.0)
    assert longest.value(now=239.0) == 4
    assert longest.value(now=240.0) == 0


def test_a_shorter_duration_replaces_it_in_the_next_window() -> None:
    longest = Longest(60.0, now=0.0)
    longest.observe(9.0, now=10.0)
    longest.observe(2.0, now=70.0)
    assert longest.value(now=71.0) == 9
    assert longest.value(now=121.0) == 2


def test_it_is_reset_after_two_windows_without_observations() -> None:
    longest = Longest(60.0, now=0.0)
    longest.observe(9.0, now=10.0)
    assert longest.value(now=1000.0) == 0
