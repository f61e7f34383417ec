"""The formats that were scored, tensor by tensor, and what a user's words leave of them.

Reads Scores' `loss_increase`; writes candidates. Does not know budgets, nor how one is chosen.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.losses import PredictedLoss, predicted_losses, storage
from kvprof.allocate.pins import Pin
from kvprof.errors import InvalidFile, UsageError
from kvprof.records.external_formats import EXTERNAL
from kvprof.records.formats import FULL_BITS, TENSORS, Format, TensorName, format_named, usual_format
from kvprof.records.scores import Scores


class ScoredFormats:
    """What was scored of each tensor to plan; losses without the calibration's factor, which is the whole plan's.

    Full precision loses nothing: it can always be asked for by name or by its 16 bits, scored or not.
    """

    def __init__(self, scores: Scores, tensors: Sequence[CachedTensor]) -> None:
        """Raise InvalidFile for scores that lack `loss_increase` for a tensor, or have none that kvprof can store."""
        plain = scores.model_copy(update={"kl_calibration": None})
        self._found = {(tensor.layer, tensor.name): predicted_losses(plain, tensor) for tensor in tensors}
        self._tensors = tensors
        for tensor in tensors:
            if not self._of(tensor):
                raise InvalidFile(
                    f"none of the formats that were scored for the {tensor.word} of layer {tensor.layer} is one that a "
                    "plan can give it"
                    + (", its head dimension being unknown" if tensor.head_dim is None else "")
                    + ".\n  Score others with `kvprof gradients --formats`, or choose another --metric."
                )

    def check_scored(self, names: Mapping[TensorName, Iterable[str]]) -> None:
        """Raise UsageError, saying what was scored, for a format that was scored for no tensor that it is asked for.

        names: the formats asked for by tensor; one for both need be scored for only one of them.
        """
        asked: dict[str, list[TensorName]] = {}
        for name, words in names.items():
            for word in words:
                asked.setdefault(word, []).append(name)
        for word, tensor_names in asked.items():
            tensors = [tensor for tensor in self._tensors if tensor.name in tensor_names]
            if not any(self._named(tensor, word) for tensor in tensors):
                whose = " or ".join(f"{name}s" for name in tensor_names)
                scored = dict.fromkeys(form for tensor in tensors for form in self._names(tensor))
                raise UsageError(
                    f"--formats: {word} was not scored for {whose}.\n  scored: {', '.join(scored)}\n"
                    f"  Choose from these, or score it: kvprof gradients --formats {word},..."
                )

    def chosen(
        self, tensor: CachedTensor, words: Sequence[str] | None, widths: Sequence[int] | None, group_size: int | None
    ) -> list[PredictedLoss]:
        """Return the candidates of a tensor: all that were scored, or those of these names, widths and group size.

        Raises UsageError, saying what was scored, where none is left.
        """
        choices = self._own(tensor, words)
        if words:
            named = [self._named(tensor, word) for word in words]
            choices = [choice for choice in dict.fromkeys(named) if choice is not None]
        if widths is not None:
            if FULL_BITS in widths and not any(choice.format.is_full for choice in choices):
                choices.append(self._full(tensor))
            choices = [choice for choice in choices if choice.format.bits in widths]
        grouped = [choice for choice in choices if _has_group(choice, tensor, group_size)]
        if not any(_has_groups(choice.format) for choice in grouped) and any(_has_groups(c.format) for c in choices):
            raise UsageError(
                f"--group-size {group_size}: no format of such groups was scored for the {tensor.word} of layer "
                f"{tensor.layer}.\n  scored: {', '.join(self._names(tensor))}"
            )
        if not grouped:
            raise UsageError(
                f"none of the formats scored for the {tensor.word} of layer {tensor.layer} is left to choose from.\n"
                f"  scored: {', '.join(self._names(tensor))}\n  Loosen --formats or --bits."
            )
        return grouped

    def pinned(
        self, tensor: CachedTensor, pin: Pin, words: Sequence[str] | None, group_size: int | None
    ) -> list[PredictedLoss]:
        """Return the one format that a pin names, or all of its width; raises UsageError where none was scored."""
        if pin.format is not None:
            found = self._named(tensor, pin.format)
            choices = [] if found is None else [found]
        else:
            choices = [choice for choice in self._own(tensor, words) if choice.format.bits == pin.bits]
            choices = [choice for choice in choices if _has_group(choice, tensor, group_size)]
            if not choices and pin.bits == FULL_BITS:
                choices = [self._full(tensor)]
        if not choices:
            groups = "" if group_size is None or pin.format is not None else f" in groups of {group_size}"
            raise UsageError(
                f"pin {pin.text!r}: {pin}{groups} was not scored for the {tensor.word} of layer {tensor.layer}.\n"
                f"  scored: {', '.join(self._names(tensor))}; {FULL_BITS} bits can always be had"
            )
        return choices

    def _of(self, tensor: CachedTensor) -> list[PredictedLoss]:
        return self._found[tensor.layer, tensor.name]

    def _own(self, tensor: CachedTensor, words: Sequence[str] | None) -> list[PredictedLoss]:
        """Return what kvprof's own cache can store, and another runtime's only where names of such are given.

        Raises UsageError where no name is given and all that was scored is other runtimes'.
        """
        if words and any(word in EXTERNAL for word in words):
            return [choice for choice in self._of(tensor) if choice.format.name in words]
        own = [choice for choice in self._of(tensor) if not choice.format.is_external]
        if not own and not words:
            raise UsageError(
                f"all that was scored for the {tensor.word} of layer {tensor.layer} is other runtimes': "
                f"{', '.join(self._names(tensor))}.\n"
                "  Plan for one of them with --target, as `kvprof targets` lists them, or score kvprof's own with "
                "`kvprof gradients`."
            )
        return own

    def _named(self, tensor: CachedTensor, word: str) -> PredictedLoss | None:
        """Return what was measured of a format by name, None where nothing was, or the heads cannot have it."""
        try:
            wanted: Hashable = storage(format_named(word, tensor.stored_as, tensor.head_dim), tensor.head_dim)
        except UsageError:
            return None
        every = self._of(tensor)
        found = next((choice for choice in every if storage(choice.format, tensor.head_dim) == wanted), None)
        return self._full(tensor) if found is None and wanted == "full" else found

    def _full(self, tensor: CachedTensor) -> PredictedLoss:
        """Return full precision, which loses nothing in any sequence."""
        samples = next((choice.samples for choice in self._of(tensor) if choice.samples is not None), None)
        none = None if samples is None else (0.0,) * len(samples)
        return PredictedLoss(usual_format(tensor.stored_as, FULL_BITS, 1), 0.0, 0.0, none)

    def _names(self, tensor: CachedTensor) -> list[str]:
        return [choice.format.name for choice in self._of(tensor)]


def every_format(scores: Scores) -> str:
    """Return, as `Allowed` takes names, all that was scored and a plan can have: other runtimes' and 16 bits too."""
    words = []
    for tensor in TENSORS:
        words += [f"{tensor}:{name}" for name in scores.scored_formats(tensor) if name not in scores.passed_over]
        words.append(f"{tensor}:full")
    return ",".join(words)


def _has_groups(form: Format) -> bool:
    """Whether the size of a format's groups is a choice: not in full precision, nor where a group is a whole head."""
    return form.scheme == "asymmetric" and not form.is_full


def _has_group(choice: PredictedLoss, tensor: CachedTensor, group_size: int | None) -> bool:
    """Whether a format has groups of a size, where it has groups to choose at all."""
    form = choice.format
    if group_size is None or not _has_groups(form):
        return True
    if form.axis == "token" and tensor.head_dim is not None:
        group_size = min(group_size, tensor.head_dim)
    return form.group_size == group_size
