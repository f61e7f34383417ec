"""Predicted KL of whole plans: signed effects of tensors summed before they are squared.

Reads Scores with `loss_effects`; writes numbers in nats a token. Does not know budgets, nor how formats are chosen.

A plan's divergence is x' M x, x the formats that it has and M the co-moments of all formats' effects. M is known from
few sequences: what it says of a single pair of tensors is noise, and a plan that is chosen by it exploits the noise. So
M itself serves to predict a plan (`samples`). What a plan is chosen by (`shrunk`) holds between two tensors the mean
correlation of all pairs with these two formats, where that is positive and as far as it is no noise: errors of some
formats push the same way in every layer. A plan is not chosen for errors that are hoped to cancel.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.losses import predicted_losses, storage
from kvprof.records.formats import Format
from kvprof.records.long_run import Floats, blended, effects_of, long_run, share_of
from kvprof.records.scores import Scores

Ints = NDArray[np.int64]


class CoMoments:
    """The effects of every scored format of every tensor to plan, and of full precision, which has none."""

    def __init__(
        self,
        windows: Sequence[Floats],
        short: Floats,
        owners: Sequence[int],
        classes: Sequence[int],
        losses: Floats | None = None,
    ) -> None:
        """Take effects as window sums.

        windows: of each sequence (rows, F), so that the squared norm of a plan's sum is its KL there. short: (F,
        sequences), the KL of single formats by squares of single positions alone. owners: the tensor of each of the F
        formats. classes: equal for equal formats of keys, or of values. losses: mean KL of each format alone, (F,), by
        default as `records.long_run.blended` has it.
        """
        self._windows = windows
        self._short = short
        self._long = np.stack([np.square(own).sum(axis=0) for own in windows], axis=1)
        self._owners = np.asarray(owners, dtype=np.int64)
        self._classes = np.asarray(classes, dtype=np.int64)
        self._losses = self.losses(range(len(windows))) if losses is None else losses

    @property
    def sequences(self) -> int:
        """How many sequences the effects are of."""
        return len(self._windows)

    def samples(self, places: Sequence[int] | Ints) -> Floats:
        """Return the KL that each sequence predicts of a plan, (sequences,). places: of its formats."""
        columns = np.asarray(places, dtype=np.int64)
        return np.array([np.square(windows[:, columns].sum(axis=1)).sum() for windows in self._windows])

    def losses(self, sequences: Sequence[int]) -> Floats:
        """Return the KL of each format alone, as some sequences tell it: (F,)."""
        some = list(sequences)
        means: Floats = blended(self._long[:, some], self._short[:, some], self._classes).mean(axis=1)
        return means

    def objective(self, places: Sequence[int] | Ints) -> float:
        """Return what plans are chosen by, of one plan. places: of its formats."""
        columns = np.asarray(places, dtype=np.int64)
        return float(self.shrunk[np.ix_(columns, columns)].sum())

    @cached_property
    def shrunk(self) -> Floats:
        """What plans are chosen by: (F, F), its diagonal the losses."""
        return self.shrunk_of(range(self.sequences), self._losses)

    def shrunk_of(self, sequences: Sequence[int], losses: Floats) -> Floats:
        """Return the shrunk co-moments of some sequences. losses: the KL of each format alone, (F,).

        How far a mean correlation is believed follows from how much single sequences differ, in sum over all pairs of
        formats; of a single sequence, nothing is.
        Source: J. Schaefer and K. Strimmer, Stat. Appl. Genet. Mol. Biol. 4 (2005), equation 10, with a target of
        constant correlation as in O. Ledoit and M. Wolf, J. Portfolio Management 30 (2004).
        """
        number = len(sequences)
        if number < 2:
            return np.diag(losses)
        scale = np.sqrt(self._long[:, list(sequences)].mean(axis=1))
        scale = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        apart = self._owners[:, None] != self._owners
        member = np.eye(int(self._classes.max()) + 1)[self._classes]  # (F, classes)
        pairs = np.maximum(member.T @ apart @ member, 1.0)
        every = []
        for place in sequences:
            windows = self._windows[place] * scale
            every.append(member.T @ np.where(apart, windows.T @ windows, 0.0) @ member / pairs)
        mean = np.mean(every, axis=0)
        noise = float((np.var(every, axis=0) * pairs).sum()) / (number - 1)
        believed = (1 - share_of(noise, float((mean**2 * pairs).sum()))) * np.maximum(mean, 0.0)
        roots = np.sqrt(losses)
        found: Floats = np.where(apart, member @ believed @ member.T, 0.0) * roots[:, None] * roots
        np.fill_diagonal(found, losses)
        return found


class _Known(NamedTuple):
    """A format of a tensor, by its place among them: how it is stored, its name, effects and loss."""

    owner: int
    stored: Hashable
    name: str
    texts: Sequence[str] | None
    loss: float


class ScoredCoMoments(CoMoments):
    """Co-moments whose formats are looked up by tensor and format."""

    def __init__(self, scores: Scores, tensors: Sequence[CachedTensor]) -> None:
        """Read the effects of every format that was scored; `has_effects` tells whether there are any."""
        assert scores.effects is not None
        plain = scores.model_copy(update={"kl_calibration": None})
        bandwidth, tokens = scores.effects.bandwidth_blocks, scores.effects.tokens
        known: list[_Known] = []
        for owner, tensor in enumerate(tensors):
            formats = predicted_losses(plain, tensor)
            for measured in formats:
                stored = storage(measured.format, tensor.head_dim)
                known.append(_Known(owner, stored, measured.format.name, measured.effects, measured.loss))
            if not any(measured.format.is_full for measured in formats):
                known.append(_Known(owner, "full", "full", None, 0.0))
        self._places = {(tensors[one.owner], one.stored): place for place, one in enumerate(known)}
        nothing = np.zeros(len(tokens)), [np.zeros(scores.effects.blocks(place)) for place in range(len(tokens))]
        effects = [nothing if one.texts is None else effects_of(one.texts) for one in known]
        windows = [
            long_run(np.stack([series[place] for _, series in effects]), bandwidth).T / np.sqrt(2 * counted)
            for place, counted in enumerate(tokens)
        ]
        short = np.stack([squares for squares, _ in effects]) / (2 * np.array(tokens))
        names: dict[tuple[str, str], int] = {}
        classes = [names.setdefault((tensors[one.owner].name, one.name), len(names)) for one in known]
        owners = [one.owner for one in known]
        super().__init__(windows, short, owners, classes, np.array([one.loss for one in known]))

    def place(self, tensor: CachedTensor, form: Format) -> int | None:
        """Return the place of a tensor's format; None where it was not scored."""
        return self._places.get((tensor, storage(form, tensor.head_dim)))


def has_effects(scores: Scores, tensors: Sequence[CachedTensor]) -> bool:
    """Whether the effects of every scored format of these tensors are known."""
    if scores.effects is None:
        return False
    found = [(scores.entry(tensor.layer), tensor.name) for tensor in tensors]
    parts = [entry.tensor(name) for entry, name in found if entry is not None]
    return len(parts) == len(found) and all(
        part.loss_increase and part.loss_effects and part.loss_effects.keys() == part.loss_increase.keys()
        for part in parts
    )
