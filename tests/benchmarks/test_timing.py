"""Interleaved timing and its statistics, with a simulated clock."""

import pytest
from timing import MIN_ROUNDS, Samples, environment, percentile, time_in_turns


class Clock:
    def __init__(self):
        self.now = 0.0
        self.rests = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.rests.append(seconds)
        self.now += seconds

    def work(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(1, 1), (10, 1), (11, 2), (50, 5), (90, 9), (91, 10), (99, 10), (100, 10)],
)
def test_percentiles_of_one_to_ten(percent, expected):
    assert percentile([7, 3, 10, 1, 5, 9, 2, 8, 4, 6], percent) == expected


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_percentile_refuses(values, percent):
    with pytest.raises(ValueError, match="found:"):
        percentile(values, percent)


def test_images_per_second_at_the_median():
    assert Samples((10.0, 20.0, 900.0)).per_second(4) == pytest.approx(200.0)


def test_latencies_exclude_warm_up_and_pauses():
    clock = Clock()
    calls = {"slow": lambda turn: clock.work(2.0 if turn else 5.0), "fast": lambda turn: clock.work(0.5)}
    found = time_in_turns(calls, repeat=3, warmup=2, rest_s=0.1, clock=clock, sleep=clock.sleep)
    assert found["slow"].latencies_ms == pytest.approx((5000, 2000, 2000))
    assert found["fast"].latencies_ms == pytest.approx((500, 500, 500))
    assert clock.rests == [0.1] * 10


def test_every_round_calls_each_function_once_in_random_order():
    clock, called = Clock(), []
    calls = {name: lambda turn, name=name: called.append((turn, name)) for name in "abc"}
    time_in_turns(calls, repeat=12, warmup=0, clock=clock, sleep=clock.sleep)
    rounds = [called[start : start + 3] for start in range(0, len(called), 3)]
    assert [{turn for turn, _ in one} for one in rounds] == [{turn} for turn in range(12)]
    assert all({name for _, name in one} == set("abc") for one in rounds)
    assert len({tuple(name for _, name in one) for one in rounds}) > 1


def test_a_failing_function_does_not_stop_the_others():
    clock = Clock()

    def fail(turn):
        if turn == 1:
            raise RuntimeError("out of something")

    found = time_in_turns({"bad": fail, "good": lambda turn: None}, repeat=4, clock=clock, sleep=clock.sleep)
    assert "out of something" in str(found["bad"].error)
    assert found["good"].error is None and len(found["good"].latencies_ms) == 4


def test_the_budget_limits_the_rounds():
    clock = Clock()
    found = time_in_turns(
        {"slow": lambda turn: clock.work(10.0)}, repeat=50, budget_s=1.0, clock=clock, sleep=clock.sleep
    )
    assert len(found["slow"].latencies_ms) == MIN_ROUNDS


def test_environment_describes_the_machine():
    found = environment()
    assert found["cpu"] and found["cores"] >= 1 and "torch" in found["versions"] and found["date"]
