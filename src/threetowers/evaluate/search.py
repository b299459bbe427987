"""Exact search: the k best candidates of each query by dot product.

A fast product scores a tile of queries and candidates with an error that has a known bound: int8 where the processor
multiplies it fast and exactly, fp32 elsewhere. Most candidates are then certainly below the k best so far. Scores of
the others are computed in fp64, rounded once to fp32 and compared, as in `evaluate/ranks.py`. The result is that of a
search in fp64, whatever the fast product is.

Legend: Q queries, C candidates, D width, B queries and N candidates of a tile, G groups of vectors, P pairs.
"""

import functools
import warnings
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.ranks import full_precision
from threetowers.evaluate.retrieval import check_features

BLOCK = 2048
"""Candidates scored at a time."""
ROWS = 1024
"""Queries scored at a time: with 2048 candidates a tile of scores takes 8 MB."""
PASS = 16 * ROWS
"""Queries for which the candidates are gone through once."""
GROUP = 16
"""Candidates of which the highest fast score is looked at first."""
_MANY = 0.08  # share of close scores from which the next finer product of a tile is faster
_MANY_GROUPS = 0.75  # share of groups from which more close scores are to be expected
_SAMPLE = 512  # vectors from which the coordinates for int8 are chosen
_FEW = 512  # vectors rounded at a time, which stay in the cache
_PAIRS = 1 << 14  # dot products at a time
_ULP = 2.0**-23
_LAST = 2**32 - 1  # the highest index that a key can hold


