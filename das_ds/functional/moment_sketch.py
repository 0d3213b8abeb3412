"""Sketches of second moments: what a low-rank mask needs of M (d, d), from a matrix (d, l) that inputs are added to.

    Y = A Omega,  A = sum of x x^T;  A is about Y (Omega^T Y)^+ Y^T  (Nystroem)

Y is linear in A: sketches with the same Omega are added over batches, ranks and domains as moments are. On average the
error in the nuclear norm is at most 1 + r / (l - r - 1) times that of the best approximation of rank r (Tropp et al.,
Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NeurIPS 2017).

Only the largest eigenvalues are known. All other directions share one factor, also those that earlier text does not
use: with c well below 1, where these matter, use the exact moment.

Shape legend: n inputs, d width of an input, l columns of the sketch, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from das_ds.functional.directions import MAX_FACTOR_ERROR, Rank, half_saturation_of_spectrum
from das_ds.functional.projectors import LowRankProjector, Projector, multiply

OVERSAMPLING = 32
"""l - r: columns of the sketch beyond the rank."""
GENERATED_ROWS = 1024
ROUNDING = 4.0 * torch.finfo(torch.float32).eps
"""Of sums in float32, relative to the largest eigenvalue; what the shift of `MomentSketch.decompose` must exceed."""
MAX_SHIFTS = 8
"""Tenfold increases of that shift; the last is larger than the largest eigenvalue."""


@dataclass
class RandomSigns:
    """Omega (d, l) of independent random signs, from a seed; all inputs of the same width share it.

    Signs instead of Gaussian numbers: they give the same errors, are exact in 16 bits, and are equal on every machine,
    as they follow from integers of the CPU's generator. They are never stored with a sketch.

    Args:
        width: d.
        num_columns: l.
        seed: of the signs.
    """

    width: int
    num_columns: int
    seed: int
    _cached: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> torch.Tensor:
        """Omega, (d, l) bfloat16; kept on the last device that asked until `free`."""
        if self._cached is None or self._cached.device != device:
            self._cached = self._generate(device)
        return self._cached

    def free(self) -> None:
        """Drop the kept copy; it is generated again when needed."""
        self._cached = None

    def _generate(self, device: torch.device) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.empty(self.width, self.num_columns, dtype=torch.bfloat16, device=device)
        # In blocks: the generator's integers have 8 bytes.
        for block in signs.split(GENERATED_ROWS):
            block.copy_(torch.randint(0, 2, block.shape, generator=generator) * 2 - 1)
        return signs


@dataclass
class MomentSketch:
    """Y = A Omega and tr A of the inputs added so far.

    Args:
        signs: Omega.
        products: Y, (d, l) float32.
        trace: tr A, () float64, on the same device.
    """

    signs: RandomSigns
    products: torch.Tensor
    trace: torch.Tensor

    @classmethod
    def zeros(cls, signs: RandomSigns, device: torch.device) -> MomentSketch:
        """Of no inputs."""
        products = torch.zeros(signs.width, signs.num_columns, device=device)
        return cls(signs, products, torch.zeros((), dtype=torch.float64, device=device))

    @property
    def max_rank(self) -> int:
        """l - `OVERSAMPLING`."""
        return self.signs.num_columns - OVERSAMPLING

    def add(self, inputs: torch.Tensor) -> None:
        """Y += x^T (x Omega), 4 n d l operations; waits for nothing.

        Args:
            inputs: x, (n, d), float32 or 16 bits, on the device of the sketch.
        """
        codes = multiply(inputs, self.signs.on(inputs.device))
        values = inputs.float()
        self.products.addmm_(values.T, codes)
        self.trace += values.square().sum(dtype=torch.float64)

    def add_sketch(self, other: MomentSketch) -> None:
        """Add the inputs of another sketch.

        Raises:
            ValueError: a sketch with another Omega.
        """
        if other.signs != self.signs:
            raise ValueError(f"sketch: found one of {other.signs}, expected one of {self.signs}")
        self.products += other.products
        self.trace += other.trace

    def normalized(self) -> MomentSketch:
        """Of A / (tr A / d): trace d, or 0 where all inputs were 0; as `directions.normalized_second_moment`."""
        mean = self.trace / self.signs.width
        products = torch.where(mean == 0, 0.0, self.products.double() / mean).float()
        return MomentSketch(self.signs, products, torch.where(mean == 0, 0.0, self.trace / mean))

    def describe_invalid(self) -> str | None:
        """Why this cannot be the sketch of a second moment; None: it may be one."""
        if not (self.products.isfinite().all() and self.trace.isfinite()):
            return "an entry that is not finite"
        if self.trace < 0:
            return "a negative trace"
        return None

    def decompose(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest eigenvalues of the Nystroem approximation, which are never above those of A, and their vectors.

        As Algorithm 3 of Tropp et al.: A + nu I is approximated, with nu a little above the rounding of Y, so that a
        Cholesky factor exists, and nu is taken off the eigenvalues.

        Returns:
            (r,) float64 in descending order, and (d, r) float64; fewer than `rank` where A has fewer above the
            rounding of Y, and at least one.

        Raises:
            ValueError: a rank below 1 or above `max_rank`, or a sketch that belongs to no second moment.
        """
        if fault := self.describe_invalid():
            raise ValueError(f"sketch: found {fault}, expected the sketch of a second moment")
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"rank: found {rank}, expected 1 to {self.max_rank} (columns - {OVERSAMPLING})")
        signs = self.signs.on(self.products.device).double()
        products = self.products.double()
        # |Y| is about the square root of l times the norm of A.
        shift = ROUNDING * float(products.norm()) / self.signs.num_columns**0.5
        if shift == 0.0:
            return products.new_zeros(1), torch.eye(self.signs.width, 1, dtype=products.dtype, device=products.device)
        limit = 1.001 * float(self.trace)
        for _ in range(MAX_SHIFTS):
            root = _square_root(products + shift * signs, signs)
            # Noise over a vanishing pivot gives eigenvalues that A cannot have; a larger shift is above the noise.
            if root is not None and float(root.square().sum()) - shift * self.signs.num_columns <= limit:
                return _eigenpairs(root, shift, rank)
            shift *= 10.0
        raise ValueError(f"sketch: found products and a trace of {limit:.3g} that no second moment has")

    def projector(
        self, half_saturation: float, rank: Rank = "auto", dtype: torch.dtype = torch.float32
    ) -> LowRankProjector:
        """P of the largest eigenvalues of A and tau for all other directions, as `directions.build_projector`.

        `auto` takes the smallest rank with an error of all factors below `MAX_FACTOR_ERROR`, and the largest where
        there is none. For the error, eigenvalues beyond the sketch are taken as 0, so that it is an upper bound.

        Args:
            half_saturation: c, in the units of A: of a normalized sketch, or of a sum of normalized sketches.
            rank: not `full`.
            dtype: of the basis, float32 or bfloat16.

        Raises:
            ValueError: rank `full`, or one below 1 or above `max_rank`.
        """
        if rank == "full":
            raise ValueError(f"rank: found full, expected auto or 1 to {self.max_rank}: a sketch has no exact form")
        eigenvalues, vectors = self.decompose(self.max_rank if rank == "auto" else rank)
        values = eigenvalues.cpu()
        tails = half_saturation / (half_saturation + self._tail_means(values))
        factors = half_saturation / (half_saturation + values)
        kept = _smallest_enough(factors, tails) if rank == "auto" else len(values)
        device = vectors.device
        return LowRankProjector.from_factors(vectors[:, :kept], factors[:kept].to(device), float(tails[kept]), dtype)

    def half_saturation_for(self, share: float) -> float:
        """c with which the plasticity of the mask of largest rank is `share`; see `directions.half_saturation_for`.

        Raises:
            ValueError: a share outside (0, 1).
        """
        values = self.decompose(self.max_rank)[0].cpu()
        spectrum = torch.cat([values, self._tail_means(values)[-1:]])
        counts = torch.ones_like(spectrum)
        counts[-1] = self.signs.width - len(values)
        return half_saturation_of_spectrum(spectrum, counts, share)

    def passing_energy(self, projector: Projector) -> float:
        """tr(P A P) / tr(A), estimated without bias as tr(Omega^T P P Y) / l / tr(A) (Hutchinson 1990).

        See `directions.passing_energy`; the relative standard deviation is at most sqrt(2 / l).
        """
        signs = self.signs.on(self.products.device).T.float()
        passing = (projector.project(signs) * projector.project(self.products.T)).sum(dtype=torch.float64)
        energy = self.trace * self.signs.num_columns
        return float(torch.where(energy == 0, 1.0, passing / energy))

    def _tail_means(self, eigenvalues: torch.Tensor) -> torch.Tensor:
        # Means of what is left of the trace, which is exact, beyond the first 0, 1 ... r eigenvalues.
        totals = torch.cat([eigenvalues.new_zeros(1), eigenvalues.cumsum(0)])
        num_left = self.signs.width - torch.arange(len(totals))
        return (self.trace.cpu() - totals).clamp_min(0.0) / num_left


