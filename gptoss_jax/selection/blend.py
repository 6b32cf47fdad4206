"""Keep-sets for several domains at once, as mixed integer programs that HiGHS solves. Letters: see `config`.

An expert of a layer stays or goes, each layer keeps as many, and the coverage of a domain is linear in who stays
(`coverage.shares`). Domains are D here, and X are the variables: whether each expert stays, and the common value.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from ..errors import RankingError

EXACT = 64  # experts of all layers up to which the solution is the best one, and not only nearly
GAP = 0.005  # with more of them: how much better the best one could be, in parts of the value
SECONDS = 60.0  # the longest that one program may take; the bound says what is known by then
SLACK = 1e-6  # to which HiGHS holds constraints


@dataclass(frozen=True)
class Sets:
    """The keep-sets among which one is looked for."""

    num_kept: int
    """Of each layer."""
    allowed_LE: Bool[np.ndarray, "L E"]
    """The experts that may stay."""
    forced_LE: Bool[np.ndarray, "L E"]
    """Those that must."""


@dataclass(frozen=True)
class Blend:
    """Keep-sets that a program found."""

    kept_LE: Bool[np.ndarray, "L E"]
    value: float
    """What was to be as large as possible."""
    bound: float
    """No keep-sets have a larger one."""
    weights_D: Float[np.ndarray, " D"]
    """How much each domain decides: the duals of the program that may keep parts of experts; they add up to 1."""


@dataclass(frozen=True)
class _Program:
    """Maximise objective · x, where over · x is at least `least`, and x keeps as many experts of each layer."""

    objective_X: np.ndarray
    over_DX: sparse.csr_matrix
    least_D: np.ndarray
    sets: Sets

    @property
    def layers_LX(self) -> sparse.csr_matrix:
        L, E = self.sets.allowed_LE.shape
        return sparse.csr_matrix((np.ones(L * E), (np.repeat(np.arange(L), E), np.arange(L * E))), (L, L * E + 1))

    @property
    def bounds(self) -> Bounds:
        low, high = self.sets.forced_LE.reshape(-1), self.sets.allowed_LE.reshape(-1)
        return Bounds(np.append(low, -np.inf), np.append(high, np.inf))


def maxmin(shares_DLE: np.ndarray, nothing_D: np.ndarray, sets: Sets, factors_D: np.ndarray | None = None) -> Blend:
    """The keep-sets whose worst domain has the largest coverage; with factors, each domain's is divided by its own."""
    D = len(shares_DLE)
    factors_D = np.ones(D) if factors_D is None else factors_D
    objective_X = np.append(np.zeros(shares_DLE[0].size), 1)
    over_DX = np.column_stack([shares_DLE.reshape(D, -1), -factors_D])
    program = _Program(objective_X, sparse.csr_matrix(over_DX), -nothing_D, sets)
    found = _best(program)
    assert found is not None  # any keep-sets have a worst domain
    kept_LE, bound = found
    coverages_D = nothing_D + (shares_DLE * kept_LE).sum((1, 2))
    return Blend(kept_LE, float((coverages_D / factors_D).min()), bound, _duals(program))


def floors(
    pooled_LE: np.ndarray, shares_DLE: np.ndarray, nothing_D: np.ndarray, floors_D: np.ndarray, sets: Sets
) -> Blend | None:
    """The keep-sets with the largest pooled coverage in which each domain has at least its floor; None where there are
    none."""
    D = len(shares_DLE)
    over_DX = np.column_stack([shares_DLE.reshape(D, -1), np.zeros(D)])
    program = _Program(np.append(pooled_LE, 0), sparse.csr_matrix(over_DX), floors_D - nothing_D, sets)
    found = _best(program)
    if found is None:
        return None
    kept_LE, bound = found
    return Blend(kept_LE, float((pooled_LE * kept_LE).sum()), bound, _duals(program))


def may_hold(shares_DLE: np.ndarray, nothing_D: np.ndarray, floors_D: np.ndarray, sets: Sets) -> bool:
    """Whether parts of experts could hold the floors: what they cannot, whole experts cannot."""
    D = len(shares_DLE)
    over_DX = np.column_stack([shares_DLE.reshape(D, -1), np.zeros(D)])
    program = _Program(np.zeros(over_DX.shape[1]), sparse.csr_matrix(over_DX), floors_D - nothing_D, sets)
    return _relaxed(program) is not None


def _best(program: _Program) -> tuple[np.ndarray, float] | None:
    """The keep-sets, and a bound of their value; None where there are none. RankingError where time ran out."""
    shape, sets = program.sets.allowed_LE.shape, program.sets
    size = sets.allowed_LE.size
    done = milp(
        -program.objective_X,
        integrality=np.append(np.ones(size), 0),
        bounds=program.bounds,
        constraints=[
            LinearConstraint(program.over_DX, program.least_D, np.inf),
            LinearConstraint(program.layers_LX, sets.num_kept, sets.num_kept),
        ],
        options={"mip_rel_gap": 0.0 if size <= EXACT else GAP, "time_limit": SECONDS},
    )
    if done.status == 2:
        return None
    if done.x is None:
        raise RankingError(f"no keep-sets of {sets.num_kept} were found in {SECONDS:.0f} s: ask for lower shares")
    return done.x[:size].reshape(shape) > 0.5, -float(done.mip_dual_bound)


def _relaxed(program: _Program) -> np.ndarray | None:
    """The duals of the constraints of domains where parts of experts may stay; None where nothing holds them."""
    layers_LX, bounds = program.layers_LX, program.bounds
    done = linprog(
        -program.objective_X,
        A_ub=-program.over_DX,
        b_ub=-program.least_D,
        A_eq=layers_LX,
        b_eq=np.full(layers_LX.shape[0], program.sets.num_kept),
        bounds=np.column_stack([bounds.lb, bounds.ub]),
        method="highs",
    )
    return None if done.status == 2 else np.maximum(-done.ineqlin.marginals, 0)


def _duals(program: _Program) -> np.ndarray:
    """The duals as weights: 0 for domains that decide nothing, equal ones where none does."""
    duals_D = _relaxed(program)
    if duals_D is None or not duals_D.any():
        return np.full(len(program.least_D), 1 / len(program.least_D))
    return duals_D / duals_D.sum()
