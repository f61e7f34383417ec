"""The commands that measure a model: `inspect`, `norms`, `gradients`, `spectra` and `divergence`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvprof.cli.options import DryRun, Model, Out, Restart, TokenizerName, TrustRemoteCode
from kvprof.cli.request import asks
from kvprof.cli.watching import watched

if TYPE_CHECKING:
    from kvprof.records.requests.measure import DivergenceRequest, GradientsRequest, SpectraRequest


def inspect(model: Model = None, trust_remote_code: TrustRemoteCode = False) -> None:
    """List the KV heads, widths and bytes that each layer caches.

    Reads the model's config alone.
    """
    from kvprof.models.config import load_config, sizes_by_default
    from kvprof.models.inventory import take_inventory
    from kvprof.models.load import resolve
    from kvprof.report.console import print_result
    from kvprof.report.tables import show_inventory

    source = resolve(model, trust_remote_code)
    config = load_config(source)
    inventory = take_inventory(config, source.id).with_defaults(sizes_by_default(source, config))
    show_inventory(inventory)
    print_result(inventory)


def norms(
    model: Model = None,
    out: Out = None,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Compute the norms of each layer's key and value projections.

    Spectral norm, Frobenius norm and stable rank of W_k and W_v, read tensor by tensor: the model is never loaded.
    """
    from kvprof.api.measure import norms_as_asked
    from kvprof.report.console import print_fetched, print_finished, print_note
    from kvprof.report.tables import show_red_flags, show_scores, show_weight_sharing

    place = {"model": model, "trust_remote_code": trust_remote_code, "out": out}
    with watched("norms", "bytes", "cpu", dry_run, **place, restart=restart) as job:
        run = norms_as_asked(job)
    show_scores(run.scores)
    show_weight_sharing(run.inventory.geometry)
    show_red_flags(run.inventory)
    for remark in run.remarks:
        print_note(remark)
    if run.fetched is not None:
        print_fetched(run.fetched.fetched_bytes, run.fetched.whole_bytes)
    print_finished(run.scores, run.path)


@asks("measure.GradientsRequest")
def gradients(
    request: GradientsRequest,
    model: Model = None,
    out: Out = None,
    dry_run: DryRun = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure gradient norms and the predicted loss of every format.

    Both on calibration text, for the keys and the values of each layer; `allocate` plans from the result.
    """
    from kvprof.api.measure import gradients_as_asked
    from kvprof.report.console import print_finished
    from kvprof.report.tables import show_scores

    place = {"model": model, "tokenizer": tokenizer, "trust_remote_code": trust_remote_code, "out": out}
    with watched("gradients", "sequences", request.device, dry_run, **place, restart=restart) as job:
        run = gradients_as_asked(request, job)
    show_scores(run.scores, brief=True)
    print_finished(run.scores, run.path, run.remarks)


@asks("measure.SpectraRequest")
def spectra(
    request: SpectraRequest,
    model: Model = None,
    out: Out = None,
    dry_run: DryRun = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure the singular values of the cached keys and values.

    Computed on calibration text, for each layer, with their effective rank.
    """
    from kvprof.api.measure import spectra_as_asked
    from kvprof.report.console import print_finished
    from kvprof.report.spectra import show_spectra

    place = {"model": model, "tokenizer": tokenizer, "trust_remote_code": trust_remote_code, "out": out}
    with watched("spectra", "sequences", request.device, dry_run, **place, restart=restart) as job:
        run = spectra_as_asked(request, job)
    show_spectra(run.spectra)
    print_finished(run.spectra, run.path, run.remarks)


@asks("measure.DivergenceRequest")
def divergence(
    request: DivergenceRequest,
    model: Model = None,
    out: Out = None,
    dry_run: DryRun = False,
    tokenizer: TokenizerName = None,
    trust_remote_code: TrustRemoteCode = False,
    restart: Restart = False,
) -> None:
    """Measure the KL of quantizing one tensor of one layer at a time.

    One forward pass per layer, tensor, format and sequence; `audit` compares the result with predictions.
    """
    from kvprof.api.measure import divergence_as_asked
    from kvprof.report.audits import show_divergence
    from kvprof.report.console import print_finished

    place = {"model": model, "tokenizer": tokenizer, "trust_remote_code": trust_remote_code, "out": out}
    with watched("divergence", "forwards", request.device, dry_run, **place, restart=restart) as job:
        run = divergence_as_asked(request, job)
    show_divergence(run.scores)
    print_finished(run.scores, run.path, run.remarks)
