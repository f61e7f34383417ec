"""norms, gradients and spectra as functions.

Read a model, and text; return records. Write a file only where a folder is named.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.api.job import Job, Progress, remark
from kvprof.records.requests.measure import DivergenceRequest, GradientsRequest, SpectraRequest
from kvprof.records.scores import Scores
from kvprof.records.spectra import Spectra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvprof.allocate.target import Target
    from kvprof.profile.decoder import Decoder
    from kvprof.profile.divergence import DivergenceRun
    from kvprof.profile.norms import NormsRun
    from kvprof.profile.sensitivity import SensitivityRun
    from kvprof.profile.spectra import SpectraRun


def norms(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Measure how large W_k and W_v are, layer by layer, as `kvprof norms` does; never loads a model that is named.

    model: a hub id, a folder, a .gguf file, or `demo` (the default); or a loaded transformers model, whose weights are
    read where they are. tokenizer: not needed, and taken so that all functions can be called alike.
    trust_remote_code: let Python code run that comes with the model, where transformers has none for it. out: a folder
    for norms.json and, meanwhile, the journal that a stopped run goes on from; without it nothing is written. restart:
    begin anew there. progress: called with (bytes done, bytes in all).
    Returns Scores: of each layer's whole (out_features, in_features) projection `spectral_norm`, `frobenius_norm` and
    `stable_rank`, and of each KV head, in the weights' own units; of a bias or a norm after k_proj, its size too.
    Raises ModelError, UnknownLayout or NonFiniteWeight for a model that cannot be measured, UsageError for no model.
    """
    run = norms_as_asked(Job.of(locals()))
    remark(run.remarks)
    return run.scores


def norms_as_asked(job: Job) -> NormsRun:
    """Measure norms for the command and the function; raises as `norms` does."""
    from kvprof.profile.norms import run_norms

    with job.opened() as (source, folder):
        return run_norms(source, folder, job.restart, job.progress, job.announce)


def gradients(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    data: str | Path | Sequence[str | Path] | None = None,
    split: str | None = None,
    column: str | None = None,
    config: str | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    formats: str | Sequence[str] | None = None,
    target: str | None = None,
    layers: str | None = None,
    recent_tokens: int | None = None,
    sink_tokens: int | None = None,
    suffix_fraction: float = 0.5,
    until_stable: bool = False,
    stable_at: str | float | Sequence[str | float] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    pack: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
    shard: str | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Measure how much the loss feels each layer's keys and values, as `kvprof gradients` does.

    model: as `norms` takes it; a loaded one is measured in the dtype and on the device that it has, and given back as
    it was. tokenizer: of a loaded model; or the name of whose to take, as --tokenizer does. data: `builtin`, `self`,
    files or hub datasets, as NAME or NAME:WEIGHT; builtin and self by default. sequences: 8 by default, 32 with
    until_stable. sequence_length: tokens; 1024 by default, or the model's own limit. formats: whose loss to predict,
    such as "int3g64,value:rot2"; "none" for gradient norms alone. target: score another runtime's formats instead.
    layers: whether those of a sliding window are scored too, `all` (the default), or left alone, `full`. sink_tokens,
    recent_tokens: kept in full precision. The rest is named as the command's options are. out: a folder for
    gradients.json and its journal; without it, no file is written but what the model writes for `self`, in the user's
    cache folder. progress: called with (sequences done, in all).
    Returns Scores: of each layer's K and V `gradient_norm`, the mean over sequences of the L2 norm of dLoss/dW (nats a
    token, by the weights' units), and `loss_increase`, by format, in nats a token; with standard errors.
    Raises UsageError for options that do not go together or a loaded model without a tokenizer, CalibrationError for
    text that cannot be read, ModelError for a model that cannot be measured, NonFiniteGradient where numbers overflow.
    """
    given = locals()
    run = gradients_as_asked(GradientsRequest.of(given, of_function=True), Job.of(given))
    remark(run.remarks)
    return run.scores


def gradients_as_asked(request: GradientsRequest, job: Job) -> SensitivityRun:
    """Measure gradients for the command and the function; raises as `gradients` does."""
    from kvprof.analysis.stability import StableAt
    from kvprof.profile.sensitivity import run_sensitivity
    from kvprof.targets.registry import target_named

    runtime = None if request.target is None else target_named(request.target)
    decoder = decoder_asked(request, runtime)
    question = StableAt(request.stable_at or ()) if request.until_stable else None
    with job.opened("" if runtime is None else runtime.name) as (source, folder):
        return run_sensitivity(
            source,
            request,
            folder,
            job.restart,
            job.progress,
            job.writing,
            question,
            None if question is None else question.check,
            job.announce,
            decoder,
        )


def decoder_asked(request: GradientsRequest, runtime: Target | None) -> Decoder:
    """Return whose losses are predicted: of the formats that are named, else those of a runtime, else kvprof's own."""
    from kvprof.allocate.target import check_serves, layer_choice
    from kvprof.profile.decoder import Decoder, read_formats
    from kvprof.records.plan import USUAL_WINDOW

    if runtime is None:
        window, usual, check = USUAL_WINDOW, None, Decoder.check
    else:
        window, usual, check = runtime.window, runtime.to_score, functools.partial(check_serves, runtime)
    return Decoder(
        usual if request.formats is None else read_formats(request.formats),
        window.with_tokens(request.sink_tokens, request.recent_tokens),
        request.suffix_fraction,
        passes_over=request.formats is None,
        layers=layer_choice(request.layers, runtime),
        check=check,
        formats_for=None if runtime is None or request.formats is not None else runtime.formats_for,
    )


def spectra(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    data: str | Path | Sequence[str | Path] | None = None,
    split: str | None = None,
    column: str | None = None,
    config: str | None = None,
    sequences: int = 8,
    sequence_length: int | None = None,
    seed: int = 0,
    pack: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Spectra:
    """Measure the singular values of the cached keys and values on text, as `kvprof spectra` does.

    model, tokenizer, data, sequence_length, out, progress: as `gradients` takes them.
    Returns Spectra: of each layer's K and V the singular values of a head's (T, D) cache, descending, as a mean over
    sequences and heads with the least and the largest head's; in the units of keys and values.
    Raises what `gradients` does.
    """
    given = locals()
    run = spectra_as_asked(SpectraRequest.of(given, of_function=True), Job.of(given))
    remark(run.remarks)
    return run.spectra


def spectra_as_asked(request: SpectraRequest, job: Job) -> SpectraRun:
    """Measure spectra for the command and the function; raises as `spectra` does."""
    from kvprof.profile.spectra import run_spectra

    with job.opened() as (source, folder):
        return run_spectra(source, request, folder, job.restart, job.progress, job.writing, job.announce)


def divergence_as_asked(request: DivergenceRequest, job: Job) -> DivergenceRun:
    """Measure the KL of quantizing single tensors; raises what `gradients` does."""
    from kvprof.profile.divergence import run_divergence

    with job.opened() as (source, folder):
        return run_divergence(source, request, folder, job.restart, job.progress, job.writing, job.announce)