@torch.no_grad()
def top_k(queries: Tensor, candidates: Tensor, k: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The k highest dot products of each query and the candidates that have them, best first.

    queries [Q, D] and candidates [C, D] are unit vectors on one device, in any floating-point type. block: candidates
    scored at a time. Returns scores, fp32 [Q, k], summed in fp64 and rounded once, and indices, int64 [Q, k]. Of equal
    scores the candidate with the lower index is first. Beyond the results it takes less than 300 MB at a width of 512,
    however many queries and candidates there are. Raises DataError for shapes and values that cannot be scored,
    UsageError for a k that is not from 1 to C.

        scores, indices = top_k(image, text, 10)
    """
    _check(queries, "queries")
    _check(candidates, "candidates")
    if queries.shape[1] != candidates.shape[1]:
        raise DataError(
            f"queries are {queries.shape[1]} wide and candidates {candidates.shape[1]}; both must come from the same "
            "pair of views"
        )
    if not 1 <= k <= len(candidates):
        raise UsageError(f"k: a number from 1 to {len(candidates)} candidates is needed, got {k}")
    home = queries.device
    if home.type == "mps":  # which has no fp64
        queries, candidates = queries.cpu(), candidates.cpu()
    # torch 2.14 leaves an int8 product of width 1 unset
    int8 = _has_fast_int8(queries.device.type) and queries.shape[1] > 1
    frame = _frame(queries, candidates) if int8 else None
    best = []
    for some in queries.split(PASS):
        searches = [_Search(rows, k, frame) for rows in some.split(ROWS)]
        for start in range(0, len(candidates), block):
            columns = _Columns(candidates, start, block, frame)
            for search in searches:
                search.add(columns)
        best += [search.keys for search in searches]
    keys = torch.cat(best)
    return _score(keys).to(home), (_LAST - (keys & _LAST)).to(home)


class _Frame(NamedTuple):
    """The coordinates in which vectors are rounded to int8: (c − shift) · candidate of c, q · query of q; all [D].

    The product of the new vectors is q · (c − shift) / unit. Embeddings often have a few large coordinates that hardly
    vary, which would leave the others little of the range of int8.
    """

    shift: Tensor
    candidate: Tensor
    query: Tensor
    unit: float


class _Near(NamedTuple):
    """Vectors x' near to x, with which a product is fast.

    vectors: x', int8 or fp32 [G · group size, D]. norm and error: bounds of ‖x‖ and ‖x − x'‖ in each group, fp32 [G].
    """

    vectors: Tensor
    norm: Tensor
    error: Tensor


class _Pairs(NamedTuple):
    """Queries and candidates by their places in a tile, int64 [P]; sorted by query, then by candidate."""

    query: Tensor
    candidate: Tensor


class _Columns:
    """A block of candidates. coarse: in int8, None where that is slow. fine: in fp32. exact: in fp64 [N, D]."""

    def __init__(self, candidates: Tensor, start: int, block: int, frame: _Frame | None) -> None:
        self.start, self.vectors = start, candidates[start : start + block]
        self.coarse = _rounded(self.vectors, frame.candidate, frame.shift, GROUP) if frame else None
        if self.coarse and not bool(self.coarse.norm.isfinite().all()):
            self.coarse = None  # vectors far from all of the sample overflow in its coordinates

    @cached_property
    def fine(self) -> _Near:
        return _as_fp32(self.vectors, GROUP)

    @cached_property
    def exact(self) -> Tensor:
        return self.vectors.double()


class _Search:
    """Some queries, and the k best of the candidates so far for each.

    keys: int64 [B, k], one for each of the best: its score, then its index, the lower the better.
    """

    def __init__(self, queries: Tensor, k: int, frame: _Frame | None) -> None:
        self.exact = queries.double()
        nothing = torch.full((len(queries), k), -torch.inf, device=queries.device)
        self.keys = _packed(nothing, torch.tensor(_LAST, device=queries.device))
        self.fine = _as_fp32(queries, 1)
        if frame:
            stretched = queries.float() * frame.query
            step = (stretched.abs().amax(1) / 127).clamp_min(1e-30)
            one = torch.ones_like(frame.shift)
            self.coarse = _rounded(stretched / step[:, None], one, torch.zeros_like(one), 1)
            self.unit = step * frame.unit
            self.offset = (self.exact @ frame.shift.double()).float()

    def add(self, columns: _Columns) -> None:
        """Looks at further candidates."""
        limit = _score(self.keys[:, -1])
        num, k = len(columns.vectors), self.keys.shape[1]
        pairs = None
        if columns.coarse:
            level = (limit - self.offset) / self.unit
            pairs = _above(self.coarse, columns.coarse, level, num, k)
        if pairs is None:
            pairs = _above(self.fine, columns.fine, limit, num, k)
        if pairs is None:
            every = (self.exact @ columns.exact.T).float()
            query, candidate = (every > limit[:, None]).nonzero(as_tuple=True)
            score = every[query, candidate]
        else:
            some = _exact(self.exact, columns.exact, pairs)
            new = (some > limit[pairs.query]).nonzero().flatten()
            query, candidate, score = pairs.query[new], pairs.candidate[new], some[new]
        if len(query):
            self._insert(query, _packed(score, columns.start + candidate))

    def _insert(self, query: Tensor, key: Tensor) -> None:
        """Keys [P] of further candidates, and the query of each, sorted."""
        rows, row, count = query.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[row]
        new = key.new_full((len(rows), int(count.max())), torch.iinfo(torch.int64).min)
        new[row, place] = key
        self.keys[rows] = torch.cat([self.keys[rows], new], dim=1).topk(self.keys.shape[1]).values


def _above(queries: _Near, candidates: _Near, limit: Tensor, num: int, k: int) -> _Pairs | None:
    """The pairs of a tile whose product may lie above the query's limit, fp32 [B]; None when they are many.

    Where the k-th best product of the tile is certainly above the limit, it takes the limit's place. num: how many
    candidates there are without those that fill the last group.
    """
    if queries.vectors.dtype == torch.int8:
        tile = torch._int_mm(candidates.vectors, queries.vectors.T)
    else:
        with full_precision(), torch.autocast(limit.device.type, enabled=False):
            tile = candidates.vectors @ queries.vectors.T
    tile = tile.unflatten(0, (-1, GROUP))
    high = tile.amax(1)  # [G, B]
    # |q·c − q'·c'| ≤ ‖q‖ ‖c − c'‖ + ‖q − q'‖ ‖c'‖, and ‖c'‖ ≤ ‖c‖ + ‖c − c'‖
    of_candidates, of_both = candidates.error[:, None], (candidates.norm + candidates.error)[:, None]
    if bool((limit == -torch.inf).any()):
        low = high - of_candidates * queries.norm - of_both * queries.error
        limit = torch.maximum(limit, _kth(low[: num // GROUP], k))
    bound = torch.addcmul(limit, of_candidates, queries.norm, value=-1)
    bound.addcmul_(of_both, queries.error, value=-1)
    group, query = (high > bound).nonzero(as_tuple=True)
    if len(group) > _MANY_GROUPS * high.numel():
        return None
    hit, place = (tile[group, :, query] > bound[group, query, None]).nonzero(as_tuple=True)
    if len(hit) > _MANY * tile.numel():
        return None
    query, candidate = query[hit], group[hit] * GROUP + place
    if num % GROUP:
        real = candidate < num
        query, candidate = query[real], candidate[real]
    query, order = query.sort(stable=True)
    return _Pairs(query, candidate[order])


def _kth(low: Tensor, k: int) -> Tensor:
    """What the k-th best candidate of each query certainly exceeds, fp32 [B]; −∞ where there are too few groups.

    low [G, B]: what the best candidate of each group reaches.
    """
    if len(low) < k:
        return low.new_full(low.shape[1:], -torch.inf)
    fold = max(1, len(low) // (16 * k))  # the best of larger groups are found sooner and are nearly as good
    folded = low[: len(low) // fold * fold].unflatten(0, (-1, fold)).amax(1)
    return torch.topk(folded, k, dim=0).values[-1] - torch.finfo(torch.float32).tiny


def _exact(queries: Tensor, candidates: Tensor, pairs: _Pairs) -> Tensor:
    """The scores of pairs from vectors in fp64, rounded once, fp32 [P]."""
    if queries.device.type != "cpu":
        parts = zip(pairs.query.split(_PAIRS), pairs.candidate.split(_PAIRS), strict=True)
        return torch.cat([(queries[a] * candidates[b]).sum(1).float() for a, b in parts])
    # On a CPU this takes a seventh of the time, since no vector is copied.
    ends = F.pad(torch.bincount(pairs.query, minlength=len(queries)).cumsum(0), (1, 0))
    nothing = queries.new_zeros(len(pairs.query))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        places = torch.sparse_csr_tensor(
            ends, pairs.candidate, nothing, (len(queries), len(candidates)), check_invariants=False
        )
    found: Tensor = torch.sparse.sampled_addmm(places, queries, candidates.T, beta=0).values()
    return found.float()


def _frame(queries: Tensor, candidates: Tensor) -> _Frame:
    """A frame from evenly spaced samples; the result is right with any, and fast with one whose errors are small."""
    some_queries, some = (x[:: 1 + len(x) // _SAMPLE].float() for x in (queries, candidates))
    shift = some.mean(0)
    spread, size = (_rms(x, 0) for x in (some - shift, some_queries))
    least = 1e-3  # of all coordinates; it leaves those that do not vary alone
    spread = spread.clamp_min(least * float(_rms(some)) + 1e-15)
    size = size.clamp_min(least * float(_rms(some_queries)) + 1e-15)
    stretch = (spread / size).sqrt()
    step = _step((some - shift) / stretch, least * float(_rms(some / stretch)) + 1e-15)
    return _Frame(shift, 1 / (stretch * step), stretch, step)


def _step(sample: Tensor, least: float) -> float:
    """The step between neighbouring values of int8, out of a few, for which rounding changes the vectors least."""
    spread = max(float(_rms(sample)), least)
    steps = [spread * reach / 127 for reach in (3, 4, 6, 9, 14)]
    return min(steps, key=lambda step: float((_to_int8(sample / step) * step - sample).norm()))


def _rms(x: Tensor, dim: int | None = None) -> Tensor:
    mean: Tensor = x.square().mean(dim)
    return mean.sqrt()


def _to_int8(x: Tensor) -> Tensor:
    return x.round().clamp_(-127, 127)


def _rounded(x: Tensor, factor: Tensor, shift: Tensor, group: int) -> _Near:
    """(x − shift) · factor in int8."""
    parts = []
    centre = -shift * factor
    for part in x.split(_FEW):
        groups = _grouped(torch.addcmul(centre, part.float(), factor), group)
        norm, share = _norms(groups)
        near = _to_int8(groups)
        vectors = near.to(torch.int8).flatten(0, 1)
        error = near.sub_(groups).norm(dim=2).amax(1) * (1 + share) + 2 * share * (norm + centre.norm())
        parts.append(_Near(vectors, norm, error))
    return _Near(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _as_fp32(x: Tensor, group: int) -> _Near:
    groups = _grouped(x.float(), group)
    norm, share = _norms(groups)
    return _Near(groups.flatten(0, 1), norm, 2 * share * norm)


def _grouped(x: Tensor, group: int) -> Tensor:
    """[G, group size, D]; rows of zeros fill the last group."""
    missing = -len(x) % group
    filled = F.pad(x, (0, 0, 0, missing)) if missing else x
    return filled.reshape(-1, group, x.shape[1])


def _norms(groups: Tensor) -> tuple[Tensor, float]:
    """A bound of the norms of each group, and one of the relative error of a sum of D terms in fp32.

    The latter holds for any order of the sum, and has room for the few operations before and after it.
    """
    share = (groups.shape[2] + 8) * _ULP
    return groups.norm(dim=2).amax(1) * (1 + share), share


def _packed(score: Tensor, index: Tensor) -> Tensor:
    """Keys in the order of the scores, fp32; of equal scores the lower index has the larger key."""
    bits = (score + 0.0).view(torch.int32)  # −0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of negative numbers grow as the numbers fall
    return (ordered.long() << 32) | (_LAST - index)


def _score(key: Tensor) -> Tensor:
    ordered = (key >> 32).int()
    bits: Tensor = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32)


@functools.cache
def _has_fast_int8(device: str) -> bool:
    """Whether int8 products are fast and exact.

    Without VNNI or AMX, oneDNN adds two products in 16 bits, which overflow. The variable ONEDNN_MAX_CPU_ISA can bring
    that about on any processor, so one product is tried.
    """
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.10
    if device != "cpu" or not (has.get("avx512_vnni") or has.get("amx_int8")):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * 127**2).all())


def _check(features: Tensor, what: str) -> None:
    """As `check_features`; whole numbers, and rows whose norm overflows, are refused too."""
    if not features.is_floating_point():
        raise DataError(f"{what}: floating-point numbers are needed, got {features.dtype}")
    if features.ndim == 2 and features.numel():
        norms: list[Tensor] = [part.float().norm(dim=1) for part in features.split(_FEW)]
        far = (~torch.cat(norms).isfinite()).nonzero().flatten()
        if not len(far):
            return
        check_features(features, what)
        raise DataError(f"{what}: unit vectors are needed, the norm of row {int(far[0])} overflows")
    check_features(features, what)