def _square_root(products: torch.Tensor, signs: torch.Tensor) -> torch.Tensor | None:
    # E (d, l) with E E^T = Y (Omega^T Y)^-1 Y^T; None where Omega^T Y is not positive definite.
    core = signs.T @ products
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2.0, upper=True)
    if failed:
        return None
    return torch.linalg.solve_triangular(factor, products, upper=True, left=False)


def _eigenpairs(root: torch.Tensor, shift: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Of E E^T - nu I by those of E^T E (l, l), which is smaller. Vectors are orthogonal up to the rounding of a float64
    # times the largest eigenvalue over the own one, which exceeds the shift: up to 1e-9.
    eigenvalues, vectors = torch.linalg.eigh(root.T @ root)
    largest_first = torch.arange(len(eigenvalues) - 1, len(eigenvalues) - 1 - rank, -1, device=root.device)
    shifted = eigenvalues[largest_first]
    kept = largest_first[shifted > 2.0 * shift]
    scales = eigenvalues[kept].sqrt()
    return eigenvalues[kept] - shift, root @ vectors[:, kept] / scales


def _smallest_enough(factors: torch.Tensor, tails: torch.Tensor) -> int:
    # At rank r the smallest flattened factor is that of the next eigenvalue, the largest at most 1.
    errors = torch.maximum(1.0 - tails[:-1], tails[:-1] - factors)
    enough = (errors <= MAX_FACTOR_ERROR).nonzero().flatten().tolist()
    return next((rank for rank in enough if rank > 0), len(factors))
