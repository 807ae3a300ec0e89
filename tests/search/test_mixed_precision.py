"""Bits within a budget: the best choice, found by integer programming."""

import ctypes
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from qtool.search import mixed_precision
from qtool.search.mixed_precision import (
    BudgetTooSmall,
    Choice,
    Knob,
    Product,
    choose_bits,
    extremes,
    pareto_front,
    price,
)

BITS = (2, 4, 8)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Knob], list[Product]]:
    """Up to five tensors, whose damage need not fall with the bits; products of some pairs of them."""
    count = draw(st.integers(1, 5))
    knobs = []
    for number in range(count):
        bits = draw(st.sampled_from([BITS, (4, 8), (8,), (2, 3, 5, 8)]))
        damage = [draw(st.floats(0, 100)) for _ in bits]
        size = draw(st.integers(1, 1000))
        knobs.append(Knob(f"t{number}", bits, tuple(damage), tuple(float(size * b) for b in bits)))
    pairs = st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=3)
    products = [Product(f"t{a}", f"t{b}", float(draw(st.integers(1, 50)))) for a, b in draw(pairs) if a != b]
    return knobs, products


def brute_force(knobs: list[Knob], products: list[Product], budget: float) -> Choice | None:
    found = None
    for bits in itertools.product(*(knob.bits for knob in knobs)):
        choice = price(knobs, products, dict(zip((k.name for k in knobs), bits, strict=True)))
        if choice.cost <= budget and (found is None or choice.damage < found.damage):
            found = choice
    return found


@settings(max_examples=150)
@given(problems(), st.floats(0, 1.2))
def test_the_choice_is_the_best_of_all(problem, share):
    knobs, products = problem
    low, high = extremes(knobs, products)
    budget = low.cost + share * (high.cost - low.cost)
    expected = brute_force(knobs, products, budget)
    assert expected is not None
    found = choose_bits(knobs, budget, products)
    assert found.cost <= budget
    assert found.damage == pytest.approx(expected.damage, rel=1e-5, abs=1e-5)
    assert found == price(knobs, products, found.bits)


@given(problems())
def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_does(problem):
    knobs, products = problem
    least = extremes(knobs, products)[0].cost
    with pytest.raises(BudgetTooSmall) as refused:
        choose_bits(knobs, least - 0.5, products)
    assert refused.value.smallest == least
    assert choose_bits(knobs, least, products).cost == least


def test_the_budget_of_all_at_eight_bits_gives_eight_bits():
    knobs = [Knob(f"t{n}", BITS, (9.0 + n, 3.0, 1.0), (2.0, 4.0, 8.0)) for n in range(8)]
    assert set(choose_bits(knobs, 64.0).bits.values()) == {8}


def test_bits_go_where_they_help_most():
    knobs = [
        Knob("frail", BITS, (100.0, 10.0, 1.0), (2, 4, 8)),
        Knob("hardy", BITS, (0.3, 0.2, 0.1), (2, 4, 8)),
    ]
    assert dict(choose_bits(knobs, 10).bits) == {"frail": 8, "hardy": 2}


def test_what_the_solver_prints_stays_out_of_the_results(monkeypatch, capfd):
    def chatty(*args: object, **kwargs: object) -> object:
        ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
        return milp(*args, **kwargs)

    monkeypatch.setattr(mixed_precision, "milp", chatty)
    choose_bits([Knob("t", BITS, (9.0, 3.0, 1.0), (2, 4, 8))], 4)
    print("after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "after\n"


def test_what_is_spent_anyway_counts():
    knobs = [Knob("t", BITS, (9.0, 3.0, 1.0), (2, 4, 8))]
    assert dict(choose_bits(knobs, 10, fixed=5).bits) == {"t": 4}
    with pytest.raises(BudgetTooSmall):
        choose_bits(knobs, 6, fixed=5)


def test_costs_of_a_real_network_are_kept_exactly():
    sizes = [9408, 36864, 73728, 147456, 294912, 589824, 1179648, 2359296, 512000]
    knobs = [
        Knob(
            f"t{n}",
            (2, 4, 6, 8),
            tuple(size**0.5 * 4.0**-b for b in (2, 4, 6, 8)),
            tuple(b * size for b in (2, 4, 6, 8)),
        )
        for n, size in enumerate(sizes)
    ]
    budget = 5 * sum(sizes)
    found = choose_bits(knobs, budget)
    assert found.cost <= budget
    uniform = price(knobs, (), {k.name: 4 for k in knobs})
    assert found.damage < uniform.damage


@settings(max_examples=30)
@given(problems())
def test_the_front_falls_in_damage_as_it_rises_in_cost(problem):
    knobs, products = problem
    front = pareto_front(knobs, products, count=8)
    for before, after in itertools.pairwise(front):
        assert after.cost > before.cost and after.damage < before.damage
    assert front[0].cost == extremes(knobs, products)[0].cost or len(front) == 1


@pytest.mark.parametrize(
    ("damage", "cost"), [((1.0,), (1.0, 2.0)), ((1.0, -1.0), (1.0, 2.0)), ((1.0, float("inf")), (1.0, 2.0))]
)
def test_a_knob_without_a_number_for_each_option_is_refused(damage, cost):
    with pytest.raises(ValueError, match="finite damage and cost"):
        Knob("t", (2, 4), damage, cost)


def test_bits_that_cost_less_than_fewer_are_refused():
    with pytest.raises(ValueError, match="more bits cost less"):
        Knob("t", (4, 2), (1.0, 1.0), (1.0, 2.0))


def test_a_product_of_something_unknown_is_refused():
    with pytest.raises(ValueError, match="no knob is called"):
        choose_bits([Knob("t", (2,), (1.0,), (1.0,))], 10, [Product("t", "u", 1.0)])
