"""The order of samples: permutations, positions and replacements."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threetowers.data.order import BLOCK_SAMPLES, GROUP_BLOCKS, GROUP_SAMPLES, Order, hash64
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


def epoch_of(order: Order, epoch: int = 0) -> np.ndarray:
    """The indices of an epoch's samples, by position."""
    first = epoch * order.epoch_samples
    return np.array([order.index(first + place) for place in range(order.epoch_samples)])


BORDERS = [
    GROUP_SAMPLES + 1,  # a second group of one sample
    GROUP_SAMPLES + BLOCK_SAMPLES - 1,
    GROUP_SAMPLES + BLOCK_SAMPLES,  # no shorter block
    2 * GROUP_SAMPLES - 1,
    2 * GROUP_SAMPLES,
    2 * GROUP_SAMPLES + 17,
]


@settings(max_examples=8, deadline=None)
@given(
    st.one_of(st.sampled_from(BORDERS), st.integers(GROUP_SAMPLES + 1, 3 * GROUP_SAMPLES)),
    st.integers(1, 5000),
    st.integers(0, 2**40),
)
def test_large_epochs_are_permutations_without_their_tail(num: int, batch_size: int, seed: int) -> None:
    order = Order(seed, num, batch_size)
    seen = np.bincount(epoch_of(order, seed % 3), minlength=num)
    assert len(seen) == num
    assert seen.max() == 1
    assert seen.sum() == num // batch_size * batch_size


@pytest.mark.parametrize("num", BORDERS)
def test_a_group_holds_whole_blocks(num: int) -> None:
    """What is read at a time are 16 stretches of 4,096 neighbours; every group but the last holds 16 blocks."""
    blocks = epoch_of(Order(5, num, 1)) // BLOCK_SAMPLES
    places = {block: np.flatnonzero(blocks == block) for block in range(-(-num // BLOCK_SAMPLES))}
    groups: list[list[int]] = []
    end = -1
    for block in sorted(places, key=lambda block: int(places[block][0])):
        if places[block][0] > end:  # nothing read before comes back: a new group
            groups.append([])
        groups[-1].append(block)
        end = max(end, int(places[block][-1]))
    assert [len(group) for group in groups[:-1]] == [GROUP_BLOCKS] * ((len(places) - 1) // GROUP_BLOCKS)
    assert sorted(groups[0]) != list(range(GROUP_BLOCKS)), "the blocks must be permuted"
    assert len(set(blocks[:100].tolist())) > GROUP_BLOCKS // 2, "the samples of a group must be mixed"


def test_the_order_of_a_seed_never_changes() -> None:
    """Runs that were begun must go on in the same order; small data keeps numpy's one permutation of all."""

    def digest(num: int) -> str:
        order = Order(7, num, 1)
        return hashlib.sha256(epoch_of(order, 1).astype("<i8").tobytes()).hexdigest()[:16]

    for num in (50, GROUP_SAMPLES):
        expected = np.random.Generator(np.random.Philox(key=hash64("order", 7, 1))).permutation(num)
        assert (epoch_of(Order(7, num, 1), 1) == expected).all()
    assert digest(GROUP_SAMPLES + 1) == "45872f32de5abd14"


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**13), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_any_position_of_any_size_is_found_alone(num: int, positions: list[int]) -> None:
    order = Order(1, num + 1, 1)
    found = [order.index(position) for position in positions]
    assert all(0 <= index <= num for index in found)
    assert [Order(1, num + 1, 1).index(position) for position in positions[::-1]] == found[::-1]


def test_the_cost_of_a_sample_does_not_grow_with_the_data() -> None:
    def seconds(num: int) -> float:
        order = Order(3, num, 64)
        first = order.epoch_samples // 2
        tries = []
        for attempt in range(3):
            start = time.process_time()
            for position in range(first, first + 20_000):
                order.index(position + attempt * GROUP_SAMPLES)
            tries.append(time.process_time() - start)
        return min(tries)

    assert seconds(20_000_000) < 4 * seconds(70_000) + 0.05


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
