import pytest
from hypothesis import given
from hypothesis import strategies as st

from threetowers.data.order import Order, hash64
from threetowers.errors import UsageError


@given(st.integers(1, 200), st.data(), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation_without_its_tail(num: int, data: st.DataObject, seed: int) -> None:
    batch_size = data.draw(st.integers(1, num))
    order = Order(seed, num, batch_size)
    for epoch in range(3):
        positions = range(epoch * order.epoch_samples, (epoch + 1) * order.epoch_samples)
        seen = [order.index(p) for p in positions]
        assert len(set(seen)) == len(seen) == num // batch_size * batch_size
        assert all(0 <= index < num for index in seen)
        assert {order.epoch(p) for p in positions} == {epoch}


def test_a_position_depends_on_nothing_before_it() -> None:
    forward = Order(3, 50, 8)
    sequence = [forward.index(p) for p in range(300)]
    assert [Order(3, 50, 8).index(p) for p in reversed(range(300))] == sequence[::-1]
    assert sequence[:48] != sequence[48:96], "epochs must differ"
    assert sequence != [Order(4, 50, 8).index(p) for p in range(300)], "seeds must differ"


def test_batches_continue_where_they_were() -> None:
    order = Order(0, 20, 5)
    whole = [list(batch) for batch in order.batches(0, 9)]
    assert [list(batch) for batch in order.batches(4, 9)] == whole[4:]


def test_replacements_are_repeatable_and_move_on() -> None:
    order = Order(0, 1000, 10)
    assert [order.replacement(7, a) for a in range(5)] == [order.replacement(7, a) for a in range(5)]
    assert len({order.replacement(7, a) for a in range(20)}) > 15


def test_data_smaller_than_a_batch_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match="--batch-size 7"):
        Order(0, 7, 8)


def test_hashes_tell_types_and_borders_apart() -> None:
    assert (
        len({hash64(1), hash64("1"), hash64("a", "b"), hash64("ab"), hash64("a\x1fb"), hash64("a", 1)}) >= 5
    )
    assert hash64("seed", 3) == hash64("seed", 3)
